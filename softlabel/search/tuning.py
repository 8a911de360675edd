"""How Ray Tune asks the plan, and what looks after a search while Tune runs."""

import time
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from softlabel.search.plan import Plan
from softlabel.search.trials import Trial

_LOOK_S = 5.0  # between looks at the nodes and the clock


class SearchRun(Protocol):
    """What a running search does for Tune (run.py)."""

    plan: Plan

    def elapsed_s(self) -> float:
        """Seconds of the budget that are used up."""

    def begin(self, trial: Trial) -> None:
        """Hand a student to the dispatcher."""

    def refresh(self, trial: Trial) -> None:
        """Update a student with what the dispatcher knows about it."""

    def advance(self, trial: Trial, epoch: int) -> None:
        """Tell the dispatcher if a student need not wait."""

    def stop(self, trial: Trial) -> None:
        """Withdraw a student from the dispatcher."""

    def save(self, trial: Trial) -> None:
        """Commit what is known about a student."""

    def maintain(self, lost_nodes: list[str]) -> None:
        """Look after clock, lease and worker groups."""


class PlanSearcher(Searcher):
    """Tune's questions, answered by the plan."""

    def __init__(self, run: SearchRun) -> None:
        super().__init__(metric="map50", mode="max")
        self._run = run
        self._by_id: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next student as a Tune config; None while a running one must end first, FINISHED if there is none."""
        trial = self._run.plan.suggest(self._run.elapsed_s())
        if trial is None:
            return None if self._by_id else Searcher.FINISHED
        self._by_id[trial_id] = trial
        self._run.begin(trial)
        return {"number": trial.number, "seed": trial.seed, "subset": trial.subset, **trial.values}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Keep what is known about a student on disk."""
        trial = self._by_id[trial_id]
        self._run.refresh(trial)
        if trial.status != "running":
            trial.status = "running"  # until Tune knows it too
        self._run.save(trial)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """A trial is over: at its end, or stopped, or failed."""
        trial = self._by_id.pop(trial_id, None)
        if trial is not None:
            self._run.stop(trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' own files are what a resumed search reads."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing either."""

    def __getstate__(self) -> dict:
        return {}


class PlanScheduler(FIFOScheduler):
    """Stops a student where the plan makes it wait. Tune asks the scheduler before it tells the searcher."""

    def __init__(self, run: SearchRun) -> None:
        super().__init__()
        self._run = run

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Called after every epoch of a student."""
        student, epoch = self._run.plan.trials[trial.config["number"]], result.get("epoch", 0)
        self._run.refresh(student)
        self._run.advance(student, epoch)
        until = self._run.plan.until(student)
        return TrialScheduler.CONTINUE if until is None or epoch < until else TrialScheduler.STOP

    def __getstate__(self) -> dict:
        return {}


class Monitor(tune.Callback):
    """Looks after the clock and the nodes while Tune runs."""

    def __init__(self, run: SearchRun) -> None:
        self._run, self._looked = run, 0.0
        self._nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called after every Tune event."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        lost, self._nodes = self._nodes - alive, alive
        self._run.maintain(sorted(lost))

    def __getstate__(self) -> dict:
        return {}
