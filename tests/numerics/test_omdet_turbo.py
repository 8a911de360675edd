"""OmDet-Turbo against transformers' own forward pass and post-processing, on a tiny untrained model."""

import numpy as np
import pytest
import torch
import transformers as t
from tiny_owlvit import make_tokenizer

from softlabel.config import Recipe
from softlabel.detectors import families
from softlabel.detectors.omdet_turbo import OmDetTurboDetector
from softlabel.detectors.queries import Queries
from softlabel.detectors.teachers import recipe_teacher
from softlabel.errors import RecipeError
from softlabel.records import Nms

SIDE = 128
ALL = Nms(0.0, 1.0, 1000)
SIZES = {
    "image_size": SIDE,
    "text_projection_in_dim": 64,
    "text_projection_out_dim": 64,
    "class_embed_dim": 64,
    "task_encoder_hidden_dim": 64,
    "encoder_hidden_dim": 32,
    "decoder_hidden_dim": 32,
    "vision_features_channels": [32, 32, 32],
    "encoder_in_channels": [16, 32, 64],
    "encoder_dim_feedforward": 32,
    "decoder_dim_feedforward": 32,
    "encoder_attention_heads": 2,
    "decoder_num_heads": 2,
    "encoder_layers": 1,
    "decoder_num_layers": 2,
    "num_queries": 20,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Its folder, model and processor."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["plane", "ship", "car", "detect", "tree"], 77)
    layers = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = t.CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=77, eos_token_id=len(tokenizer) - 1, **layers
    )
    stages = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "out_indices": [2, 3, 4]}
    backbone = t.SwinConfig(image_size=SIDE, embed_dim=8, **stages)
    config = t.OmDetTurboConfig(
        text_config=text,
        backbone_config=backbone,
        use_timm_backbone=False,
        apply_layernorm_after_vision_backbone=False,
        **SIZES,
    )
    model = t.OmDetTurboForObjectDetection(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    image_processor = t.DetrImageProcessor(size={"height": SIDE, "width": SIDE}, do_pad=False)
    processor = t.OmDetTurboProcessor(image_processor, tokenizer)
    folder = tmp_path_factory.mktemp("omdet")
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(96, 96), (60, 96), (96, 96)]]


def theirs(tiny, image, phrasings):
    """transformers' boxes in tile pixels, and the score of every phrasing."""
    _, model, processor = tiny
    inputs = processor(image, text=phrasings, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    height, width = image.shape[:2]
    centre, size = outputs.decoder_coord_logits[0].numpy().reshape(-1, 2, 2).transpose(1, 0, 2)
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1) * [width, height, width, height]
    (found,) = processor.post_process_grounded_object_detection(
        outputs, threshold=-1.0, nms_threshold=1.0, target_sizes=[(height, width)]
    )
    return np.clip(boxes, 0, [width, height] * 2), outputs.decoder_class_logits[0].sigmoid().numpy(), found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_boxes_and_vectors_are_transformers_own(tiny, images, batch_size):
    queries = Queries((("plane",), ("ship",), ("car",)))
    found = OmDetTurboDetector(tiny[0], queries, ALL, batch_size=batch_size).detect(images)
    for image, ours in zip(images, found, strict=True):
        boxes, vectors, kept = theirs(tiny, image, ["plane", "ship", "car"])
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        apart = np.abs(ours.boxes[:, None] - boxes[inside]).max(-1)
        apart += np.abs(ours.scores[:, None] - vectors[inside]).max(-1)
        assert len(ours.boxes) == inside.sum() > 5
        assert apart.min(0).max() < 2e-3 and apart.min(1).max() < 2e-3
        assert vectors.std(0).min() > 1e-3
        best = kept["scores"].max().item()  # what its post-processing is surest of
        assert abs(ours.best[0] - best) < 1e-4


def test_phrasings_compete_and_background_takes_away(tiny, images):
    queries = Queries((("plane", "car"), ("ship",)), combine="max", background=("tree",))
    ours = OmDetTurboDetector(tiny[0], queries, ALL).detect(images[:1])[0]
    boxes, vectors, _ = theirs(tiny, images[0], ["plane", "car", "ship", "tree"])
    expected = np.stack([vectors[:, :2].max(1), vectors[:, 2]], axis=1)
    kept = (expected.max(1) >= vectors[:, 3]) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    assert 0 < kept.sum() == len(ours.boxes) < len(boxes)
    np.testing.assert_allclose(ours.best, np.sort(expected[kept].max(1))[::-1], atol=1e-4)


def test_the_mean_of_phrasings_is_of_their_embeddings(tiny, images):
    """Twice the same phrasing is that phrasing."""
    once, twice = (
        OmDetTurboDetector(tiny[0], Queries((phrasings, ("ship",))), ALL)._engine._forward.classes
        for phrasings in (("plane",), ("plane", "plane"))
    )
    torch.testing.assert_close(once, twice)


def test_it_is_a_teacher_by_its_folder(tiny, images):
    label = {"open_vocabulary": {"model": str(tiny[0]), "prompts": {"plane": ["plane"], "ship": ["ship"]}}}
    recipe = Recipe.model_validate(
        {"name": "x", "classes": ["plane", "ship"], "tiles": {"synthetic": {}}, "label": {"floor": 0.02, **label}}
    )
    teacher = recipe_teacher(recipe)
    assert (teacher.family, teacher.nms.iou) == ("omdet-turbo", 0.5)
    (found,) = families.load(teacher, threads=2, batch_size=1).detect(images[:1])
    assert found.scores.shape[1] == 2
    with pytest.raises(RecipeError, match="OmDet-Turbo takes prompts"):
        OmDetTurboDetector(tiny[0], Queries(((),), examples=((np.zeros((8, 8, 3), np.uint8),),)), ALL)
