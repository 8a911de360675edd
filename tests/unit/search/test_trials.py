"""What a student that was stopped says of one that was not."""

import numpy as np
import pytest

from softlabel.search.trials import Trial, evidence


def student(number, threshold, map50s, *, status="finished", seed=0, subset=1.0):
    history = [{"epoch": i + 1, "map50": value, "seconds": 1.0} for i, value in enumerate(map50s)]
    return Trial(number, {"t": threshold}, seed, subset, "explore", 4, status=status, history=history)


FULL = [student(0, 0.3, [0.1, 0.3, 0.5, 0.4]), student(1, 0.5, [0.2, 0.3, 0.6, 0.7])]


def test_a_full_student_is_what_its_best_epoch_has():
    assert [(one.map50, one.extra_variance) for one in evidence(FULL)] == [(0.5, 0), (0.7, 0)]


def test_a_stopped_student_is_taken_for_as_much_better_as_full_ones_became():
    stopped = student(2, 0.7, [0.05, 0.2], status="stopped")
    found = evidence([*FULL, stopped])[-1]
    assert found.map50 == pytest.approx(0.2 + np.mean([0.5 - 0.3, 0.7 - 0.3]))
    # It was stopped for being behind: that the others gained alike does not say that it would have.
    assert found.extra_variance == pytest.approx((0.5 * 0.3) ** 2) and np.std([0.2, 0.4], ddof=1) < 0.5 * 0.3
    unlike = student(3, 0.9, [0.1, 0.1, 0.1, 0.9])
    found = evidence([*FULL, unlike, stopped])[-1]
    assert found.extra_variance == pytest.approx(np.var([0.2, 0.4, 0.8], ddof=1))


def test_without_two_full_students_only_equals_are_compared():
    young = [student(0, 0.3, [0.1, 0.2], status="stopped"), student(1, 0.5, [0.4], status="stopped")]
    assert [one.values["t"] for one in evidence(young)] == [0.3]
    assert [one.values["t"] for one in evidence([FULL[0], *young])] == [0.3]


def test_failed_and_running_students_say_nothing():
    silent = [student(2, 0.9, [0.9], status="failed"), student(3, 0.8, [0.9], status="running")]
    assert evidence([*FULL, *silent]) == evidence(FULL)


def test_a_subset_is_worth_what_full_ones_of_the_same_values_gained():
    small = [student(2 + i, t, y, subset=0.5) for i, (t, y) in enumerate([(0.3, [0.1, 0.2]), (0.5, [0.1, 0.3])])]
    other = student(4, 0.7, [0.2, 0.25], subset=0.5)
    found = {one.values["t"]: one.map50 for one in evidence([*FULL, *small, other]) if one.extra_variance}
    assert found[0.7] == pytest.approx(0.25 + np.mean([0.5 - 0.2, 0.7 - 0.3]))
