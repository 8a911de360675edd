"""Students of the search: what each was to be, how far it got, and what that says about a fully trained one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softlabel.search.space import Values

Role = Literal["first", "explore", "repeat"]
Status = Literal["running", "stopped", "finished", "failed"]

# Standard deviations, as shares of what full students gain after an age. In the grids of benchmarks/RESULTS.md, gains
# differed by shares of 0.04 to 0.2 between seeds and of 0.14 to 0.38 between thresholds; the worse half gained a third
# less or more.
_SPREAD = 0.25
_SPREAD_COUNTS = 2  # counts as this many students: two or three that agree may do so by chance
_BEHIND = 0.3
_LEAST_SD = 0.005


@dataclass
class Trial:
    """One student. ``history`` has a row per epoch, with epoch, map50 and seconds; ``folder`` is its training step."""

    number: int
    values: Values
    seed: int
    subset: float
    role: Role
    epochs: int
    folder: str = ""
    status: Status = "running"
    reason: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @staticmethod
    def name_of(number: int) -> str:
        """What a student is called."""
        return f"{number:03d}"

    @property
    def name(self) -> str:
        """What it is called."""
        return self.name_of(self.number)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    def best(self, epoch: int | None = None) -> float:
        """Validation mAP50 of the best epoch up to ``epoch`` (default: of all epochs), whose weights are kept."""
        return max((row["map50"] for row in self.history[:epoch]), default=0.0)

    @property
    def is_full(self) -> bool:
        """Whether it shows what a final student would reach: all tiles, all epochs."""
        return self.status == "finished" and self.subset == 1

    def to_dict(self) -> dict[str, Any]:
        """As it is written to disk."""
        return asdict(self)


def explored(trials: Sequence[Trial], subset: float, seed: int) -> list[Trial]:
    """The students that try values out, on that share of the tiles, without those that repeat values with another
    seed."""
    tried = [trial for trial in trials if trial.subset == subset]
    return [trial for trial in tried if trial.role != "repeat" or trial.seed == seed]


@dataclass(frozen=True)
class Evidence:
    """What a student says about a full one with its values: mAP50, and the variance of that estimate (0: it is one).

    ``shared_variance`` is that of the error which all students of a ``stage`` (tiles, epochs to do and done) share: how
    much stopped ones would gain. ``own_variance`` is that of the rest.
    """

    number: int
    values: Values
    map50: float
    own_variance: float = 0.0
    shared_variance: float = 0.0
    stage: tuple[float, int, int] | None = None


def evidence(trials: Sequence[Trial]) -> list[Evidence]:
    """What the students so far say about full ones.

    One that was stopped, or saw a subset of the tiles, is credited with what full ones gained from there on, and is the
    more uncertain the more is missing. It is left out where there are not two that tell how much that is; if nothing
    else is left, only the students that did the most epochs are used, as they are.
    """
    usable = [trial for trial in trials if trial.status in ("finished", "stopped") and trial.history]
    full = [trial for trial in usable if trial.is_full]
    found = [Evidence(trial.number, trial.values, trial.best()) for trial in full]
    for trial in usable:
        if not trial.is_full and (gains := _gains(trial, full, usable)):
            found.append(_expected(trial, np.array(gains)))
    return found or [Evidence(trial.number, trial.values, trial.best()) for trial in _oldest(usable)]


def covariance(found: Sequence[Evidence]) -> NDArray[np.float64]:
    """(N, N) covariance of the errors in the evidence: those shared by students of one stage, and each one's own."""
    same = np.array([[a.stage is not None and a.stage == b.stage for b in found] for a in found])
    shared = np.sqrt([one.shared_variance for one in found])
    return np.where(same, np.outer(shared, shared), 0.0) + np.diag([one.own_variance for one in found])


def _expected(trial: Trial, gains: NDArray[np.float64]) -> Evidence:
    gain, count = float(gains.mean()), len(gains)
    squares = _SPREAD_COUNTS * (_SPREAD * gain) ** 2 + float(((gains - gain) ** 2).sum())
    own = max(squares / (_SPREAD_COUNTS + count - 1), _LEAST_SD**2)
    behind = _BEHIND * gain if trial.status == "stopped" else 0.0
    stage = (trial.subset, trial.epochs, trial.epoch)
    return Evidence(trial.number, trial.values, trial.best() + gain, own, own / count + behind**2, stage)


def _gains(trial: Trial, full: list[Trial], usable: list[Trial]) -> list[float]:
    """What others gained from where this one ended; nothing if fewer than two tell."""
    if trial.subset == 1:
        alike = [other for other in full if other.epochs == trial.epochs and other.epoch > trial.epoch]
        gains = [other.best() - other.best(trial.epoch) for other in alike]
    else:
        alike = [
            other
            for other in usable
            if (other.subset, other.epochs) == (trial.subset, trial.epochs) and other.epoch >= trial.epoch
        ]
        gains = [
            other.best() - small.best(trial.epoch) for small in alike for other in full if other.values == small.values
        ]
    return gains if len(gains) > 1 else []


def _oldest(trials: list[Trial]) -> list[Trial]:
    most = max((trial.epoch for trial in trials), default=0)
    return [trial for trial in trials if trial.epoch == most]
