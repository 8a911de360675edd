"""Several ways to train, judged together: values by the metric itself, intervals by cases whose answer is known."""

import numpy as np
import pytest
from judged_tiles import CLASSES, random_tiles

from softlabel.evaluation.methods import Student, method_rows
from softlabel.evaluation.metrics import evaluate

GROUPS = [f"g{i // 2}" for i in range(24)]


def student(method, train_set, seed, noise_px, draw=None):
    tiles = random_tiles(seed if draw is None else draw, noise_px=noise_px, number=24)
    return Student(method, train_set, seed, tiles)


def rows_of(students, samples=200, seed=0):
    found = method_rows(students, CLASSES, plain="plain", truth="truth", samples=samples, seed=seed, groups=GROUPS)
    return {(row["method"], row["train_set"]): row for row in found}


@pytest.fixture(scope="module")
def students():
    """Plain students find boxes badly, truth's well, one way in between, one as the plain ones, on two sets."""
    noise = {"plain": 6.0, "between": 3.0, "alike": 6.0, "truth": 1.0}
    return [
        student(method, train_set, seed, px, draw=seed + 10 * number)
        for method, px in noise.items()
        for number, train_set in enumerate(("train_1", "train_2"))
        for seed in range(3)
    ]


def test_values_are_means_over_seeds_of_the_one_metric(students):
    rows = rows_of(students, samples=0)
    for (method, train_set), row in rows.items():
        own = [s for s in students if s.method == method and train_set in (s.train_set, "all")]
        metrics = [evaluate(one.results, CLASSES) for one in own]
        assert row["students"] == len(own) == (6 if train_set == "all" else 3)
        assert row["map50"]["value"] == pytest.approx(np.mean([m.map50 for m in metrics]))
        assert row["map50_95"]["value"] == pytest.approx(np.mean([m.map50_95 for m in metrics]))
        assert row["map50"]["low"] is None and not row["gain"]["distinguishable"]
        for name in CLASSES:
            expected = np.mean([m.per_class[name]["ap50"] for m in metrics])
            assert row["per_class"][name] == pytest.approx(expected)
        if train_set != "all":
            assert row["seeds"] == pytest.approx({str(s.seed): m.map50 for s, m in zip(own, metrics, strict=True)})
    plain, between, truth = (rows[name, "train_1"]["map50"]["value"] for name in ("plain", "between", "truth"))
    assert rows["between", "train_1"]["gain"]["value"] == pytest.approx(between - plain)
    assert rows["between", "train_1"]["gap_closed"]["value"] == pytest.approx((between - plain) / (truth - plain))


def test_equal_students_are_not_told_apart_and_others_are(students):
    for (method, _), row in rows_of(students).items():
        gain, share = row["gain"], row["gap_closed"]
        if method in ("plain", "alike"):  # the draws are the same for both: no difference in any
            assert (gain["value"], gain["low"], gain["high"]) == (0, 0, 0) and not gain["distinguishable"]
            assert (share["value"], share["low"], share["high"]) == (0, 0, 0)
        else:
            assert gain["distinguishable"] and 0 < gain["low"] < gain["value"] < gain["high"]
            assert row["map50"]["low"] < row["map50"]["value"] < row["map50"]["high"]
        if method == "truth":
            assert (share["value"], share["low"], share["high"]) == (1, 1, 1)


def test_seeds_alone_spread_as_draws_of_them_do():
    """All tiles are one group, so that no draw of images differs from another."""
    students = [student(m, "s", seed, px + seed) for m, px in (("plain", 6), ("truth", 1)) for seed in range(4)]
    found = method_rows(students, CLASSES, plain="plain", truth="truth", samples=2000, seed=0, groups=["one"] * 24)
    for row in found:
        values = np.array(list(row["seeds"].values()))
        means = values[np.random.default_rng(1).integers(0, 4, (20000, 4))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        assert (row["map50"]["low"], row["map50"]["high"]) == pytest.approx((low, high), abs=0.1 * np.ptp(values))
        assert row["map50"]["low"] < row["map50"]["value"] < row["map50"]["high"]


def test_the_same_seed_gives_the_same_intervals(students):
    assert rows_of(students, 50) == rows_of(students, 50)
    assert rows_of(students, 50) != rows_of(students, 50, seed=1)


def test_without_plain_students_nothing_is_compared(students):
    with pytest.raises(ValueError, match="no student of plain on train_2"):
        rows_of([s for s in students if (s.method, s.train_set) != ("plain", "train_2")])
