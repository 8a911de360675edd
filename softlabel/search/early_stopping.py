"""How far each student of a search is trained: to a rung, where it waits until it is among the best there.

ASHA (Li et al., arXiv:1810.05934, algorithm 2): a student waits after ``grace_epochs``, after ``reduction_factor``
times as many, and so on, until it is among the best 1/``reduction_factor`` of those that got that far, and then goes on
from where it was. Ray's scheduler of that name never resumes a student, so it has to train whichever leads at the
moment to the end.
"""

from collections.abc import Sequence

import numpy as np

from softlabel.config import Search
from softlabel.search.trials import Trial, explored

_LEARNED = 0.1  # of what the best finished student reached: where the best has less, it says no more than the worst
_USUAL_MAP50 = 0.5  # taken for that until one has finished


class EarlyStopping:
    """The rungs of a search and who waits at them.

    Args:
        search: The recipe's section.
        trials: All students so far: the plan's own list, which grows.
        seed: The recipe's.
    """

    def __init__(self, search: Search, trials: Sequence[Trial], seed: int) -> None:
        self._search, self._trials, self._seed = search, trials, seed

    def next_rung(self, trial: Trial, epoch: int) -> int | None:
        """The first rung from an epoch on, that epoch included, at which a student waits; None for a repeated one."""
        rungs = [] if trial.role == "repeat" else self._rungs()
        return next((rung for rung in rungs if epoch <= rung < trial.epochs), None)

    def goes_on(self, trial: Trial, rung: int) -> bool:
        """Whether a student at a rung need not wait there. Where none of that age has found anything, as after a few
        epochs from scratch, nobody waits: a lead of a thousandth is chance there."""
        return self._is_blind(rung) or trial in self._best(rung)

    def promoted(self) -> Trial | None:
        """A student that waits and may go on, from the highest rung with one."""
        for rung in reversed(self._rungs()):
            for trial in self._best(rung):
                following = self.next_rung(trial, rung + 1) or trial.epochs
                if trial.status == "stopped" and rung <= trial.epoch < following:
                    return trial
        return None

    def waiting(self, most: int) -> list[Trial]:
        """The best of the students that wait, at most ``most`` for each rung."""
        rungs = [0, *self._rungs()]
        found = []
        for rung, above in zip(rungs, [*rungs[1:], np.inf], strict=True):
            here = [trial for trial in self._trials if trial.status == "stopped" and rung <= trial.epoch < above]
            found += sorted(here, key=Trial.best, reverse=True)[:most]
        return found

    def _rungs(self) -> list[int]:
        """The ages, in epochs, at which students wait."""
        rungs, rung = [], float(self._search.grace_epochs)
        while self._search.stop_early and rung < max((trial.epochs for trial in self._trials), default=0):
            rungs.append(round(rung))
            rung *= self._search.reduction_factor
        return list(dict.fromkeys(rungs))

    def _best(self, rung: int) -> list[Trial]:
        """The best 1/``reduction_factor`` of the students that reached a rung, as they were at that age."""
        there = explored(self._trials, self._search.subset, self._seed)
        reached = [trial for trial in there if trial.epoch >= rung and trial.status != "failed"]
        reached.sort(key=lambda trial: -trial.best(rung))
        return reached[: int(len(reached) / self._search.reduction_factor)]

    def _is_blind(self, rung: int) -> bool:
        finished = max((trial.best() for trial in self._trials if trial.is_full), default=_USUAL_MAP50)
        return max(trial.best(rung) for trial in self._trials) < _LEARNED * finished
