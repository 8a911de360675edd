"""Batches of tiles through a device that never waits for its host.

Tiles are put into pinned memory as uint8, copied on a stream of their own while the previous pass runs, and resized,
padded and scaled on the device; boxes are decoded and suppressed for the whole batch (batch_nms.py), and what is kept
is copied back on a third stream while the next pass runs. Each pass is waited for once, by the thread that makes
Detections of it.

A pass is full where there are enough tiles: what one call leaves over waits for the next call's tiles, and goes as it
is only when the device has nothing else to do.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch

from softlabel.detectors.batch_nms import START, Effort, Kept
from softlabel.detectors.selection import Image, Selection
from softlabel.records import Detections

IN_FLIGHT = 3
"""Passes at once: one runs while the next one's tiles are copied to the device and the last one's boxes from it."""
_PASSES_BEFORE_GRAPH = 4  # making a CUDA graph costs as much as some five passes
_COPIERS = 4  # threads that fill pinned memory: one alone is slower than a small model's forward pass
_FINISHERS = 2

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
Run = Callable[[torch.Tensor], Kept]


class Awaited(Protocol):
    """Something on its way from the device."""

    def synchronize(self) -> None:
        """Wait for it."""
        ...


class Queue(Protocol):
    """A device's streams."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies from and to by itself."""
        ...

    def upload(self, tiles: torch.Tensor) -> torch.Tensor:
        """Pinned tiles on the device; what is computed from now on comes after the copy."""
        ...

    def computing(self) -> AbstractContextManager:
        """A context: what is computed in it follows what was computed before."""
        ...

    def download(self, found: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> Awaited:
        """Copy what was computed last to pinned memory."""
        ...

    def captured(self, run: Run, tiles: torch.Tensor) -> Run | None:
        """The same function as one launch, for tiles of this shape; None where the device has nothing like it."""
        ...


class CudaQueue:
    """The streams of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up, self._compute, self._down = (torch.cuda.Stream(device) for _ in range(3))
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As for Queue."""
        return torch.empty(*shape, dtype=dtype, pin_memory=True)

    def upload(self, tiles: torch.Tensor) -> torch.Tensor:
        """As for Queue."""
        with torch.cuda.stream(self._up):
            there = tiles.to(self._device, non_blocking=True)
        self._compute.wait_stream(self._up)
        there.record_stream(self._compute)
        return there

    def computing(self) -> AbstractContextManager:
        """As for Queue."""
        return torch.cuda.stream(self._compute)

    def download(self, found: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> Awaited:
        """As for Queue."""
        self._down.wait_stream(self._compute)
        with torch.cuda.stream(self._down):
            for there, here in zip(found, into, strict=True):
                here.copy_(there, non_blocking=True)
                there.record_stream(self._down)
            event = torch.cuda.Event(blocking=True)  # a host that waits by spinning takes a core from the readers
            event.record()
        return event

    def captured(self, run: Run, tiles: torch.Tensor) -> Run | None:
        """As for Queue: a CUDA graph."""
        static = tiles.clone()
        run(static)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads wait for events meanwhile, which must not become part of the graph.
            with torch.cuda.graph(graph, self._pool, self._compute, capture_error_mode="thread_local"):
                kept = run(static)
        except RuntimeError:  # too little memory, or a network that synchronises after all: it runs without a graph
            return None

        def replay(tiles: torch.Tensor) -> Kept:
            static.copy_(tiles, non_blocking=True)
            graph.replay()
            return Kept(kept.rows.clone(), kept.count.clone(), kept.effort.clone())

        return replay


@dataclass
class _Call:
    """Tiles that were started together, and what was found so far."""

    found: list[Detections | None]
    missing: int
    error: BaseException | None = None


@dataclass(frozen=True)
class _Tile:
    image: Image
    call: _Call
    index: int


@dataclass
class _Slot:
    """Pinned memory for one pass in flight, by purpose."""

    memory: dict[Any, torch.Tensor] = field(default_factory=dict)

    def get(self, queue: Queue, purpose: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of a shape; it is kept for the next pass."""
        key = (purpose, tuple(shape[1:]))
        if key not in self.memory or len(self.memory[key]) < shape[0]:
            self.memory[key] = queue.pinned(shape, dtype)
        return self.memory[key][: shape[0]]


class Pipeline:
    """Runs one network over tiles of any shape.

    Args:
        forward: Decoded boxes (B, C, A) of uint8 tiles (B, H, W, 3), and whatever else.
        queue: The device's.
        batch_size: Tiles per pass.
        may_shrink: Whether to halve that where memory does not suffice.
        whole_batches: Whether every pass must have that size.
        capturable: Whether the forward pass never synchronises with the device, and so may become a CUDA graph.
    """

    def __init__(
        self,
        forward: Forward,
        queue: Queue,
        batch_size: int,
        *,
        may_shrink: bool,
        whole_batches: bool,
        capturable: bool,
    ) -> None:
        self._forward, self._queue, self._batch_size = forward, queue, batch_size
        self._may_shrink, self._whole_batches, self._capturable = may_shrink, whole_batches, capturable
        self._launching, self._changed = threading.RLock(), threading.Condition()
        self._pending: dict[Selection, list[_Tile]] = {}
        self._again: list[tuple[Selection, list[_Tile]]] = []
        self._in_flight, self._effort = 0, START
        self._runs: dict[tuple, Run | int] = {}
        self._slots: SimpleQueue[_Slot] = SimpleQueue()
        for _ in range(IN_FLIGHT):
            self._slots.put(_Slot())
        self._copiers = ThreadPoolExecutor(_COPIERS, "copy")
        self._finishers = ThreadPoolExecutor(_FINISHERS, "boxes")

    def start(self, images: Sequence[Image], selection: Selection) -> Callable[[], list[Detections]]:
        """Put tiles of one shape on their way; the function returned waits for the last of them, from any thread."""
        call = _Call([None] * len(images), len(images))
        with self._launching:
            pending = self._pending.setdefault(selection, [])
            for index, image in enumerate(images):
                pending.append(_Tile(image, call, index))
                if len(pending) >= self._batch_size:
                    self._launch_pending(selection)
        return partial(self._finish, call)

    def _finish(self, call: _Call) -> list[Detections]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not call.missing or call.error or self._again or not self._in_flight)
                if call.error:
                    raise call.error
                if not call.missing:
                    return [found for found in call.found if found is not None]
            with self._launching:
                if self._again:
                    self._launch(*self._again.pop())
                elif not self._in_flight and (selection := next((s for s, t in self._pending.items() if t), None)):
                    self._launch_pending(selection)

    def _launch_pending(self, selection: Selection) -> None:
        pending = self._pending[selection]
        tiles = pending[: self._batch_size]
        del pending[: len(tiles)]
        self._launch(selection, tiles)

    def _launch(self, selection: Selection, tiles: list[_Tile]) -> None:
        """Launch one pass, or several where memory does not suffice."""
        slot = self._slots.get()  # waits until a pass is over: then its memory is free
        try:
            size = len(tiles)
            if self._whole_batches or self._is_captured(selection, self._batch_size, self._effort):
                size = self._batch_size
            here = self._filled(slot, [tile.image for tile in tiles], size)
            with torch.inference_mode(), self._queue.computing():
                kept = self._run(selection, self._queue.upload(here), self._effort)
            found = [kept.rows, kept.count, kept.effort]
            into = [slot.get(self._queue, str(i), one.shape, one.dtype) for i, one in enumerate(found)]
            done = self._queue.download(found, into)
        except torch.OutOfMemoryError as error:
            self._slots.put(slot)
            if not self._may_shrink or len(tiles) == 1:
                self._fail(tiles, error)
                return
            half = max(1, len(tiles) // 2)
            self._batch_size = min(self._batch_size, half)
            for start in range(0, len(tiles), half):
                self._launch(selection, tiles[start : start + half])
        except Exception as error:  # noqa: BLE001 (whoever waits for one of the tiles raises it)
            self._slots.put(slot)
            self._fail(tiles, error)
        else:
            with self._changed:
                self._in_flight += 1
            self._finishers.submit(self._take, selection, tiles, self._effort, slot, into, done)

    def _filled(self, slot: _Slot, images: Sequence[Image], size: int) -> torch.Tensor:
        """Tiles in pinned memory, followed by black ones where a pass must be full."""
        here = slot.get(self._queue, "tiles", (size, *images[0].shape), torch.uint8)
        array = here.numpy()
        share = -(-len(images) // _COPIERS)
        list(self._copiers.map(lambda i: _copy(images[i : i + share], array[i : i + share]), range(0, size, share)))
        return here

    def _run(self, selection: Selection, tiles: torch.Tensor, effort: Effort) -> Kept:
        key = (selection, len(tiles), effort)

        def run(tiles: torch.Tensor) -> Kept:
            decoded, _ = self._forward(selection.geometry.apply_to_batch(tiles))
            return selection.of_batch(decoded, effort)

        known = self._runs.get(key, 0)
        if callable(known):
            return known(tiles)
        if known < _PASSES_BEFORE_GRAPH or len(tiles) < self._batch_size or not self._capturable:
            self._runs[key] = known + 1
            return run(tiles)
        captured = self._queue.captured(run, tiles)
        if captured is None:
            self._capturable = False
            return run(tiles)
        self._runs[key] = captured
        return captured(tiles)

    def _is_captured(self, selection: Selection, size: int, effort: Effort) -> bool:
        return callable(self._runs.get((selection, size, effort)))

    def _take(
        self,
        selection: Selection,
        tiles: list[_Tile],
        effort: Effort,
        slot: _Slot,
        into: list[torch.Tensor],
        done: Awaited,
    ) -> None:
        """Wait for a pass, and give its callers what was found; if its effort was too little, have it run again."""
        error, results, needed = None, [], effort
        try:
            done.synchronize()
            rows, count, efforts = (one.numpy()[: len(tiles)] for one in into)
            needed = Effort(*efforts.max(axis=0).tolist())
            if effort.suffices(needed):
                kept = rows[np.arange(rows.shape[1]) < count[:, None]]
                results = selection.detections(kept, count)
        except Exception as caught:  # noqa: BLE001
            error = caught
        self._slots.put(slot)
        with self._changed:
            self._in_flight -= 1
            if error:
                self._fail(tiles, error)
            elif not effort.suffices(needed):
                self._effort = self._effort.raised_to(needed)
                self._again.append((selection, tiles))
            else:
                for tile, found in zip(tiles, results, strict=True):
                    tile.call.found[tile.index] = found
                    tile.call.missing -= 1
            self._changed.notify_all()

    def _fail(self, tiles: list[_Tile], error: BaseException) -> None:
        with self._changed:
            for tile in tiles:
                tile.call.error = error
            self._changed.notify_all()


def _copy(images: Sequence[Image], into: np.ndarray) -> None:
    if len(images):
        np.stack(images, out=into[: len(images)])
    into[len(images) :] = 0
