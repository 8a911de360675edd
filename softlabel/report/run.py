"""What a person looks at in a soft-label store: numbers, histograms, and the most doubtful tiles to correct."""

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from softlabel.errors import SceneError, StoreError
from softlabel.imagery.scenes import TileReader
from softlabel.records import TILES, Detections
from softlabel.report import figures, page, wording
from softlabel.report import store as report
from softlabel.report.figures import Pixels
from softlabel.report.store import DoubtfulTile, Tally
from softlabel.results.stores import Store, open_store
from softlabel.shards import read_shards
from softlabel.store import commit, read_json, write_json, write_text
from softlabel.tile_table import iterate_tiles

_INK_RGB = (90, 100, 112)
_MAX_CLASS_PANELS = 60  # xView has as many
_JPEGS_BYTES, _MAX_JPEG_BYTES = 2_000_000, 160_000
_OVERLAY_PX, _PAGE_PX = 1280, 640
_SHEET_PX, _THUMBNAIL_PX = 2000, (120, 320)


@dataclass(frozen=True)
class _Picture:
    """What is kept of a doubtful tile once its files are written."""

    coco: dict[str, Any]
    shown: Detections
    view: dict[str, Any]
    thumbnail: Pixels


def show(folder: Path, output: Path, num_doubtful: int) -> str:
    """Count a finished store in one pass, whatever its size, draw it into ``output``, and return it in words.

    Writes index.html, histograms.png, contact.png, ``overlays/`` (a PNG per doubtful tile with its boxes) and, for
    correction, ``doubtful/`` (images/ and coco.json). What an earlier call wrote there is replaced.

    Raises:
        StoreError: The store is missing, unfinished, broken or without its tiles, or somebody corrected
            ``doubtful/coco.json`` in place.
    """
    store = open_store(folder)
    earlier = _earlier_pictures(output)
    tally = Tally(len(store.classes), num_doubtful)
    for shard in read_shards(store.folder):
        tally.add(shard)
    histograms = _histograms(tally, store.classes)
    _commit(output / "histograms.png", histograms)
    for path in earlier:  # what the new coco.json does not list would pass for images without objects
        path.unlink(missing_ok=True)
    pictures, skipped = _draw_doubtful(tally, store, output)
    view = _view(store, tally, histograms, pictures, skipped)
    write_text(output / "index.html", page.render("store.html.j2", view))
    lines = [report.format_store(store.folder.name, store.teacher, tally), ""]
    lines += [f"no picture of {tile_id}: {reason}" for tile_id, reason in skipped]
    lines += [f"{len(pictures)} doubtful tiles to correct in {output / 'doubtful'}", f"{output / 'index.html'}"]
    return "\n".join(lines)


def _earlier_pictures(output: Path) -> list[Path]:
    """The pictures that an earlier call wrote."""
    listing = output / "doubtful" / "coco.json"
    if not listing.exists():
        return []
    document = read_json(listing)
    if not report.is_as_written(document):
        raise StoreError(f"{listing} was edited: move {listing.parent} away, or give another --output")
    names = [image["file_name"] for image in document["images"]]
    folders = (output / "overlays", output / "doubtful" / "images")
    return [output / "contact.png", *(folder / name for folder in folders for name in names)]


def _histograms(tally: Tally, classes: Sequence[str]) -> bytes:
    """All classes, then each alone; where there are very many, those with the most boxes."""
    counts_K = tally.boxes_HK[0]
    largest = set(np.argsort(-counts_K, kind="stable")[:_MAX_CLASS_PANELS].tolist())
    panels = [(f"all classes: {wording.plain(int(counts_K.sum()))}", tally.histograms_KB.sum(axis=0), _INK_RGB)]
    for i, name in enumerate(classes):
        if i in largest:
            panels.append((f"{name}: {wording.plain(int(counts_K[i]))}", tally.histograms_KB[i], figures.class_rgb(i)))
    return figures.histograms_png(panels, "score of the best class")


