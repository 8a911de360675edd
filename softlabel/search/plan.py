"""Which student comes next: first what people would try, then what Optuna asks for, then the leaders with other seeds.

Pure: no clock, no disk and no Ray of its own, so that whole searches can be simulated.
"""

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from softlabel.config import Recipe, Search, Threshold
from softlabel.errors import NO_LABELS
from softlabel.recipe_file import with_values
from softlabel.search.curve import Curve
from softlabel.search.early_stopping import EarlyStopping
from softlabel.search.space import THRESHOLD, Values, distinct, distributions, first_points, grid, rounded, to_unit
from softlabel.search.trials import Role, Trial, covariance, evidence, explored

_NUM_RANDOM = 4  # a sampler draws at random until it has this many values, the first points included
_MAX_FAILED = 5  # with no other outcome so far
_MAX_FAILED_IN_A_ROW = 10  # whatever there was before them
_HURRY = 1.1  # a student is not begun if less time is left than this many times what earlier ones took

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Plan:
    """The students of a search so far, and which comes next.

    Args:
        recipe: Its ``search`` section and seed are used.
        trials: Students of an earlier run of the same search; those that were running are resumed first.
        automatic: Thresholds that follow from the labels, to be tried first.
        budget_s: Seconds the search may take, None for no limit.
    """

    def __init__(
        self, recipe: Recipe, trials: Sequence[Trial], automatic: Sequence[Threshold], budget_s: float | None
    ) -> None:
        self._recipe, self.search = recipe, recipe.search
        self.trials = list(trials)
        self._unfinished = [trial for trial in self.trials if trial.status == "running"]
        self.references = first_points(recipe, automatic)
        self._budget_s = budget_s
        self._distributions = distributions(recipe.search.space)
        self.stopping = EarlyStopping(recipe.search, self.trials, recipe.seed)
        self._until = {trial.number: self.stopping.next_rung(trial, trial.epoch) for trial in self._unfinished}

    def suggest(self, elapsed_s: float) -> Trial | None:
        """The next student to train; None if there is to be no other, or none before one of those running has ended."""
        if self._unfinished:
            return self._unfinished.pop(0)
        if has_failed(self.trials) or not self._has_time(elapsed_s):
            return None
        if trial := self._promoted(elapsed_s):
            return self._go_on(trial, trial.role)
        if len(self.trials) >= self.search.trials:
            return self._complete_leader()
        tried = [trial.values for trial in self.trials]
        first = next((values for values in self.references if values not in tried), None)
        if self.search.sampler != "grid" and first is not None:
            return self._begin(first, "first")
        if self._is_exploring(elapsed_s):
            return self._explore()
        return self._repeat()

    def until(self, trial: Trial) -> int | None:
        """The epoch after which a student waits; None if it is trained to its end."""
        return self._until[trial.number]

    def advance(self, trial: Trial, epoch: int) -> None:
        """Let a student that has reached the epoch where it would wait go on, if it may at once."""
        rung = self._until[trial.number]
        if rung is not None and epoch >= rung and self.stopping.goes_on(trial, rung):
            self._until[trial.number] = self.stopping.next_rung(trial, rung + 1)

    def is_over(self, elapsed_s: float) -> bool:
        """Whether there would be nothing more to train even if there were time."""
        if any(trial.status == "running" for trial in self.trials):
            return False
        open_ = len(self.trials) < self.search.trials or self._promoted(elapsed_s) or self._incomplete_leader()
        return has_failed(self.trials) or not open_

    def leaders(self) -> list[Values]:
        """The tried values, best first, by what is known about their mAP now."""
        found = evidence(self.trials)
        points = distinct([one.values for one in found])
        if not points:
            return []
        means, _ = self._curve().mean_and_sd(to_unit(self.search.space, points))
        return [points[i] for i in np.argsort(-means, kind="stable")]

    def _promoted(self, elapsed_s: float) -> Trial | None:
        """A student that waits and may go on; None once the leaders are being repeated."""
        return None if self._share(elapsed_s) >= self.search.explore else self.stopping.promoted()

    def _share(self, elapsed_s: float) -> float:
        """The share of the budget that is used up."""
        return elapsed_s / self._budget_s if self._budget_s else 0.0

    def _is_exploring(self, elapsed_s: float) -> bool:
        if self._budget_s and self._budget_s - elapsed_s < 2 * _HURRY * self._whole_s(self.trials):
            return False  # there is an answer only if the leader gets to the end
        if self._share(elapsed_s) >= self.search.explore:
            return False
        if self.search.sampler == "grid":
            return bool(self._untried())
        return len(self.trials) / self.search.trials < self.search.explore

    def _has_time(self, elapsed_s: float) -> bool:
        complete = [trial for trial in self.trials if trial.is_full]
        return not self._budget_s or self._budget_s - elapsed_s > _HURRY * self._whole_s(complete)

    def _whole_s(self, trials: Sequence[Trial]) -> float:
        """Seconds that a student takes from beginning to end, judging by what these took so far; 0 if unknown."""
        begun = [trial.seconds / trial.epoch * trial.epochs / trial.subset for trial in trials if trial.epoch]
        return float(np.median(begun)) if begun else 0.0

    def _explore(self) -> Trial:
        if self.search.sampler == "grid":
            return self._begin(self._untried()[0], "explore")
        # A new sampler each time, so that a resumed search draws what an undisturbed one would have drawn.
        sampler = _sampler(self.search, self._recipe.seed + 1000 * len(self.trials))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(self._told())
        found = study.ask(self._distributions).params
        return self._begin(rounded(self.search.space, found), "explore")

    def _told(self) -> list[FrozenTrial]:
        """What a sampler is told: the mAP that students would have reached, or, where it is unknown what they gain with
        age, what they all had at one age; 0 for those that failed because of their values; and which are running."""
        there = explored(self.trials, self.search.subset, self._recipe.seed)
        trials = [trial for trial in there if trial.values.keys() == self._distributions.keys()]
        known = [trial for trial in trials if trial.history and trial.status in ("finished", "stopped")]
        values = {one.number: one.map50 for one in evidence(self.trials)}
        if not all(trial.number in values for trial in known):
            age = min(trial.epoch for trial in known)
            values = {trial.number: trial.best(age) for trial in known}
        values |= {trial.number: 0.0 for trial in trials if self._is_worthless(trial)}
        told = [trial for trial in trials if trial.number in values or trial.status == "running"]
        return [self._frozen(trial, values.get(trial.number)) for trial in told]

    def _is_worthless(self, trial: Trial) -> bool:
        """Whether it failed because of its values: no label was left, or, where more than thresholds vary, it never
        did an epoch. That a worker died says nothing about a threshold."""
        others = any(not key.startswith(THRESHOLD) for key in trial.values)
        without = trial.reason.startswith(NO_LABELS) or (others and not trial.history)
        return trial.status == "failed" and without

    def _frozen(self, trial: Trial, value: float | None) -> FrozenTrial:
        state = TrialState.RUNNING if value is None else TrialState.COMPLETE
        return create_trial(state=state, params=trial.values, distributions=self._distributions, value=value)

    def _untried(self) -> list[Values]:
        tried = [trial.values for trial in self.trials]
        return [values for values in grid(self.search.space, self.search.grid_points) if values not in tried]

    def _repeat(self) -> Trial | None:
        """Other seeds for the leader and for the values it is compared with, up to ``search.seeds`` each; then for the
        values at which a randomly drawn curve has its peak (Thompson, 1933), where the answer may still change."""
        leaders = self.leaders()
        if not leaders:
            is_used_up = self.search.sampler == "grid" and not self._untried()
            return None if is_used_up or any(trial.status == "running" for trial in self.trials) else self._explore()
        anchors = distinct([leaders[0], *self.references])
        seeds = Counter(anchors.index(trial.values) for trial in self._begun_in_full() if trial.values in anchors)
        fewest = min(range(len(anchors)), key=lambda i: seeds[i])
        values = anchors[fewest] if seeds[fewest] < self.search.seeds else self._draw(leaders)
        return self._begin(values, "repeat")

    def _begun_in_full(self) -> list[Trial]:
        """Students on all tiles with no rung left to wait at; failed ones count too, or values that cannot be trained
        would be tried for ever."""
        there = [trial for trial in self.trials if trial.subset == 1]
        return [t for t in there if t.status != "stopped" and not (t.status == "running" and self._until[t.number])]

    def _complete_leader(self) -> Trial | None:
        values = self._incomplete_leader()
        return None if values is None else self._begin(values, "repeat")

    def _incomplete_leader(self) -> Values | None:
        """The best values so far, if no student of theirs was trained to the end: a search can only answer with values
        that have one. None while others are running, since one of them may become the leader."""
        if any(trial.status == "running" for trial in self.trials):
            return None
        leader = next(iter(self.leaders()), None)
        return None if leader in [trial.values for trial in self._begun_in_full()] else leader

    def _draw(self, points: list[Values]) -> Values:
        rng = np.random.default_rng([self._recipe.seed, len(self.trials)])
        (drawn,) = self._curve().sample(to_unit(self.search.space, points), 1, rng)
        return points[int(np.argmax(drawn))]

    def _curve(self) -> Curve:
        return curve_of(self.search, self.trials)

    def _begin(self, values: Values, role: Role) -> Trial:
        subset = 1.0 if role == "repeat" else self.search.subset
        same = [t for t in self.trials if t.values == values and t.subset == subset]
        stopped = next((trial for trial in same if trial.status == "stopped"), None)
        if role == "repeat" and stopped:
            return self._go_on(stopped, role)
        epochs = with_values(self._recipe, values).train.student.args.get("epochs", 100)
        trial = Trial(len(self.trials), values, self._recipe.seed + len(same), subset, role, epochs)
        self.trials.append(trial)
        self._until[trial.number] = self.stopping.next_rung(trial, 0)
        return trial

    def _go_on(self, trial: Trial, role: Role) -> Trial:
        """Resume a student that waits, from its last epoch."""
        trial.status, trial.role = "running", role
        self._until[trial.number] = self.stopping.next_rung(trial, trial.epoch + 1)
        return trial


