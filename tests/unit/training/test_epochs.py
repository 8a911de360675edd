"""What a training draws: by seed and epoch alone, whoever makes it and whenever."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader

from softlabel.training.dataset import TileDataset
from softlabel.training.epochs import EpochBatches, Mixture, draw_by_epoch, seeded
from softlabel.training.targets import Target

SIZE, TILES, BATCH = 64, 10, 4
DATA = {"names": {0: "car", 1: "ship"}, "nc": 2, "channels": 3}


def read(row):
    return np.random.RandomState(int(row["tile_id"])).randint(0, 255, (SIZE, SIZE, 3), np.uint8)


def dataset(cache=None, mixture=None, **args):
    targets = [
        Target({"tile_id": str(i), "window": (0, 0, SIZE, SIZE)}, np.array([[9, 9, 40, 50]], np.float32), np.array([1]))
        for i in range(TILES)
    ]
    hyp = get_cfg(overrides={"mixup": 0.3, "cutmix": 0.3, **args})
    fixed = {"imgsz": SIZE, "batch_size": BATCH, "augment": True, "cache": cache, "data": DATA}
    return TileDataset(targets, read, mixture, hyp=hyp, **fixed)


@pytest.fixture
def loader_of():
    made = []

    def make(workers, data=None):
        loader = build_dataloader(dataset() if data is None else data, BATCH, workers, device="cpu")
        made.append(loader)
        return loader, draw_by_epoch(loader, Mixture(len(loader.dataset)), seed=7)

    yield make
    for loader in made:
        loader.close()


def epochs(loader, count):
    return [list(loader) for _ in range(count)]


def same(one, other):
    assert [batch["im_file"] for batch in one] == [batch["im_file"] for batch in other]
    return all(torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in ("img", "bboxes", "cls"))


@pytest.mark.parametrize("cache", [None, "ram", "disk"])
def test_batches_are_the_same_for_any_number_of_workers(loader_of, cache):
    (alone, _), (shared, _) = (loader_of(workers, dataset(cache)) for workers in (0, 2))
    assert (alone.num_workers, len(alone)) == (0, 3) and shared.num_workers
    one, other = epochs(alone, 3), epochs(shared, 3)
    assert all(same(a, b) for a, b in zip(one, other, strict=True))


def test_the_cache_changes_no_batch(loader_of):
    plain, *kept = (epochs(loader_of(0, dataset(cache))[0], 2) for cache in (None, "ram", "disk"))
    assert all(same(a, b) for other in kept for a, b in zip(plain, other, strict=True))


def test_no_two_epochs_are_the_same(loader_of):
    one, other = epochs(loader_of(0, dataset(mosaic=0.0))[0], 2)
    files = [[name for batch in epoch for name in batch["im_file"]] for epoch in (one, other)]
    assert files[0] != files[1] and sorted(files[0]) == sorted(files[1]) == sorted(map(str, range(TILES)))
    first, second = (
        dict(zip(names, torch.cat([batch["img"] for batch in epoch]), strict=True))
        for names, epoch in zip(files, (one, other), strict=True)
    )
    assert not any(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_sees_what_the_undisturbed_one_saw(loader_of, workers):
    undisturbed = epochs(loader_of(workers)[0], 3)
    resumed, batches = loader_of(workers)
    batches.epoch = 1
    assert all(same(a, b) for a, b in zip(epochs(resumed, 2), undisturbed[1:], strict=True))


def test_workers_live_through_the_epochs(loader_of):
    loader, batches = loader_of(2)
    workers = []
    for epoch in range(3):
        batches.epoch = epoch
        list(loader)
        workers.append([worker.pid for worker in loader.iterator._workers])
    assert workers[0] == workers[1] == workers[2] and all(workers[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_the_mosaic_begins_the_epoch_anew(loader_of, workers):
    """Its first batches were drawn ahead, with mosaic."""
    loader, batches = loader_of(workers)
    list(loader)
    batches.epoch = 1
    loader.dataset.close_mosaic(get_cfg())
    loader.reset()
    closed = list(loader)
    without, with_mosaic = (
        loader_of(0, dataset(**args)) for args in ({"mosaic": 0.0, "mixup": 0.0, "cutmix": 0.0}, {})
    )
    for _, others in (without, with_mosaic):
        others.epoch = 1
    assert same(list(without[0]), closed) and not same(list(with_mosaic[0]), closed)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_tiles_of_an_epoch(world_size):
    ranks = [EpochBatches(Mixture(5), 2, 1, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    epochs = [[next(batches) for _ in range(len(one))] for one in ranks for batches in [iter(one)]]
    assert len({sum(map(len, epoch)) for epoch in epochs}) == 1
    drawn = [draw for epoch in epochs for batch in epoch for draw in batch]
    counts = Counter(draw.tile for draw in drawn)
    assert set(counts) == set(range(5)) and max(counts.values()) - min(counts.values()) <= 1
    assert len({draw.seed for draw in drawn}) == len(drawn)


def test_an_epoch_has_its_share_of_truth_and_is_no_longer_for_it():
    mixture = Mixture(soft=40, truth=6, share=0.4)
    seen = Counter()
    for epoch in range(20):
        order = mixture.order(np.random.default_rng(epoch))
        truth, counts = order[order >= 40], Counter(order.tolist())
        assert len(order) == 40 and len(truth) == 16
        assert set(truth.tolist()) == set(range(40, 46)) and max(counts[i] for i in range(40, 46)) == 3
        assert max(counts[i] for i in range(40)) == 1
        assert np.diff(np.flatnonzero(order >= 40)).max() < 16  # the two are mixed
        seen.update(order[order < 40].tolist())
    assert len(seen) == 40
    random.seed(0)
    partners = np.array([mixture.partner() for _ in range(2000)])
    assert 0.35 < (partners >= 40).mean() < 0.45 and set(partners.tolist()) == set(range(46))
    assert Mixture(7).order(np.random.default_rng(3)).tolist() == np.random.default_rng(3).permutation(7).tolist()


@pytest.mark.parametrize("args", [{"mosaic": 1.0}, {"mosaic": 0.0, "mixup": 1.0, "cutmix": 0.0}])
def test_tiles_are_mixed_with_others_by_the_same_share(args):
    mixed = dataset(mixture=Mixture(soft=2, truth=TILES - 2, share=0.5), **args)
    asked, plainly = [], mixed.get_image_and_label
    mixed.get_image_and_label = lambda index: asked.append(index) or plainly(index)
    for i in range(100):
        mixed[i % 2]
    others = [index for index in asked if index >= 2]
    partners = len(asked) - 100  # a tile itself is asked for too
    assert 0.4 < len(others) / partners < 0.6


def test_the_training_s_own_draws_are_left_alone():
    drawn = []
    for disturb in (False, True):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        with seeded(1):
            drawn_inside = (random.random(), np.random.rand(), torch.rand(1)) if disturb else ()
        assert bool(drawn_inside) == disturb
        drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert drawn[0] == drawn[1]
