"""From the pixels of one shard to soft labels committed to the store: what a labelling actor does, without Ray."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from softlabel.detectors.detector import Detector
from softlabel.detectors.families import load
from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import RecipeError
from softlabel.labelling.job import LabelJob
from softlabel.labelling.journal import LABELLING, Journal
from softlabel.labelling.reading import images_of, tiles_of
from softlabel.records import EMPTY, LOSS_NAMES, REJECTED, Detections, Truth, soft_labels_table
from softlabel.shards import read_shard, shard_file
from softlabel.store import write_table

_NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32))


class Labeller:
    """Holds one teacher at a time, labels whole shards and commits them. Several threads may call it: while the last
    tiles of one shard are in the model, the next shard's follow, and other shards are committed. A model that waits
    between shards leaves cores idle."""

    def __init__(
        self, jobs: Sequence[LabelJob], stores: Sequence[Path], threads: int | None, batch_size: int | None
    ) -> None:
        self._jobs, self._stores = jobs, stores
        self._threads, self._batch_size = threads, batch_size
        self._loaded: tuple[int, Detector] | None = None
        # A shard holds the first while its tiles are handed to the model, the second while it waits for the last ones.
        self._entrance, self._exit = threading.Lock(), threading.RLock()
        self._busy_until = 0.0

    def __call__(self, read: pa.Table) -> pa.Table:
        """Label one shard, the row that ``read_shard`` made of it, and report in one row what was done, and when."""
        index, shard, table = read["job"][0].as_py(), read["shard"][0].as_py(), tiles_of(read)
        journal = Journal(self._stores[index], shard, LABELLING)
        # Noted before its turn comes: writing to a bucket takes a while, and the model should not wait for that.
        noted = nullcontext() if journal.has_suspects else journal.in_hand(_readable(table))
        alone = journal.has_suspects or self._jobs[index].with_losses
        with noted, self._turn(alone=alone) as handed_over:
            labels, began, device = self._label(table, index, shard, journal, handed_over)
            handed_over()  # for a shard without readable tiles
            ended = time.time()
            busy_s, self._busy_until = ended - max(began, self._busy_until), ended
        self._commit(labels, index, shard, again=read["again"][0].as_py())
        seen = table.select(["height", "width", "km2"])  # filtering the pixels would copy them
        seen = seen.filter(pc.and_(pc.is_null(table["reason"]), pc.invert(table["empty"])))
        pixels = pc.sum(pc.multiply(seen["height"].cast(pa.int64()), seen["width"].cast(pa.int64()))).as_py()
        row = {
            "job": index,
            "shard": shard,
            "tiles": len(labels),
            "empty": pc.sum(pc.equal(labels["status"], EMPTY)).as_py() or 0,
            "rejected": pc.sum(pc.equal(labels["status"], REJECTED)).as_py() or 0,
            "boxes": pc.sum(pc.list_value_length(labels["boxes"])).as_py() or 0,
            "pixels": pixels or 0,
            "km2": pc.sum(seen["km2"]).as_py() or 0.0,
            "busy_s": busy_s,
            "begin": began,
            "end": time.time(),
            "actor": f"{socket.gethostname()}:{os.getpid()}",
            "device": device,
        }
        return pa.table({key: [value] for key, value in row.items()})

    @contextmanager
    def _turn(self, *, alone: bool) -> Iterator[Callable[[], None]]:
        """A shard's turn in the model, after those that came before; calling what it yields lets the next one in.

        With ``alone``, nothing else is in the model until the end, so that a tile that kills the process is known, and
        losses are computed by one thread.
        """
        with ExitStack() as at_exit, ExitStack() as at_entrance:
            at_entrance.enter_context(self._entrance)
            if alone:
                at_exit.enter_context(self._exit)

            def handed_over() -> None:
                if not alone:
                    at_exit.enter_context(self._exit)
                    at_entrance.close()

            yield handed_over

    def _label(
        self, table: pa.Table, index: int, shard: int, journal: Journal, handed_over: Callable[[], None]
    ) -> tuple[pa.Table, float, str]:
        """Soft labels of a shard, the time when the model got it, and the model's device."""
        job, detector = self._jobs[index], self._detector(index)
        began = time.time()
        tile_ids, images = table["tile_id"].to_pylist(), images_of(table)
        reasons, retryable = table["reason"].to_pylist(), table["retryable"].to_pylist()
        empty = set(table["tile_id"].filter(table["empty"]).to_pylist())
        truths = _read_truths(job, shard) if job.with_losses else None
        found: list[Detections] = [_NOTHING] * len(tile_ids)
        losses: list[list[float] | None] = [None] * len(tile_ids)
        readable = [i for i, reason in enumerate(reasons) if reason is None and tile_ids[i] not in empty]
        for group in journal.groups([tile_ids[i] for i in readable]):
            chosen = [readable[i] for i in group]
            verdict = journal.verdict(tile_ids[chosen[0]]) if len(chosen) == 1 else ""
            if verdict:
                reasons[chosen[0]] = verdict
            elif chosen:
                with journal.in_hand([tile_ids[i] for i in chosen]) if journal.has_suspects else nullcontext():
                    drawn = None if truths is None else [truths[tile_ids[i]] for i in chosen]
                    answers = _detect(detector, [images[i] for i in chosen], drawn, handed_over)
                for i, (detections, terms) in zip(chosen, answers, strict=True):
                    found[i], losses[i] = detections, terms
        labels = soft_labels_table(job.teacher.num_classes, tile_ids, found, losses, reasons, retryable, empty)
        if truths is not None:
            names = ",".join(cast(YoloDetector, detector).loss_names())
            labels = labels.replace_schema_metadata({LOSS_NAMES: names})
        return labels, began, _device(detector)

    def _commit(self, labels: pa.Table, index: int, shard: int, *, again: bool) -> None:
        """Write a whole shard; if it is there already, replace the rows that were labelled again."""
        before = read_shard(self._stores[index], shard) if again else None
        if before is not None:
            metadata = before.schema.metadata
            new = {tile_id: i for i, tile_id in enumerate(labels["tile_id"].to_pylist())}
            order = [new.get(tile_id, -1) for tile_id in before["tile_id"].to_pylist()]
            both = _together(before, labels)
            labels = both.take([len(before) + i if i >= 0 else row for row, i in enumerate(order)])
            labels = labels.replace_schema_metadata(metadata)
        write_table(shard_file(self._stores[index], shard), labels)

    def _detector(self, index: int) -> Detector:
        if self._loaded is None or self._loaded[0] != index:
            # Two at once may not fit on a GPU: first wait for the last shard to leave the previous one.
            with self._exit:
                self._loaded = None
                self._loaded = (
                    index,
                    load(self._jobs[index].teacher, threads=self._threads, batch_size=self._batch_size),
                )
        return self._loaded[1]


