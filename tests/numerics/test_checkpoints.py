"""Checkpoints that the installed ultralytics wrote are the same detector here: its predict is the reference."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from ultralytics import RTDETR, YOLO
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import DetectionModel, OBBModel, WorldModel, YOLOEModel, YOLOESegModel

from softlabel import rotated
from softlabel.detectors import families as detectors
from softlabel.detectors.describe import read_header
from softlabel.detectors.weights import import_weights, load_model
from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import WeightsError
from softlabel.records import Nms

IMGSZ = 192
MAX_DET = 200
QUICK = ["yolov3-tiny", "yolov5n", "yolov8n", "yolov10n", "yolo11n", "yolo26n", "yolov8n-seg", "yolo26n-pose"]
OTHERS = [
    *("yolov3u", "yolov5n-p6", "yolov6n", "yolov8n-p2", "yolov8n-p6", "yolov8n-ghost", "yolov8m", "yolov9t", "yolov9c"),
    *("yolov9e", "yolov10b", "yolo11m", "yolo12n", "yolo26m", "yolo26n-p6", "yolo11n-pose", "yolo26n-seg"),
]
TRAINED = ["yolov8n", "yolo11n", "yolo26n"]


@pytest.fixture(scope="module")
def images(shared):
    """Real tiles: the whole, a wide and a tall part."""
    path = sorted((shared / "data" / "overhead" / "images").iterdir())[0]
    whole = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    return [whole[:640, :640], whole[:300, :900], whole[:900, :500]]


def talkative(name, images):
    """An untrained model whose boxes and scores follow the pixels: a fresh one gives all of them the same score."""
    torch.manual_seed(0)
    yolo = YOLO(f"{name}.yaml")
    head = yolo.model.model[-1]
    assert isinstance(head, Detect)
    for module in yolo.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    for branch in head.cv3:
        torch.nn.init.normal_(branch[-1].weight, std=0.05)  # scores that saturate at 1 would be in no order
        torch.nn.init.constant_(branch[-1].bias, -3.5)
    batch = np.stack([cv2.resize(image, (IMGSZ, IMGSZ)) for image in images])
    with torch.no_grad():
        yolo.model.train()(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255)
    yolo.model.eval()
    return yolo


def predict(yolo, image, nms):
    """What ultralytics' predict says of it; one-to-many heads, as class vectors need them."""
    options = {"imgsz": IMGSZ, "conf": nms.floor, "iou": nms.iou, "max_det": nms.max_det, "device": "cpu"}
    result = yolo.predict(image[..., ::-1], end2end=False, verbose=False, **options)[0]
    return result.boxes if result.obb is None else result.obb


def clear_nms(yolo, image):
    """A floor and an IoU that no score and no pair of boxes comes near: rounding, which differs from CPU to CPU (and
    in ultralytics' NMS is 0.06 px at class 79, whose offset is 600,000 px), then decides about no box."""
    scores = np.sort(predict(yolo, image, Nms(1e-6, 1.0, 10**6)).conf.numpy())[-150:]
    widest = np.diff(scores[:50]).argmax()
    floor = float(scores[widest : widest + 2].mean())
    for iou in np.arange(0.8, 0.3, -0.01):
        below, above = (predict(yolo, image, Nms(floor, iou + by, MAX_DET)).data for by in (-0.005, 0.005))
        if torch.equal(below, above):
            return Nms(floor, iou, MAX_DET)
    raise AssertionError("at each IoU some pair is on the edge")


