import numpy as np
import pytest

from softlabel.config import Split
from softlabel.errors import RecipeError
from softlabel.imagery import tiles


@pytest.mark.parametrize(
    "size, expected",
    [
        ((4, 4, 4, 0), [(0, 0, 4, 4)]),
        ((3, 2, 4, 0), [(0, 0, 3, 2)]),  # smaller than a tile
        ((8, 2, 4, 0), [(0, 0, 4, 2), (4, 0, 4, 2)]),  # lower than a tile
        ((5, 4, 4, 0), [(0, 0, 4, 4), (1, 0, 4, 4)]),  # shifted back inside
        ((4, 6, 4, 2), [(0, 0, 4, 4), (0, 2, 4, 4)]),
        ((7, 4, 4, 2), [(0, 0, 4, 4), (2, 0, 4, 4), (3, 0, 4, 4)]),
        ((5, 5, 4, 0), [(0, 0, 4, 4), (1, 0, 4, 4), (0, 1, 4, 4), (1, 1, 4, 4)]),  # row by row
    ],
)
def test_windows(size, expected):
    assert tiles.windows(*size) == expected


def test_windows_cover_every_pixel_and_are_full_size():
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height, size = rng.integers(1, 40, 3)
        overlap = int(rng.integers(0, size))
        seen = np.zeros((height, width), int)
        found = tiles.windows(int(width), int(height), int(size), overlap)
        for column, row, w, h in found:
            assert (w, h) == (min(size, width), min(size, height))
            assert column >= 0 and row >= 0 and column + w <= width and row + h <= height
            seen[row : row + h, column : column + w] += 1
        assert seen.min() >= 1
        assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "box, local, visible, ignore",
    [
        ((12, 23, 16, 27), (2, 3, 6, 7), 1.0, False),  # whole
        ((5, 20, 15, 30), (0, 0, 5, 10), 0.5, False),  # half, at the left edge: exactly min_visible is kept
        ((4, 20, 14, 30), (0, 0, 4, 10), 0.4, True),
        ((0, 0, 100, 100), (0, 0, 10, 10), 0.01, True),  # larger than the tile
    ],
)
def test_clip_truth_moves_and_clips(box, local, visible, ignore):
    found = tiles.clip_truth(np.array([box], np.float64), (10, 20, 10, 10), 0.5)
    assert found.kept_T.tolist() == [0]
    np.testing.assert_allclose(found.boxes_T4, [local])
    np.testing.assert_allclose(found.visible_T, [visible], rtol=1e-6)
    assert found.ignore_T.tolist() == [ignore]


@pytest.mark.parametrize(
    "box", [(0, 20, 10, 30), (20, 20, 25, 25), (12, 10, 15, 20), (0, 0, 1, 1), (9, 21, 10 + 1e-12, 25)]
)
def test_clip_truth_leaves_out_what_only_touches(box):
    found = tiles.clip_truth(np.array([box, (11, 21, 12, 22)], np.float64), (10, 20, 10, 10), 0.3)
    assert found.kept_T.tolist() == [1]


def test_clip_truth_of_nothing():
    found = tiles.clip_truth(np.zeros((0, 4)), (0, 0, 10, 10), 0.3)
    assert [len(part) for part in found] == [0, 0, 0, 0]
    assert found.boxes_T4.shape == (0, 4) and found.boxes_T4.dtype == np.float32


def test_visible_shares_of_a_partition_add_up():
    boxes = np.random.default_rng(1).uniform(0, 80, (50, 2))
    boxes = np.hstack([boxes, boxes + np.random.default_rng(2).uniform(1, 20, (50, 2))])
    total = np.zeros(50)
    for window in tiles.windows(100, 100, 25, 0):
        found = tiles.clip_truth(boxes, window, 0.3)
        total[found.kept_T] += found.visible_T
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def _groups(count, seed=0):
    rng = np.random.default_rng(seed)
    return {f"g{index}": np.array([rng.integers(1, 9), *rng.poisson(3, 2)]) for index in range(count)}


def test_splits_match_the_shares():
    groups = _groups(300)
    found = tiles.assign_splits(groups, Split(), 0)
    total = sum(groups.values())
    for name, share in {"train_1": 0.34, "train_2": 0.34, "test": 0.2, "val_1": 0.06, "val_2": 0.06}.items():
        part = sum(groups[group] for group, split in found.items() if split == name)
        np.testing.assert_allclose(part / total, share, atol=0.02)


def test_splits_are_deterministic_and_follow_the_seed():
    groups = _groups(40)
    backwards = dict(reversed(groups.items()))
    assert tiles.assign_splits(groups, Split(), 3) == tiles.assign_splits(backwards, Split(), 3)
    equal = {f"g{index}": np.array([1, 1]) for index in range(40)}  # nothing but ties
    assert tiles.assign_splits(equal, Split(), 3) != tiles.assign_splits(equal, Split(), 4)


def test_one_giant_group_goes_to_a_large_split():
    groups = {**{f"g{index}": np.array([1]) for index in range(60)}, "giant": np.array([30])}
    assert tiles.assign_splits(groups, Split(), 0)["giant"].startswith("train")


def test_every_split_gets_a_group():
    found = tiles.assign_splits({f"g{index}": np.array([10**index]) for index in range(5)}, Split(), 0)
    assert sorted(found.values()) == ["test", "train_1", "train_2", "val_1", "val_2"]


def test_a_rare_class_reaches_every_split_that_it_can():
    groups = {f"plain{index}": np.array([5, 20, 0]) for index in range(100)}
    groups |= {f"rare{index}": np.array([9, 0, 40]) for index in range(6)}
    found = tiles.assign_splits(groups, Split(), 0)
    assert {split for group, split in found.items() if group.startswith("rare")} == set(found.values())
    assert len(set(found.values())) == 5


@pytest.mark.parametrize("count, missing", [(0, "test"), (3, "val_1"), (4, "val_2")])
def test_too_few_groups_name_the_empty_split(count, missing):
    with pytest.raises(RecipeError, match=f"empty split .*{missing}"):
        tiles.assign_splits(_groups(count), Split(), 0)


def test_no_validation_and_no_second_training_set():
    split = Split(train_1=0.8, train_2=0, test=0.2, validation=0)
    assert set(tiles.assign_splits(_groups(2), split, 0).values()) == {"train_1", "test"}
    assert tiles.split_names(split) == ["train_1", "test"]


def test_keep_background_is_a_fair_hash():
    names = [f"scene#{index}" for index in range(4000)]
    kept = [name for name in names if tiles.keep_background(name, 0, 0.3)]
    assert abs(len(kept) / 4000 - 0.3) < 0.03
    assert set(kept) <= {name for name in names if tiles.keep_background(name, 0, 0.5)}
    assert kept != [name for name in names if tiles.keep_background(name, 1, 0.3)]
    assert all(tiles.keep_background(name, 0, 1) and not tiles.keep_background(name, 0, 0) for name in names)
