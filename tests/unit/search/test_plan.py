"""Which student comes next, played through without a Ray."""

from collections import Counter

import pytest
from conftest import tiny_recipe

from softlabel.errors import NO_LABELS
from softlabel.search.plan import Plan, has_failed
from softlabel.search.trials import Trial

KEY = "train.threshold"


def play(plan, map50, limit=200):
    """Train every student that the plan asks for, one at a time and in no time."""
    for _ in range(limit):
        trial = plan.suggest(0.0)
        if trial is None:
            return plan.trials
        train(plan, trial, map50(trial))
    raise AssertionError("the plan never ends")


def train(plan, trial, map50):
    """Until it waits, or to its end."""
    while trial.epoch < (plan.until(trial) or trial.epochs):
        epoch = trial.epoch + 1
        trial.history.append({"epoch": epoch, "map50": map50 * epoch / trial.epochs, "seconds": 1.0})
        plan.advance(trial, epoch)
    trial.status, trial.seconds = ("finished" if trial.epoch == trial.epochs else "stopped"), float(trial.epoch)


def made(trials=12, **search):
    """Students of three epochs; without rungs if nothing else is said."""
    return tiny_recipe(search={"trials": trials, "stop_early": False, **search})


def with_rungs(trials, **search):
    """Students wait after one epoch and after two."""
    return made(trials, stop_early=True, grace_epochs=1, reduction_factor=2, **search)


def peak(trial):
    return 0.6 - (trial.values[KEY] - 0.4) ** 2


def test_first_what_people_would_try_then_the_sampler_then_the_leaders():
    trials = play(Plan(made(20, explore=0.5), [], (0.37,), None), peak)
    assert [trial.values[KEY] for trial in trials[:3]] == [0.3, 0.5, 0.37]
    assert [trial.role for trial in trials] == ["first"] * 3 + ["explore"] * 7 + ["repeat"] * 10
    assert len({trial.values[KEY] for trial in trials[:10]}) == 10
    for threshold in (0.3, 0.5):
        seeds = [trial.seed for trial in trials if trial.values[KEY] == threshold]
        assert len(seeds) >= 3 and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_a_search_is_the_same_every_time_and_differs_by_seed(sampler):
    recipe = made(10, sampler=sampler, explore=0.9)
    found = [[trial.values for trial in play(Plan(one, [], (), None), peak)] for one in (recipe, recipe)]
    other = play(Plan(recipe.model_copy(update={"seed": 1}), [], (), None), peak)
    assert found[0] == found[1] != [trial.values for trial in other]


@pytest.mark.parametrize(("sampler", "near"), [("tpe", 0.16), ("gp", 0.02)])
def test_samplers_that_learn_come_near_the_peak(sampler, near):
    """Random ones are at 0.22 from it on average."""
    late = []
    for seed in range(3):
        recipe = made(24, sampler=sampler, explore=1.0).model_copy(update={"seed": seed})
        late += [abs(trial.values[KEY] - 0.4) for trial in play(Plan(recipe, [], (), None), peak)[-8:]]
    assert sum(late) / len(late) < near


def test_a_grid_is_tried_once_each_and_then_repeated():
    trials = play(Plan(made(15, sampler="grid", grid_points=5), [], (0.37,), None), peak)
    assert [trial.values[KEY] for trial in trials[:5]] == [0.05, 0.275, 0.5, 0.725, 0.95]
    assert {trial.role for trial in trials[5:]} == {"repeat"} and len(trials) == 15


def test_a_grid_of_which_nothing_trains_comes_to_an_end():
    plan = Plan(made(15, sampler="grid", grid_points=2), [], (), None)
    for _ in range(2):
        plan.suggest(0.0).status = "failed"
    assert plan.suggest(0.0) is None


def test_half_of_the_students_go_on_at_each_rung_and_the_leader_to_the_end():
    plan = Plan(with_rungs(12, explore=1.0, sampler="random"), [], (), None)
    trials = play(plan, peak)
    assert len(trials) == 12 and plan.is_over(0.0)
    epochs = Counter(trial.epoch for trial in trials)
    assert epochs[1] >= 5 and epochs[3] <= 5, epochs
    best = max(trials, key=peak)
    assert best.status == "finished" and plan.leaders()[0] == best.values