def assert_same(path, images, masks=False):
    yolo, total = YOLO(path), 0
    for i, image in enumerate(images):
        nms = clear_nms(yolo, image)
        found = YoloDetector.from_weights(path, nms, IMGSZ).detect(images)[i]
        theirs = predict(yolo, image, nms)
        boxes, scores = theirs.xyxy.numpy(), theirs.conf.numpy()
        with_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores = boxes[with_area], scores[with_area]
        apart_px = np.abs(found.boxes[:, None] - boxes).max(-1) + np.abs(found.best[:, None] - scores)
        nearest = apart_px.argmin(0)
        np.testing.assert_allclose(found.boxes[nearest], boxes, atol=1e-5 * max(image.shape))
        np.testing.assert_allclose(found.best[nearest], scores, atol=1e-4)
        # ultralytics leaves out boxes whose mask is empty.
        assert len(boxes) == len(found.boxes) or (masks and 0 < len(found.boxes) - len(boxes) < 5)
        total += len(boxes)
    assert total > 20


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_a_saved_model_finds_what_ultralytics_own_predict_finds(name, images, tmp_path):
    path = tmp_path / "best.pt"
    talkative(name, images).save(path)
    assert_same(path, images, masks="-seg" in name)


@pytest.mark.parametrize("name", ["yolov8n-rtdetr", pytest.param("rtdetr-resnet50", marks=pytest.mark.long)])
def test_an_rtdetr_keeps_the_class_vectors_of_what_ultralytics_own_predict_finds(name, images, tmp_path):
    torch.manual_seed(0)
    path, rtdetr = tmp_path / "best.pt", RTDETR(f"{name}.yaml")
    head = rtdetr.model.model[-1]
    for linear in (*head.dec_score_head, head.enc_score_head, *(mlp.layers[-1] for mlp in head.dec_bbox_head)):
        torch.nn.init.normal_(linear.weight, std=0.3)
    rtdetr.save(path)
    detector = detectors.load(teacher_of(path), threads=None, batch_size=2)
    theirs = RTDETR(path)
    for image, found in zip(images, detector.detect(images), strict=True):
        options = {"imgsz": IMGSZ, "conf": 1e-6, "max_det": 10**6, "device": "cpu", "verbose": False}
        boxes = theirs.predict(image[..., ::-1], **options)[0].boxes
        assert len(boxes) == 300  # of all box and class pairs the best: a box may be there several times
        apart = np.abs(found.boxes[:, None] - np.clip(boxes.xyxy.numpy(), 0, [*image.shape[1::-1]] * 2)).max(-1)
        assert apart.min(0).max() < 1e-5 * max(image.shape)
        vectors = found.scores[apart.argmin(0), boxes.cls.numpy().astype(int)]
        np.testing.assert_allclose(vectors, boxes.conf.numpy(), atol=1e-4)
        assert (found.scores.shape[1], found.scores.std() > 0.01) == (80, True)


def teacher_of(path):
    header = read_header(path)
    return detectors.Teacher(
        header.family, path, {}, len(header.classes), IMGSZ, Nms(1e-6, 1.0, 300), "pytorch", "float32"
    )


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n", "yolo11n-obb", "yolov10n"])
def test_a_model_that_began_as_one_of_other_classes_is_as_wide_as_that(name, images, tmp_path):
    """As whoever fine-tunes from COCO has it: ultralytics keeps the width that 80 classes gave the head."""
    kind = OBBModel if "obb" in name else DetectionModel
    torch.manual_seed(0)
    first, fine_tuned = (kind(f"{name}.yaml", nc=classes, verbose=False) for classes in (80, 2))
    fine_tuned.load(first, verbose=False)
    fine_tuned.names = {0: "plane", 1: "ship"}
    torch.save({"model": fine_tuned, "train_args": {"imgsz": IMGSZ}}, tmp_path / "best.pt")
    import_weights(tmp_path / "best.pt", tmp_path / "best.safetensors")
    for path in (tmp_path / "best.pt", tmp_path / "best.safetensors"):
        model, header = load_model(path)
        assert (header.yaml["class_width"], header.classes) == (80, ("plane", "ship"))
        with torch.no_grad():
            ours, theirs = (one.eval()(torch.ones(1, 3, 64, 64))[0] for one in (model, fine_tuned))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_model_finds_what_ultralytics_own_predict_finds(name, images, tmp_path):
    """One epoch on eight tiles: best.pt as it is stripped at the end, and a checkpoint from amid it, with optimizer."""
    folder = trained(name, images, tmp_path)
    for path in (folder / "best.pt", folder / "epoch0.pt"):
        model, header = load_model(path)
        assert (header.classes, header.imgsz, header.train_args["epochs"]) == (("plane", "ship"), IMGSZ, 1)
        assert model.names == {0: "plane", 1: "ship"}
        assert_same(path, images)
    assert (folder / "epoch0.pt").stat().st_size > 2 * (folder / "best.pt").stat().st_size