def has_failed(trials: Sequence[Trial]) -> bool:
    """Whether the search itself, or what it runs on, is at fault, rather than some values: all students so far failed
    (``_MAX_FAILED`` or more), or the last ``_MAX_FAILED_IN_A_ROW`` did, none of them for want of labels."""
    ended = [trial for trial in trials if trial.status != "running"]
    last = ended[-_MAX_FAILED_IN_A_ROW:]
    nothing_else = len(ended) >= _MAX_FAILED and all(trial.status == "failed" for trial in ended)
    in_a_row = len(last) == _MAX_FAILED_IN_A_ROW and all(
        trial.status == "failed" and not trial.reason.startswith(NO_LABELS) for trial in last
    )
    return nothing_else or in_a_row


def curve_of(search: Search, trials: Sequence[Trial]) -> Curve:
    """What is known about mAP over the space after these students; there must be evidence from at least one."""
    found = evidence(trials)
    x = to_unit(search.space, [one.values for one in found])
    return Curve(x, np.array([one.map50 for one in found]), covariance(found))


def _sampler(search: Search, seed: int) -> BaseSampler:
    if search.sampler == "tpe":
        several = len(search.space) > 1
        return TPESampler(n_startup_trials=_NUM_RANDOM, multivariate=several, constant_liar=True, seed=seed)
    if search.sampler == "gp":
        return GPSampler(n_startup_trials=_NUM_RANDOM, deterministic_objective=False, seed=seed)
    return RandomSampler(seed=seed)
