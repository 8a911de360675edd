"""How actors and readers share a cluster: plain arithmetic on the recipe's ``execution`` and on what is there."""

import math
from dataclasses import dataclass

from softlabel.config import Execution
from softlabel.errors import RecipeError


@dataclass(frozen=True)
class Resources:
    """The recipe's ``execution`` on a cluster: the CPUs of each node, and the GPUs of all together."""

    execution: Execution
    node_cpus: tuple[float, ...]
    gpus: float

    @property
    def least_actors(self) -> int:
        """Actors to start with."""
        return self.execution.actors if isinstance(self.execution.actors, int) else self.execution.actors[0]

    @property
    def most_actors(self) -> int:
        """Actors that the pool may grow to."""
        return self.execution.actors if isinstance(self.execution.actors, int) else self.execution.actors[1]

    @property
    def reader_cpus_per_actor(self) -> float:
        """As the recipe says; otherwise little without GPUs, since the model needs the CPUs, and with GPUs all that the
        actors leave: one core decodes some hundred tiles of 512 px a second, and a GPU labels thousands. Ray Data makes
        readers wait where the model is slower."""
        if self.execution.reader_cpus_per_actor is not None:
            return self.execution.reader_cpus_per_actor
        if not self.execution.gpus_per_actor:
            return 0.25
        return max(1.0, math.floor(sum(self.node_cpus) / self.most_actors - self.cpus_per_actor))

    @property
    def cpus_per_reader(self) -> float:
        """CPUs of one reading task."""
        return min(1.0, self.reader_cpus_per_actor)

    @property
    def readers(self) -> int:
        """How many reading tasks run at once."""
        return max(1, round(self.reader_cpus_per_actor / self.cpus_per_reader)) * self.most_actors

    @property
    def cpus_per_actor(self) -> float:
        """As the recipe says; otherwise 1 with GPUs, and without them an even share of all that the readers leave."""
        if self.execution.cpus_per_actor is not None:
            return self.execution.cpus_per_actor
        if self.execution.gpus_per_actor:
            return 1.0
        shares = (node / count for node in self.node_cpus if node for count in range(1, self.most_actors + 1))
        fitting = (share for share in shares if self._places(share) >= min(self.most_actors, self._places(0.25)))
        share = max(fitting, default=0.0)
        return max(0.25, math.floor((share - self.reader_cpus_per_actor) * 100) / 100)

    def _places(self, cpus: float) -> int:
        """How many actors of ``cpus`` CPUs there is room for, each on one node."""
        return sum(math.floor(node / cpus + 1e-9) for node in self.node_cpus)

    @property
    def threads(self) -> int:
        """Threads of one actor's forward pass: the CPUs it reserves, rounded up."""
        return math.ceil(self.cpus_per_actor)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What has to be there at least: the actors to start with and a reader, each on one node."""
        actor = {"CPU": self.cpus_per_actor, "GPU": self.execution.gpus_per_actor}
        return [*[actor] * self.least_actors, {"CPU": self.cpus_per_reader}]

    def check(self) -> None:
        """Refuse what could never start: an actor pool that takes every CPU silently starves the readers.

        Raises:
            RecipeError: It says what is needed, what is there and which key to lower.
        """
        for resource, needed, there in (
            ("CPU", self.least_actors * self.cpus_per_actor + self.cpus_per_reader, sum(self.node_cpus)),
            ("GPU", self.least_actors * self.execution.gpus_per_actor, self.gpus),
        ):
            if needed > there:
                raise RecipeError(
                    f"labelling needs {needed:g} {resource} ({self.least_actors} actors and a reader), the cluster has "
                    f"{there:g}: lower execution.actors or execution.{resource.lower()}s_per_actor, or raise "
                    "execution.wait_minutes where an autoscaler brings more"
                )
