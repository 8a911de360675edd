"""One student of the search each: what it was to be, how far it came, and what that says of a finished one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from softlabel.search.space import Values

Role = Literal["first", "explore", "repeat"]
Status = Literal["running", "stopped", "finished", "failed"]

_LEAST_EXTRA_SD = 0.005  # of a value that is an estimate: a handful of differences may agree by chance
_UNKNOWN_GAIN = 0.5  # what was stopped for being behind need not gain what the others did: standard deviation, share


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
        """mAP50 on the validation split of the best epoch up to ``epoch`` (default: all): what its weights have."""
        return max((row["map50"] for row in self.history[:epoch]), default=0.0)

    @property
    def is_full(self) -> bool:
        """Whether it counts as what a final student would reach: all tiles, all epochs."""
        return self.status == "finished" and self.subset == 1

    def to_dict(self) -> dict[str, Any]:
        """As it is written to disk."""
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """What a student says of a full one of its values: mAP50, and the variance of saying so (0: it is one)."""

    number: int
    values: Values
    map50: float
    extra_variance: float


def evidence(trials: Sequence[Trial]) -> list[Evidence]:
    """What the students so far say of full ones.

    One that was stopped, or saw a subset of the tiles, is taken for as much better as full ones became on the way from
    there, and as the more uncertain the more is missing. Where there are not two to tell how much, only values of equal
    standing are used, the fullest there are.
    """
    usable = [trial for trial in trials if trial.status in ("finished", "stopped") and trial.history]
    full = [trial for trial in usable if trial.is_full]
    found = [Evidence(trial.number, trial.values, trial.best(), 0.0) for trial in full]
    for trial in usable:
        if not trial.is_full and (gains := _gains(trial, full, usable)):
            gain = float(np.mean(gains))
            unknown = _UNKNOWN_GAIN * gain if trial.status == "stopped" else 0.0
            extra = max(float(np.var(gains, ddof=1)), unknown**2, _LEAST_EXTRA_SD**2)
            found.append(Evidence(trial.number, trial.values, trial.best() + gain, extra))
    return found or [Evidence(trial.number, trial.values, trial.best(), 0.0) for trial in _oldest(usable)]


def _gains(trial: Trial, full: list[Trial], usable: list[Trial]) -> list[float]:
    """What others gained from where this one ended."""
    if trial.subset == 1:
        gains = [other.best() - other.best(trial.epoch) for other in full if other.epoch > trial.epoch]
    else:
        alike = [other for other in usable if other.subset == trial.subset and other.epoch >= trial.epoch]
        gains = [
            other.best() - small.best(trial.epoch) for small in alike for other in full if other.values == small.values
        ]
    return gains if len(gains) > 1 else []


def _oldest(trials: list[Trial]) -> list[Trial]:
    most = max((trial.epoch for trial in trials), default=0)
    return [trial for trial in trials if trial.epoch == most]
