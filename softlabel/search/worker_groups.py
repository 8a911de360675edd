"""Worker groups of Ray Train that live as long as a search, and train one student after another."""

import uuid
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from softlabel.config import Execution
from softlabel.errors import SoftlabelError
from softlabel.store import is_done, summary
from softlabel.training.job import scaling
from softlabel.training.targets import TrainJob

_TAKE_S = 60.0  # a group asks again after so long: ranks that wait for the first must not run into a timeout


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)  # its process holds Ray Train's controller for as long as it lives
def launch(dispatcher: Any, group: int, execution: Execution, folder: str) -> None:
    """One worker group, from the first student to the last; Ray Train begins it again whenever a worker dies."""
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
            storage_path=f"{folder}/ray",
            failure_config=ray.train.FailureConfig(max_failures=1000),  # the dispatcher counts, by student
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
    """Train one student and put it down. What goes wrong with it is its own end, not the group's."""
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
    except Exception as error:  # whatever a recipe's values or the data bring about
        status, reason = "failed", one_line(error)
        if ray.train.get_context().get_world_size() > 1:  # the other ranks wait for this one: begin the group again
            if isinstance(error, SoftlabelError):
                ray.get(dispatcher.release.remote(group, status, reason, [], 0.0))
            else:  # maybe no more than that another rank has died
                ray.get(dispatcher.note_failure.remote(group, reason))
            raise
    if is_first():
        history, seconds = (done["history"], done["seconds"]) if done else ([], 0.0)
        ray.get(dispatcher.release.remote(group, status, reason, history, seconds))


def one_line(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SoftlabelError) else f"{type(error).__name__}: {text}"
