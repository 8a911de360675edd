"""A GPU's pipeline, on a made-up device that notes in which order it was asked for what."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch

from softlabel.detectors.letterbox import Letterbox
from softlabel.detectors.pipeline import Pipeline
from softlabel.detectors.resize import resized
from softlabel.detectors.selection import Selection
from softlabel.records import Nms


@dataclass
class Gate:
    """What is awaited; open from the start unless the device says otherwise."""

    number: int
    device: "Device"

    def synchronize(self):
        self.device.log.append(("wait", self.number))
        assert self.device.opened.wait(60)
        self.device.log.append(("done", self.number))


class Device:
    """Computes at once, on the CPU; results can be held back."""

    def __init__(self):
        self.log, self.opened, self.passes, self.graphs = [], threading.Event(), 0, False
        self.opened.set()
        self.downloaded = threading.Semaphore(0)

    def pinned(self, shape, dtype):
        return torch.empty(*shape, dtype=dtype)

    def upload(self, tiles):
        self.log.append(("upload", len(tiles)))
        return tiles.clone()

    def computing(self):
        return nullcontext()

    def download(self, found, into):
        for there, here in zip(found, into, strict=True):
            here.copy_(there)
        self.passes += 1
        self.log.append(("download", self.passes))
        self.downloaded.release()
        return Gate(self.passes, self)

    def captured(self, run, tiles):
        self.log.append(("capture", len(tiles)))
        return run if self.graphs else None

    def asked(self, what):
        return [number for name, number in self.log if name == what]


def forward(tiles):
    """One box per tile, in the middle, whose size is the value of its first pixel."""
    value = tiles[:, 0, 0, 0].float()
    middle = torch.full_like(value, 16)
    return torch.stack([middle, middle, value, value, torch.full_like(value, 0.9)], 1)[:, :, None], None


def made(device, batch_size=4, forward=forward, **options):
    options = {"may_shrink": False, "whole_batches": False, "capturable": False} | options
    return Pipeline(forward, device, batch_size, **options)


def selection(size=32, **options):
    return Selection(Letterbox.of((size, size), 32, 32), 1, None, Nms(0.1, 0.5, 10), False, **options)


def tiles(*values, size=32):
    return [np.full((size, size, 3), value, np.uint8) for value in values]


def widths(found):
    return [round(float(one.boxes[0, 2] - one.boxes[0, 0])) for one in found]


def test_each_tile_gets_its_own_boxes_in_order():
    pipeline = made(Device())
    finishes = [pipeline.start(tiles(*range(first, first + 7)), selection()) for first in (2, 9, 16)]
    assert [widths(finish()) for finish in finishes] == [list(range(first, first + 7)) for first in (2, 9, 16)]


def test_a_device_is_waited_for_once_per_pass():
    device = Device()
    assert widths(made(device).start(tiles(*range(2, 22)), selection())()) == list(range(2, 22))
    assert device.asked("upload") == [4] * 5
    assert sorted(device.asked("wait")) == [1, 2, 3, 4, 5]


def test_the_next_tiles_are_copied_before_the_last_results_are_taken():
    device = Device()
    device.opened.clear()
    pipeline = made(device)
    with ThreadPoolExecutor(1) as other:
        finish = other.submit(pipeline.start(tiles(*range(2, 10)), selection()))
        assert device.downloaded.acquire(timeout=60) and device.downloaded.acquire(timeout=60)
        assert len(device.asked("upload")) == 2 and not device.asked("done")
        device.opened.set()
        assert widths(finish.result()) == list(range(2, 10))


def test_passes_in_flight_are_few():
    """So are the tiles that memory is taken for: whoever starts more waits."""
    device = Device()
    device.opened.clear()
    pipeline = made(device)
    with ThreadPoolExecutor(1) as other:
        started = other.submit(pipeline.start, tiles(*range(2, 26)), selection())
        for _ in range(3):
            assert device.downloaded.acquire(timeout=60)
        assert not device.downloaded.acquire(timeout=0.3) and not started.done()
        device.opened.set()
        assert widths(started.result()()) == list(range(2, 26))


def test_a_pass_takes_tiles_of_two_calls():
    """Of 3 and 5 tiles with 4 in a pass, two are full, while there is something else to do."""
    device = Device()
    pipeline = made(device)
    first, second = (pipeline.start(tiles(*values), selection()) for values in ((2, 3, 4), (5, 6, 7, 8, 9)))
    assert widths(first()) == [2, 3, 4] and widths(second()) == [5, 6, 7, 8, 9]
    assert device.asked("upload") == [4, 4]


def test_what_no_call_fills_up_goes_when_the_device_is_idle():
    device = Device()
    pipeline = made(device)
    assert widths(pipeline.start(tiles(2, 3), selection())()) == [2, 3]
    assert device.asked("upload") == [2]
    # Tiles of another shape wait for each other, and not for these.
    finishes = [pipeline.start(tiles(4), selection()), pipeline.start(tiles(8, size=16), selection(16))]
    assert [widths(finish()) for finish in finishes] == [[4], [4]]
    assert device.asked("upload") == [2, 1, 1]


def test_whole_batches_are_filled_up():
    device = Device()
    assert widths(made(device, whole_batches=True).start(tiles(2, 3, 4, 5, 6), selection())()) == [2, 3, 4, 5, 6]
    assert device.asked("upload") == [4, 4]


def test_a_graph_is_made_once_for_full_passes():
    device = Device()
    device.graphs = True
    pipeline = made(device, capturable=True)
    assert widths(pipeline.start(tiles(*range(2, 30)), selection())()) == list(range(2, 30))
    assert device.asked("capture") == [4]
    # What is left over is filled up, since one launch is cheaper than many.
    assert widths(pipeline.start(tiles(5), selection())()) == [5]
    assert device.asked("upload")[-1] == 4


def test_no_graph_is_tried_twice():
    device = Device()
    pipeline = made(device, capturable=True)
    assert widths(pipeline.start(tiles(*range(2, 30)), selection())()) == list(range(2, 30))
    assert device.asked("capture") == [4]


def rows_of_boxes(tiles):
    """600 boxes beside each other."""
    count, batch = 600, len(tiles)
    boxes = torch.zeros(batch, 5, count)
    boxes[:, 0], boxes[:, 1] = torch.arange(count) % 30 + 0.5, torch.arange(count) // 30 + 0.5
    boxes[:, 2:4], boxes[:, 4] = 1.0, 0.9
    return boxes, None


def test_what_was_done_with_too_little_effort_is_done_again():
    device = Device()
    pipeline = made(device, forward=rows_of_boxes)
    choice = Selection(Letterbox.of((32, 32), 32, 32), 1, None, Nms(0.1, 0.5, 1000), False)
    assert [len(one.boxes) for one in pipeline.start(tiles(1, 2), choice)()] == [600, 600]
    assert device.passes == 3  # 2 blocks and room for 256, 4 and 512 (what 2 blocks hold), 4 and 1,024
    assert [len(one.boxes) for one in pipeline.start(tiles(1, 2), choice)()] == [600, 600]
    assert device.passes == 4  # the effort is remembered


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def small(tiles):
        sizes.append(len(tiles))
        if len(tiles) > 1:
            raise torch.OutOfMemoryError("no room")
        return forward(tiles)

    pipeline = made(Device(), forward=small, may_shrink=True)
    assert widths(pipeline.start(tiles(*range(2, 12)), selection())()) == list(range(2, 12))
    assert sizes == [4, 2, 1, 1, 2, 1, 1, *[1] * 6]
    with pytest.raises(torch.OutOfMemoryError):
        made(Device(), forward=small).start(tiles(1, 2), selection())()


def test_an_error_reaches_those_whose_tiles_it_took():
    def fails(tiles):
        if (tiles == 13).any():
            raise ValueError("unlucky")
        return forward(tiles)

    pipeline = made(Device(), 2, fails)
    good, bad, after = (pipeline.start(tiles(*pair), selection()) for pair in ((2, 3), (12, 13), (4, 5)))
    assert widths(good()) == [2, 3]
    with pytest.raises(ValueError, match="unlucky"):
        bad()
    assert widths(after()) == [4, 5]


def test_several_threads_may_start_and_wait():
    pipeline = made(Device(), 3)

    def label(first):
        return widths(pipeline.start(tiles(*range(first, first + 5)), selection())())

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(label, range(2, 22))) == [list(range(first, first + 5)) for first in range(2, 22)]


@pytest.mark.parametrize("seed", range(60))
def test_tiles_are_resized_as_opencv_does(seed):
    rng = np.random.default_rng(seed)
    height, width, new_height, new_width = (int(side) for side in rng.integers(1, 200, 4))
    if seed % 5 == 0:
        new_height, new_width = max(1, height // 2), max(1, width // 2)
    image = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    for ours, one in zip(resized(torch.from_numpy(image), (new_height, new_width)).numpy(), image, strict=True):
        np.testing.assert_array_equal(ours, cv2.resize(one, (new_width, new_height), interpolation=cv2.INTER_LINEAR))


@pytest.mark.parametrize("shape", [(50, 96), (96, 96), (40, 33), (97, 12)])
def test_a_batch_is_letterboxed_as_each_tile_is(shape):
    geometry = Letterbox.of(shape, 80, 32)
    images = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), dtype=np.uint8)
    found = geometry.apply_to_batch(torch.from_numpy(images)).numpy()
    np.testing.assert_array_equal(found, np.stack([geometry.apply(image) for image in images]))
