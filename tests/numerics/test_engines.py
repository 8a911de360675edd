"""Every engine that a CPU can run against PyTorch in float32, and which engine is taken where."""

import copy
import importlib.util
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from softlabel.detectors import engine_choice, engines
from softlabel.detectors.describe import read_header
from softlabel.detectors.engine_choice import resolve
from softlabel.detectors.engines import Outputs
from softlabel.detectors.teachers import weights_fingerprint
from softlabel.detectors.tile_loss import TileLoss
from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import RecipeError
from softlabel.records import Nms, Truth

FAMILIES = ["talkative_model", "talkative_anchor_model"]
SHAPES = [(96, 96), (96, 96), (50, 96), (128, 40), (96, 96), (50, 96), (96, 96)]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    # Smooth, as pictures are: noise alone gives hundreds of boxes that rounding can tip.
    small = [rng.integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8) for h, w in SHAPES]
    return [
        np.asarray(torch.nn.functional.interpolate(torch.from_numpy(one).permute(2, 0, 1)[None].float(), size=shape,
                   mode="bilinear")[0].permute(1, 2, 0).to(torch.uint8))
        for one, shape in zip(small, SHAPES, strict=True)
    ]  # fmt: skip


def detector(model, floor=0.05, imgsz=96, **settings):
    return YoloDetector(copy.deepcopy(model), imgsz, Nms(floor=floor), torch.device("cpu"), **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reference(model, images):
    found = detector(model).detect(images)
    assert all(len(one.boxes) > 5 for one in found)
    return found


def need_openvino():
    if importlib.util.find_spec("openvino") is None:  # importing it here would be without our precautions
        pytest.skip("openvino is not installed")


@pytest.fixture(scope="module")
def openvino(model):
    need_openvino()
    return detector(model, engine="openvino")


@pytest.fixture(scope="module", params=["pytorch", "openvino"])
def bfloat16(request, model):
    if request.param == "openvino":
        need_openvino()
    return detector(model, floor=0.03, engine=request.param, precision="bfloat16")


def assert_agree(found, reference, box_px=0.01, score=1e-4):
    assert len(found) == len(reference)
    for ours, theirs in zip(found, reference, strict=True):
        assert len(ours.boxes) == len(theirs.boxes)
        assert (ours.objectness is None) == (theirs.objectness is None)
        if len(theirs.boxes):
            rows, others = (scaled(one, box_px, score) for one in (ours, theirs))
            # Row by row but for the order of equal scores, which rounding may turn.
            assert float(torch.cdist(rows, others, p=float("inf")).amin(1).max()) < 1


def scaled(found, box_px, score):
    """Boxes, vectors and objectness in units of their tolerances."""
    objectness = [] if found.objectness is None else [found.objectness / score]
    return torch.from_numpy(np.column_stack([found.boxes / box_px, found.scores / score, *objectness])).double()


def decoded(detector, shape):
    """Everything that a model says of two images, (2, 4 + K (+ 1), all anchors), before anything is left out."""
    images = np.random.default_rng(1).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    return torch.stack(detector._engine.start(iter(images), lambda outputs: list(outputs.decoded.clone()))())


@pytest.mark.parametrize("shape", [(96, 96), (64, 96), (96, 32), (96, 96)])
def test_every_box_and_score_that_openvino_decodes_equals_pytorch_s(model, openvino, shape):
    ours, theirs = decoded(openvino, shape), decoded(detector(model), shape)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours[:, :4], theirs[:, :4], atol=0.02, rtol=0)
    torch.testing.assert_close(ours[:, 4:], theirs[:, 4:], atol=1e-4, rtol=0)


def test_openvino_finds_what_pytorch_finds(openvino, images, reference):
    assert_agree(openvino.detect(images), reference)


def test_a_tile_s_boxes_are_the_same_in_any_company(openvino, images, reference):
    assert_agree(openvino.detect(images[:1]), reference[:1])
    many = [index % len(images) for index in range(40)]
    assert_agree(openvino.detect([images[index] for index in many]), [reference[index] for index in many])
    for index in (2, 3):
        assert_agree(openvino.detect(images[index : index + 1] * 9), reference[index : index + 1] * 9)


