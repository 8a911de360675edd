"""Which student comes next, played through without a Ray."""

import pytest
from conftest import tiny_recipe

from softlabel.search.plan import Plan
from softlabel.search.trials import Trial

KEY = "train.threshold"


def play(plan, map50, *, stop=lambda trial: None, limit=200):
    """Train every student that the plan asks for, in no time; ``stop`` gives the epoch at which one is stopped."""
    for _ in range(limit):
        trial = plan.next(0.0)
        if trial is None:
            return plan.trials
        last = trial.epochs if plan.is_exempt(trial) else stop(trial) or trial.epochs
        value = map50(trial)
        trial.history = [{"epoch": e, "map50": value * e / trial.epochs, "seconds": 1.0} for e in range(1, last + 1)]
        trial.status, trial.seconds = ("finished" if last == trial.epochs else "stopped"), float(last)
        plan.ended(trial)
    raise AssertionError("the plan never ends")


def made(trials=12, **search):
    return tiny_recipe(search={"trials": trials, **search})


def peak(trial):
    return 0.6 - (trial.values[KEY] - 0.4) ** 2


def test_first_what_people_would_try_then_the_sampler_then_the_leaders():
    trials = play(Plan(made(20, explore=0.5), [], 0.37, None), peak)
    assert [trial.values[KEY] for trial in trials[:3]] == [0.3, 0.5, 0.37]
    assert [trial.role for trial in trials] == ["first"] * 3 + ["explore"] * 7 + ["repeat"] * 10
    assert len({trial.values[KEY] for trial in trials[:10]}) == 10
    for threshold in (0.3, 0.5):
        seeds = [trial.seed for trial in trials if trial.values[KEY] == threshold]
        assert len(seeds) >= 3 and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_a_search_is_the_same_every_time_and_differs_by_seed(sampler):
    recipe = made(10, sampler=sampler, explore=0.9)
    found = [[trial.values for trial in play(Plan(one, [], None, None), peak)] for one in (recipe, recipe)]
    other = play(Plan(recipe.model_copy(update={"seed": 1}), [], None, None), peak)
    assert found[0] == found[1] != [trial.values for trial in other]


@pytest.mark.parametrize(("sampler", "near"), [("tpe", 0.16), ("gp", 0.02)])
def test_samplers_that_learn_come_near_the_peak(sampler, near):
    """Random ones are at 0.22 from it on average."""
    late = []
    for seed in range(3):
        recipe = made(24, sampler=sampler, explore=1.0).model_copy(update={"seed": seed})
        late += [abs(trial.values[KEY] - 0.4) for trial in play(Plan(recipe, [], None, None), peak)[-8:]]
    assert sum(late) / len(late) < near


def test_a_grid_is_tried_once_each_and_then_repeated():
    trials = play(Plan(made(15, sampler="grid", grid_points=5), [], 0.37, None), peak)
    assert [trial.values[KEY] for trial in trials[:5]] == [0.05, 0.275, 0.5, 0.725, 0.95]
    assert {trial.role for trial in trials[5:]} == {"repeat"} and len(trials) == 15


def test_a_stopped_leader_goes_on_instead_of_starting_over():
    """Everything explored is stopped after an epoch, and the best of it is better than the first points."""
    plan = Plan(made(12, explore=0.7), [], None, None)
    trials = play(plan, lambda trial: peak(trial) if trial.role == "first" else 0.9, stop=lambda trial: 2)
    taken_up = [trial for trial in trials if trial.role == "repeat" and trial.seed == 0]
    assert taken_up and all(trial.epoch == trial.epochs for trial in taken_up)
    keys = [(trial.values[KEY], trial.seed) for trial in trials]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_what_was_running_when_the_driver_died_comes_first_and_the_rest_is_as_undisturbed(sampler):
    recipe = made(12, sampler=sampler)
    undisturbed = play(Plan(recipe, [], None, None), peak)
    earlier = [Trial(**trial.to_dict()) for trial in undisturbed[:5]]
    earlier[3].status = "running"
    plan = Plan(recipe, earlier, None, None)
    assert plan.next(0.0) is earlier[3]
    earlier[3].status = "finished"
    plan.ended(earlier[3])
    found = play(plan, peak)
    assert found == undisturbed


def test_the_first_points_of_a_resumed_search_are_not_tried_again():
    recipe = made(6, explore=1.0)
    first = play(Plan(made(2), [], 0.37, None), peak)
    found = play(Plan(recipe, first, 0.37, None), peak)
    assert [trial.values[KEY] for trial in found[:3]] == [0.3, 0.5, 0.37]


def test_only_failures_end_the_search():
    plan = Plan(made(50), [], None, None)
    for _ in range(5):
        trial = plan.next(0.0)
        trial.status, trial.reason = "failed", "no such thing"
        plan.ended(trial)
    assert plan.has_failed() and plan.next(0.0) is None


def test_a_failure_among_others_is_passed_over():
    plan = Plan(made(20), [], None, None)
    for _ in range(20):
        trial = plan.next(0.0)
        trial.status = "failed" if trial.values[KEY] > 0.6 else "finished"
        trial.history = [{"epoch": 1, "map50": peak(trial), "seconds": 1.0}] if trial.status == "finished" else []
        plan.ended(trial)
    assert all(trial.values[KEY] <= 0.6 for trial in plan.trials if trial.role == "repeat")
    asked = [trial.status for trial in plan.trials if trial.role == "explore"]
    assert asked[len(asked) // 2 :].count("failed") <= 1  # the sampler has learned where nothing is to be had


def test_time_moves_on_to_repeating_and_ends_before_the_last_student_would_be_cut_off():
    plan = Plan(made(1000, explore=0.5), [], None, 100.0)
    now = 0.0
    while trial := plan.next(now):
        now += 9.0
        trial.history = [{"epoch": 4, "map50": peak(trial), "seconds": 9.0}]
        trial.status, trial.seconds = "finished", 9.0
        plan.ended(trial)
    assert 81 <= now <= 100
    assert [trial.role for trial in plan.trials].index("repeat") == 6


def test_the_first_tries_on_a_subset_are_repeated_on_everything():
    trials = play(Plan(made(20, subset=0.25, explore=0.5), [], None, None), peak)
    assert {trial.subset for trial in trials if trial.role != "repeat"} == {0.25}
    assert {trial.subset for trial in trials if trial.role == "repeat"} == {1.0}
    assert [trial.seed for trial in trials if trial.role == "repeat" and trial.values[KEY] == 0.3][:2] == [0, 1]


def test_a_first_point_that_fails_is_not_tried_for_ever():
    """As where no label scores above 0.5."""
    plan = Plan(made(20, explore=0.4), [], None, None)
    while trial := plan.next(0.0):
        trial.status = "failed" if trial.values[KEY] >= 0.5 else "finished"
        trial.history = [{"epoch": 3, "map50": peak(trial), "seconds": 1.0}] if trial.status == "finished" else []
        plan.ended(trial)
    assert sum(trial.values[KEY] == 0.5 for trial in plan.trials) <= 3
    assert len(plan.trials) == 20