@pytest.mark.parametrize(
    "name", ["yolo11n-obb", *(pytest.param(f"{name}-obb", marks=pytest.mark.long) for name in ("yolov8n", "yolo26n"))]
)
def test_a_model_of_rotated_boxes_finds_what_ultralytics_own_predict_finds(name, images, tmp_path):
    path = tmp_path / "best.pt"
    yolo = talkative(name, images)
    for branch in yolo.model.model[-1].cv4:
        torch.nn.init.normal_(branch[-1].weight, std=1.0)
    yolo.save(path)
    yolo, angles = YOLO(path), []
    for i, image in enumerate(images):
        nms = clear_nms(yolo, image)
        found = YoloDetector.from_weights(path, nms, IMGSZ).detect(images)[i]
        boxes = predict(yolo, image, nms)
        inside = hulls_in(image, boxes.xywhr.numpy())
        assert len(found.boxes) == inside.sum() > 5
        scores, class_ids = boxes.conf.numpy()[inside], boxes.cls.numpy()[inside]
        one, other = (np.sort(rotated.corners(xywhr), 1) for xywhr in (found.xywhr, boxes.xywhr.numpy()[inside]))
        nearest = np.abs(one[:, None] - other).max((2, 3)).argmin(0)  # equal scores may change places
        np.testing.assert_allclose(one[nearest], other, atol=1e-4 * max(image.shape))
        np.testing.assert_allclose(found.best[nearest], scores, atol=1e-4)
        assert (found.class_ids[nearest] == class_ids).all()
        angles.extend(found.xywhr[:, 4])
        hulls = np.clip(rotated.hulls(found.xywhr), 0, [*image.shape[1::-1]] * 2)
        np.testing.assert_allclose(found.boxes, hulls, atol=1e-3)
    assert np.ptp(angles) > 0.5


def hulls_in(image, xywhr):
    hulls = np.clip(rotated.hulls(xywhr), 0, [*image.shape[1::-1]] * 2)
    return (hulls[:, 2:] > hulls[:, :2]).all(1)


@pytest.mark.long
def test_a_trained_model_of_rotated_boxes_is_read(images, tmp_path):
    folder = trained("yolo11n-obb", images, tmp_path, label="0 0.3 0.4 0.5 0.3 0.6 0.5 0.4 0.6")
    model, header = load_model(folder / "best.pt")
    assert (header.classes, header.imgsz) == (("plane", "ship"), IMGSZ)
    assert type(model).__name__ == "OBBModel"
    found = YoloDetector(model, IMGSZ, Nms(1e-5, 0.4, 50)).detect(images[:1])[0]
    boxes = YOLO(folder / "best.pt").predict(images[0][..., ::-1], imgsz=IMGSZ, conf=1e-5, iou=0.4, max_det=50)[0].obb
    np.testing.assert_allclose(
        found.best[0], boxes.conf.numpy()[hulls_in(images[0], boxes.xywhr.numpy())][0], atol=1e-4
    )