def _draw_doubtful(tally: Tally, store: Store, output: Path) -> tuple[list[_Picture], list[tuple[str, str]]]:
    """Draw the tiles that can be read, one at a time; (tile_id, reason) of the others."""
    rows = _tile_rows(store.tiles, [tile.tile_id for tile in tally.doubtful])
    painter = _Painter(output, store.classes, len(tally.doubtful))
    reader = TileReader()
    pictures: list[_Picture] = []
    skipped: list[tuple[str, str]] = []
    for rank, tile in enumerate(tally.doubtful, start=1):
        row = rows[tile.tile_id]
        try:
            image = reader.read(row)
        except SceneError as error:
            skipped.append((tile.tile_id, str(error)))
            continue
        pictures.append(painter.draw(rank, tile, tally.shown_above, image, row["group"]))
    reader.close()
    painter.contact_sheet(pictures)
    document = report.coco(((picture.coco, picture.shown) for picture in pictures), store.classes)
    write_json(output / "doubtful" / "coco.json", document)
    return pictures, skipped


def _tile_rows(tiles: Path, tile_ids: Sequence[str]) -> dict[str, dict]:
    """The rows of some tiles, by tile_id."""
    wanted = set(tile_ids)
    columns = [name for name in TILES.names if name != "truth"]
    return {row["tile_id"]: row for row in iterate_tiles(tiles, columns=columns) if row["tile_id"] in wanted}


class _Painter:
    """Writes the files of doubtful tiles."""

    def __init__(self, output: Path, classes: Sequence[str], num_tiles: int) -> None:
        self._output, self._classes = output, classes
        self._max_bytes = min(_MAX_JPEG_BYTES, _JPEGS_BYTES // max(num_tiles, 1))
        self._thumbnail_px = int(np.clip(_SHEET_PX / math.sqrt(max(num_tiles, 1) * 4 / 3), *_THUMBNAIL_PX))

    def draw(self, rank: int, tile: DoubtfulTile, threshold: float, image: Pixels, group: str) -> _Picture:
        """Write one tile's overlay and its pixels, the latter for correction."""
        shown = tile.detections.above(threshold)
        name = f"{rank:03d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', tile.tile_id)[-100:]}.png"
        draw = partial(figures.draw_soft_labels, image, shown, self._classes)
        large = draw(max(_OVERLAY_PX, *image.shape[:2]), scores=True)
        _commit(self._output / "overlays" / name, figures.png(large))
        _commit(self._output / "doubtful" / "images" / name, figures.png(image))
        size = {"width": image.shape[1], "height": image.shape[0]}
        view = {
            "rank": rank,
            "tile_id": tile.tile_id,
            "file": name,
            "doubt": wording.number(tile.doubt, 1),
            "boxes": len(shown.boxes),
            "jpeg": _base64(figures.jpeg(draw(_PAGE_PX, scores=False), self._max_bytes)),
        }
        thumbnail = draw(self._thumbnail_px, scores=False)
        return _Picture({"file_name": name, **size, "group": group, "tile_id": tile.tile_id}, shown, view, thumbnail)

    def contact_sheet(self, pictures: Sequence[_Picture]) -> None:
        """Write all tiles as one picture."""
        if pictures:
            captions = [f"{picture.view['rank']}: {picture.view['tile_id']}" for picture in pictures]
            sheet = figures.contact_sheet([picture.thumbnail for picture in pictures], captions, self._thumbnail_px)
            _commit(self._output / "contact.png", figures.png(sheet))


def _view(
    store: Store,
    tally: Tally,
    histograms: bytes,
    pictures: Sequence[_Picture],
    skipped: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """All that the page needs."""
    reasons, more_reasons = report.top_reasons(tally)
    return {
        "name": store.folder.name,
        "facts": report.teacher_facts(store.teacher),
        "counts": report.tile_counts(tally),
        "boxes": report.box_table(tally, store.teacher),
        "reasons": reasons,
        "more_reasons": more_reasons,
        "histograms": _base64(histograms),
        "panels_left_out": max(0, len(store.classes) - _MAX_CLASS_PANELS),
        "shown_above": tally.shown_above,
        "legend": _legend(pictures, store.classes),
        "pictures": [picture.view for picture in pictures],
        "skipped": skipped,
    }


def _legend(pictures: Sequence[_Picture], classes: Sequence[str]) -> list[tuple[str, str]]:
    """(name, CSS colour) of the classes that are seen in any picture."""
    seen = sorted({class_id for picture in pictures for class_id in picture.shown.class_ids.tolist()})
    return [(classes[i], "rgb({}, {}, {})".format(*figures.class_rgb(i))) for i in seen]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _commit(path: Path, data: bytes) -> None:
    commit(path, lambda temporary: temporary.write_bytes(data))
