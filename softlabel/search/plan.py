"""Which student next: first what people would try, then what Optuna asks for, then the leaders with other seeds.

Pure: no clock, no disk and no Ray of its own, so that whole searches can be simulated.
"""

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import create_trial

from softlabel.config import Recipe, Search, with_values
from softlabel.search.curve import Curve
from softlabel.search.space import Values, distributions, first_points, grid, to_unit
from softlabel.search.trials import Role, Trial, evidence

_NUM_RANDOM = 4  # points before a sampler has anything to go by; the first points come on top
_MAX_FAILED_IN_A_ROW = 5
_HURRY = 1.1  # a student is not begun if the time left is shorter than so many of those before

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Plan:
    """The students of a search so far, and which comes next.

    Args:
        recipe: Its ``search`` section and seed are used.
        trials: Students of an earlier run of the same search; those that were running are taken up first.
        f1_confidence: Where the teacher's F1 is best on the validation split.
        budget_s: Seconds the search may take, null for no limit.
    """

    def __init__(
        self, recipe: Recipe, trials: Sequence[Trial], f1_confidence: float | None, budget_s: float | None
    ) -> None:
        self._recipe, self.search = recipe, recipe.search
        self.trials = list(trials)
        self._unfinished = [trial for trial in self.trials if trial.status == "running"]
        self.references = first_points(recipe, f1_confidence)
        self._budget_s = budget_s
        self._distributions = distributions(recipe.search.space)
        self._study = optuna.create_study(direction="maximize")
        self._asked: dict[int, optuna.trial.Trial] = {}
        for trial in self.trials:
            if trial.role != "repeat" and trial.status != "running":
                self._remember(trial)

    def next(self, elapsed_s: float) -> Trial | None:
        """The next student to train; None if there shall be no other, or not before one of those running has ended."""
        if self._unfinished:
            return self._unfinished.pop(0)
        if self.has_failed() or len(self.trials) >= self.search.trials or not self._has_time(elapsed_s):
            return None
        tried = [trial.values for trial in self.trials]
        first = next((values for values in self.references if values not in tried), None)
        if self.search.sampler != "grid" and first is not None:
            return self._begin(first, "first")
        if self._is_exploring(elapsed_s):
            return self._explore()
        return self._repeat()

    def ended(self, trial: Trial) -> None:
        """Take note of a student that finished, was stopped or failed."""
        if trial.role == "repeat":
            return
        asked = self._asked.pop(trial.number, None)
        if asked is None:
            self._remember(trial)
        else:
            self._study.tell(asked, _value(trial, self.trials))

    def has_failed(self) -> bool:
        """Whether nothing but failures came of the first students: the search itself is at fault, not a value."""
        ended = [trial for trial in self.trials if trial.status != "running"]
        return len(ended) >= _MAX_FAILED_IN_A_ROW and all(trial.status == "failed" for trial in ended)

    def is_exempt(self, trial: Trial) -> bool:
        """Whether a student must not be stopped early: one that is trained to know its values better."""
        return not self.search.stop_early or trial.role == "repeat"

    def leaders(self) -> list[Values]:
        """The tried values, by what is known of their mAP now, best first."""
        found = evidence(self.trials)
        points = _distinct([one.values for one in found])
        if not points:
            return []
        means, _ = self._curve().mean_and_sd(to_unit(self.search.space, points))
        return [points[i] for i in np.argsort(-means, kind="stable")]

    def _is_exploring(self, elapsed_s: float) -> bool:
        share = len(self.trials) / self.search.trials
        if self._budget_s:
            share = max(share, elapsed_s / self._budget_s)
        if self.search.sampler == "grid":
            return bool(self._untried())
        return share < self.search.explore

    def _has_time(self, elapsed_s: float) -> bool:
        if not self._budget_s:
            return True
        whole = [trial.seconds for trial in self.trials if trial.is_full]
        return self._budget_s - elapsed_s > (_HURRY * float(np.median(whole)) if whole else 0.0)

    def _explore(self) -> Trial:
        if self.search.sampler == "grid":
            return self._begin(self._untried()[0], "explore")
        # A sampler per question: a resumed search draws what the undisturbed one would have drawn.
        self._study.sampler = _sampler(self.search, self._recipe.seed + 1000 * len(self.trials))
        asked = self._study.ask(self._distributions)
        values = {key: round(value, 4) if isinstance(value, float) else value for key, value in asked.params.items()}
        trial = self._begin(values, "explore")
        self._asked[trial.number] = asked
        return trial

    def _untried(self) -> list[Values]:
        tried = [trial.values for trial in self.trials]
        return [values for values in grid(self.search.space, self.search.grid_points) if values not in tried]

    def _repeat(self) -> Trial | None:
        """Seeds for the leader and for what it is compared with, up to ``search.seeds`` each; then where a curve drawn
        at random has its peak (Thompson, 1933), which is where the answer may still change."""
        leaders = self.leaders()
        if not leaders:
            return None if any(trial.status == "running" for trial in self.trials) else self._explore()
        anchors = _distinct([leaders[0], *self.references])
        seeds = Counter(anchors.index(trial.values) for trial in self._begun_in_full() if trial.values in anchors)
        fewest = min(range(len(anchors)), key=lambda i: seeds[i])
        values = anchors[fewest] if seeds[fewest] < self.search.seeds else self._draw(leaders)
        return self._begin(values, "repeat")

    def _begun_in_full(self) -> list[Trial]:
        """Those that failed too, or values that cannot train would be tried for ever."""
        return [trial for trial in self.trials if trial.subset == 1 and trial.status != "stopped"]

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
            stopped.status, stopped.role = "running", "repeat"  # it goes on from its last epoch
            return stopped
        epochs = with_values(self._recipe, values).train.student.args.get("epochs", 100)
        trial = Trial(len(self.trials), values, self._recipe.seed + len(same), subset, role, epochs)
        self.trials.append(trial)
        return trial

    def _remember(self, trial: Trial) -> None:
        if trial.values.keys() != self._distributions.keys() or not (trial.history or trial.status == "failed"):
            return
        self._study.add_trial(
            create_trial(params=trial.values, distributions=self._distributions, value=_value(trial, self.trials))
        )


def curve_of(search: Search, trials: Sequence[Trial]) -> Curve:
    """What is known of mAP over the space after these students; there must be evidence of at least one."""
    found = evidence(trials)
    x = to_unit(search.space, [one.values for one in found])
    return Curve(x, np.array([one.map50 for one in found]), np.array([one.extra_variance for one in found]))


def _value(trial: Trial, trials: Sequence[Trial]) -> float:
    """What a sampler is told: of a student that was stopped, what it would have reached; of one that failed, as where
    no label is left, that it is worth nothing."""
    if trial.status == "failed":
        return 0.0
    alone = [other for other in trials if other.is_full and other is not trial]
    return next((one.map50 for one in evidence([*alone, trial]) if one.values is trial.values), trial.best())


def _distinct(points: Sequence[Values]) -> list[Values]:
    found: list[Values] = []
    for point in points:
        if point not in found:
            found.append(point)
    return found


def _sampler(search: Search, seed: int) -> BaseSampler:
    if search.sampler == "tpe":
        several = len(search.space) > 1
        return TPESampler(n_startup_trials=_NUM_RANDOM, multivariate=several, constant_liar=True, seed=seed)
    if search.sampler == "gp":
        return GPSampler(n_startup_trials=_NUM_RANDOM, deterministic_objective=False, seed=seed)
    return RandomSampler(seed=seed)
