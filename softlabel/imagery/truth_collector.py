"""Rows of a truth file sorted into images, rejections and those left out on purpose, their classes mapped to ours.

A row is one box in a truth file. A reader (truth_formats.py, truth_yolo.py) turns each into a `Row` or raises `BadRow`;
truth.py turns what was collected into the public types.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from softlabel.config import TruthSource
from softlabel.errors import TruthError
from softlabel.imagery.truth_fields import BadRow, Box, attempt, one_line, show
from softlabel.records import UNKNOWN_CLASS

Rejected = tuple[str, int | None, str]
"""File, row (None where it is the whole file) and reason."""


class Row(NamedTuple):
    """One box: its image, its class as the source has it, and xyxy; either of the last two may be why it is unusable.

    ``corners`` are those of a rotated box, x, y, x, y, ...
    """

    image: str
    source_class: int | str | BadRow
    box: Box | BadRow
    crowd: bool = False
    corners: tuple[float, ...] | None = None


@dataclass
class Image:
    """What is known about one image; ``facts`` are further fields of `SceneTruth` (truth.py), and so are the lists.

    ``unsure`` has the classes of objects whose place is not known, UNKNOWN_CLASS where it may be any class.
    """

    facts: dict[str, Any]
    boxes: list[Box] = field(default_factory=list)
    corners: list[tuple[float, ...] | None] = field(default_factory=list)
    class_ids: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    unsure: set[int] = field(default_factory=set)
    seen: set[tuple[Any, ...]] = field(default_factory=set)


class Collector:
    """Takes in rows and maps their classes. ``targets`` maps each source class to ours, None where it is not mapped.

    Somebody drew a rejected row all the same. Where its box is known, that is kept as UNKNOWN_CLASS; where it is not,
    its class is unsure in its image. Otherwise the object would pass for background.
    """

    def __init__(self, drop_others: bool, targets: dict[int | str, int | None]) -> None:
        self.drop_others, self.targets = drop_others, targets
        self.images: dict[str, Image] = {}
        self.rejected: list[Rejected] = []
        self.warnings: list[str] = []
        self.counts: Counter[str] = Counter()

    def image(self, name: str, **facts: Any) -> Image:
        """The image of that name; ``facts`` count only where it is new."""
        return self.images.setdefault(name, Image(facts))

    def reject(self, file: str, row: int | None, reason: object) -> None:
        self.rejected.append((file, row, str(reason)))

    def read(self, file: str, rows: Iterable[tuple[int, Any]], parse: Callable[[Any], Row]) -> None:
        """Take each (number, raw row) as ``parse`` reads it; one that cannot be used is rejected on its own."""
        for number, raw in rows:
            try:
                self._add(file, number, parse(raw))
            except BadRow as reason:  # and its image is not known
                self.counts["rows"] += 1
                self.reject(file, number, reason)

    def _add(self, file: str, number: int, row: Row) -> None:
        image = self.image(row.image, file=file)
        drawn = (row.source_class, row.box, row.crowd, row.corners)
        if drawn in image.seen:
            self.counts["duplicates"] += 1
            return
        image.seen.add(drawn)
        self.counts["rows"] += 1
        target = attempt(lambda: self._target(row.source_class))
        if target is None:
            self.counts["dropped"] += 1
            return
        problems = [problem for problem in (target, row.box) if isinstance(problem, BadRow)]
        if problems:
            self.reject(file, number, "; ".join(map(str, problems)))
        class_id = UNKNOWN_CLASS if isinstance(target, BadRow) else target
        if isinstance(row.box, BadRow):
            image.unsure.add(class_id)
            return
        image.boxes.append(row.box)
        image.corners.append(row.corners)
        image.class_ids.append(class_id)
        image.crowd.append(row.crowd or class_id == UNKNOWN_CLASS)
        image.rows.append(number)

    def _target(self, source_class: int | str | BadRow) -> int | None:
        """Our class; None where the row is left out on purpose."""
        if isinstance(source_class, BadRow):
            raise source_class
        if source_class not in self.targets:
            raise BadRow(f"unknown class {show(source_class)}")
        target = self.targets[source_class]
        if target is None and not self.drop_others:
            raise BadRow(
                f"class {show(source_class)} is not mapped: add it to tiles.truth.mapping, or leave such boxes out "
                "with other_classes: drop"
            )
        return target


def listed_collector(source: TruthSource, classes: tuple[str, ...], known: dict[int, str]) -> Collector:
    """A collector for a source that lists its classes."""
    names = {str(key) for key in known} | set(known.values())
    numbers = {str(key): int(key) for key in source.mapping if str(key).isdecimal()}
    strange = [str(key) for key in source.mapping if str(key) not in names and str(key) not in numbers]
    if strange:
        has = _some(known.values())
        raise TruthError(f"tiles.truth.mapping names {', '.join(strange)}, {source.path} has {has}, ...: correct it")
    extra = {number: "" for key, number in numbers.items() if key not in names}
    targets = targets_of(source, classes, {**known, **extra})
    require_all(source, classes, set(targets.values()), known.values())
    return Collector(source.other_classes == "drop", targets)


def targets_of(
    source: TruthSource, classes: tuple[str, ...], known: Mapping[int, str] | Mapping[str, str]
) -> dict[int | str, int | None]:
    """Map source class (id or, in DOTA, name) to our class; None for a known class that is not mapped."""
    mapping = {str(key): name for key, name in source.mapping.items()}
    targets: dict[int | str, int | None] = {}
    for key, name in known.items():
        ours = mapping.get(str(key), mapping.get(name)) if mapping else name
        targets[key] = classes.index(ours) if ours in classes else None
    return targets


def require_all(
    source: TruthSource, classes: tuple[str, ...], made: Collection[int | None], known: Iterable[str]
) -> None:
    """Refuse classes that no source class can become; ``made`` has the indices of those that one can."""
    missing = [name for index, name in enumerate(classes) if index not in made]
    if missing:
        raise TruthError(
            f"class without mapping: nothing in {source.path} can become {', '.join(missing)}: add it to "
            f"tiles.truth.mapping (the source has {_some(known)}, ...) or take it out of classes"
        )


def _some(names: Iterable[str]) -> str:
    """The first ten names of a source, in quotes, as they may hold line breaks and half characters."""
    return ", ".join(show(name) for name in list(names)[:10])


def read_lines(
    collector: Collector, file: Path, image: str, parse: Callable[[str], Row], skip: tuple[str, ...] = ()
) -> None:
    """Read an image's label file, all lines but empty ones and headers; an unreadable file is one rejection, and nobody
    can say what is in its image."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except (OSError, ValueError) as error:
        collector.reject(str(file), None, f"cannot be read: {one_line(error)}")
        collector.image(image).unsure.add(UNKNOWN_CLASS)
        return
    rows = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    wanted = ((number, line) for number, line in rows if line and not line.lower().startswith(skip or ("\0",)))
    collector.read(str(file), wanted, parse)
