"""How a teacher's own classes become the recipe's.

Drivers and reading tasks are given a ClassMap, so nothing here may import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from softlabel.errors import RecipeError

_MOST_NAMED = 10


@dataclass(frozen=True)
class ClassMap:
    """Which class of the recipe each of a teacher's classes becomes; None: none.

    Where several become one, it takes the best of their scores. A sum would be a probability only if they were mutually
    exclusive, and could exceed 1; the scores of detectors are independent.
    """

    classes: tuple[str, ...]
    becomes: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """For each class of the recipe, the indices of the teacher's that become it."""
        return tuple(
            tuple(place for place, (_, name) in enumerate(self.becomes) if name == wanted) for wanted in self.classes
        )

    def identity(self) -> dict[str, str | None]:
        """As it enters a teacher's fingerprint."""
        return dict(self.becomes)


def class_map(
    weights: object, found: Sequence[str], classes: Sequence[str], asked: Mapping[str, str | None]
) -> ClassMap | None:
    """How a teacher's classes become the recipe's; None where they are the recipe's.

    A class that ``asked`` does not mention becomes the recipe's class of the same name, or none. Nothing need be asked
    for where the two have the same names, in whatever order.

    Args:
        weights: The teacher, for messages.
        found: The teacher's classes, in the order of its scores.
        classes: The recipe's.
        asked: From a teacher's class to one of the recipe's, or to None: ``label.classes``.

    Raises:
        RecipeError: They differ and nothing is asked for, or what is asked for is not a class of the teacher.
    """
    if not asked and tuple(found) == tuple(classes):
        return None
    if not asked and sorted(found) != sorted(classes):
        raise RecipeError(
            f"{weights} knows the classes {listed(found)}, the recipe has {listed(classes)}: give `classes` as the "
            f"weights have them, or map them: --set label.classes.{found[0]}={classes[0]}"
        )
    if unknown := [name for name in asked if name not in found]:
        raise RecipeError(
            f"label.classes names {listed(unknown)}, which {weights} does not know: remove it, or give one of "
            f"{listed(found)}"
        )
    own = {name: name for name in classes}
    return ClassMap(tuple(classes), tuple((name, asked.get(name, own.get(name))) for name in found))


def left_out(found: ClassMap, asked: Mapping[str, str | None]) -> list[str]:
    """Messages about the teacher's unmentioned classes that become none, and the recipe's that none becomes."""
    silent = [name for name, becomes in found.becomes if becomes is None and name not in asked]
    without = [name for name, columns in zip(found.classes, found.columns, strict=True) if not columns]
    lines = []
    if silent:
        lines.append(f"label.classes: left out, since no class of the recipe has the same name: {listed(silent)}")
    if without:
        lines.append(f"label.classes: the teacher has nothing for {listed(without)}: no box will be of them")
    return lines


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many there are where that is not all."""
    more = f", ... ({len(names)})" if len(names) > _MOST_NAMED else ""
    return ", ".join(islice(names, _MOST_NAMED)) + more
