"""Which windows a scene is cut into, which truth lies in each, and which split it belongs to. No pixels here.

Boxes are xyxy, x right, y down, max edges exclusive; windows are (column, row, width, height); all in pixels.
Shape suffixes: N counts boxes, T the boxes that touch a tile, C the counts that splits are balanced by.
"""

import hashlib
import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softlabel import boxes as box_math
from softlabel.config import Split
from softlabel.errors import RecipeError

_SLIVER_PX = 0.005

Window = tuple[int, int, int, int]


class TileTruth(NamedTuple):
    """The truth boxes that touch one tile."""

    kept_T: NDArray[np.int64]
    """Their indices among the scene's boxes, ascending."""
    boxes_T4: NDArray[np.float32]
    """Clipped to the tile, in tile pixels."""
    visible_T: NDArray[np.float32]
    """Share of the whole box's area inside the tile, in (0, 1]."""
    ignore_T: NDArray[np.bool_]
    """Set where ``visible`` is below the recipe's ``min_visible``."""


def windows(width: int, height: int, size_px: int, overlap_px: int) -> list[Window]:
    """Windows that cover every pixel of a scene, row by row.

    All are ``size_px`` square: the last column and row are shifted back inside, so they overlap their neighbours by
    more. Along an axis where the scene is shorter than a tile, the window has the scene's extent.
    """
    columns = _starts(width, size_px, size_px - overlap_px)
    rows = _starts(height, size_px, size_px - overlap_px)
    size = min(size_px, width), min(size_px, height)
    return [(column, row, *size) for row in rows for column in columns]


def clip_truth(boxes_N4: box_math.Floats, window: Window, min_visible: float) -> TileTruth:
    """The scene's truth boxes that touch a window; edges that only meet do not touch.

    A box that reaches less than 0.005 px into the window does not touch it either: that is half the smallest side of a
    whole box (softlabel.imagery.truth), so that rounding to float32 never loses one.
    """
    column, row, width, height = window
    boxes_N4 = np.asarray(boxes_N4, np.float64)
    inside = box_math.clip(boxes_N4, (column, row, column + width, row + height))
    local = (inside - np.array([column, row, column, row])).astype(np.float32)
    whole = box_math.area(boxes_N4)
    visible = (box_math.area(inside) / np.where(whole > 0, whole, 1)).astype(np.float32)
    kept = np.flatnonzero(((local[:, 2:] - local[:, :2]) >= _SLIVER_PX).all(axis=1) & (visible > 0))
    return TileTruth(kept, local[kept], visible[kept], visible[kept] < np.float32(min_visible))


def split_names(split: Split) -> list[str]:
    """The splits with a share above 0, largest first."""
    return list(_shares(split))


def assign_splits(groups: dict[str, NDArray], split: Split, seed: int) -> dict[str, str]:
    """Deal groups out to train_1, val_1, train_2, val_2 and test, so that every count is shared as the recipe says.

    Groups are dealt largest first (equal ones in an order shuffled by ``seed``), each to the split that is furthest
    below its share of what the group holds. The deficit is a share of each count's total, so a group of rare classes
    goes where those are missing. Then a split that lacks a class gets a group with it, if another split can spare one.
    The order of ``groups`` does not matter.

    Args:
        groups: Per group, the counts (C,) to balance, >= 0: first its size (tiles), then its boxes per class.
        split: The shares; validation is carved out of each training set.
        seed: Seeds the shuffle.

    Raises:
        RecipeError: There are fewer groups than splits with a share above 0; it names the splits left empty.
    """
    shares = _shares(split)
    if len(groups) < len(shares):
        empty = ", ".join(list(shares)[len(groups) :])
        raise RecipeError(
            f"empty split {empty}: {len(groups)} groups of scenes with truth cannot fill {len(shares)} splits: add "
            "scenes or groups, or set a share of tiles.split to 0"
        )
    names, shares_C = _largest_first(groups, seed)
    found = _deal(names, shares_C, shares)
    _fill_gaps(found, shares_C > 0, list(shares))
    return found


def keep_background(tile_id: str, seed: int, probability: float) -> bool:
    """Whether a background tile stays; depends on its arguments alone, so never on order or machine."""
    head = hashlib.sha256(f"{seed}:{tile_id}".encode()).digest()[:8]
    return int.from_bytes(head) / 2**64 < probability


def _starts(length: int, size: int, stride: int) -> list[int]:
    if length <= size:
        return [0]
    starts = list(range(0, length - size + 1, stride))
    return starts if starts[-1] + size == length else [*starts, length - size]


def _shares(split: Split) -> dict[str, float]:
    """Each split's share of all tiles, only where above 0, largest first (so that ties favour it)."""
    shares = {"test": split.test}
    for number, share in (("1", split.train_1), ("2", split.train_2)):
        shares[f"train_{number}"] = share * (1 - split.validation)
        shares[f"val_{number}"] = share * split.validation
    return dict(sorted(((name, share) for name, share in shares.items() if share > 0), key=lambda item: -item[1]))


def _largest_first(groups: dict[str, NDArray], seed: int) -> tuple[list[str], NDArray[np.float64]]:
    """Group names, largest group first, and each group's share of each count's total."""
    names = sorted(groups)
    counts = np.array([groups[name] for name in names], np.float64)
    total = counts.sum(axis=0)
    shares = counts / np.where(total > 0, total, 1)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-shares[order].sum(axis=1), kind="stable")]
    return [names[index] for index in order], shares[order]


def _deal(names: list[str], shares_C: NDArray[np.float64], shares: dict[str, float]) -> dict[str, str]:
    splits = list(shares)
    deficit = np.repeat(np.array(list(shares.values()))[:, None], shares_C.shape[1], axis=1)
    found = {}
    for name, share in zip(names, shares_C, strict=True):
        # Rounded, or the last bit of a sum would break ties differently on another machine.
        best = int(np.argmax(np.round(deficit @ share, 12)))
        deficit[best] -= share
        found[name] = splits[best]
    return found


def _fill_gaps(found: dict[str, str], holds_C: NDArray[np.bool_], splits: list[str]) -> None:
    """Give a split that has none of a count the smallest group with some of it that another split can spare.

    With few groups, a class would otherwise be missing from the small splits: eight groups of cars, none in validation.
    ``found`` and ``holds_C`` are in order, largest group first.
    """
    names = list(found)
    have = {name: np.zeros(holds_C.shape[1], int) for name in splits}
    for name, holds in zip(names, holds_C, strict=True):
        have[found[name]] += holds
    for count, split in itertools.product(range(holds_C.shape[1]), splits):
        if have[split][count]:
            continue
        for name, holds in zip(reversed(names), holds_C[::-1], strict=True):
            left = have[found[name]] - holds
            # Filling an empty split (count 0, the size) may cost another split a class; filling in a class may not.
            if holds[count] and left[0] and (count == 0 or left[holds].all()):
                have[found[name]], have[split] = left, have[split] + holds
                found[name] = split
                break
