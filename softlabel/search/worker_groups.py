"""Worker groups of Ray Train that live as long as a search, and train one student after another."""

import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from softlabel.autoscaling import wait_for
from softlabel.config import Execution, Recipe
from softlabel.errors import RecipeError, SoftlabelError, TrainingError
from softlabel.lease import Lease
from softlabel.recipe_file import dump_recipe
from softlabel.search.dispatcher import Dispatcher
from softlabel.storage import ray_storage, remove_tree
from softlabel.store import is_done, summary, write_text
from softlabel.terminal import say
from softlabel.training.job import scaling
from softlabel.training.targets import TrainJob

_TAKE_S = 60.0  # a group asks again after this long, lest the ranks that wait for the first run into a timeout
_LOOK_S = 10.0
_LEAVE_S = 60.0  # for groups to end by themselves
_MAX_ENDED = 5  # groups that Ray Train may give up, in all


class WorkerGroups:
    """The groups of one run, and the dispatcher from which they take students.

    The dispatcher and the groups' Ray Train controllers run on this node: they are lost with it, and with no other.

    Args:
        execution: How large a group is.
        folder: The run's; what Ray Train writes there is gone at the end.
        max_failures: How often a student may be restarted after its workers died.
    """

    def __init__(self, execution: Execution, folder: Path, max_failures: int) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.dispatcher = ray.remote(num_cpus=0, scheduling_strategy=here)(Dispatcher).remote(max_failures)
        self._launcher = launch.options(scheduling_strategy=here)
        self._execution, self._folder = execution, folder
        self._groups: dict[ray.ObjectRef, int] = {}
        self._ended = 0

    def start(self, count: int) -> None:
        """Launch this many groups."""
        self._groups = {self._launch(i): i for i in range(count)}

    def maintain(self, lost_nodes: list[str]) -> None:
        """Give the students of lost nodes to other groups, and relaunch those that ended, as with their controller.

        Raises:
            TrainingError: Groups end again and again.
        """
        if lost_nodes:
            self.dispatcher.nodes_lost.remote(lost_nodes)
        ended, _ = ray.wait(list(self._groups), num_returns=len(self._groups), timeout=0)
        for reference in ended:
            group = self._groups.pop(reference)
            self._ended += 1
            if self._ended > _MAX_ENDED:
                try:
                    ray.get(reference)
                except RayError as error:
                    raise TrainingError(f"worker groups keep ending unexpectedly: {one_line(error)}") from None
            self._groups[self._launch(group)] = group

    def send_home(self) -> None:
        """Let each group hand its student back after the epoch it is in, and end; the dispatcher can still be asked."""
        self.dispatcher.close.remote()
        _, staying = ray.wait(list(self._groups), num_returns=len(self._groups), timeout=_LEAVE_S)
        for group in staying:
            ray.cancel(group, force=True)

    def end(self) -> None:
        """Kill the dispatcher, to which Tune keeps a handle."""
        ray.kill(self.dispatcher)

    def remove_traces(self) -> None:
        """Delete what Ray Train has written."""
        remove_tree(self._folder / "ray")

    def _launch(self, group: int) -> ray.ObjectRef:
        return self._launcher.remote(self.dispatcher, group, self._execution, self._folder)


def train_side_by_side(recipe: Recipe, jobs: Sequence[TrainJob], folder: Path) -> dict[str, str]:
    """Train the jobs that are not done. When run again after an interruption, each goes on from its last epoch.

    Args:
        recipe: Its ``execution`` says how large a worker group is, its ``search.max_failures`` how often a student may
            be restarted.
        jobs: Their names differ.
        folder: The run's, which only one driver may use at a time.

    Returns:
        Why students failed, by name; empty where all are trained.

    Raises:
        RecipeError: The cluster cannot hold one worker group.
        StoreError: Another driver is using the folder.
        TrainingError: Worker groups end by themselves, again and again.
    """
    missing = [job for job in jobs if not is_done(job.folder)]
    if not missing:
        return {}
    count = min(num_groups(recipe.execution), len(missing))
    for job in missing:
        write_text(job.folder / "recipe.yaml", dump_recipe(recipe))
    with Lease(folder) as lease:
        groups = WorkerGroups(recipe.execution, folder, recipe.search.max_failures)
        say(f"training {len(missing)} models, {count} at a time")
        try:
            groups.start(count)
            return _wait_for(missing, groups, lease)
        finally:
            groups.send_home()
            groups.end()
            if lease.is_held:
                groups.remove_traces()


