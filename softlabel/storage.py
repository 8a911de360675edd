"""Where a run folder lies: on a disk, or in a bucket (``s3://``, ``gs://``, ``az://``), through paths used alike.

A path in a bucket is a `upath.UPath`, which has pathlib's methods and is used wherever a Path is; obstore is below it.
Credentials and endpoints come from the environment alone (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``): no file of a run, and
no argument of a process, contains any.

A bucket's objects appear whole or not at all, and are never renamed; one can be created on condition that it is not
there, and replaced on condition that it is still the one that was read.
"""

import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import unquote, urlsplit

from softlabel.errors import SessionError, StorageError

_SCHEME = re.compile(r"(\w{2,}):/")  # one letter is a drive
_BUCKETS = ("s3", "gs", "az")
_T = TypeVar("_T")


def location(text: Path | str) -> Path:
    """A folder or file by its path or URL; a path object is returned as it is.

    Raises:
        SessionError: It is a URL, but of neither a file nor a place in a bucket.
    """
    if not isinstance(text, str):
        return text
    if not (scheme := _SCHEME.match(text)):
        return Path(text)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    if scheme[1] not in _BUCKETS:
        raise SessionError(f"{text.partition('?')[0]} is no place for files: give a path, or s3://, gs:// or az://")
    if not re.fullmatch(r"\w+://[^/@?*#[\]]+(/[^@?*#[\]]*)?", text):  # @ and ? come with secrets, the others are globs
        raise SessionError(f"{scheme[1]}: give {scheme[1]}://BUCKET/FOLDER, without characters such as @ ? # * [")
    from softlabel.buckets import BucketPath  # takes a fifth of a second

    return cast(Path, BucketPath(text.rstrip("/"), protocol=scheme[1]))


def is_remote(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return not isinstance(path, Path)


def upload(source: Path, path: Path) -> None:
    """Upload a local file to ``path``, whole or not at all."""
    _fs(path).put_file(str(source), _key(path))


def create(path: Path, data: bytes) -> bool:
    """Create a file with these bytes if there is none; return whether it was created: of two who try, one is told so.
    In a bucket that may be untrue where an answer was lost: then the file's content tells."""
    if is_remote(path):
        return bool(_fs(path).put_if(_key(path), data, "create"))
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def read_tagged(path: Path) -> tuple[bytes, Any]:
    """A file's bytes, and in a bucket the tag that tells the object from one that replaces it; raises
    FileNotFoundError."""
    return _fs(path).read_tagged(_key(path)) if is_remote(path) else (path.read_bytes(), None)


def replace(path: Path, data: bytes, tag: Any) -> bool:
    """Replace an object if it still has that ``tag`` (as `read_tagged` gave it); return whether it was replaced.
    Answers may be lost, as in `create`."""
    return bool(_fs(path).put_if(_key(path), data, tag))


def patiently(ask: Callable[[], _T], waits_s: Sequence[float] = (0.2, 0.5, 1.0, 2.0, 5.0)) -> _T:
    """What ``ask`` returns, tried again where a bucket is away for a moment."""
    for wait_s in waits_s:
        with suppress(StorageError):
            return ask()
        time.sleep(wait_s)
    return ask()


def has_conditions(folder: Path) -> bool:
    """Whether a bucket, which can be written to, heeds the conditions of `create` and `replace`: some that speak S3
    do not."""
    return patiently(lambda: _heeds_conditions(folder), (0.2, 0.5))  # a bucket that is not there is said soon


def _heeds_conditions(folder: Path) -> bool:
    probe = folder / f".softlabel-{uuid.uuid4().hex}"
    try:
        create(probe, b"1")
        if create(probe, b"2"):
            return False
        data, tag = read_tagged(probe)
        replace(probe, b"3", tag)
        return data == b"1" and not replace(probe, b"4", tag) and probe.read_bytes() == b"3"
    finally:
        probe.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, if it is there."""
    if is_remote(folder):
        _fs(folder).remove_all(_key(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)


def modified(folder: Path) -> dict[Path, float]:
    """When each file below a folder was last written, in seconds since 1970; those removed meanwhile are left out."""
    if is_remote(folder):
        return cast(dict[Path, float], cast(Any, folder).modified())
    times = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime
    return times


def on_disk(path: Path | str) -> Path:
    """The file itself, or a local copy for libraries that can read no other: one copy for all processes of a machine.

    Raises:
        FileNotFoundError: There is no such file in the bucket.
    """
    path = location(path)
    if not is_remote(path):
        return path
    found = _fs(path).info(_key(path))
    name = hashlib.sha256(f"{path} {found['e_tag']} {found['size']}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"softlabel-{os.getuid()}" / name
    if not (copy := folder / path.name).exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        half = folder / f".{uuid.uuid4().hex}"
        half.write_bytes(path.read_bytes())
        os.replace(half, copy)
    return copy


def ray_storage(folder: Path) -> dict[str, Any]:
    """A folder as the arguments that Ray's RunConfig takes."""
    if not is_remote(folder):
        return {"storage_path": str(folder)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": _key(folder), "storage_filesystem": PyFileSystem(FSSpecHandler(_fs(folder)))}


def _fs(path: Path) -> Any:
    return cast(Any, path).fs


def _key(path: Path) -> str:
    return str(cast(Any, path).path)
