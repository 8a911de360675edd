"""The Ray that a command runs on: the cluster that it was submitted to, or one of its own; and its log."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from softlabel.errors import SessionError
from softlabel.terminal import MARK, log_to, say

LOG = "softlabel.log"
"""In the run folder: what Ray and other libraries say."""


class Terminated(BaseException):
    """SIGTERM, as `ray job stop` and a preempted machine send it: leave by way of every `finally`."""


@contextmanager
def ray_session(run_dir: Path, *, verbose: bool) -> Iterator[None]:
    """Ray, from here to the end; what it says goes to a log in the run folder, or to the terminal if ``verbose``.

    Raises:
        SessionError: Ray does not start, or there is no such cluster.
    """
    if verbose:
        with _ray():
            yield
        return
    _check_log(run_dir / LOG)
    with log_to(run_dir / LOG), _workers_heard(), _ray():
        yield


def _check_log(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()
    except OSError as error:
        raise SessionError(
            f"cannot write the log {path} ({error.strerror}): make room for it, or use --verbose"
        ) from None


@contextmanager
def _ray() -> Iterator[None]:
    """The cluster this runs in when it was submitted as a job, else a Ray of its own on this machine.

    A bare ray.init() would attach to whatever Ray happens to run here. RAY_ADDRESS with http:// is where jobs are
    submitted to, not a cluster to join.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    joined = bool(address) and not address.startswith("http")
    with mock.patch.dict(os.environ):
        if not joined:
            _settle_address()
        before = signal.signal(signal.SIGTERM, _terminate)
        # Ray Train frees a worker group's resources by asking the State API, which is part of the dashboard.
        with _said_in_one_line(address if joined else None):
            ray.init(address=address if joined else "local", include_dashboard=None if joined else True)
        signal.signal(signal.SIGTERM, _terminate)  # ray.init sets a handler of its own
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            ray.shutdown()


def _settle_address() -> None:
    """Settle where a Ray of our own will listen before it starts, so that all its processes know it.

    Ray's State API looks for any Ray on the machine where the environment names none, and with a second one there it
    fails: Ray Train does not free the resources of a worker group that was lost.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)


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
    """Says the lines of workers that are meant for the user; Ray forwards all of them."""
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
