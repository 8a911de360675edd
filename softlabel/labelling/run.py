"""The labelling step: from tiles to soft labels, as one Ray Data job.

Work is handed out in shards, the row groups of the tiles' files. A shard's rows are committed, by rename, to a file
named after the shard, so a shard done twice (a retried task, a rerun) is there once, and a rerun does what is missing.
In the end all are packed into a few large files (softlabel.shards).
If Ray's job is ended from outside (a process, actor or node lost more often than Ray itself retries), another starts
for what is left, until more than ``execution.max_failures`` in a row get no further than the one before.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data.context import AutoscalingConfig
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import OutOfDiskError, RayError, RayTaskError
from ray.util.metrics import Counter as MetricCounter
from tqdm import tqdm

from softlabel.autoscaling import wait_for
from softlabel.config import Execution, Recipe
from softlabel.errors import DISK_FULL, SoftlabelError, StorageError, StoreError
from softlabel.imagery.scenes import read_tile
from softlabel.labelling import journal
from softlabel.labelling.job import LabelJob
from softlabel.labelling.reading import read_item
from softlabel.labelling.resources import Resources
from softlabel.labelling.speed import Speed
from softlabel.lease import Lease
from softlabel.packing import pack_store
from softlabel.recipe_file import dump_recipe
from softlabel.records import EMPTY, LABELLED, REJECTED
from softlabel.shards import STATUSES, committed, read_shard, retryable_counts, retryable_ids
from softlabel.storage import is_remote
from softlabel.store import DONE, STORE, finish, is_done, read_json, summary, write_json, write_text
from softlabel.terminal import progress, say

# A Ray started from here lets a reader wait for the model. Otherwise, with more idle processes than CPUs, as on a
# laptop, Ray ends those idle for a second, and the next shard pays seconds for another. (On a cluster see
# docs/cluster.md.)
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
# They are the only way to tell Ray Data an actor's name and how often to restart it; Ray has yet to replace them.
warnings.filterwarnings("ignore", message="`ray_remote_args")
_RAY_RETRIES = 5  # of a task or an actor, by Ray itself; its default for actors is to restart them for ever
# For an actor on a CPU, whose every pass asks for some 100 MB for activations: glibc gives that memory back and fetches
# it anew, page by page. Kept, and in huge pages, it is there at once: PyTorch labels 4 % more tiles.
KEEP_MEMORY = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={1 << 30}",
        f"glibc.malloc.trim_threshold={1 << 32}",
        f"glibc.malloc.top_pad={1 << 26}",
    )
)
# Concurrent calls of an actor: the last tiles of one shard are labelled, and it is committed, alongside the next. A GPU
# has several shards on their way to it and back.
_CALLS_OF_CPU, _CALLS_OF_GPU = 2, 4
# At most so many shards per task, at least so many tasks per reader: at the end readers wait for the longest task.
_MAX_SHARDS, _TASKS_PER_READER = 16, 32

Shard = tuple[int, int]
"""A job and one of its shards."""
Work = dict[Shard, int]
"""The number of tiles to label in each shard."""


def finished_store(job: LabelJob, run_dir: Path) -> Path:
    """The store that a job has filled.

    Raises:
        StoreError: It has not been filled, or not completely.
    """
    folder = job.folder(run_dir)
    if not is_done(folder):
        raise StoreError(f"{folder} is not finished: run `softlabel label` with the same recipe and --set first")
    return folder


def label(recipe: Recipe, jobs: Sequence[LabelJob], run_dir: Path, *, retry_rejected: bool = False) -> list[Path]:
    """Run labelling jobs that are not done yet, all in one Ray Data run, and return their stores.

    Args:
        recipe: Its ``execution`` and ``label`` sections are used.
        jobs: The teachers.
        run_dir: Where the stores go.
        retry_rejected: Read again the tiles whose failure may have been transient.

    Raises:
        StoreError: A store was made by something else, another run is writing it, its counts do not balance, too many
            tiles were rejected, no shard was finished for a long time, or there is no space left.
    """
    folders = [job.folder(run_dir) for job in jobs]
    for job, folder in zip(jobs, folders, strict=True):
        _claim(folder, job, recipe)
    opened = [i for i, folder in enumerate(folders) if _is_open(folder, retry_rejected)]
    with ExitStack() as held:
        leases = [held.enter_context(Lease(folders[i])) for i in opened]
        opened = [i for i in opened if _is_open(folders[i], retry_rejected)]  # its last holder may have finished it
        for i in opened:
            (folders[i] / DONE).unlink(missing_ok=True)
        work, again = _work(jobs, folders, opened, retry_rejected)
        speed = _label_missing(recipe.execution, jobs, folders, work, again, leases)
        for i in opened:
            _finish(jobs[i], folders[i], speed)
    for folder in folders:
        _check_rejected(folder, recipe.label.max_rejected_fraction)
    return folders


def _claim(folder: Path, job: LabelJob, recipe: Recipe) -> None:
    identity = job.identity()
    if not (folder / STORE).exists():
        write_json(folder / STORE, identity)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        return
    found = read_json(folder / STORE)
    differing = sorted(key for key in identity if found.get(key) != identity[key])
    if differing:
        differences = "; ".join(f"{key}: store {found.get(key)}, asked {identity[key]}" for key in differing)
        raise StoreError(f"{folder} was made by something else ({differences}): use another --run-dir")


def _is_open(folder: Path, retry_rejected: bool) -> bool:
    return not is_done(folder) or (retry_rejected and bool(summary(folder).get("retryable")))


def _work(
    jobs: Sequence[LabelJob], folders: Sequence[Path], opened: Sequence[int], retry_rejected: bool
) -> tuple[Work, set[Shard]]:
    """What is to be labelled, and which of those shards are there already and have tiles to read again."""
    work: Work = {}
    again: Work = {}
    for i in opened:
        done = committed(folders[i])
        work |= {(i, shard): count for shard, count in jobs[i].shards() if shard not in done}
        if retry_rejected:
            again |= {(i, shard): count for shard, count in retryable_counts(folders[i]).items()}
    return work | again, set(again)


def _label_missing(
    execution: Execution,
    jobs: Sequence[LabelJob],
    folders: Sequence[Path],
    work: Work,
    again: set[Shard],
    leases: Sequence[Lease],
) -> Speed:
    """Label until nothing is left: ``work`` is emptied on the way, ``again`` gains what has tiles to retry."""
    speed = Speed()
    if not work:
        return speed
    resources = wait_for(partial(_resources, execution), _there(execution).bundles, execution.wait_minutes)
    say(f"labelling {sum(work.values())} tiles in {len(work)} shards")
    failures, most_deaths = 0, _deaths(folders)
    with progress(total=sum(work.values()), unit="tile", desc="labelling") as bar:
        while work:
            before = len(work)
            try:
                for row in _results(resources, jobs, folders, work, again):
                    for lease in leases:
                        lease.check()
                    work.pop((row["job"], row["shard"]), None)
                    speed.add(row)
                    bar.set_postfix_str(speed.line(), refresh=False)
                    bar.update(row["tiles"])
            except RayError as error:
                _end_actors()  # what they still do would be overlooked below
                _raise_unless_lost(error, folders)
                _drop_committed(folders, work, again, bar)
                deaths = _deaths(folders)  # counts living readers too: only a new maximum is a step towards a culprit
                failures = 0 if len(work) < before or deaths > most_deaths else failures + 1
                most_deaths = max(deaths, most_deaths)
                if failures > execution.max_failures:
                    raise StoreError(f"labelling got no further in {failures} runs: {_one_line(error)}") from error
                say(f"labelling: {_one_line(error)}; going on with the {sum(work.values())} tiles left")
            except ExecutionTimeoutError as error:
                raise StoreError(_stalled(execution, folders, error)) from None
            finally:
                _end_actors()
    say(f"labelling: {speed.line()}")
    return speed


def _end_actors() -> None:
    """Kill the actors of the last run of Ray Data, which only drops its references to them.

    They take a second or two to end by themselves, in which the packing would need memory beside theirs. And after a
    failure, as long as anything refers to its error, and so to the actors, they keep CPUs and GPUs that the next run
    and the packing wait for.
    """
    while _Watching.actors:
        ray.kill(_Watching.actors.pop())


def _deaths(folders: Sequence[Path]) -> int:
    return sum(journal.deaths(folder) for folder in folders)


def _drop_committed(folders: Sequence[Path], work: Work, again: set[Shard], bar: tqdm) -> None:
    """Drop shards whose process died after committing but before saying so. (One that is retried is retried again.)"""
    done = [committed(folder) for folder in folders]
    for (i, shard), count in list(work.items()):
        if shard in done[i] and (table := read_shard(folders[i], shard)) is not None:
            if retryable_ids(table):
                again.add((i, shard))
            else:
                bar.update(count)
                del work[i, shard]


def _results(
    resources: Resources, jobs: Sequence[LabelJob], folders: Sequence[Path], work: Work, again: set[Shard]
) -> Iterator[dict]:
    """One Ray Data job over what is left, yielding its actors' reports on shards."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts tiles, not blocks
    context.target_max_block_size = 1  # a byte: each shard, whatever its size, is a block of its own
    context.raise_original_map_exception = True  # else a full disk is a line in a traceback, not an error to recognise
    context.custom_execution_callback_classes = [_Watching]
    context.execution_no_progress_timeout_s = resources.execution.stall_minutes * 60
    # Ray divides shards in hand by concurrent calls per actor: a pool would grow only at that many times the shards.
    growth = AutoscalingConfig()
    calls = _CALLS_OF_GPU if resources.execution.gpus_per_actor else _CALLS_OF_CPU
    growth.actor_pool_util_upscaling_threshold /= calls
    growth.actor_pool_util_downscaling_threshold /= calls
    context.autoscaling_config = growth
    items = [{"job": i, "shard": shard, "again": (i, shard) in again} for i, shard in work]
    labelled = (
        ray.data.from_items(items, override_num_blocks=_num_blocks(len(items), resources.readers))
        .map_batches(
            partial(read_item, jobs, folders, read_tile),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=resources.readers),
            num_cpus=resources.cpus_per_reader,
            max_retries=_RAY_RETRIES,
        )
        .map_batches(
            _Labeller,
            batch_size=1,  # one row, that is one shard
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=max(1, resources.least_actors),  # 0 waits for no GPU, but Ray Data takes no 0
                max_size=resources.most_actors,
                max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=True,
            ),
            num_cpus=resources.cpus_per_actor,
            num_gpus=resources.execution.gpus_per_actor or None,
            max_restarts=_RAY_RETRIES,
            max_task_retries=_RAY_RETRIES,
            runtime_env={"env_vars": {"GLIBC_TUNABLES": KEEP_MEMORY}},
            fn_constructor_args=(jobs, folders, resources.threads, resources.execution.batch_size),
        )
    )
    yield from labelled.iter_rows()


