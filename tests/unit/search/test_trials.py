"""What a student that was stopped says of one that was not."""

import numpy as np
import pytest

from softlabel.search.trials import Trial, covariance, evidence


def history(epochs):
    return [{"epoch": i + 1, "map50": 0.9 * i / epochs, "seconds": 1.0} for i in range(epochs)]


def student(number, threshold, map50s, *, status="finished", seed=0, subset=1.0):
    history = [{"epoch": i + 1, "map50": value, "seconds": 1.0} for i, value in enumerate(map50s)]
    return Trial(number, {"t": threshold}, seed, subset, "explore", 4, status=status, history=history)


FULL = [student(0, 0.3, [0.1, 0.3, 0.5, 0.4]), student(1, 0.5, [0.2, 0.3, 0.6, 0.7])]


def test_a_full_student_is_what_its_best_epoch_has():
    assert [one.map50 for one in evidence(FULL)] == [0.5, 0.7] and not covariance(evidence(FULL)).any()


def test_a_stopped_student_is_taken_for_as_much_better_as_full_ones_became():
    stopped = student(2, 0.7, [0.05, 0.2], status="stopped")
    found = evidence([*FULL, stopped])[-1]
    assert found.map50 == pytest.approx(0.2 + np.mean([0.5 - 0.3, 0.7 - 0.3]))
    unlike = student(
        3, 0.9, [0.1, 0.1, 0.1, 0.9]
    )  # the less full ones agree on what there is to gain, the less is known
    assert evidence([*FULL, unlike, stopped])[-1].own_variance > 2 * found.own_variance > 0


def test_what_is_to_be_gained_is_asked_of_those_that_were_to_go_as_far():
    longer = [Trial(2 + i, {"t": 0.1}, 0, 1.0, "explore", 9, "", "finished", "", history(9)) for i in range(2)]
    stopped = student(4, 0.7, [0.05, 0.2], status="stopped")
    assert evidence([*FULL, *longer, stopped])[-1] == evidence([*FULL, stopped])[-1]


def test_of_those_that_were_stopped_together_the_differences_are_better_known_than_the_level():
    """They were stopped for being behind: none of them need gain what full ones did."""
    behind = [student(2 + i, 0.7 + 0.1 * i, [0.05, y], status="stopped") for i, y in enumerate([0.2, 0.1])]
    earlier = student(4, 0.6, [0.05], status="stopped")
    found = covariance(evidence([*FULL, *behind, earlier]))
    difference = found[2, 2] + found[3, 3] - 2 * found[2, 3]
    assert np.sqrt(found[2, 2]) > 0.3 * 0.3 and np.sqrt(difference) < 1.42 * np.sqrt(found[2, 2] - found[2, 3])
    assert 0 < found[2, 3] < found[2, 2]
    assert not found[:2].any() and not found[2:4, 4].any()
    np.testing.assert_array_equal(found, found.T)


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
    found = {one.values["t"]: one.map50 for one in evidence([*FULL, *small, other]) if one.own_variance}
    assert found[0.7] == pytest.approx(0.25 + np.mean([0.5 - 0.2, 0.7 - 0.3]))
