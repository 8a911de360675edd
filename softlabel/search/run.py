"""The search on Ray: Tune decides which students train and for how long, a few Ray Train launches train them all.

A launch takes half a minute or more, so worker groups are started once and take student after student from a
dispatcher (dispatcher.py). A trial of Tune's only waits there: it holds no CPU, and stopping it frees its group at the
end of the epoch. What a student left in its folder is enough to go on, so a search that died is resumed from the disk
alone.
"""

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import tune

from softlabel.calibration import calibration_of
from softlabel.config import HARD, Execution, Recipe, Threshold
from softlabel.errors import StoreError, TrainingError
from softlabel.lease import Lease
from softlabel.recipe_file import dump_recipe, with_values
from softlabel.search.answer import answer
from softlabel.search.plan import Plan, has_failed
from softlabel.search.trainable import Student
from softlabel.search.trials import Trial
from softlabel.search.tuning import Monitor, PlanScheduler, PlanSearcher
from softlabel.search.worker_groups import WorkerGroups, num_groups
from softlabel.storage import ray_storage
from softlabel.store import finish, is_done, read_json, step_dir, write_json, write_text
from softlabel.terminal import say
from softlabel.training.arguments import check_soft, check_train_args
from softlabel.training.job import train_job
from softlabel.training.targets import STATE, WEIGHTS, TrainJob, truth_targets

# Ray Train repeats every print of a worker in its own log, which goes to the same terminal.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
# Else Ctrl-C counts as the end of the budget: an answer is written, and the test split is looked at.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

_KEPT = 5  # how many states of waiting students, at each rung, and how many weights of finished ones are kept
_SPARE = 15  # further weights kept while it runs, since the sixth best now may be the best in the end
_OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Inputs:
    """What a search works on.

    ``store`` holds the labels of the recipe's ``train.split``; values are judged on ``val_split``'s truth;
    ``automatic`` are thresholds that follow from the labels, by the name of the way they were found.
    """

    recipe: Recipe
    run_dir: Path
    tiles: Path
    store: Path
    val_split: str
    automatic: dict[str, Threshold]

    @property
    def folder(self) -> Path:
        """The search's, named after all that must stay the same when it is continued.

        Budget, ``execution``, and ``trials``, ``explore``, ``seeds``, ``max_failures`` and ``precision`` may change.
        """
        recipe = self.recipe
        hashed = {
            "student": recipe.train.student.model_dump(mode="json"),
            "threshold": recipe.train.threshold,
            **({} if recipe.train.soft == HARD else {"soft": recipe.train.soft.model_dump(mode="json")}),
            "search": recipe.search.model_dump(
                mode="json", exclude={"trials", "explore", "seeds", "max_failures", "precision"}
            ),
            "seed": recipe.seed,
            "split": recipe.train.split,
            "val_split": self.val_split,
            "tiles": self.tiles.name,
            "soft_labels": self.store.name,
        }
        if calibration := calibration_of(recipe):
            hashed["calibration"] = calibration.to_json()
        return step_dir(self.run_dir, "search", hashed)

    def job(self, trial: Trial) -> TrainJob:
        """The student of a trial."""
        recipe = with_values(self.recipe, trial.values).model_copy(update={"seed": trial.seed})
        return train_job(
            recipe,
            self.folder / "students",
            trial.name,
            recipe.train.student,
            tiles=self.tiles,
            split=recipe.train.split,
            val_split=self.val_split,
            soft_labels=self.store,
            threshold=recipe.train.threshold,
            subset=trial.subset,
        )


def search(inputs: Inputs, budget_s: float | None, *, resume: bool) -> Path:
    """Train students until the budget or the number of trials is used up; the search's folder holds the outcome.

    Args:
        inputs: What to search on.
        budget_s: Seconds that the search may take, including those of earlier runs that it goes on from.
        resume: Go on from an earlier run that died or had a smaller budget.

    Returns:
        The folder: ``search.json`` (trials, answer, costs), ``trials/``, ``students/``, ``tune/`` (TensorBoard).

    Raises:
        RecipeError: The cluster cannot hold one worker group.
        StoreError: There is an earlier run and ``resume`` is not set, or another driver is running it.
        TrainingError: There is no truth to judge by, or no student trained to the end.
    """
    folder = inputs.folder
    if (folder / "recipe.yaml").exists() and not resume:
        state = "finished" if is_done(folder) else "unfinished"
        raise StoreError(
            f"there is a search in {folder}, {state}: add --resume to go on with it, or use another --run-dir"
        )
    if resume and not (folder / "recipe.yaml").exists() and any(inputs.run_dir.glob("search-*/recipe.yaml")):
        say(f"the search that is in {inputs.run_dir} is of another recipe: a new one begins")
    _check(inputs)  # raises here, once and early, what would otherwise fail in every student
    groups = num_groups(inputs.recipe.execution)
    write_text(folder / "recipe.yaml", dump_recipe(inputs.recipe))
    with Lease(folder) as lease:
        run = _Search(inputs, budget_s, lease)
        run.train(groups)
        return run.finish()


