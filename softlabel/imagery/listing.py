"""Which scenes there are: those of a folder, a glob or a table, or a single one, local or on an object store."""

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq

from softlabel.errors import SceneError

SUFFIXES = (".tif", ".tiff", ".jpg", ".jpeg", ".png")
_TABLES = (".csv", ".parquet", ".geoparquet")
_URI_COLUMNS = ("uri", "location")  # location: as gdaltindex calls it


def list_scenes(spec: str) -> list[tuple[str, str]]:
    """All images of a folder (and of those below it), a glob or a table, or one image, local or on an object store.

    A table (.csv, .parquet, .geoparquet) has a row per scene with its ``uri`` (or ``location``, as gdaltindex calls
    it), which may be relative to the table's folder, and optionally its ``scene_id``.

    Links to folders are followed. Hidden files and folders, whose names begin with a dot, are ignored: notebooks and
    file managers keep copies there.

    Returns:
        (scene_id, uri) pairs sorted by scene_id, which is the table's own, or the path below the folder, below the
        glob's fixed part or below the folder that all of a table share; for one image, its name. Local uris are
        absolute paths. A single image, or one in a table, may have any suffix (over http, only one in a table);
        others are chosen by theirs: .tif .tiff .jpg .jpeg .png in any case.

    Raises:
        SceneError: There are none, they cannot be listed, or a table does not say which they are.
    """
    try:
        if spec.lower().endswith(_TABLES) and not glob.has_magic(spec):
            found = _list_table(spec)
        else:
            found = _list_remote(spec) if has_scheme(spec) else _list_local(spec)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SceneError(f"cannot list scenes at {spec} ({error}): check tiles.scenes and your access") from None
    if not found:
        raise SceneError(f"no scenes at {spec}: give tiles.scenes a folder, glob or file of {' '.join(SUFFIXES)}")
    return sorted(found)


def has_scheme(spec: str) -> bool:
    """Whether it is a URI, not a path."""
    return "://" in spec


def file_system(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """pyarrow's file system for a URI, and the path in it; for Azure, whose az:// pyarrow does not know, the one
    that run folders use."""
    scheme, _, path = uri.partition("://")
    if scheme != "az":
        return pyarrow.fs.FileSystem.from_uri(uri)
    from softlabel.buckets import Bucket  # importing it takes a fifth of a second

    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(Bucket(scheme))), path


def walk_files(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Every file below a folder except hidden ones, sorted; links to folders are followed, but not in a loop.

    Args:
        folder: Where to look; one that may not be read counts as empty.
        above: The real paths of the folders that led here.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:  # such as lost+found, where a disk is mounted
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from walk_files(entry.path, above | {here})
        else:
            yield entry.path


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _is_hidden(scene_id: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(scene_id).parts)


def _list_local(spec: str) -> list[tuple[str, str]]:
    root = os.path.abspath(spec)
    if os.path.isfile(root):
        return [(os.path.basename(root), root)]
    if os.path.isdir(root):
        paths = list(walk_files(root))
    else:
        paths = [path for path in glob.glob(root, recursive=True) if os.path.isfile(path)]
        root = _fixed_part(root)
    named = [(Path(path).relative_to(root).as_posix(), path) for path in paths if _is_image(path)]
    return [(scene_id, path) for scene_id, path in named if not _is_hidden(scene_id)]


def _fixed_part(pattern: str) -> str:
    """The folder above the first part of a glob that has a wildcard."""
    parts = Path(pattern).parts
    first = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return str(Path(*parts[:first]))


def _list_table(spec: str) -> list[tuple[str, str]]:
    remote = has_scheme(spec)
    system, path = file_system(spec if remote else Path(os.path.abspath(spec)).as_uri())
    with system.open_input_file(path) as file:
        table = pyarrow.csv.read_csv(file) if spec.lower().endswith(".csv") else pq.read_table(file)
    column = next((name for name in _URI_COLUMNS if name in table.column_names), None)
    if column is None:
        raise SceneError(
            f"{spec} has no column {' or '.join(_URI_COLUMNS)}: give one with a scene's path or URI in a row"
        )
    folder = spec.rpartition("/")[0] if remote else os.path.dirname(os.path.abspath(spec))
    uris = [absolute(str(uri), folder) for uri in table[column].to_pylist() if uri]
    named = table["scene_id"].to_pylist() if "scene_id" in table.column_names else _below(uris)
    ids = [str(name) for name in named if name is not None]
    if not len(uris) == len({*ids}) == table.num_rows:
        raise SceneError(f"{spec} has a row without {column} or scene_id, or a scene twice: give each scene one row")
    return list(zip(ids, uris, strict=True))


def absolute(uri: str, folder: str) -> str:
    """A path or URI that may be relative to a folder, local or on an object store, made absolute."""
    if has_scheme(uri) or uri.startswith("/"):
        return uri
    if not has_scheme(folder):
        return os.path.normpath(os.path.join(folder, uri))
    scheme, _, path = folder.partition("://")
    return f"{scheme}://{os.path.normpath(f'{path}/{uri}')}"


def _below(uris: list[str]) -> list[str]:
    """Each URI's path below the folder that all share."""
    folders = zip(*(uri.split("/")[:-1] for uri in uris), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len({*names}) == 1, folders))
    return ["/".join(uri.split("/")[shared:]) for uri in uris]


def _list_remote(spec: str) -> list[tuple[str, str]]:
    if _is_image(spec) and not glob.has_magic(spec):
        return [(PurePosixPath(spec).name, spec)]
    scheme = spec.partition("://")[0]
    root, pattern = (_fixed_part(spec.partition("://")[2]), spec) if glob.has_magic(spec) else (None, None)
    folder = f"{scheme}://{root}" if root else spec
    system, base = file_system(folder)
    if pattern is None and system.get_file_info(base).is_file:
        return [(PurePosixPath(base).name, spec)]
    files = system.get_file_info(pyarrow.fs.FileSelector(base, recursive=True))
    names = [str(PurePosixPath(file.path).relative_to(base)) for file in files if file.is_file and _is_image(file.path)]
    found = [(name, f"{folder.rstrip('/')}/{name}") for name in names if not _is_hidden(name)]
    return [(name, uri) for name, uri in found if pattern is None or fnmatch(uri, pattern)]