def test_the_best_of_those_that_wait_goes_on_once_enough_have_come():
    plan = Plan(with_rungs(4, explore=1.0), [], (), None)
    first, second = plan.suggest(0.0), plan.suggest(0.0)
    train(plan, first, 0.6)
    assert (first.status, first.epoch) == ("stopped", 1)  # alone it is not the better half of anything
    train(plan, second, 0.5)
    assert (second.status, second.epoch) == ("stopped", 1)
    assert plan.suggest(0.0) is first and first.status == "running" and plan.until(first) == 2
    third = plan.suggest(0.0)
    train(plan, third, 0.55)
    assert third.epoch == 1 and plan.suggest(0.0) is not third  # half of three is one, and that one has gone on


def test_a_student_that_leads_does_not_wait():
    plan = Plan(with_rungs(6, explore=1.0), [], (), None)
    first, second = plan.suggest(0.0), plan.suggest(0.0)
    train(plan, first, 0.5)
    train(plan, second, 0.6)
    assert second.epoch == 2


def test_of_several_that_wait_in_the_end_one_is_completed():
    """While it trains another group asks too."""
    plan = Plan(made(3, stop_early=True, grace_epochs=1, reduction_factor=9, explore=1.0), [], (), None)
    for reached in (0.4, 0.6, 0.5):
        train(plan, plan.suggest(0.0), reached)
    assert {trial.status for trial in plan.trials} == {"stopped"}
    leader = plan.suggest(0.0)
    assert leader.best() == max(trial.best() for trial in plan.trials) and plan.until(leader) is None
    assert plan.suggest(0.0) is None
    train(plan, leader, 0.6)
    assert plan.suggest(0.0) is None and plan.is_over(0.0)


def test_where_nobody_has_found_anything_nobody_waits():
    plan = Plan(with_rungs(6, explore=1.0), [], (), None)
    train(plan, trial := plan.suggest(0.0), 0.09)  # 0.03 after the first epoch, 0.06 after the second
    assert trial.epoch == 2


def test_a_leader_that_waits_goes_on_instead_of_starting_over():
    plan = Plan(with_rungs(12, explore=0.7), [], (), None)
    trials = play(plan, peak)
    taken_up = [trial for trial in trials if trial.role == "repeat" and trial.seed == 0]
    assert taken_up and all(trial.epoch == trial.epochs for trial in taken_up)
    keys = [(trial.values[KEY], trial.seed) for trial in trials]
    assert len(set(keys)) == len(keys)


def test_those_kept_are_the_best_of_each_rung():
    plan = Plan(with_rungs(14, explore=1.0), [], (), None)
    play(plan, peak)
    for rung in (1, 2):
        here = sorted((t for t in plan.trials if t.status == "stopped" and t.epoch == rung), key=peak)
        assert [t for t in plan.stopping.waiting(2) if t.epoch == rung] == here[::-1][:2]


def test_what_waited_when_the_driver_died_is_decided_anew():
    """It had come to its rung, and nobody had said yet whether it goes on."""
    recipe = with_rungs(6, explore=1.0)
    plan = Plan(recipe, [], (), None)
    train(plan, plan.suggest(0.0), 0.6)
    held = plan.suggest(0.0)
    held.history.append({"epoch": 1, "map50": 0.1, "seconds": 1.0})
    again = Plan(recipe, [Trial(**trial.to_dict()) for trial in plan.trials], (), None)
    taken = again.suggest(0.0)
    assert taken.number == held.number and again.until(taken) == 1


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_what_was_running_when_the_driver_died_comes_first_and_the_rest_is_as_undisturbed(sampler):
    recipe = made(12, sampler=sampler)
    undisturbed = play(Plan(recipe, [], (), None), peak)
    earlier = [Trial(**trial.to_dict()) for trial in undisturbed[:5]]
    earlier[3].status = "running"
    plan = Plan(recipe, earlier, (), None)
    assert plan.suggest(0.0) is earlier[3]
    earlier[3].status = "finished"
    found = play(plan, peak)
    assert found == undisturbed


def test_the_first_points_of_a_resumed_search_are_not_tried_again():
    recipe = made(6, explore=1.0)
    first = play(Plan(made(2), [], (0.37,), None), peak)
    found = play(Plan(recipe, first, (0.37,), None), peak)
    assert [trial.values[KEY] for trial in found[:3]] == [0.3, 0.5, 0.37]


def test_only_failures_end_the_search():
    plan = Plan(made(50), [], (), None)
    for _ in range(5):
        trial = plan.suggest(0.0)
        trial.status, trial.reason = "failed", "no such thing"
    assert has_failed(plan.trials) and plan.suggest(0.0) is None


