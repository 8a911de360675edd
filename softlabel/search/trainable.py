"""A trial of Ray Tune's: it waits at the dispatcher for its student's epochs. Its process imports this file and little
else, since a search starts several."""

from typing import Any

import ray
from ray import tune

from softlabel.search.trials import Trial


class Student(tune.Trainable):
    """A trial: it waits at the dispatcher for its student's epochs. Its process outlives it and serves the next."""

    def setup(self, config: dict[str, Any], dispatcher: Any = None) -> None:
        """Remember whom to wait for."""
        self._dispatcher, self._name, self._seen = dispatcher, Trial.name_of(config["number"]), 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another student in the same process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One more epoch of the student."""
        found = ray.get(self._dispatcher.wait.remote(self._name, self._seen))
        history = found["history"]
        self._seen = min(self._seen + 1, len(history))
        best = max((row["map50"] for row in history[: self._seen]), default=0.0)
        ended = found["status"] not in ("waiting", "training") and self._seen >= len(history)
        return {"map50": best, "epoch": self._seen, "done": ended}