@pytest.mark.parametrize("batch_size", [1, 3, 100, None])
def test_pytorch_finds_the_same_at_any_batch_size(model, images, reference, batch_size):
    assert_agree(detector(model, batch_size=batch_size).detect(images), reference)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_passes_beside_each_other_come_back_in_order(model, images, reference, batch_size):
    before = torch.get_num_threads()
    assert_agree(detector(model, threads=3, batch_size=batch_size).detect(images), reference)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "settings",
    [{"threads": 2, "batch_size": 2}, {"threads": 3, "batch_size": 1, "precision": "bfloat16"}, {"engine": "openvino"}],
    ids=str,
)
def test_tiles_may_be_started_while_others_are_waited_for(model, images, settings):
    if "engine" in settings:
        need_openvino()
    one, order = detector(model, **settings), list(range(len(images)))
    alone = [one.detect([image])[0] for image in images]
    with ThreadPoolExecutor() as waiting:
        found = []
        for turn in range(6):
            turned = order[turn:] + order[:turn]  # so that shapes change between and within
            found.append((turned, waiting.submit(one.start([images[i] for i in turned]))))
        for turned, result in found:
            assert_agree(result.result(), [alone[i] for i in turned])


def split(outputs):
    return list(outputs.decoded)


def test_tiles_of_other_shapes_do_not_wait_for_each_other():
    together = threading.Barrier(2, timeout=30)

    class Meeting(engines.Network):
        def forward(self, tiles):
            together.wait()
            return tiles.sum((1, 2, 3))[:, None, None].float(), None

    engine = engines._TorchThreads(Meeting(), 1, 2)
    finishes = [engine.start([np.zeros((4, side, 3), np.uint8)], split) for side in (4, 8)]
    assert [len(finish()) for finish in finishes] == [1, 1]


def test_threads_share_the_tensors_of_a_network():
    """As many copies as threads would not fit where one does."""
    seen, together = set(), threading.Barrier(2, timeout=30)

    class Weighted(engines.Network):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.register_buffer("mean", torch.ones(1))

        def forward(self, tiles):
            together.wait()
            seen.add((id(self), self.weight.data_ptr(), self.mean.data_ptr()))
            return tiles.sum((1, 2, 3))[:, None, None].float(), None

    network = Weighted()
    engines._TorchThreads(network, 1, 2).start([np.zeros((4, 4, 3), np.uint8)] * 2, split)()
    modules, *tensors = (set(values) for values in zip(*seen, strict=True))
    assert len(modules) == 2 and tensors == [{network.weight.data_ptr()}, {network.mean.data_ptr()}]


def test_outputs_of_passes_are_not_kept():
    made, most_alive = [], []

    class Watched(engines.Network):
        def forward(self, tiles):
            raw = torch.zeros(1000)
            made.append(weakref.ref(raw))
            most_alive.append(sum(one() is not None for one in made))
            return tiles.sum((1, 2, 3))[:, None, None].float(), raw

    engine = engines._TorchThreads(Watched(), 1, 2)
    images = [np.zeros((4, side, 3), np.uint8) for side in (4, 8, 12, 16) for _ in range(8)]
    finishes = [engine.start([image], split) for image in images]
    assert all(len(finish()) == 1 for finish in finishes)
    assert len(made) == len(images) and max(most_alive) <= 2


def test_a_pass_keeps_to_its_thread_whatever_the_process_may_use():
    set_by_others, before, threads = threading.Event(), torch.get_num_threads(), []

    class Watched(engines.Network):
        def forward(self, tiles):
            set_by_others.wait()
            torch.ones(1 << 20).exp()  # work enough for several threads
            threads.append(torch.get_num_threads())
            return tiles.sum((1, 2, 3))[:, None, None].float(), None

    finish = engines._TorchThreads(Watched(), 1, 2).start([np.zeros((4, 4, 3), np.uint8)] * 4, split)
    try:
        torch.set_num_threads(4)
        set_by_others.set()
        finish()
    finally:
        torch.set_num_threads(before)
    assert threads == [1] * 4


def test_pixels_may_be_read_only_or_a_view(openvino, model, images, reference):
    views = [np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0) for image in images]
    for view in views:
        view.flags.writeable = False
    assert_agree(openvino.detect(views), reference)
    assert_agree(detector(model).detect(views), reference)


def eagerly(compile_):
    """torch.compile without a compiler, which takes a minute, but with its tracing: any break of the graph raises."""
    return lambda module, **settings: compile_(module, **{**settings, "backend": "eager", "fullgraph": True})


