"""Object stores: paths in them, and an obstore file system with conditional writes and errors that say what to do."""

import glob
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from obstore import store as stores
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.fsspec import BufferedFile
from upath.implementations.cloud import CloudPath
from upath.registry import register_implementation

from softlabel.errors import StorageError

# A lease's reads and writes must fail rather than come late: the caller retries them. Options given here replace those
# that obstore takes from the environment.
_QUICK = {"timeout": "5s", "connect_timeout": "5s"}
_RETRY: dict[str, Any] = {"max_retries": 1, "retry_timeout": timedelta(seconds=10)}
_WAITS_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""How long to wait before each retry of a deletion."""
_PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_FROM_ENVIRONMENT = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_ca_certificate", "proxy_excludes")


class BucketPath(CloudPath):
    """A path in ``s3://``, ``gs://`` or ``az://``; a small file is read or written in one request."""

    __slots__ = ()

    @classmethod
    def _fs_factory(cls, urlpath: str, protocol: str, storage_options: Mapping[str, Any]) -> "Bucket":
        return Bucket(protocol)  # type: ignore[call-overload, no-any-return]

    def read_bytes(self) -> bytes:
        return self.fs.cat_file(self.path)

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        self.fs.pipe_file(self.path, bytes(data))
        return len(data)

    def write_text(self, data: str, *_: Any, **__: Any) -> int:
        return self.write_bytes(data.encode())

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return bool(self.fs.is_object(self.path))

    def iterdir(self) -> Iterator["BucketPath"]:
        for name in self.fs.ls(self.path, detail=False):
            yield self / str(name).rpartition("/")[2]

    def glob(self, pattern: str, **options: Any) -> Iterator["BucketPath"]:
        """As in pathlib, with ``**`` for everything below. Unlike fsspec's, it tolerates folders that come and go
        meanwhile, and lists each level once."""
        first, _, rest = pattern.partition("/")
        if first == "**":
            yield from (path for path in self.modified() if fnmatchcase(path.name, rest))
        elif not glob.has_magic(first):
            yield from (self / first).glob(rest) if rest else [self / first] if (self / first).exists() else []
        else:
            with suppress(FileNotFoundError):
                for path in self.iterdir():
                    if fnmatchcase(path.name, first):
                        yield from path.glob(rest) if rest else [path]

    def modified(self) -> dict["BucketPath", float]:
        """Everything below this path, and when each object was written."""
        return {self / name.removeprefix(f"{self.path}/"): when for name, when in self.fs.below(self.path)}

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a bucket has no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        self.fs.rm_file(self.path)


for _protocol in ("s3", "gs", "az"):
    register_implementation(_protocol, BucketPath, clobber=True)


@contextmanager
def _failures(url: str, *, writing: bool = False) -> Iterator[None]:
    """Turn failures in the block into StorageErrors; unless ``writing``, a missing object stays a FileNotFoundError."""
    try:
        yield
    except (BaseError, OSError) as error:
        if isinstance(error, FileNotFoundError) and not writing:
            raise
        text = " ".join(str(error).split())
        if answer := re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text):  # in XML, as S3 answers
            text = f"{answer[1]}: {answer[2]}"
        raise StorageError(
            f"{url} cannot be used ({text[:300]}): check the bucket's name, the credentials in the environment and the "
            "network, then run the same again"
        ) from None