class _Watching(ExecutionCallback):
    """Knows the actors of a run, and drops what Ray Data notes about each block for a Dataset's statistics, which
    nobody asks for here: kilobytes a shard, kept until the end."""

    actors: ClassVar[list[ActorHandle]] = []  # Ray Data makes the instances itself

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Called by Ray Data at each turn of its loop."""
        for operator in executor._topology:
            for blocks in operator.get_stats().values():
                blocks.clear()
            for pool in operator.get_autoscaling_actor_pools():
                # A pool that is empty again is done, and its last actors are about to end.
                _Watching.actors[:] = pool._actor_to_logical_id or _Watching.actors


def _num_blocks(num_shards: int, readers: int) -> int:
    """How many tasks read the shards: each costs the driver memory for as long as the run lasts, and one that is lost
    is redone."""
    per_task = min(_MAX_SHARDS, max(1, num_shards // (_TASKS_PER_READER * readers)))
    return -(-num_shards // per_task)


def _resources(execution: Execution) -> Resources:
    resources = _there(execution)
    resources.check()
    return resources


def _there(execution: Execution) -> Resources:
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return Resources(execution, tuple(nodes), ray.cluster_resources().get("GPU", 0.0))


class _Labeller:
    """A Labeller in an actor, whose counts show on Ray's dashboard."""

    def __init__(self, jobs: Sequence[LabelJob], stores: Sequence[Path], threads: int, batch_size: int | None) -> None:
        from softlabel.labelling.labeller import Labeller  # imports torch, which the driver does without

        self._labeller = Labeller(jobs, stores, min(threads, os.cpu_count() or 1), batch_size)
        self._names = [store.name for store in stores]
        self._counters = {
            key: MetricCounter(f"softlabel_{key}", f"{key} of labelling", ("store",))
            for key in ("tiles", "empty", "rejected", "boxes", "pixels", "busy_s", "km2")
        }

    def __call__(self, read: pa.Table) -> pa.Table:
        result = self._labeller(read)
        (row,) = result.to_pylist()
        tags = {"store": self._names[row["job"]]}  # "job" is Prometheus's own label for what it scrapes
        for key, counter in self._counters.items():
            if row[key] > 0:
                counter.inc(row[key], tags)
        return result


