"""The Ray that a command runs on: the cluster that it was submitted to, or a Ray of its own; and its log."""

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from softlabel.errors import DISK_FULL, SessionError, StorageError
from softlabel.storage import has_conditions, is_remote, upload
from softlabel.terminal import MARK, log_to, say

LOG = "softlabel.log"
"""In the run folder: what Ray and other libraries say."""


class Terminated(BaseException):
    """SIGTERM, as `ray job stop` and a preempted machine send it: leave through every `finally`."""


@dataclass(frozen=True)
class Cluster:
    """What there is to compute on: the CPUs of each node, and the total number of GPUs."""

    node_cpus: tuple[float, ...]
    gpus: int


def name_log(run_dir: Path, verbose: bool) -> None:
    """Say where the log is, if there is one."""
    if not verbose:
        say(f"log: {run_dir / LOG}")


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before hours of work are lost to it.

    Raises:
        SessionError: It cannot be written to, or its bucket ignores the conditions of writes.
        StorageError: Its bucket cannot be written to.
    """
    if is_remote(folder):
        if not has_conditions(folder):
            problem = "its server ignores If-None-Match or If-Match, which keep two runs from writing there at once"
            raise SessionError(f"cannot write to {folder} ({problem}): give another folder, or use a newer server")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        reason = "it is a file" if folder.is_file() else error.strerror
        raise SessionError(f"cannot write to {folder} ({reason}): give another folder") from None


@contextmanager
def ray_session(run_dir: Path, *, verbose: bool) -> Iterator[bool]:
    """Run Ray for the block; what it prints goes to a log in the run folder, or to the terminal if ``verbose``. Yields
    whether a cluster was joined.

    Raises:
        SessionError: Ray does not start, there is no such cluster, or the log cannot be written.
    """
    if verbose:
        with _ray() as joined:
            yield joined
        return
    with _log_at(run_dir / LOG), _workers_heard(), _ray() as joined:
        yield joined


@contextmanager
def _log_at(path: Path) -> Iterator[None]:
    """`log_to`; for a bucket, where no line can be appended, the log is on this machine and is uploaded at the end."""
    if not is_remote(path):
        with log_to(path):
            yield
        return
    log = Path(tempfile.mkdtemp(prefix="softlabel-")) / LOG
    if path.exists():  # of the run that this one resumes
        log.write_bytes(path.read_bytes())
    try:
        with log_to(log):
            yield
    finally:
        try:
            upload(log, path)
            shutil.rmtree(log.parent)
        except StorageError:  # whatever else went wrong is what the user should be told
            say(f"the log stays on this machine, in {log}: {path} cannot be written")


def cluster(*, joined: bool) -> Cluster:
    """The resources that Ray counts; unless a cluster was ``joined``, only those GPUs that PyTorch can use."""
    import ray

    nodes = tuple(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    gpus = int(ray.cluster_resources().get("GPU", 0.0))
    if joined or not gpus:
        return Cluster(nodes, gpus)
    import torch

    usable = min(gpus, torch.cuda.device_count())
    if usable < gpus:
        say(f"PyTorch {torch.__version__} can use {usable} of the {gpus} GPUs here: install one built for them")
    return Cluster(nodes, usable)


@contextmanager
def _ray() -> Iterator[bool]:
    """Join the cluster that this was submitted to as a job, else start a Ray of our own on this machine; yields whether
    a cluster was joined.

    A bare ray.init() would attach to whatever Ray happens to run here. RAY_ADDRESS with http:// is where jobs are
    submitted, not a cluster to join.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    joined = bool(address) and not address.startswith("http")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with mock.patch.dict(os.environ):
            with _said_in_one_line(address if joined else None):
                ray.init(**(_join(address) if joined else _start()))
            signal.signal(signal.SIGTERM, _terminate)  # ray.init sets a handler of its own
            try:
                with _terminated_in_c():
                    yield joined
            finally:
                ray.shutdown()
    finally:
        signal.signal(signal.SIGTERM, before)


# Where a process's environment names no Ray, Ray's State API looks for any on the machine, and fails if there is a
# second one: Ray Train then does not free the resources of a worker group that was lost. So every process is told.


def _join(address: str) -> dict[str, Any]:
    """Arguments of ray.init to join a cluster, whose processes run already: runtime environments tell ours."""
    told = {} if address == "auto" else {"runtime_env": {"env_vars": {"RAY_ADDRESS": address}}}
    return {"address": address, **told}


def _start() -> dict[str, Any]:
    """Arguments of ray.init to start a Ray of our own: where it will listen is settled first, and inherited by all."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)
    # Ray Train frees a worker group's resources by asking the State API, which is part of the dashboard.
    return {"address": "local", "include_dashboard": True}


@contextmanager
def _terminated_in_c() -> Iterator[None]:
    """Raise again the exception that a signal handler raised in Ray's C code, which makes it a SystemError."""
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, Terminated):
            raise error.__cause__ from None
        raise


@contextmanager
def _said_in_one_line(joined: str | None) -> Iterator[None]:
    try:
        yield
    except SystemExit:  # what Ray makes of SIGTERM while it starts
        raise Terminated from None
    except Exception as error:  # Ray raises all kinds
        text = " ".join(str(error).split())
        if joined is not None:
            raise SessionError(f"cannot join the Ray at {joined} ({text[:300]}): check address and token") from error
        if "AF_UNIX" in text:
            remedy = "the folder for its sockets has too long a path: set RAY_TMPDIR to a shorter one, such as /tmp"
        elif "timed out" in text:
            remedy = "this machine was too busy: try again, or set RAY_raylet_start_wait_time_s=300"
        else:
            remedy = "run it again with --verbose"
        raise SessionError(f"Ray did not start ({type(error).__name__}: {text[:200]}): {remedy}") from error


@contextmanager
def _workers_heard() -> Iterator[None]:
    """Print those lines of workers that are meant for the user; Ray forwards all of them."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as forwarded

    forwarded.add_handler(LOG, _pass_on)
    try:
        yield
    finally:
        forwarded.remove_handler(LOG)


def _pass_on(data: dict) -> None:
    for line in data["lines"]:
        if line.startswith(MARK):
            say(line.removeprefix(MARK).rstrip())


def _terminate(_signal: int, _frame: object) -> None:
    raise Terminated