def _readable(table: pa.Table) -> list[str]:
    seen = pc.and_(pc.is_null(table["reason"]), pc.invert(table["empty"]))
    return table["tile_id"].filter(seen).to_pylist()


def _together(before: pa.Table, after: pa.Table) -> pa.Table:
    """The rows of two tables; one of format 4 lacks rotated boxes, one of format 5 lacks agreement."""
    tables = [before.replace_schema_metadata(), after.replace_schema_metadata()]
    return pa.concat_tables(tables, promote_options="default").select(after.column_names)


def _read_truths(job: LabelJob, shard: int) -> dict[str, Truth]:
    rows = job.tile_rows(shard, ("tile_id", "truth")).to_pylist()
    return {row["tile_id"]: Truth.from_row(row["truth"]) for row in rows}


def _detect(
    detector: Detector,
    images: list[np.ndarray],
    truths: list[Truth] | None,
    handed_over: Callable[[], None],
) -> list[tuple[Detections, list[float] | None]]:
    try:
        if truths is None:
            finish = detector.start(images)
            handed_over()
            return [(detections, None) for detections in finish()]
        return list(cast(YoloDetector, detector).detect_with_losses(images, truths))
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):  # PyTorch has no exception class for it on a CPU
            raise
        raise RecipeError(f"a batch does not fit in memory ({error}): lower execution.batch_size") from None


def _device(detector: Detector) -> str:
    # Ray shows each actor only its own GPUs, through this variable.
    return f"{detector.device.type} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}".strip()
