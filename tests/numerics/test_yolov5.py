"""The anchor-based YOLOv5: its size, its answers with the original weights, and that it works where ultralytics' do."""

import copy
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import ultralytics
from safetensors.torch import load_file

from softlabel.detectors.header import Header
from softlabel.detectors.weights import build_model, load_matching, load_model, save_weights
from softlabel.detectors.yolo import YoloDetector
from softlabel.detectors.yolov5 import COCO_ANCHORS, AnchorDetect, YoloV5
from softlabel.errors import RecipeError, WeightsError
from softlabel.records import Nms

CLASSES = ("car", "plane", "ship")


@pytest.fixture
def model(talkative_anchor_model):
    return talkative_anchor_model


def test_yolov5s_with_the_paper_s_three_classes_has_its_parameters():
    assert sum(p.numel() for p in build_model("yolov5s-anchor.yaml", 3).parameters()) == 7_027_720


@pytest.mark.parametrize(("size", "millions"), [("n", 1.9), ("s", 7.2), ("m", 21.2), ("l", 46.5), ("x", 86.7)])
def test_sizes_are_the_published_ones(size, millions):
    counted = sum(p.numel() for p in build_model(f"yolov5{size}-anchor.yaml", 80).parameters())
    assert counted / 1e6 == pytest.approx(millions, abs=0.07)


def test_original_weights_find_what_they_found(shared):
    """ultralytics' bus.jpg, 1080 x 810, letterboxed to 640 x 480; confidence above 0.25, NMS at IoU 0.45.

    The figures are another decoder's, to two digits.
    """
    image = cv2.imread(str(Path(ultralytics.__file__).parent / "assets" / "bus.jpg"))[..., ::-1]
    detector = YoloDetector.from_weights(shared / "weights/yolov5n.pt", Nms(floor=0.25, iou=0.45), imgsz=640)
    found = detector.detect([np.ascontiguousarray(image)])[0]
    _, header = load_model(shared / "weights/yolov5n.pt")
    names = [header.classes[i] for i in found.class_ids]
    assert names == ["person"] * 4 + ["bus"]
    np.testing.assert_allclose(found.best, [0.87, 0.78, 0.76, 0.49, 0.44], atol=0.03)
    bus = found.boxes[4]
    assert bus[0] < 40 and bus[2] > 790 and 200 < bus[1] < 260 and 740 < bus[3] < 800


def test_a_checkpoint_and_its_cross_check_hold_the_same_tensors(shared):
    model, header = load_model(shared / "weights/yolov5n.pt")
    other = load_file(shared / "weights/yolov5n_coco.safetensors")
    assert model.state_dict().keys() == other.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, other[key])
    assert (len(header.classes), header.imgsz, header.classes[0]) == (80, 640, "person")
    assert header.yaml["anchors"] == [list(level) for level in COCO_ANCHORS]


def test_original_weights_start_three_classes_with_all_but_the_head(shared):
    model = build_model("yolov5n-anchor.yaml", 3)
    fitting, total = load_matching(model, shared / "weights/yolov5n.pt")
    assert (fitting, total) == (343, 349)  # 342 of backbone and neck, and the anchors; not 3 weights and 3 biases


def test_outputs_decode_to_centre_size_and_scores():
    """Logits of one cell by hand: sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4."""
    head = AnchorDetect(2, COCO_ANCHORS, torch.tensor([8.0, 16, 32]), (4, 4, 4)).eval()
    for conv in head.m:
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    with torch.no_grad():
        head.m[1].bias.view(3, 7)[2] = torch.tensor([math.log(3), 0, math.log(3), 0, math.log(3), 0, math.log(3)])
        decoded, raw = head([torch.rand(1, 4, *hw) for hw in [(4, 6), (2, 3), (1, 2)]])
    assert decoded.shape == (1, 7, 3 * (24 + 6 + 2))
    assert [tuple(level.shape) for level in raw["feats"]] == [(1, 3, 4, 6, 7), (1, 3, 2, 3, 7), (1, 3, 1, 2, 7)]
    plain = decoded[0, :, 0]  # stride 8, first anchor 10 x 13, cell (0, 0)
    torch.testing.assert_close(plain, torch.tensor([4.0, 4, 10, 13, 0.25, 0.25, 0.5]))
    index = 3 * 24 + 2 * 6 + 1 * 3 + 2  # stride 16, third anchor 59 x 119, row 1, column 2
    x, y, w = (0.75 * 2 - 0.5 + 2) * 16, (0.5 * 2 - 0.5 + 1) * 16, (0.75 * 2) ** 2 * 59
    torch.testing.assert_close(decoded[0, :, index], torch.tensor([x, y, w, 119, 0.375, 0.5625, 0.75]))


def test_a_fresh_head_expects_few_objects():
    head = build_model("yolov5n-anchor.yaml", 3).model[-1]
    for conv, stride in zip(head.m, (8, 16, 32), strict=True):
        bias = conv.bias.detach().view(3, 8)
        assert bias[:, 4].mean() == pytest.approx(math.log(8 / (640 / stride) ** 2), abs=0.3)
        assert bias[:, 5:].mean() == pytest.approx(math.log(0.6 / 2.00001), abs=0.3)


def test_fusing_changes_no_answer(model):
    x = torch.rand(2, 3, 96, 64)
    with torch.inference_mode():
        plain, _ = copy.deepcopy(model)(x)
        fused, _ = copy.deepcopy(model).fuse(verbose=False)(x)
    torch.testing.assert_close(fused, plain, atol=1e-3, rtol=1e-3)


def test_other_anchors_travel_with_the_weights(model, tmp_path):
    mine = copy.deepcopy(model)
    mine.set_anchors(mine.anchors_px() * np.float32(0.5))
    path = tmp_path / "w.safetensors"
    save_weights(path, mine, Header(mine.yaml, CLASSES, 96, {}))
    loaded, header = load_model(path)
    assert isinstance(loaded, YoloV5) and header.yaml["anchors"][0] == [5, 6.5, 8, 15, 16.5, 11.5]
    np.testing.assert_allclose(loaded.anchors_px(), np.array(COCO_ANCHORS).reshape(3, 3, 2) / 2)


@pytest.mark.parametrize("name", ["yolov5q-anchor.yaml", "yolov5n-anchors.yaml", "yolov99.yaml"])
def test_an_unknown_model_is_named(name):
    with pytest.raises(RecipeError, match=f"no model {name}"):
        build_model(name, 3)


def test_a_weights_file_cannot_have_its_yaml_evaluated(model, tmp_path):
    """Its metadata may name layers; anything else that ultralytics' parser would look up or evaluate is refused."""
    for key, value in {
        "activation": "open('called', 'w').close() or nn.ReLU()",
        "backbone": [[-1, 1, "torch_safe_load", ["x.pt"]]],
    }.items():
        path = tmp_path / f"{key}.safetensors"
        save_weights(path, model, Header({**model.yaml, key: value}, CLASSES, 96, {}))
        with pytest.raises(WeightsError, match="describes a model that cannot be built"):
            load_model(path)