def _check(inputs: Inputs) -> None:
    truth_targets(inputs.tiles, inputs.val_split)
    inputs.job(Trial(0, {}, inputs.recipe.seed, 1.0, "first", 0))


def check_space(recipe: Recipe) -> None:
    """Refuse a search space with values that no student can be made of.

    Raises:
        RecipeError: Naming the key.
    """
    space: dict[str, list] = {key: list(one.choices or [one.min, one.max]) for key, one in recipe.search.space.items()}
    alone = [{key: value} for key, values in space.items() for value in values]
    for values in (*alone, {key: values[0] for key, values in space.items()}):
        student = with_values(recipe, values).train.student
        check_train_args(student.args, "train.student", student.model)
    lowest = {key: min(values) for key, values in space.items() if key.startswith("train.threshold")}
    highest = {key: max(values) for key, values in space.items() if key.startswith("train.soft.ignore_above")}
    narrowest = with_values(recipe, {**lowest, **highest})
    check_soft(narrowest, [narrowest.train.threshold])


class _Search:
    """One run of a search: its plan, its clock, and what it writes."""

    def __init__(self, inputs: Inputs, budget_s: float | None, lease: Lease) -> None:
        self.inputs, self.folder, self._lease = inputs, inputs.folder, lease
        self.budget_s, self._began = budget_s, time.monotonic()
        self._before = read_json(self._clock) if self._clock.exists() else {"seconds": 0.0, "capacity_s": 0.0}
        trials = [Trial(**read_json(path)) for path in (self.folder / "trials").glob("*.json")]
        trials.sort(key=lambda trial: trial.number)
        mended = has_failed(trials)  # the cause is taken to be fixed, or the search would end at once
        for trial in trials if self._has_time() else []:
            if trial.reason == _OUT_OF_TIME or (mended and trial.status == "failed"):
                trial.status, trial.reason = "running", ""
        self.plan = Plan(inputs.recipe, trials, list(inputs.automatic.values()), budget_s)
        self._groups = WorkerGroups(inputs.recipe.execution, self.folder, inputs.recipe.search.max_failures)
        self.dispatcher = self._groups.dispatcher
        self.num_groups = 0

    @property
    def _clock(self) -> Path:
        return self.folder / "clock.json"

    def elapsed_s(self) -> float:
        """Seconds that this run and those before it have taken."""
        return self._before["seconds"] + time.monotonic() - self._began

    def train(self, num_groups: int) -> None:
        """Run Tune over worker groups until there is nothing more to do, or no time."""
        if not self._has_time() or self.plan.is_over(self.elapsed_s()):
            return
        self.num_groups = num_groups
        say(f"searching {', '.join(self.inputs.recipe.search.space)} with {num_groups} students at a time")
        self._groups.start(num_groups)
        trainable = tune.with_parameters(Student, dispatcher=self.dispatcher)
        tuner = tune.Tuner(
            # A byte of memory and no CPU: a trial only waits, and the students would lack any CPUs that it held.
            tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 1}])),
            tune_config=tune.TuneConfig(
                metric="map50",
                mode="max",
                search_alg=PlanSearcher(self),
                scheduler=PlanScheduler(self),
                num_samples=-1,  # until the plan ends it: a student that waited comes back as another Tune trial
                max_concurrent_trials=num_groups,
                time_budget_s=None if self.budget_s is None else self.budget_s - self.elapsed_s(),
                reuse_actors=True,
                trial_name_creator=lambda trial: f"student-{trial.config['number']:03d}",
                trial_dirname_creator=lambda trial: f"student-{trial.config['number']:03d}-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name=f"tune-{uuid.uuid4().hex[:6]}",
                **ray_storage(self.folder / "tune"),
                callbacks=[Monitor(self)],
                failure_config=tune.FailureConfig(max_failures=self.inputs.recipe.search.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the students' folders have it all
                verbose=1,
            ),
        )
        try:
            tuner.fit()
        finally:
            self._close()

    def _has_time(self) -> bool:
        return self.budget_s is None or self.elapsed_s() < self.budget_s

    def begin(self, trial: Trial) -> None:
        """Hand a student to the dispatcher."""
        job = self.inputs.job(trial)
        trial.folder = job.folder.name
        values = ", ".join(f"{key} {value}" for key, value in trial.values.items())
        say(f"{trial.name}: {values}, seed {trial.seed}")
        self.save(trial)
        ray.get(self.dispatcher.submit.remote(trial.name, job, self.plan.until(trial)))

    def advance(self, trial: Trial, epoch: int) -> None:
        """Let a student that has reached the epoch where it would wait go on, if it may."""
        before = self.plan.until(trial)
        self.plan.advance(trial, epoch)
        if self.plan.until(trial) != before:
            ray.get(self.dispatcher.extend.remote(trial.name, self.plan.until(trial)))

    def stop(self, trial: Trial) -> None:
        """Withdraw a student from the dispatcher, whatever became of it."""
        ray.get(self.dispatcher.stop.remote(trial.name))
        self.refresh(trial)
        self.save(trial)
        self._clean(_KEPT + _SPARE)

    def refresh(self, trial: Trial) -> None:
        """Update a student with what the dispatcher knows about it."""
        found = ray.get(self.dispatcher.status.remote(trial.name))
        if found["status"] in ("stopped", "finished", "failed"):
            trial.status, trial.reason = found["status"], found["reason"]
        if len(found["history"]) >= trial.epoch:
            trial.history, trial.seconds = found["history"], found["seconds"]

    def save(self, trial: Trial) -> None:
        """Commit what is known about a student, and the search's clock."""
        write_json(self.folder / "trials" / f"{trial.name}.json", trial.to_dict())
        self.save_clock()

    def save_clock(self) -> None:
        """Commit how long the search has taken."""
        seconds = time.monotonic() - self._began
        capacity = self._before["capacity_s"] + seconds * self.num_groups
        write_json(self._clock, {"seconds": self._before["seconds"] + seconds, "capacity_s": capacity})

    def _clean(self, weights: int) -> None:
        """Keep only states that may be resumed and weights that may be asked for; the disk is not endless."""
        waiting = [trial.values for trial in self.plan.stopping.waiting(_KEPT)]
        full = [trial.values for trial in self.plan.trials if trial.is_full]
        best = [values for values in self.plan.leaders() if values in full]
        for status, file, wanted in (("stopped", STATE, waiting), ("finished", WEIGHTS, best[:weights])):
            for trial in self.plan.trials:
                if trial.status == status and trial.values not in (*wanted, *self.plan.references):
                    (self._student(trial) / file).unlink(missing_ok=True)
        for trial in self.plan.trials:
            if trial.status == "failed":
                (self._student(trial) / STATE).unlink(missing_ok=True)

    def _student(self, trial: Trial) -> Path:
        return self.folder / "students" / trial.folder

    def maintain(self, lost_nodes: list[str]) -> None:
        """Look after lease, clock and worker groups."""
        self._lease.check()
        self.save_clock()
        self._groups.maintain(lost_nodes)

    def _close(self) -> None:
        self._groups.send_home()
        if self._lease.is_held:  # else the folder is another driver's now
            self._settle()
        self._groups.end()

    def _settle(self) -> None:
        """Once the groups have ended, record what became of the students in hand, and delete what is not needed."""
        for trial in self.plan.trials:
            if trial.status == "running":
                self.refresh(trial)
                if trial.status == "stopped":  # because its group ended, not by the plan
                    trial.status = "running"
                self.save(trial)
        self._clean(_KEPT)
        self.save_clock()
        self._groups.remove_traces()

    def finish(self) -> Path:
        """Write search.json."""
        trials = self.plan.trials
        for trial in trials:
            if trial.status == "running":
                trial.status, trial.reason = "stopped", _OUT_OF_TIME
                self.save(trial)
        if not any(trial.is_full for trial in trials):
            reasons = list(dict.fromkeys(trial.reason for trial in trials if trial.reason))
            raise TrainingError(
                f"no student trained to the end ({len(trials)} begun; {'; '.join(reasons[:3]) or 'the budget ended'}): "
                "give it a larger --budget with --resume, or correct what failed"
            )
        if has_failed(trials):
            say(f"stopped by consecutive failures, the last: {trials[-1].reason}: fix that and continue with --resume")
        clock = read_json(self._clock)
        trained = sum(sum(row["seconds"] for row in trial.history) for trial in trials)
        results = {
            "answer": answer(self.plan.search, trials, self.plan.references),
            "trials": [trial.to_dict() for trial in trials],
            "space": {key: one.model_dump(mode="json") for key, one in self.plan.search.space.items()},
            "classes": list(self.inputs.recipe.classes),
            "references": self.plan.references,
            "automatic": self.inputs.automatic,
            "seconds": clock["seconds"],
            "epochs": sum(trial.epoch for trial in trials),
            "start_up_share": max(0.0, 1 - trained / max(clock["capacity_s"], 1e-9)),
            **_hours(self.inputs.recipe.execution, clock["capacity_s"]),
        }
        write_json(self.folder / "search.json", results)
        finish(self.folder, {"name": "search", "trials": len(trials), "seconds": clock["seconds"]})
        return self.folder


def _hours(execution: Execution, capacity_s: float) -> dict[str, float]:
    hours = capacity_s / 3600 * execution.workers
    return {"cpu_hours": hours * execution.cpus_per_worker, "gpu_hours": hours * execution.gpus_per_worker}