class Bucket(AbstractFileSystem):  # type: ignore[misc]
    """All buckets of a protocol as one fsspec file system, through obstore's blocking calls. obstore's own file system
    uses coroutines: a process that ends right after one is now and then aborted (PyO3/pyo3-async-runtimes#40)."""

    def __init__(self, protocol: str) -> None:
        super().__init__()
        self.protocol = protocol
        self._construct_store = lru_cache(self._construct_store)  # type: ignore[method-assign]

    def _construct_store(self, bucket: str) -> Any:  # obstore's files call this and _split_path by name
        return self._store(bucket)

    def _store(self, bucket: str, **options: Any) -> Any:
        from_url: Any = stores.from_url  # which has an overload for each provider
        return from_url(f"{self.protocol}://{bucket}", **options)

    def _split_path(self, path: str) -> tuple[str, str]:
        bucket, _, key = str(path).removeprefix(f"{self.protocol}://").partition("/")
        return bucket, key

    @contextmanager
    def _at(self, path: str, *, writing: bool = False) -> Iterator[tuple[Any, str]]:
        """The bucket's store and the object's key in it, for a block whose failures are treated as `_failures` does."""
        bucket, key = self._split_path(path)
        with _failures(self.url(path), writing=writing):
            yield self._construct_store(bucket), key

    def url(self, path: str) -> str:
        """A path as the user knows it."""
        return path if "://" in path else f"{self.protocol}://{path}"

    def is_object(self, path: str) -> bool:
        """Whether there is an object of that name."""
        with self._at(path) as (store, key), suppress(FileNotFoundError):
            store.head(key)
            return True
        return False

    def below(self, path: str) -> Iterator[tuple[str, float]]:
        """Every object below a path and when it was written, a thousand per request."""
        bucket, _ = self._split_path(path)
        with self._at(path) as (store, key):
            for found in store.list(f"{key}/"):
                yield from ((f"{bucket}/{one['path']}", one["last_modified"].timestamp()) for one in found)

    def remove_all(self, path: str) -> None:
        """Delete every object below a path."""
        with ThreadPoolExecutor(16) as deleting:
            list(deleting.map(self.rm_file, (name for name, _ in self.below(path))))

    def read_tagged(self, path: str) -> tuple[bytes, dict[str, str]]:
        """An object's bytes, and the tag that tells it from another of the same name; raises FileNotFoundError."""
        with _failures(self.url(path)):
            store, key = self._quick(path)
            got = store.get(key)
            tag = {name: value for name in ("e_tag", "version") if (value := got.meta[name]) is not None}
            return got.bytes().to_bytes(), tag

    def put_if(self, path: str, data: bytes, condition: Any) -> bool:
        """Write an object if there is none yet (``create``) or it still has the given tag; return whether it did."""
        with _failures(self.url(path), writing=True):
            store, key = self._quick(path)
            try:
                store.put(key, data, mode=condition)
            except (AlreadyExistsError, PreconditionError):
                return False
            except FileNotFoundError:
                if condition == "create":  # there is no bucket
                    raise
                return False
            return True

    def _quick(self, path: str) -> tuple[Any, str]:
        bucket, key = self._split_path(path)
        names = {name: f"{_PREFIXES[str(self.protocol)]}{name.upper()}" for name in _FROM_ENVIRONMENT}
        options: Any = _QUICK | {name: os.environ[given] for name, given in names.items() if given in os.environ}
        return self._store(bucket, client_options=options, retry_config=_RETRY), key

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """An object's bytes; a whole object in one request."""
        if start is not None or end is not None:
            return bytes(super().cat_file(path, start, end, **options))
        with self._at(path) as (store, key):
            return bytes(store.get(key).bytes().to_bytes())

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """An object's size and tag, or a directory entry where there are objects below; raises FileNotFoundError."""
        with self._at(path) as (store, key):
            with suppress(FileNotFoundError):
                if key:
                    head = store.head(key)
                    return {**head, "mtime": head["last_modified"].timestamp(), "name": path, "type": "file"}
            self.ls(path)
            return {"name": path, "size": 0, "type": "directory"}

    def exists(self, path: str, **_: Any) -> bool:
        """Whether there is an object of that name, or one below it."""
        with suppress(FileNotFoundError):
            return bool(self.info(path))
        return False

    def isfile(self, path: str) -> bool:
        """As `is_object`."""
        return self.is_object(path)

    def ls(self, path: str, detail: bool = True, **__: Any) -> list[Any]:
        """What is in a folder; raises FileNotFoundError where there is nothing."""
        bucket, _ = self._split_path(path)
        with self._at(path) as (store, key):
            found = store.list_with_delimiter(key)
        files = [{**one, "name": f"{bucket}/{one['path']}", "type": "file"} for one in found["objects"]]
        folders = [
            {"name": f"{bucket}/{prefix}", "size": 0, "type": "directory"} for prefix in found["common_prefixes"]
        ]
        if not (files or folders):
            raise FileNotFoundError(path)
        return files + folders if detail else sorted(one["name"] for one in files + folders)

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **_: Any) -> None:
        """Write an object in one request."""
        with self._at(path, writing=True) as (store, key):
            store.put(key, value)

    def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        """Upload a local file, a large one in parts."""
        with self._at(rpath, writing=True) as (store, key):
            store.put(key, Path(lpath))

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy an object within its bucket."""
        with self._at(path1) as (store, key):
            store.copy(key, self._split_path(path2)[1])

    def rm_file(self, path: str) -> None:
        """Delete an object, if it is there: S3 does not tell whether it was."""
        with self._at(path) as (store, key), suppress(FileNotFoundError):
            for wait_s in (*_WAITS_S, None):  # obstore itself retries everything else
                try:
                    return store.delete(key)
                except GenericError:
                    if wait_s is None:
                        raise
                    time.sleep(wait_s)

    def _open(self, path: str, mode: str = "rb", *_: Any, **options: Any) -> BufferedFile:
        if mode == "rb":  # asked first: a missing file would leave a half-made object, which complains when deleted
            options["size"] = self.info(path)["size"]
        return _File(self, path, mode, **options)  # type: ignore[call-overload, no-any-return]


class _File(BufferedFile):
    def read(self, length: int = -1) -> bytes:
        with _failures(self.fs.url(self.path)):
            return super().read(length)

    def write(self, data: bytes) -> int:
        with _failures(self.fs.url(self.path), writing=True):
            return super().write(bytes(data))  # Arrow passes another kind of buffer

    def flush(self, force: bool = False) -> None:
        with _failures(self.fs.url(self.path), writing=True):
            super().flush(force)

    def close(self) -> None:
        with _failures(self.fs.url(self.path), writing=self.mode == "wb"):
            super().close()