@pytest.mark.parametrize("name", ["yolov8s-worldv2", pytest.param("yolov8s-world", marks=pytest.mark.long)])
def test_a_yolo_world_looks_for_the_classes_it_was_last_given(name, images, tmp_path):
    """As set_classes and save leave it: the text is in the checkpoint, and its encoder is not needed."""
    torch.manual_seed(0)
    model = WorldModel(f"{name}.yaml", verbose=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.txt_feats, model.model[-1].nc = torch.nn.functional.normalize(torch.randn(1, 3, 512), dim=-1), 3
    batch = np.stack([cv2.resize(image, (IMGSZ, IMGSZ)) for image in images])
    with torch.no_grad():
        model.train()(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255)
    model.names = ["a plane", "a ship", "a car"]
    torch.save({"model": model.eval(), "train_args": {"imgsz": IMGSZ, "task": "detect"}}, tmp_path / "best.pt")
    import_weights(tmp_path / "best.pt", tmp_path / "best.safetensors")
    for path in (tmp_path / "best.pt", tmp_path / "best.safetensors"):
        read, header = load_model(path)
        assert header.classes == ("a plane", "a ship", "a car")
        pixels = torch.from_numpy(batch[:1]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            ours, theirs = (one.eval()(pixels)[0] for one in (read, model))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
        assert ours.shape[1] == 7 and ours[0, 4:].std() > 0.1 * ours[0, 4:].mean()
    found = YoloDetector.from_weights(path, Nms(1e-5, 0.6, MAX_DET)).detect(images)
    assert all(one.scores.shape == (len(one.boxes), 3) for one in found) and sum(len(one.boxes) for one in found) > 5


@pytest.mark.parametrize(
    "name", ["yoloe-11s", *(pytest.param(one, marks=pytest.mark.long) for one in ("yoloe-v8s-seg", "yoloe-26s-seg"))]
)
def test_a_yoloe_looks_for_the_classes_it_was_last_given(name, images, tmp_path):
    """As set_classes and save leave it. It becomes a plain detection model, of these classes."""
    torch.manual_seed(0)
    model = (YOLOESegModel if "seg" in name else YOLOEModel)(f"{name}.yaml", verbose=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    model.set_classes(["a plane", "a ship", "a car"], torch.nn.functional.normalize(torch.randn(1, 3, 512), dim=-1))
    batch = np.stack([cv2.resize(image, (IMGSZ, IMGSZ)) for image in images])
    with torch.no_grad():
        model.train()(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255)
    torch.save({"model": model.eval(), "train_args": {"imgsz": IMGSZ, "task": "detect"}}, tmp_path / "best.pt")
    read, header = load_model(tmp_path / "best.pt")
    assert header.classes == ("a plane", "a ship", "a car") and header.yaml["head"][-1][2] == "Detect"
    pixels = torch.from_numpy(batch[:1]).permute(0, 3, 1, 2).float() / 255
    for one in (read, model):
        one.end2end = False
    with torch.no_grad():
        ours, theirs = read.eval()(pixels)[0], model.eval()(pixels)[0]
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    torch.testing.assert_close(ours, theirs[:, :7], atol=1e-3, rtol=1e-4)
    assert ours[0, 4:].std() > 0.05 * ours[0, 4:].mean()
    del model.pe
    torch.save({"model": model}, tmp_path / "best.pt")
    with pytest.raises(WeightsError, match=r"it is a YOLOE without classes: save it after model\.set_classes"):
        load_model(tmp_path / "best.pt")


TRAIN = """
import sys
from ultralytics import RTDETR, YOLO
model, folder, imgsz = sys.argv[1:]
options = dict(batch=4, workers=0, device="cpu", project=folder, name="run", plots=False, save_period=1)
YOLO(f"{model}.yaml").train(data=f"{folder}/data.yaml", epochs=1, imgsz=int(imgsz), **options)
"""


def trained(name, images, folder, label="0 0.5 0.5 0.4 0.4"):
    """A folder of checkpoints. In a process of its own: ultralytics changes settings of the whole process."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i in range(8):
        cv2.imwrite(str(folder / "images" / f"{i}.png"), cv2.resize(images[i % 3], (IMGSZ, IMGSZ)))
        (folder / "labels" / f"{i}.txt").write_text(f"{label}\n")
    data = f"path: {folder}\ntrain: images\nval: images\nnames: [plane, ship]\n"
    (folder / "data.yaml").write_text(data)
    environment = {**os.environ, "YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "true"}
    command = [sys.executable, "-c", TRAIN, name, str(folder), str(IMGSZ)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run" / "weights"
