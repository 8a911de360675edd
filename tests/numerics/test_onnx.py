"""Graphs that ultralytics exported against the checkpoint they were made of, and against its own predict."""

import copy

import numpy as np
import onnx
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel, OBBModel

from softlabel.cli import main
from softlabel.config import Recipe
from softlabel.detectors import families
from softlabel.detectors.onnx_file import read_onnx_header
from softlabel.detectors.teachers import recipe_teacher
from softlabel.errors import RecipeError, WeightsError

NAMES = ("plane", "ship", "car")
IMGSZ = 96


def talkative(kind, name):
    torch.manual_seed(0)
    model = kind(name, nc=3, verbose=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    for branch in model.model[-1].cv3:
        torch.nn.init.normal_(branch[-1].weight, std=0.1)
        torch.nn.init.constant_(branch[-1].bias, -3.0)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, IMGSZ, IMGSZ))
    model.names = dict(enumerate(NAMES))
    return model.eval()


def exported(folder, name="yolov8n", **options):
    """The checkpoint and the graph."""
    kind = OBBModel if "obb" in name else DetectionModel
    path = folder / "best.pt"
    task = "obb" if "obb" in name else "detect"
    torch.save({"model": talkative(kind, f"{name}.yaml"), "train_args": {"imgsz": IMGSZ, "task": task}}, path)
    options = {"imgsz": IMGSZ, "simplify": False, "device": "cpu", "verbose": False, **options}
    YOLO(path).export(format="onnx", **options)
    return path, path.with_suffix(".onnx")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(96, 96), (60, 96), (128, 100)]]


def teacher_of(weights, **label):
    label = {"weights": str(weights), "floor": 0.05, "iou": 0.5, "max_det": 100, "engine": "auto", **label}
    return recipe_teacher(
        Recipe.model_validate({"name": "x", "classes": list(NAMES), "tiles": {"synthetic": {}}, "label": label})
    )


@pytest.mark.parametrize("threads", [None, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [("yolov8n", {}), ("yolo11n", {"dynamic": True}), ("yolov8n", {"batch": 2}), ("yolo11n-obb", {})],
    ids=["fixed", "dynamic", "batch of two", "rotated"],
)
def test_a_graph_finds_what_its_checkpoint_finds(tmp_path, images, name, options, threads):
    checkpoint, graph = exported(tmp_path, name, **options)
    teacher = teacher_of(graph)
    assert (teacher.family, teacher.fingerprint["engine"], teacher.imgsz) == ("onnx", "onnxruntime", IMGSZ)
    # A graph of one size pads to its square; a checkpoint sees as much only of square tiles.
    seen = images if options.get("dynamic") else images[:1]
    found = families.load(teacher, threads=threads, batch_size=3).detect(seen)
    expected = families.load(teacher_of(checkpoint, engine="pytorch"), threads=None, batch_size=3).detect(seen)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.boxes) == len(theirs.boxes) > 3
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=2e-2)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
        assert (ours.xywhr is None) == ("obb" not in name)
        if ours.xywhr is not None:
            np.testing.assert_allclose(ours.xywhr, theirs.xywhr, atol=2e-2)


@pytest.mark.parametrize("imgsz", [IMGSZ, (64, 96)], ids=["square", "rectangular"])
def test_tiles_of_any_shape_are_letterboxed_as_ultralytics_predicts(tmp_path, images, imgsz):
    _, graph = exported(tmp_path, imgsz=imgsz)
    found = families.load(teacher_of(graph), threads=None, batch_size=3).detect(images)
    model = YOLO(graph, task="detect")
    for image, ours in zip(images, found, strict=True):
        options = {"imgsz": imgsz, "conf": 0.05, "iou": 0.5, "max_det": 100, "device": "cpu", "verbose": False}
        boxes = model.predict(image[..., ::-1], **options)[0].boxes
        inside = (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all(1).numpy()
        np.testing.assert_allclose(ours.best, boxes.conf.numpy()[inside], atol=1e-4)
        assert len(ours.boxes) > 5


def test_what_cannot_be_a_teacher_is_said_in_one_line(tmp_path, capsys):
    _, baked = exported(tmp_path, nms=True)
    with pytest.raises(WeightsError, match=r"has NMS baked in, .* export it without \(.* nms=False end2end=False\)"):
        read_onnx_header(baked)
    model = onnx.load(str(exported(tmp_path)[1]))
    nameless = copy.deepcopy(model)
    del nameless.metadata_props[:]
    onnx.save(nameless, tmp_path / "nameless.onnx")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "best.onnx").read_bytes()[:5000])
    for name, says in {
        "nameless.onnx": "does not say its classes and image size: export it by ultralytics",
        "cut.onnx": "cannot be read as ONNX",
        "gone.onnx": "no weights at",
    }.items():
        assert main(["describe", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    with pytest.raises(RecipeError, match=r"label\.imgsz: .* was exported for 96 px"):
        teacher_of(tmp_path / "best.onnx", imgsz=64)
    with pytest.raises(RecipeError, match=r"label\.engine: openvino does not run this model \(onnx\)"):
        teacher_of(tmp_path / "best.onnx", engine="openvino")


def test_a_graph_is_described(tmp_path, capsys):
    _, graph = exported(tmp_path)
    assert main(["describe", str(graph)]) == 0
    said = capsys.readouterr().out
    assert "best.onnx, ONNX" in said and "3: plane, ship, car" in said and "imgsz:      96 px" in said


def test_without_onnxruntime_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(WeightsError, match=r'needs onnxruntime: pip install "softlabel\[onnx\]"'):
        read_onnx_header(tmp_path / "best.onnx")
