"""Fields of truth files, loaded and checked: each check returns the value, or raises `BadRow` with the reason."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import yaml

from softlabel.errors import TruthError
from softlabel.storage import location

IMAGE_SUFFIXES = (".tif", ".tiff", ".jpg", ".jpeg", ".png", ".bmp", ".webp")
_FAR_PX = 1e9
_WHOLE = re.compile(r"[+-]?\d{1,40}(\.0*)?([eE][+-]?\d{1,2})?")
T = TypeVar("T")
Box = tuple[float, float, float, float]
# What parsers raise on arbitrary bytes: bad tags make yaml.safe_load raise KeyError, IndexError, AttributeError.
_UNREADABLE = (
    *(OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError, MemoryError),
    yaml.YAMLError,
)


class BadRow(ValueError):
    """Why a row is rejected."""


def attempt(check: Callable[[], T]) -> T | BadRow:
    """What a check returns, or why it fails: one field of a row can be unusable while the others are known."""
    try:
        return check()
    except BadRow as reason:
        return reason


def load(path: Path | str, parse: Callable[[str], Any], kind: str) -> Any:
    """What ``parse`` makes of a file; TruthError where it is missing or broken, whatever ``parse`` raises."""
    try:
        return parse(location(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise TruthError(f"no truth file at {path}: correct tiles.truth.path") from None
    except _UNREADABLE as error:
        raise TruthError(f"{path} cannot be read as {kind} ({one_line(error)}): get an unbroken copy") from None


def load_json(path: str) -> Any:
    return load(path, json.loads, "JSON")


def load_yaml(path: Path) -> dict:
    data = load(path, yaml.safe_load, "YAML")
    if not isinstance(data, dict):
        raise TruthError(f"{path} must be a mapping with names, train and val, it is {show(data)}")
    return data


def lists_in(data: Any, keys: Sequence[str], path: str) -> list[list[Any]]:
    """The lists of a JSON object under ``keys``; TruthError unless all are there."""
    lists: list[Any] = [data.get(key) for key in keys] if isinstance(data, dict) else []
    if not lists or not all(isinstance(value, list) for value in lists):
        raise TruthError(f"{path} must be a JSON object with the lists {', '.join(keys)}: check tiles.truth.format")
    return lists


def as_object(value: Any, what: str) -> dict:
    if not isinstance(value, dict):
        raise BadRow(f"{what} must be an object, it is {show(value)}")
    return value


def as_text(value: Any, what: str) -> str:
    try:
        if isinstance(value, str) and value and value.encode():  # half a surrogate pair cannot be written anywhere
            return value
    except UnicodeEncodeError:
        pass
    raise BadRow(f"{what} must be a text, it is {show(value)}")


def as_image_name(value: Any, what: str = "file_name") -> str:
    path = PurePosixPath(as_text(value, what))
    if not path.name:
        raise BadRow(f"{what} {show(value)} names no file")
    return str(path)


def as_label(value: Any, what: str) -> str | None:
    if value is None:
        return None
    return as_text(value, what) if isinstance(value, str) else str(as_whole(value, what))


def as_whole(value: Any, what: str) -> int:
    """A whole number, as other programs write it: 1, 1.0, "1" or "1.0e+00"."""
    number: Any = value
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        number = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or abs(number) >= 2**63:
        raise BadRow(f"{what} must be a whole number, it is {show(value)}")
    return number


def as_flag(value: Any, what: str) -> bool:
    """True or false, 1 or 0; None is false."""
    return bool(value) if value is None or isinstance(value, bool) else as_whole(value, what) != 0


def as_numbers(values: Any, count: int, what: str) -> list[float]:
    if not isinstance(values, list) or len(values) != count or any(isinstance(value, bool) for value in values):
        raise BadRow(f"{what} must be {count} numbers, it is {show(values)}")
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"{what} must be {count} numbers, not all of its values are") from None


def as_box(x0: float, y0: float, x1: float, y1: float) -> Box:
    if not all(abs(value) <= _FAR_PX for value in (x0, y0, x1, y1)):  # false for NaN too
        raise BadRow("coordinates must be finite and below 1e9 px")
    if x1 < x0 or y1 < y0:
        raise BadRow(f"inverted box {x0:g},{y0:g},{x1:g},{y1:g}")
    if x1 == x0 or y1 == y0:
        raise BadRow(f"box without area {x0:g},{y0:g},{x1:g},{y1:g}")
    return x0, y0, x1, y1


def as_hull(points: Sequence[float]) -> Box:
    """The upright box around the points x, y, x, y, ..."""
    xs, ys = points[::2], points[1::2]
    return as_box(min(xs), min(ys), max(xs), max(ys))


def show(value: Any) -> str:
    """A value for an error message, shortened; never raises, unlike repr on huge or deeply nested ones."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a number beyond 64 bits"
    return repr(value)[:60]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