def _wait_for(jobs: list[TrainJob], groups: WorkerGroups, lease: Lease) -> dict[str, str]:
    dispatcher, failed = groups.dispatcher, dict[str, str]()
    for job in jobs:  # one after the other, since they are taken in this order
        ray.get(dispatcher.submit.remote(job.name, job))
    waiting = {dispatcher.wait.remote(job.name, 0): job.name for job in jobs}
    nodes = _alive()
    while waiting:
        (ready, _), before = ray.wait(list(waiting), timeout=_LOOK_S), nodes
        nodes = _alive()
        lease.check()
        groups.maintain(sorted(before - nodes))
        for reference in ready:
            name, found = waiting.pop(reference), ray.get(reference)
            if found["status"] in ("waiting", "training"):
                waiting[dispatcher.wait.remote(name, len(found["history"]))] = name
                continue
            if found["status"] == "failed":
                failed[name] = found["reason"]
            said = " ".join((name, found["status"], found["reason"])).rstrip()
            say(f"{len(jobs) - len(waiting)} of {len(jobs)} students: {said}")
    return failed


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def num_groups(execution: Execution) -> int:
    """How many worker groups fit into the cluster at once; waits up to ``execution.wait_minutes`` for room for one.

    Raises:
        RecipeError: Not even one fits.
    """
    worker = {"CPU": execution.cpus_per_worker, "GPU": execution.gpus_per_worker}
    return wait_for(partial(_num_groups, execution), [worker] * execution.workers, execution.wait_minutes)


def _num_groups(execution: Execution) -> int:
    workers = 0
    for node in ray.nodes():
        if node["Alive"]:
            there = node["Resources"]
            fits = there.get("CPU", 0.0) / execution.cpus_per_worker
            if execution.gpus_per_worker:
                fits = min(fits, there.get("GPU", 0.0) / execution.gpus_per_worker)
            workers += int(fits + 1e-6)
    if workers < execution.workers:
        needed = f"{execution.workers} workers of {execution.cpus_per_worker:g} CPU, {execution.gpus_per_worker:g} GPU"
        raise RecipeError(
            f"a student needs {needed}, and {workers} fit: lower execution.workers, cpus_per_worker or "
            "gpus_per_worker, or raise execution.wait_minutes where an autoscaler brings more"
        )
    return workers // execution.workers


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)  # its process keeps Ray Train's controller for as long as it lives
def launch(dispatcher: Any, group: int, execution: Execution, folder: Path) -> None:
    """One worker group, from the first student to the last; Ray Train restarts it whenever a worker dies."""
    TorchTrainer(
        _worker,
        train_loop_config={
            "dispatcher": dispatcher,
            "group": group,
            "cpu_threads": max(1, int(execution.cpus_per_worker)),
        },
        scaling_config=ray.train.ScalingConfig(**scaling(execution)),
        run_config=ray.train.RunConfig(
            name=f"group-{group}-{uuid.uuid4().hex[:6]}",
            **ray_storage(folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=1000),  # the dispatcher counts them, by student
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    """The training function of every worker: students until the dispatcher closes."""
    from softlabel.training.trainer import set_up

    set_up()
    while (job := _take(config)) is not None:
        _train(job, config)


def _take(config: dict[str, Any]) -> TrainJob | None:
    from softlabel.training.ranks import from_first

    node = ray.get_runtime_context().get_node_id()
    while True:
        found = from_first(lambda: ray.get(config["dispatcher"].next_job.remote(config["group"], node, _TAKE_S)))
        if found != "wait":
            return None if found == "close" else found


def _train(job: TrainJob, config: dict[str, Any]) -> None:
    """Train one student and hand it back. What goes wrong with it ends the student, not the group."""
    from softlabel.training.ranks import is_first
    from softlabel.training.trainer import Stopped, finish_model, train_model

    dispatcher, group = config["dispatcher"], config["group"]
    status, reason, done = "finished", "", None
    try:
        if is_done(job.folder):
            done = summary(job.folder)
        else:
            trainer = train_model(
                job,
                config["cpu_threads"],
                lambda history, seconds: ray.get(dispatcher.report.remote(group, history, seconds)),
            )
            finish_model(job, done := trainer.summary())
    except Stopped:
        status = "stopped"
    except Exception as error:  # anything that a recipe's values or the data may cause
        status, reason = "failed", one_line(error)
        if ray.train.get_context().get_world_size() > 1:  # the other ranks wait for this one: restart the group
            if isinstance(error, SoftlabelError):
                ray.get(dispatcher.release.remote(group, status, reason, [], 0.0))
            else:  # perhaps only because another rank has died
                ray.get(dispatcher.note_failure.remote(group, reason))
            raise
    if is_first():
        history, seconds = (done["history"], done["seconds"]) if done else ([], 0.0)
        ray.get(dispatcher.release.remote(group, status, reason, history, seconds))


def one_line(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SoftlabelError) else f"{type(error).__name__}: {text}"
