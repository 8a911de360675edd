"""A pass that never waits for its GPU, on a GPU of PyTorch's fake tensors: they have shapes and devices, but no values.

Whatever would ask such a tensor for a value raises, and so does a kernel that gets tensors of two devices.
"""

import pytest
import torch
from tiny_owlvit import make, save, words
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softlabel.detectors.batch_nms import START
from softlabel.detectors.owlvit import OwlVitDetector
from softlabel.detectors.queries import Queries
from softlabel.detectors.resize import _taps
from softlabel.detectors.weights import build_model
from softlabel.detectors.yolo import YoloDetector
from softlabel.records import Nms

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BATCH, TILE_HW = 4, (100, 60)


class Arrivals(TorchDispatchMode):
    """Notes copies from the host to the GPU. (A number that a kernel takes from the host goes with its launch.)"""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        before, after = ({one.device for one in tree_leaves(some) if isinstance(one, torch.Tensor)}
                         for some in ((args, kwargs), found))  # fmt: skip
        if "copy" in str(func) and GPU in after and CPU in before:
            self.found.append(str(func))
        return found


@pytest.fixture
def fake():
    """The mode; tensors that are kept for a device are forgotten, those of the fake one and afterwards of the true."""
    _taps.cache_clear()
    with torch.no_grad():
        yield FakeTensorMode()
    _taps.cache_clear()


def moved(network, fake):
    """What ``to(GPU)`` does to a network, on a GPU that is not there."""

    def there(tensor):
        return fake.from_tensor(tensor).to(GPU)

    with fake:
        for module in network.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = torch.nn.Parameter(there(tensor).detach(), requires_grad=False)
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    module._buffers[name] = there(tensor)
        for shape, (anchors, strides, rest) in (getattr(network, "_grids", None) or {}).items():
            network._grids[shape] = there(anchors), there(strides), rest


def run(detector, fake):
    """A first pass on the CPU, which keeps what is made once for a shape, then two on the GPU; what the second one
    found, and what came from the host meanwhile."""
    network, selection = detector._engine._forward, detector._selection(detector.geometry(TILE_HW))
    network.make_capturable()

    def go(device):
        tiles = torch.zeros(BATCH, *TILE_HW, 3, dtype=torch.uint8, device=device)
        return selection.of_batch(network(selection.geometry.apply_to_batch(tiles))[0], START)

    go(CPU)
    moved(network, fake)
    with fake:
        go(GPU)
        with Arrivals() as arrivals:
            return go(GPU), arrivals.found


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(
    "name", ["yolov8n.yaml", "yolov5n-anchor.yaml", "yolov10n.yaml", "yolo26n.yaml", "yolo11n-obb.yaml"]
)
def test_a_yolo_s_pass_asks_its_gpu_for_nothing(name, precision, fake):
    kept, arrived = run(YoloDetector(build_model(name, 3), 96, Nms(0.01), CPU, precision=precision), fake)
    assert not arrived
    assert all(part.device == GPU and len(part) == BATCH for part in (kept.rows, kept.count, kept.effort))
    assert kept.rows.dtype == torch.float32


def test_an_owlvit_s_pass_asks_its_gpu_for_nothing(fake, tmp_path):
    save(tmp_path, *make("owlvit", words(), image_size=64, patch_size=8))
    queries = Queries((("a plane",), ("a ship",), ("a car",)))
    kept, arrived = run(OwlVitDetector(tmp_path, queries, Nms(0.0, 0.5), CPU), fake)
    assert not arrived
    assert kept.rows.device == GPU and kept.rows.dtype == torch.float32


def with_forward(change):
    """A YOLO whose outputs are changed on their way."""
    detector = YoloDetector(build_model("yolov8n.yaml", 3), 96, Nms(0.01), CPU)
    network = detector._engine._forward
    forward = network.forward

    def changed(tiles):
        decoded, raw = forward(tiles)
        return change(decoded), raw

    network.forward = changed
    return detector


def test_a_question_is_noticed(fake):
    with pytest.raises(DataDependentOutputException):
        run(with_forward(lambda decoded: decoded * decoded.max().item()), fake)


def test_an_arrival_is_noticed(fake):
    _, arrived = run(with_forward(lambda decoded: decoded * torch.tensor([2.0], device=decoded.device)), fake)
    assert arrived == ["aten._to_copy.default"]