def test_what_is_compiled_finds_the_same(model, images, reference, monkeypatch):
    monkeypatch.setattr(torch, "compile", eagerly(torch.compile))
    torch._dynamo.reset()  # it counts what it compiled in one process, and refuses the ninth
    assert_agree(detector(model, engine="pytorch_compile", batch_size=3).detect(images), reference)


@pytest.mark.long
def test_compiled_code_finds_the_same(model, images, reference):
    assert_agree(detector(model, engine="pytorch_compile", batch_size=3).detect(images), reference)


def share_matched(found, reference, iou=0.9, score=0.02):
    """Of the reference's boxes, those with a box of the same class at that IoU and a score that near."""
    total = matched = 0
    for ours, theirs in zip(found, reference, strict=True):
        total += len(theirs.boxes)
        if len(ours.boxes) and len(theirs.boxes):
            overlaps = box_iou(torch.from_numpy(theirs.boxes), torch.from_numpy(ours.boxes)).numpy()
            near = np.abs(theirs.best[:, None] - ours.best[None]) <= score
            same = theirs.class_ids[:, None] == ours.class_ids[None]
            matched += int(((overlaps >= iou) & near & same).any(axis=1).sum())
    return matched / total


def test_bfloat16_finds_nearly_all_of_it(bfloat16, images, reference):
    # Of trained models' boxes above 0.25 it was 96 to 99.7 %; an untrained one has more that are close calls.
    assert share_matched(bfloat16.detect(images), reference) > 0.85


def test_boxes_are_decoded_in_float32_whatever_the_precision(bfloat16):
    """Coordinates of 256 to 512 px are 2 px apart in bfloat16."""
    xy = decoded(bfloat16, (64, 512))[:, :2]
    assert xy.dtype == torch.float32
    far = xy[xy > 256]
    assert len(far) > 100 and float((far.bfloat16().float() - far).abs().median()) > 0.2


class Counting:
    """A forward pass that says of each tile what its pixels add up to, and of which batch it was."""

    def __init__(self, most):
        self.most, self.batches = most, []

    def __call__(self, tiles):
        assert tiles.dtype == torch.uint8
        self.batches.append(len(tiles))
        if len(tiles) > self.most:
            raise torch.cuda.OutOfMemoryError("too many")
        return tiles.sum((1, 2, 3))[:, None, None].float(), None


def run_counting(engine, count):
    images = [np.full((4, 4, 3), index, np.uint8) for index in range(count)]

    def use(outputs: Outputs):
        return list(zip(range(outputs.first, count), outputs.decoded.flatten().tolist(), strict=False))

    assert engine.start(iter(images), use)() == [(index, 48.0 * index) for index in range(count)]


def test_a_batch_that_does_not_fit_is_halved_and_the_size_that_fits_is_kept():
    forward = Counting(most=3)
    engine = engines._Torch(forward, torch.device("cpu"), None, whole_batches=False)
    run_counting(engine, 11)
    assert forward.batches == [4, 2, 2, 2, 2, 2, 1]
    run_counting(engine, 3)
    assert forward.batches[7:] == [2, 1]


def test_a_last_batch_that_does_not_fit_is_not_tried_again_as_it_was():
    forward = Counting(most=1)
    run_counting(engines._Torch(forward, torch.device("cpu"), None, whole_batches=False), 3)
    assert forward.batches == [3, 1, 1, 1]


def test_a_given_batch_size_is_not_changed():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run_counting(engines._Torch(Counting(most=3), torch.device("cpu"), 4, whole_batches=False), 11)


def test_one_tile_that_does_not_fit_ends_it():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run_counting(engines._Torch(Counting(most=0), torch.device("cpu"), None, whole_batches=False), 11)


def test_what_is_compiled_for_one_size_gets_no_other():
    forward = Counting(most=4)
    run_counting(engines._Torch(forward, torch.device("cpu"), 4, whole_batches=True), 9)
    assert forward.batches == [4, 4, 4]


