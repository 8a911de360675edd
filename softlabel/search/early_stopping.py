"""How far each student of a search is trained: to a rung, where it waits until it is among the best there.

ASHA (Li et al., arXiv:1810.05934, algorithm 2): a student waits after ``grace_epochs``, and after ``reduction_factor``
times as many, until it is in the best one in ``reduction_factor`` of those that came so far, and then goes on from
where it was. Ray's scheduler of that name never takes one up again, so it has to train whoever leads at the moment to
the end.
"""

from collections.abc import Sequence

import numpy as np

from softlabel.config import Search
from softlabel.search.trials import Trial, explored

_LEARNED = 0.1  # of what a finished student reached: where the best has less, it is as good as the worst
_USUAL_MAP50 = 0.5  # until one has finished


class EarlyStopping:
    """The rungs of a search and who waits at them.

    Args:
        search: The recipe's section.
        trials: All students so far; the list of the plan, which grows.
        seed: The recipe's.
    """

    def __init__(self, search: Search, trials: Sequence[Trial], seed: int) -> None:
        self._search, self._trials, self._seed = search, trials, seed

    def next_rung(self, trial: Trial, epoch: int) -> int | None:
        """Where a student waits next from an epoch on (at it, if that is a rung); a repeated one nowhere."""
        rungs = [] if trial.role == "repeat" else self._rungs()
        return next((rung for rung in rungs if epoch <= rung < trial.epochs), None)

    def goes_on(self, trial: Trial, rung: int) -> bool:
        """Whether a student at a rung need not wait there. Where none of an age has found anything yet, as after a few
        epochs from scratch, nobody waits: who is ahead there by a thousandth is chance."""
        return self._is_blind(rung) or trial in self._best(rung)

    def promoted(self) -> Trial | None:
        """A student that waits and may go on, of the oldest that do."""
        for rung in reversed(self._rungs()):
            for trial in self._best(rung):
                following = self.next_rung(trial, rung + 1) or trial.epochs
                if trial.status == "stopped" and rung <= trial.epoch < following:
                    return trial
        return None

    def waiting(self, most: int) -> list[Trial]:
        """Of the students that wait at each rung the best ones, so many at most."""
        rungs = [0, *self._rungs()]
        found = []
        for rung, above in zip(rungs, [*rungs[1:], np.inf], strict=True):
            here = [trial for trial in self._trials if trial.status == "stopped" and rung <= trial.epoch < above]
            found += sorted(here, key=Trial.best, reverse=True)[:most]
        return found

    def _rungs(self) -> list[int]:
        """The ages at which students wait."""
        rungs, rung = [], float(self._search.grace_epochs)
        while self._search.stop_early and rung < max((trial.epochs for trial in self._trials), default=0):
            rungs.append(round(rung))
            rung *= self._search.reduction_factor
        return list(dict.fromkeys(rungs))

    def _best(self, rung: int) -> list[Trial]:
        """The best one in ``reduction_factor`` of those that reached an age, at that age."""
        there = explored(self._trials, self._search.subset, self._seed)
        reached = [trial for trial in there if trial.epoch >= rung and trial.status != "failed"]
        reached.sort(key=lambda trial: -trial.best(rung))
        return reached[: int(len(reached) / self._search.reduction_factor)]

    def _is_blind(self, rung: int) -> bool:
        finished = max((trial.best() for trial in self._trials if trial.is_full), default=_USUAL_MAP50)
        return max(trial.best(rung) for trial in self._trials) < _LEARNED * finished
