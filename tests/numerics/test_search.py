"""The curve against scikit-learn, and whole searches on simulated students: is the interval as good as its word?"""

from functools import cache

import numpy as np
import pytest
from conftest import tiny_recipe
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from softlabel.search.answer import answer
from softlabel.search.curve import _MEAN_SD, Curve, _Model
from softlabel.search.plan import Plan

KEY = "train.threshold"
NOISE = 0.015  # between seeds of the demo's students
EPOCHS = 12


def data(num=12, noise=NOISE, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (num, 1))
    return x, 0.5 + 0.2 * np.sin(3 * x[:, 0]) + rng.normal(0, noise, num), rng.uniform(0, 0.02, num) ** 2


def test_one_model_is_scikit_learns():
    x, y, extra = data()
    model, at = _Model(0.4, 0.08, 0.02, 1.0), np.linspace(0, 1, 30)[:, None]
    curve = Curve(x, y, np.diag(extra))
    kernel = ConstantKernel(_MEAN_SD**2) + ConstantKernel(model.height**2) * Matern(model.length, nu=2.5)
    reference = GaussianProcessRegressor(kernel, alpha=model.noise**2 + extra, optimizer=None).fit(x, y - y.mean())
    mean, covariance = reference.predict(at, return_cov=True)
    ours, our_covariance = curve._posterior(model, at)
    np.testing.assert_allclose(ours, mean, atol=1e-8)
    np.testing.assert_allclose(our_covariance, covariance, atol=1e-8)


def test_weights_are_marginal_likelihoods():
    x, y, extra = data(6)
    curve = Curve(x, y, np.diag(extra))
    for a, b in zip(curve._models, curve._models[1:], strict=False):
        if a.length and b.length:
            logs = []
            for model in (a, b):
                kernel = ConstantKernel(_MEAN_SD**2) + ConstantKernel(model.height**2) * Matern(model.length, nu=2.5)
                covariance = kernel(x) + np.diag(model.noise**2 + extra)
                logs.append(multivariate_normal(np.zeros(6), covariance).logpdf(y - y.mean()))
            assert np.log(a.weight / b.weight) == pytest.approx(logs[0] - logs[1], abs=1e-6)


def test_samples_have_the_curve_s_mean_and_spread():
    x, y, extra = data()
    curve, at = Curve(x, y, np.diag(extra)), np.linspace(0, 1, 20)[:, None]
    mean, sd = curve.mean_and_sd(at)
    samples = curve.sample(at, 20_000, np.random.default_rng(0))
    np.testing.assert_allclose(samples.mean(axis=0), mean, atol=0.002)
    np.testing.assert_allclose(samples.std(axis=0), sd, rtol=0.1, atol=0.001)


def test_an_error_that_some_share_moves_their_level_and_not_their_shape():
    """By the formula of a Gaussian's condition, the level of half of them unknown."""
    x, y, extra = data()
    half = np.arange(len(x)) < len(x) // 2
    shared = np.diag(extra) + 1e4 * np.outer(half, half)
    curve, lifted = Curve(x, y, shared), Curve(x, y + 0.3 * half, shared)
    at = np.linspace(0, 1, 30)[:, None]
    np.testing.assert_allclose(curve.mean_and_sd(at)[0], lifted.mean_and_sd(at)[0], atol=1e-3)
    model = _Model(0.4, 0.08, 0.02, 1.0)
    kernel = ConstantKernel(_MEAN_SD**2) + ConstantKernel(model.height**2) * Matern(model.length, nu=2.5)
    inverse = np.linalg.inv(kernel(x) + model.noise**2 * np.eye(len(x)) + shared)
    mean, covariance = curve._posterior(model, at)
    np.testing.assert_allclose(mean, kernel(at, x) @ inverse @ (y - y.mean()), atol=1e-6)
    np.testing.assert_allclose(covariance, kernel(at) - kernel(at, x) @ inverse @ kernel(at, x).T, atol=1e-6)


def bump(t, at, width):
    return np.exp(-(((t - at) / width) ** 2))


CURVES = {
    "low peak": lambda t: 0.6 - 0.5 * (t - 0.25) ** 2,
    "steep fall": lambda t: 0.55 + 0.1 * t - 0.9 * np.maximum(t - 0.55, 0) ** 1.5,
    "two peaks": lambda t: 0.5 + 0.06 * bump(t, 0.2, 0.1) + 0.1 * bump(t, 0.7, 0.12),
}
GRID = np.linspace(0.05, 0.95, 1801)