def test_losses_of_passes_beside_each_other_are_taken_one_at_a_time(model, images, monkeypatch):
    taking, of_one = threading.Lock(), TileLoss.__call__
    truths = [Truth(np.array([[5, 5, 30, 35]], np.float32), np.array([1], np.int32), np.array([False]))] * len(images)

    def alone(loss, *arguments):
        assert taking.acquire(blocking=False)
        time.sleep(0.01)  # a thread that does not wait for its turn comes now
        found = of_one(loss, *arguments)
        taking.release()
        return found

    expected = detector(model).losses(images, truths)
    monkeypatch.setattr(TileLoss, "__call__", alone)
    found = detector(model, threads=3, batch_size=1).losses(images, truths)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_losses_come_from_pytorch_in_float32_alone(bfloat16, images):
    with pytest.raises(ValueError, match="float32"):
        bfloat16.losses(images[:1], [Truth.from_row(None)])


def test_openvino_leaves_pytorch_its_threads_and_tells_nobody(openvino, images):
    before = torch.get_num_threads()
    openvino.detect(images[:2])
    assert torch.get_num_threads() == before
    assert sys.modules["openvino_telemetry"] is None


def test_a_labelling_process_starts_without_the_machinery_of_torch_compile():
    """It comes with torchvision's package, takes as long as all the rest, and nothing of it is used."""
    code = "import sys, softlabel.labelling.labeller; print({'torchvision', 'torch._dynamo'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr


def test_torchvision_may_come_later():
    code = (
        "import softlabel.detectors.detector, torchvision, torch;"
        "print(torchvision.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "tensor([0])", found.stderr


@pytest.fixture
def installed(monkeypatch):
    def install(*names):
        monkeypatch.setattr(engine_choice, "_is_installed", lambda name: name in names)

    return install


@pytest.mark.parametrize(
    ("asked", "cuda", "names", "got"),
    [
        (("auto", "auto"), False, ("openvino",), ("openvino", "float32")),
        (("auto", "auto"), False, (), ("pytorch", "float32")),
        (("auto", "auto"), True, ("openvino", "torch_tensorrt"), ("pytorch", "float16")),
        (("auto", "bfloat16"), False, ("openvino",), ("openvino", "bfloat16")),
        (("auto", "float32"), True, (), ("pytorch", "float32")),
        (("pytorch", "auto"), False, ("openvino",), ("pytorch", "float32")),
        (("pytorch", "bfloat16"), False, (), ("pytorch", "bfloat16")),
        (("pytorch_compile", "auto"), True, (), ("pytorch_compile", "float16")),
        (("tensorrt", "auto"), True, ("torch_tensorrt",), ("tensorrt", "float16")),
    ],
)
def test_what_auto_means(installed, asked, cuda, names, got):
    installed(*names)
    assert resolve(*asked, cuda=cuda, with_losses=False) == got
    assert resolve(*asked, cuda=cuda, with_losses=True) == ("pytorch", "float32")


@pytest.mark.parametrize(
    ("asked", "cuda", "names", "message"),
    [
        (("openvino", "auto"), False, (), "openvino is not installed"),
        (("openvino", "auto"), True, ("openvino",), "openvino runs on CPUs"),
        (("tensorrt", "auto"), False, ("torch_tensorrt",), "tensorrt needs CUDA"),
        (("tensorrt", "auto"), True, (), "tensorrt is not installed"),
        (("pytorch", "float16"), False, (), "float16 needs CUDA"),
        (("auto", "float16"), False, ("openvino",), "float16 needs CUDA"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(installed, asked, cuda, names, message):
    installed(*names)
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(*asked, cuda=cuda, with_losses=False)
    assert "\n" not in str(caught.value)


def test_engine_and_precision_are_part_of_the_fingerprint(weights):
    need_openvino()
    header = read_header(weights)
    plain = weights_fingerprint(weights, header, 96, Nms())
    assert plain == weights_fingerprint(weights, header, 96, Nms(), "pytorch", "float32")
    other = weights_fingerprint(weights, header, 96, Nms(), "openvino", "bfloat16")
    assert {key for key in plain if plain[key] != other[key]} == {"engine", "precision", "versions"}
    assert set(other["versions"]) - set(plain["versions"]) == {"openvino"}


def test_a_detector_from_weights_runs_on_the_engine_it_is_given(weights, images):
    need_openvino()
    settings = {"nms": Nms(floor=0.05), "imgsz": 96}
    plain = YoloDetector.from_weights(weights, **settings)
    assert_agree(
        YoloDetector.from_weights(weights, engine="openvino", threads=1, **settings).detect(images),
        plain.detect(images),
    )
