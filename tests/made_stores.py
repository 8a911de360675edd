"""Stores written by hand: tiles with the boxes a test wants, on disk as labelling leaves them."""

import shutil
from collections import Counter
from functools import partial

import numpy as np

from softlabel import shards, tile_table
from softlabel.records import EMPTY, Detections, soft_labels_table
from softlabel.results import run as results
from softlabel.results.stores import num_shards
from softlabel.results.subtype import subtype_shard
from softlabel.shards import shard_file
from softlabel.store import DONE, finish, write_json, write_table

CLASSES = ["car", "plane", "ship"]


def detections(*boxes):
    """Boxes (x0, y0, x1, y1, class_id, score); the other classes have a tenth of the score."""
    scores = np.zeros((len(boxes), len(CLASSES)), np.float32)
    for row, (*_, class_id, score) in zip(scores, boxes, strict=True):
        row[:] = score / 10
        row[class_id] = score
    return Detections(np.array([box[:4] for box in boxes], np.float32).reshape(-1, 4), scores)


def made_tile(scene_id, window, found=None, *, reason=None, retryable=False, **columns):
    """A tile row, what was found in it, and why it was rejected if it was; "empty" if it has no valid pixel."""
    column, row, width, height = window
    tile = {
        "tile_id": f"{scene_id}#{column}_{row}_{width}x{height}",
        "scene_id": scene_id,
        "scene_uri": f"/gone/{scene_id}",
        "window": list(window),
        "bands": [1, 2, 3],
        "group": scene_id,
        **columns,
    }
    return tile, found or detections(), reason, retryable


def write_tiles(run_dir, made, *, shard_tiles=64, name="tiles-made"):
    """The tiles folder of a run."""
    folder = run_dir / name
    tile_table.write_tiles(folder, (tile for tile, *_ in made), shard_tiles)
    finish(folder, {"tiles": len(made)})
    return folder


def write_store(run_dir, made, *, tiles="tiles-made", shard_tiles=64, weights="w1", splits=None, classes=CLASSES):
    """A finished store of those tiles, in shards of as many."""
    folder = run_dir / f"label-{weights}"
    teacher = {"weights": weights, "architecture": "yolov5n.yaml:n:nc=3", "classes": list(classes)}
    write_json(folder / "store.json", {"teacher": teacher, "tiles": tiles, "splits": splits, "with_losses": False})
    counts = {"requested": 0, "labelled": 0, "empty": 0, "rejected": 0, "boxes": 0, "saturated": 0}
    for start in range(0, len(made), shard_tiles):
        asked = [one for one in made[start : start + shard_tiles] if splits is None or one[0].get("split") in splits]
        if asked:
            rows, found, reasons, retryable = zip(*asked, strict=True)
            ids = [row["tile_id"] for row in rows]
            empty = {tile_id for tile_id, reason in zip(ids, reasons, strict=True) if reason == EMPTY}
            reasons = [None if reason == EMPTY else reason for reason in reasons]
            table = soft_labels_table(len(classes), ids, found, [None] * len(ids), reasons, retryable, empty)
            write_table(shard_file(folder, start // shard_tiles), table)
        counts["requested"] += len(asked)
        counts["rejected"] += sum(reason not in (None, EMPTY) for *_, reason, _ in asked)
        counts["empty"] += sum(reason == EMPTY for *_, reason, _ in asked)
        counts["boxes"] += sum(len(found.boxes) for _, found, *_ in asked)
    finish(folder, {"name": weights, **counts, "labelled": counts["requested"] - counts["rejected"] - counts["empty"]})
    return folder


def made_store(run_dir, made, **options):
    """Tiles and a store of them."""
    size = {key: options[key] for key in ("shard_tiles",) if key in options}
    write_tiles(run_dir, made, **size)
    return write_store(run_dir, made, **options)


def unpack(folder):
    """A finished store as it was before it was packed; its shards."""
    labels = list(shards._numbered(folder, None))
    shutil.rmtree(folder / "table")
    (folder / DONE).unlink()
    for shard, table in labels:
        write_table(shard_file(folder, shard), table)
    return [shard_file(folder, shard) for shard, _ in labels]


def write_finer(job, read, *, only=None, again=False):
    """The store of a SubtypeJob as the tasks of `softlabel subtype` write it, without Ray; unfinished if ``only`` some
    shards are written. What was counted."""
    write_json(job.output / "store.json", job.identity())
    batch = {"first": [0], "stop": [only or num_shards(job.store)]}
    results._write_shards(job.output, partial(subtype_shard, job, read), again, batch)
    counts = Counter()
    if not only:
        for number, expected in shards.to_pack(job.store.tiles, job.store.splits):
            counts.update(shards.pack(job.output, job.store.tiles, job.store.splits, number, expected))
        finish(job.output, {"requested": job.store.num_tiles, **counts})
    return counts
