"""What is on disk: step folders named by a hash of what determines them, and files that appear whole or not at all.

A run folder holds ``<step>-<hash>/`` folders. A step's last act is to write its marker (``done.json``) by rename, so
half-finished work is never taken for a result.
"""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.errors import StoreError
from softlabel.storage import is_remote, location, upload

FORMAT_VERSION = 7
"""The format of everything below a run folder. 2: one normaliser per loss term; 3: tiles know their scene's stamp,
teachers their engine; 4: pixels as a person sees them, empty tiles, truth of unknown class; 5: rotated boxes beside
upright ones; 6: how well the candidates of a box agreed; 7: tiles in files of bounded size."""
_HASHED_VERSION = 4
"""Part of every step's hash: the last version that changed what steps make of the same inputs."""
DONE = "done.json"
STORE = "store.json"
"""What a store of soft labels was made from."""


def digest(value: Any) -> str:
    """10 hex digits of the SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def file_digest(path: Path | str) -> str:
    """10 hex digits of the SHA-256 of a file's bytes."""
    with location(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def step_dir(run_dir: Path, name: str, inputs: Any) -> Path:
    """The folder of a step: its name and a hash of all that determines its result, upstream folders included."""
    return run_dir / f"{name}-{digest({'format_version': _HASHED_VERSION, 'inputs': inputs})}"


def commit(path: Path, write: Callable[[Path], object], *, sync: bool = True) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place; for a bucket, fill a local one,
    then upload it.

    A kill at any moment leaves either the old file or the whole new one, and so does a loss of power with ``sync``;
    temporary names start with a dot.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="softlabel-") as scratch:
            write(made := Path(scratch) / path.name)
            upload(made, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Commit a JSON file; NaN, which JSON does not have, is written as null."""
    text = json.dumps(_without_nan(value), indent=1)
    commit(path, lambda temporary: _write_text(temporary, text))


def read_json(path: Path) -> Any:
    """Read a JSON file of this project.

    Raises:
        StoreError: It is missing or broken.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} is missing: run the step that makes it first") from None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: 1,000 nested brackets are no JSON of ours
        raise broken(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Commit a text file."""
    commit(path, lambda temporary: _write_text(temporary, text))


def write_table(path: Path, table: pa.Table) -> None:
    """Commit a Parquet file, with checksums: without them, one in forty damaged pages reads as other values."""
    commit(path, lambda temporary: pq.write_table(table, temporary, compression="zstd", write_page_checksum=True))


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file of this project, all of its columns or some.

    Raises:
        StoreError: It is missing or broken.
    """
    try:
        source = pa.BufferReader(path.read_bytes()) if is_remote(path) else path  # one request, not one per column
        table = pq.read_table(source, columns=columns, partitioning=None, page_checksum_verification=True)
        table.validate(full=True)  # else text that is not UTF-8 fails later, where rows are made of it
        return table
    except FileNotFoundError:
        raise StoreError(f"{path} is missing: run the step that makes it first") from None
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a column's name that is not UTF-8
        raise broken(path, error) from None


@contextmanager
def opened(path: Path, fetch: Callable[[Path], bytes] | None = None) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of this project, to read some of its row groups.

    Args:
        path: The file.
        fetch: How to get the whole of a file in a bucket; without it, each part is a request of its own.

    Raises:
        StoreError: It is missing or broken, at once or while it is read.
    """
    try:
        with _source(path, fetch) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise StoreError(f"{path} is missing: run the step that makes it first") from None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:  # ValueError: a column's name that is not UTF-8
        raise broken(path, error) from None


def _source(path: Path, fetch: Callable[[Path], bytes] | None) -> AbstractContextManager[Any]:
    if not is_remote(path):
        return nullcontext(path)
    return path.open("rb") if fetch is None else nullcontext(pa.BufferReader(fetch(path)))


def is_done(folder: Path) -> bool:
    """Whether the step that writes ``folder`` finished."""
    return (folder / DONE).is_file()


def finish(folder: Path, summary: dict) -> None:
    """Mark a step's folder as finished, with its summary."""
    write_json(folder / DONE, {"format_version": FORMAT_VERSION, **summary})


def summary(folder: Path) -> dict:
    """The summary of a finished step.

    Raises:
        StoreError: It did not finish, or a newer softlabel made it.
    """
    found = read_json(folder / DONE)
    if not isinstance(found, dict) or not isinstance(found.get("format_version", 0), int):
        raise StoreError(f"{folder / DONE} is no summary of a step: delete it and run its step again")
    if found.get("format_version", 0) > FORMAT_VERSION:
        raise StoreError(
            f"{folder} has format_version {found['format_version']}, this softlabel reads up to {FORMAT_VERSION}: "
            "use a newer softlabel or another --run-dir"
        )
    return found


def broken(path: Path, error: Exception) -> StoreError:
    """The error for a file that cannot be read."""
    reason = " ".join(str(error).split())[:200]  # Arrow's have several lines
    return StoreError(f"{path} cannot be read ({reason}): delete it and run its step again")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if hasattr(value, "tolist"):
        return _without_nan(value.tolist())
    return None if isinstance(value, float) and value != value else value
