"""What a search says in the end, of students that are made up."""

import pytest
from conftest import tiny_recipe

from softlabel.errors import NO_LABELS
from softlabel.search.answer import answer
from softlabel.search.trials import Trial

KEY = "train.threshold"


def student(number, threshold, map50=None, reason="", subset=1.0):
    history = [] if map50 is None else [{"epoch": 1, "map50": map50, "seconds": 1.0}]
    status = "failed" if map50 is None else "finished"
    return Trial(number, {KEY: threshold}, 0, subset, "explore", 1, status=status, reason=reason, history=history)


FULL = [student(i, t, y) for i, (t, y) in enumerate([(0.1, 0.60), (0.3, 0.62), (0.5, 0.55)])]


@pytest.mark.parametrize(
    ("reason", "subset", "last"),
    [
        (f"{NO_LABELS}: no soft label is above 0.8", 1.0, 0.79),
        (f"{NO_LABELS}: the 0.25 that is used has no box", 0.25, 0.95),  # the other tiles may have some
        ("its workers died 3 times", 1.0, 0.95),
    ],
)
def test_the_best_threshold_is_not_looked_for_where_no_label_is_left(reason, subset, last):
    failed = [student(3, 0.8, reason=reason, subset=subset), student(4, 0.9, reason=reason, subset=subset)]
    found = answer(tiny_recipe().search, [*FULL, *failed], [{KEY: 0.5}])
    line = found["lines"][KEY]
    assert max(line["at"]) == pytest.approx(last) and line["peak_high"] <= last
    assert len(line["at"]) == len(line["mean"]) == len(line["low"]) == len(line["high"])
    assert found["values"] == {KEY: 0.3}


def test_nothing_is_said_of_a_threshold_that_leaves_no_label():
    failed = student(3, 0.45, reason=f"{NO_LABELS}: no soft label is above 0.45")
    found = answer(tiny_recipe().search, [*FULL[:2], failed], [{KEY: 0.1}, {KEY: 0.5}])
    assert [row["values"] for row in found["against"]] == [{KEY: 0.1}]


def test_one_value_is_no_flat_curve():
    """A budget may end with one student in full: what those that stopped would have gained is not known then."""
    history = [{"epoch": 1, "map50": 0.3, "seconds": 1.0}]
    stopped = [
        Trial(i, {KEY: t}, 0, 1.0, "explore", 2, status="stopped", history=history) for i, t in [(1, 0.5), (2, 0.7)]
    ]
    for seeds in (1, 3):
        full = [
            Trial(0, {KEY: 0.3}, seed, 1.0, "explore", 1, status="finished", history=history) for seed in range(seeds)
        ]
        found = answer(tiny_recipe().search, full, [])
        assert found["compared"] == 1 and not found["flat"]
    found = answer(tiny_recipe().search, [*full[:1], *stopped], [])
    assert found["compared"] == 1 and not found["flat"]
    assert answer(tiny_recipe().search, FULL, [])["compared"] == 3
