"""What a user reads: our own lines, and progress. All else that is printed goes to the run's log while there is one.

Libraries print and log to stdout and stderr, some of them from C++. While a log is open, both file descriptors lead to
it, and so do sys.stdout and sys.stderr; `say` and `progress` write to where those led before.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from softlabel.errors import SessionError

MARK = "softlabel: "
"""How a worker's line begins if it is for the user."""
_LINE_S = 30.0


class _Terminal(NamedTuple):
    out: TextIO
    err: TextIO


_kept: list[_Terminal] = []  # where stdout and stderr led before a log was opened


def say(text: str) -> None:
    """Print a line for the user, or several, clear of any progress bar."""
    terminal = _terminal()
    with tqdm.external_write_mode(file=terminal.err):
        print(text, file=terminal.out, flush=True)


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm with its own options: a bar on a terminal; elsewhere separate lines, since a bar would be endless."""
    err = _terminal().err
    if err.isatty():
        return tqdm(iterable, mininterval=2, file=err, **options)
    return _Lines(iterable, mininterval=_LINE_S, maxinterval=_LINE_S, ncols=0, file=err, **options)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append to a file what anybody but `say` and `progress` prints to stdout and stderr.

    The file stays open: a library may have made a log handler for it, and write to it later.

    Raises:
        SessionError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = open(path, "a", buffering=1, errors="replace")  # noqa: SIM115
    except OSError as error:
        raise SessionError(f"cannot write the log {path} ({error.strerror}): move it, or use --verbose") from None
    before, descriptors = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    terminal = _Terminal(*(_copy(stream, fd) for stream, fd in zip(before, descriptors, strict=True)))
    for fd in (1, 2):
        os.dup2(log.fileno(), fd)
    sys.stdout = sys.stderr = log
    _kept.append(terminal)
    try:
        yield
    finally:
        _kept.pop()
        sys.stdout, sys.stderr = before
        for fd, kept in zip((1, 2), descriptors, strict=True):
            os.dup2(kept, fd)
            os.close(kept)
        for stream in {*terminal} - {*before}:
            stream.close()


def _terminal() -> _Terminal:
    return _kept[-1] if _kept else _Terminal(sys.stdout, sys.stderr)


def _copy(stream: TextIO, descriptor: int) -> TextIO:
    """A stream to where ``stream`` leads now, even after its file descriptor leads elsewhere."""
    stream.flush()
    try:
        if stream.fileno() > 2:
            return stream
    except io.UnsupportedOperation:  # it has none, as when a test captures it
        return stream
    return open(os.dup(descriptor), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)


class _Lines(tqdm):
    """Lines instead of a bar, each with another count."""

    _said: float = -1

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Write whole lines, where tqdm begins each with a carriage return."""

        def write(text: str) -> None:
            file.write(f"{text.strip()}\n")
            file.flush()

        return write

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Say how far it has got, if that has changed."""
        if self.n != self._said:
            self._said = self.n
            super().display(msg, pos)

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: a printed line stays."""

    def close(self) -> None:
        """Print the last line, without the empty one that follows a bar."""
        if not self.disable:
            self.display()
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]