def simulated_search(curve, seed, *, trials=24, explore=0.6, start=0):
    """A search whose students grow like real ones after ``start`` epochs, reach ``curve`` and differ by seed; returns
    its answer."""
    search = {"trials": trials, "explore": explore, "grace_epochs": 3}
    recipe = tiny_recipe(seed=seed, search=search)
    args = {**recipe.train.student.args, "epochs": EPOCHS}
    student = recipe.train.student.model_copy(update={"args": args})
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"student": student})})
    plan, rng = Plan(recipe, [], (0.4,), None), np.random.default_rng(seed)
    finals: dict[int, float] = {}
    while trial := plan.suggest(0.0):
        final = finals.setdefault(trial.number, float(curve(trial.values[KEY]) + rng.normal(0, NOISE)))
        while trial.epoch < (plan.until(trial) or EPOCHS):
            epoch = trial.epoch + 1
            share = max(0.0, 1 - np.exp((start - epoch) / 4)) / (1 - np.exp((start - EPOCHS) / 4))
            grown = final * share + rng.normal(0, NOISE / 3)
            trial.history.append({"epoch": epoch, "map50": float(grown if epoch < EPOCHS else final), "seconds": 1.0})
            plan.advance(trial, epoch)
        trial.status = "finished" if trial.epoch == EPOCHS else "stopped"
        trial.seconds = float(trial.epoch)
    return answer(plan.search, plan.trials, plan.references), plan


@cache
def searches(num):
    """Curve and answer of so many searches, on one curve after the other."""
    curves = [list(CURVES.values())[seed % len(CURVES)] for seed in range(num)]
    return [(curve, simulated_search(curve, seed)[0]) for seed, curve in enumerate(curves)]


def test_the_interval_covers_the_peak_as_often_as_it_says(is_long):
    lines = [(found["lines"][KEY], GRID[np.argmax(curve(GRID))]) for curve, found in searches(40 if is_long else 15)]
    covered = [line["peak_low"] <= peak <= line["peak_high"] for line, peak in lines]
    assert np.mean(covered) >= 0.85, covered


def test_the_choice_is_nearly_as_good_as_the_peak(is_long):
    found = searches(40 if is_long else 15)
    lost = [curve(GRID).max() - curve(answered["values"][KEY]) for curve, answered in found]
    assert np.mean(lost) < 0.01, lost


def test_a_flat_curve_is_called_flat(is_long):
    num = 40 if is_long else 10
    flat = [simulated_search(lambda t: 0.5 + 0 * t, seed)[0]["flat"] for seed in range(num)]
    assert np.mean(flat) >= 0.85


@pytest.mark.parametrize("name", ["low peak", "steep fall"])
def test_a_curve_with_a_peak_is_not_called_flat(name, is_long):
    num = 20 if is_long else 4
    assert not any(simulated_search(CURVES[name], seed)[0]["flat"] for seed in range(num))


def test_what_was_stopped_early_narrows_the_interval(is_long):
    """Most students are stopped; if their differences counted for nothing the interval would be the whole range."""
    lines = [found["lines"][KEY] for _, found in searches(40 if is_long else 15)]
    assert np.mean([line["peak_high"] - line["peak_low"] for line in lines]) < 0.6


def test_the_gain_over_what_it_is_compared_with_is_in_its_interval(is_long):
    found = [
        (curve, one["values"][KEY], row) for curve, one in searches(40 if is_long else 15) for row in one["against"]
    ]
    gains = [(curve(best) - curve(row["values"][KEY]), row["gain"]) for curve, best, row in found]
    assert np.mean([gain["low"] <= true <= gain["high"] for true, gain in gains]) >= 0.8


def test_stopping_early_saves_epochs():
    """Rungs are at 3 and 9 of 12 epochs."""
    _, exploring = simulated_search(CURVES["low peak"], 0, explore=1.0)
    assert sum(trial.epoch for trial in exploring.trials) < 0.6 * len(exploring.trials) * EPOCHS
    _, plan = simulated_search(CURVES["low peak"], 0)
    assert all(any(t.is_full for t in plan.trials if t.values == values) for values in plan.references)


def test_nobody_waits_while_none_has_found_anything():
    """At three epochs there is nothing but noise."""
    _, plan = simulated_search(CURVES["low peak"], 0, explore=1.0, start=6)
    assert {trial.epoch for trial in plan.trials} == {9, EPOCHS}
