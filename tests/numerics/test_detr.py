"""Detectors of transformers with classes of their own against its own post-processing, on tiny untrained models."""

import numpy as np
import pytest
import torch
import transformers as t

from softlabel.config import Recipe
from softlabel.detectors import families
from softlabel.detectors.describe import describe
from softlabel.detectors.detr import DetrDetector
from softlabel.detectors.teachers import recipe_teacher
from softlabel.errors import RecipeError, WeightsError
from softlabel.records import Nms

NAMES = {0: "plane", 1: "ship", 2: "car"}
SIDE = 64
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
STAGES = ["stage2", "stage3", "stage4"]
SIZES = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 20,
}
HGNET = {
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 16],
    "stage_mid_channels": [8] * 4,
    "stage_out_channels": [8, 16, 16, 16],
    "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [1] * 4,
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False] * 4,
    "stage_kernel_size": [3] * 4,
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1] * 4,
}
HYBRID = {"encoder_hidden_dim": 16, "d_model": 16, "decoder_in_channels": [16] * 3, "num_denoising": 0, **SIZES}


def plain(config, model, processor, width=16, stages=("stage4",), side=SIDE):
    backbone = t.ResNetConfig(**RESNET, out_features=list(stages))
    options = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "d_model": width}
    found = config(backbone_config=backbone, num_labels=3, **options, **SIZES)
    return model(found), processor(size={"height": side, "width": side})


def hybrid(config, model):
    backbone = t.RTDetrResNetConfig(**RESNET, out_features=STAGES)
    found = config(backbone_config=backbone, encoder_in_channels=[8, 16, 16], num_labels=3, **HYBRID)
    return model(found), t.RTDetrImageProcessor(size={"height": SIDE, "width": SIDE})


def d_fine():
    backbone = t.HGNetV2Config(**HGNET, out_features=STAGES)
    found = t.DFineConfig(backbone_config=backbone, encoder_in_channels=[16] * 3, num_labels=3, **HYBRID)
    return t.DFineForObjectDetection(found), t.RTDetrImageProcessor(size={"height": SIDE, "width": SIDE})


def yolos():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    found = t.YolosConfig(image_size=[SIDE, SIDE], patch_size=8, num_detection_tokens=20, num_labels=3, **sizes)
    return t.YolosForObjectDetection(found), t.YolosImageProcessor(size={"height": SIDE, "width": SIDE})


def rf_detr():
    layers = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2}
    windows = {"image_size": 112, "patch_size": 14, "num_windows": 2, "out_features": ["stage2", "stage4"]}
    heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "decoder_layers": 2}
    sizes = {"d_model": 32, "decoder_ffn_dim": 32, "intermediate_size": 32, "c2f_num_blocks": 1, "group_detr": 1}
    backbone = t.RfDetrDinov2Config(**layers, **windows)
    found = t.RfDetrConfig(backbone_config=backbone, num_labels=3, num_queries=20, **heads, **sizes)
    return t.RfDetrForObjectDetection(found), t.RfDetrImageProcessor(size={"height": 112, "width": 112})


MAKERS = {
    "rf_detr": rf_detr,
    "detr": lambda: plain(t.DetrConfig, t.DetrForObjectDetection, t.DetrImageProcessor),
    "conditional_detr": lambda: plain(
        t.ConditionalDetrConfig, t.ConditionalDetrForObjectDetection, t.ConditionalDetrImageProcessor
    ),
    "deformable_detr": lambda: plain(
        t.DeformableDetrConfig,
        t.DeformableDetrForObjectDetection,
        t.DeformableDetrImageProcessor,
        width=32,
        stages=STAGES,
        side=2 * SIDE,
    ),
    "rt_detr": lambda: hybrid(t.RTDetrConfig, t.RTDetrForObjectDetection),
    "rt_detr_v2": lambda: hybrid(t.RTDetrV2Config, t.RTDetrV2ForObjectDetection),
    "d_fine": d_fine,
    "yolos": yolos,
}


@pytest.fixture(scope="module", params=MAKERS)
def tiny(request, tmp_path_factory):
    """Its name, folder, model and processor."""
    torch.manual_seed(0)
    model, processor = MAKERS[request.param]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # a fresh one answers alike everywhere
    model.config.id2label, model.config.label2id = NAMES, {name: i for i, name in NAMES.items()}
    folder = tmp_path_factory.mktemp(request.param)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, folder, model, processor


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(96, 96), (60, 96), (96, 40)]]


def test_boxes_and_vectors_are_transformers_own(tiny, images):
    """Class by class: of every query its box, and the score that post-processing gives each class."""
    _, folder, model, processor = tiny
    found = DetrDetector(folder, Nms(0.0, 1.0, 1000), batch_size=2).detect(images)
    for image, ours in zip(images, found, strict=True):
        height, width = image.shape[:2]
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        (theirs,) = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=[(height, width)])
        boxes = np.clip(theirs["boxes"].numpy(), 0, [width, height] * 2)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        apart = np.abs(ours.boxes[:, None] - boxes[inside]).max(-1)
        assert apart.min(0).max() < 1e-3
        assert ours.scores.shape == (len(ours.boxes), 3) and 5 < len(ours.boxes) <= 20
        # Several queries may have one box: among these the vector is looked for.
        for column, label, score in zip(apart.T, theirs["labels"][inside], theirs["scores"][inside], strict=True):
            assert np.abs(ours.scores[column < 1e-3, int(label)] - float(score)).min() < 1e-4


def test_it_is_a_teacher_by_its_folder(tiny, images):
    name, folder, *_ = tiny
    said = describe(str(folder))
    assert said["classes"] == "3: plane, ship, car" and said["family"] == f"{name} of transformers"
    teacher = recipe_teacher(recipe_of(folder, {"car": None}))
    assert (teacher.family, teacher.engine, teacher.nms.iou, teacher.num_classes) == (name, "pytorch", 1.0, 2)
    assert teacher.fingerprint["class_map"] == {"plane": "plane", "ship": "ship", "car": None}
    (found,) = families.load(teacher, threads=None, batch_size=1).detect(images[:1])
    (plain,) = DetrDetector(folder, teacher.nms).detect(images[:1])
    assert found.scores.shape[1] == 2 and len(plain.boxes)
    with pytest.raises(RecipeError, match=r"knows the classes plane, ship, car, the recipe has plane, ship"):
        recipe_teacher(recipe_of(folder, {}))
    with pytest.raises(RecipeError, match=r"has classes of its own: give it as label\.weights"):
        label = {"open_vocabulary": {"model": str(folder), "prompts": {"plane": ["a"], "ship": ["b"]}}}
        recipe_teacher(recipe_of(None, {}, **label))


def recipe_of(folder, classes, **label):
    label = label or {"weights": str(folder), "classes": classes}
    return Recipe.model_validate(
        {"name": "x", "classes": ["plane", "ship"], "tiles": {"synthetic": {}}, "label": {"floor": 0.02, **label}}
    )


def test_a_model_of_another_kind_is_named(tmp_path):
    t.ViTConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"is vit: give one of conditional_detr, d_fine, .*owlvit"):
        recipe_teacher(recipe_of(tmp_path, {}))


def test_bfloat16_is_near(tiny, images):
    _, folder, *_ = tiny
    exact, near = (
        DetrDetector(folder, Nms(0.0, 1.0, 1000), precision=precision).detect(images[:1])[0]
        for precision in ("float32", "bfloat16")
    )
    assert abs(len(exact.boxes) - len(near.boxes)) <= 2 and abs(exact.best[0] - near.best[0]) < 0.05