def _raise_unless_lost(error: RayError, folders: Sequence[Path]) -> None:
    """Raise what another try would meet again; return if Ray lost a process, an actor, a node or an object."""
    for cause in _causes(error):
        if isinstance(cause, RayTaskError):  # may also be of its cause's class, with a traceback for a message
            continue
        if isinstance(cause, StorageError):  # which may be over by the next try
            return
        if isinstance(cause, SoftlabelError):
            raise cause from None
        full = isinstance(cause, OSError) and cause.errno in DISK_FULL
        if full or isinstance(cause, OutOfDiskError):
            raise StoreError(
                f"no space left on the disk of {folders[0]}, or on Ray's for spilling: free some and run the same again"
            ) from None
    if isinstance(error, RayTaskError) and any(not isinstance(cause, RayError) for cause in _causes(error)):
        raise error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _stalled(execution: Execution, folders: Sequence[Path], error: ExecutionTimeoutError) -> str:
    """What waited for what: Ray Data's own words about its stages, and what the journal says is in hand."""
    stages = "; ".join(line.strip(" -") for line in str(error).splitlines() if line.startswith("  - "))
    hands = [found for folder in folders for found in journal.in_hand(folder)]
    busy = [f"{stage} {tile_id} for {seconds:.0f} s" for stage, tile_id, seconds in hands]
    in_hand = ", ".join(busy[:5]) or "nothing, so the stages are waiting for free resources"
    free = ray.available_resources()
    return (
        f"no shard of tiles was finished for {execution.stall_minutes:g} minutes ({stages}). In progress: {in_hand}. "
        f"Free: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU. The same command goes on from here; if tiles "
        "really take that long, raise execution.stall_minutes"
    )


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _finish(job: LabelJob, folder: Path, speed: Speed) -> None:
    """Pack the store, check that requested = labelled + empty + rejected, and mark it done."""
    counts, requested = pack_store(folder, job.tiles, job.splits), sum(count for _, count in job.shards())
    if sum(counts[status] for status in STATUSES) != requested:
        raise StoreError(f"{folder} does not balance ({dict(counts)} of {requested}): delete it and label again")
    journal.forget_all(folder)
    if not is_remote(folder):  # a bucket has no half-written files
        for left in folder.glob("**/.*.*"):  # by processes that died while committing
            left.unlink(missing_ok=True)
    told = {"name": job.name, "requested": requested, **counts}
    finish(folder, {**told, "speed": speed.summary() if speed.tiles else None})
    empty = f" + {counts[EMPTY]} empty (no valid pixel)" if counts[EMPTY] else ""
    say(
        f"{job.name}: {requested} tiles asked for = {counts[LABELLED]} labelled{empty} + {counts[REJECTED]} "
        f"rejected ({counts['retryable']} retryable); {counts['boxes']} boxes, {counts['saturated']} tiles saturated"
    )


def _check_rejected(folder: Path, max_fraction: float) -> None:
    counts = summary(folder)
    share = counts[REJECTED] / max(counts["requested"], 1)
    if share > max_fraction:
        again = f"; {counts['retryable']} may be had with --retry-rejected" if counts["retryable"] else ""
        raise StoreError(
            f"{counts[REJECTED]} of {counts['requested']} tiles were rejected ({share:.0%}; label.max_rejected_fraction"
            f" is {max_fraction:.0%}): see the reasons in {folder / 'rejected'}{again}"
        )