@pytest.mark.parametrize(("reason", "begun"), [("OSError: No space left on device", 13), (f"{NO_LABELS}: none", 30)])
def test_failures_in_a_row_end_the_search_if_labels_were_there(reason, begun):
    """A disk that is full is no reason to go through all students."""
    plan = Plan(made(30), [], (), None)
    while trial := plan.suggest(0.0):
        if trial.number < 3:
            train(plan, trial, peak(trial))
        else:
            trial.status, trial.reason = "failed", reason
    assert len(plan.trials) == begun and plan.is_over(0.0)


def test_a_failure_among_others_is_passed_over():
    plan = Plan(made(20), [], (), None)
    for _ in range(20):
        trial = plan.suggest(0.0)
        trial.status, trial.reason = ("failed", NO_LABELS) if trial.values[KEY] > 0.6 else ("finished", "")
        trial.history = [{"epoch": 1, "map50": peak(trial), "seconds": 1.0}] if trial.status == "finished" else []
    assert all(trial.values[KEY] <= 0.6 for trial in plan.trials if trial.role == "repeat")
    asked = [trial.status for trial in plan.trials if trial.role == "explore"]
    assert asked[len(asked) // 2 :].count("failed") <= 1  # the sampler has learned where nothing is to be had


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_that_died_at_a_threshold_does_not_drive_the_sampler_from_it(seed):
    recipe = made(16, sampler="gp", explore=1.0).model_copy(update={"seed": seed})
    plan = Plan(recipe, [], (0.37,), None)
    while trial := plan.suggest(0.0):
        if trial.number == 9:
            trial.status, trial.reason = "failed", "its workers died 3 times"
        else:
            train(plan, trial, peak(trial))
    late = [abs(trial.values[KEY] - 0.4) for trial in plan.trials[10:]]
    assert sum(late) / len(late) < 0.1, late


def test_a_value_that_never_trains_is_learned():
    optimizer = "train.student.args.optimizer"
    space = {KEY: {"min": 0.05, "max": 0.95}, optimizer: {"choices": ["SGD", "NoSuchOptimizer"]}}
    plan = Plan(made(24, space=space, explore=1.0), [], (), None)
    while trial := plan.suggest(0.0):
        if trial.values[optimizer] == "SGD":
            train(plan, trial, peak(trial))
        else:
            trial.status, trial.reason = "failed", "NotImplementedError: NoSuchOptimizer"
    assert [trial.status for trial in plan.trials[12:]].count("failed") <= 3


@pytest.mark.parametrize("budget_s", [40.0, 80.0])
def test_a_grid_too_large_for_its_time_ends_with_students_in_full(budget_s):
    plan = Plan(made(200, sampler="grid", grid_points=81, stop_early=True, grace_epochs=1), [], (), budget_s)
    while (trial := plan.suggest(now := sum(trial.seconds for trial in plan.trials))) and now < budget_s:
        train(plan, trial, peak(trial))
    assert any(trial.is_full for trial in plan.trials) and any(trial.role == "repeat" for trial in plan.trials)


def test_time_moves_on_to_repeating_and_ends_before_the_last_student_would_be_cut_off():
    plan = Plan(made(1000, explore=0.5), [], (), 100.0)
    now = 0.0
    while trial := plan.suggest(now):
        now += 9.0
        trial.history = [{"epoch": e, "map50": peak(trial), "seconds": 3.0} for e in (1, 2, 3)]
        trial.status, trial.seconds = "finished", 9.0
    assert 81 <= now <= 100
    assert [trial.role for trial in plan.trials].index("repeat") == 6


def test_the_first_tries_on_a_subset_are_repeated_on_everything():
    trials = play(Plan(made(20, subset=0.25, explore=0.5), [], (), None), peak)
    assert {trial.subset for trial in trials if trial.role != "repeat"} == {0.25}
    assert {trial.subset for trial in trials if trial.role == "repeat"} == {1.0}
    assert [trial.seed for trial in trials if trial.role == "repeat" and trial.values[KEY] == 0.3][:2] == [0, 1]


def test_a_first_point_that_fails_is_not_tried_for_ever():
    """As where no label scores above 0.5."""
    plan = Plan(made(20, explore=0.4), [], (), None)
    while trial := plan.suggest(0.0):
        trial.status = "failed" if trial.values[KEY] >= 0.5 else "finished"
        trial.history = [{"epoch": 3, "map50": peak(trial), "seconds": 1.0}] if trial.status == "finished" else []
    assert sum(trial.values[KEY] == 0.5 for trial in plan.trials) <= 3
    assert len(plan.trials) == 20
