"""Grounding DINO and MM-Grounding-DINO against transformers' own forward pass, on tiny untrained models."""

import numpy as np
import pytest
import torch
import transformers as t

from softlabel.config import Recipe
from softlabel.detectors import families
from softlabel.detectors.grounding_dino import GroundingDinoDetector
from softlabel.detectors.queries import Queries
from softlabel.detectors.teachers import recipe_teacher
from softlabel.errors import RecipeError
from softlabel.records import Nms

WORDS = ["a", "plane", "ship", "small", "car", "vehicle", "tree", "an", "aircraft"]
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}  # BERT's own
PROMPTS = (("a plane", "an aircraft"), ("ship",), ("small car",))
ALL = Nms(0.0, 1.0, 1000)
MODELS = {
    "grounding-dino": (t.GroundingDinoConfig, t.GroundingDinoForObjectDetection),
    "mm-grounding-dino": (t.MMGroundingDinoConfig, t.MMGroundingDinoForObjectDetection),
}


@pytest.fixture(scope="module", params=MODELS)
def tiny(request, tmp_path_factory):
    """Its folder, model and processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    vocabulary = [SPECIAL.get(i, f"[unused{i}]") for i in range(1100)]
    vocabulary[200 : 200 + len(WORDS)] = WORDS
    tokenizer = t.BertTokenizer(vocab_file=str(folder / "vocab.txt"), vocab={w: i for i, w in enumerate(vocabulary)})
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    backbone = t.SwinConfig(
        image_size=128, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
    )
    config, kind = MODELS[request.param]
    model = kind(
        config(
            backbone_config=backbone,
            text_config=t.BertConfig(vocab_size=1100, **sizes),
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_queries=20,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    image_processor = t.GroundingDinoImageProcessor(size={"height": 128, "width": 128})
    processor = t.GroundingDinoProcessor(image_processor, tokenizer)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(96, 96), (60, 96), (96, 96)]]


def theirs(tiny, image, text):
    """transformers' boxes, and the scores of the words of a caption."""
    _, model, processor = tiny
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    height, width = image.shape[:2]
    (found,) = processor.post_process_grounded_object_detection(
        outputs, threshold=-1.0, text_threshold=0.0, target_sizes=[(height, width)]
    )
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    scores = outputs.logits[0].sigmoid().numpy()
    return np.clip(found["boxes"].numpy(), 0, [width, height] * 2), scores, words


CAPTION = "a plane. an aircraft. ship. small car."
PLACES = {"a plane": [1, 2], "an aircraft": [4, 5], "ship": [7], "small car": [9, 10]}


@pytest.mark.parametrize("combine", ["mean", "max"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_boxes_and_vectors_are_transformers_own(tiny, images, combine, batch_size):
    queries = Queries(PROMPTS, combine=combine)
    found = GroundingDinoDetector(tiny[0], queries, ALL, batch_size=batch_size).detect(images)
    for image, ours in zip(images, found, strict=True):
        boxes, of_token, words = theirs(tiny, image, CAPTION)
        assert [words[i] for i in (1, 2, 7, 9, 10)] == ["a", "plane", "ship", "small", "car"]
        phrase = {name: of_token[:, places].max(1) for name, places in PLACES.items()}
        both = np.stack([phrase["a plane"], phrase["an aircraft"]])
        first = both.mean(0) if combine == "mean" else both.max(0)
        vectors = np.stack([first, phrase["ship"], phrase["small car"]], axis=1)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        apart = np.abs(ours.boxes[:, None] - boxes[inside]).max(-1)
        nearest = np.abs(ours.scores[:, None] - vectors[inside]).max(-1) + apart
        assert len(ours.boxes) == inside.sum() > 5 and nearest.min(0).max() < 1e-3 and nearest.min(1).max() < 1e-3
        assert vectors.std(0).min() > 1e-3


def test_a_box_that_suits_background_best_goes(tiny, images):
    plain = GroundingDinoDetector(tiny[0], Queries(PROMPTS, combine="max"), ALL).detect(images[:1])[0]
    less = GroundingDinoDetector(tiny[0], Queries(PROMPTS, combine="max", background=("tree", "vehicle")), ALL)
    left = less.detect(images[:1])[0]
    assert 0 < len(left.boxes) < len(plain.boxes)
    boxes, of_token, words = theirs(tiny, images[0], f"{CAPTION[:-1]}. tree. vehicle.")
    best = of_token[:, [i for places in PLACES.values() for i in places]].max(1)
    kept = best >= of_token[:, [words.index("tree"), words.index("vehicle")]].max(1)
    assert len(left.boxes) == (kept & (boxes[:, 2:] > boxes[:, :2]).all(1)).sum()


def test_the_text_is_encoded_once(tiny, images):
    detector = GroundingDinoDetector(tiny[0], Queries(PROMPTS), ALL, batch_size=1)
    calls = []
    encoder = detector._engine._forward.model.model.text_backbone.encoder
    encoder.register_forward_hook(lambda *_: calls.append(1))
    detector.detect(images)
    assert len(calls) == 1


def recipe_of(folder, **found):
    label = {"open_vocabulary": {"model": str(folder), "prompts": {"plane": ["a plane"], "ship": ["ship"]}, **found}}
    return Recipe.model_validate(
        {"name": "x", "classes": ["plane", "ship"], "tiles": {"synthetic": {}}, "label": {"floor": 0.02, **label}}
    )


def test_it_is_a_teacher_by_its_folder(tiny, images):
    teacher = recipe_teacher(recipe_of(tiny[0]))
    assert teacher.family in MODELS and teacher.nms.iou == 0.7 and "queries" in teacher.fingerprint
    (found,) = families.load(teacher, threads=2, batch_size=1).detect(images[:1])
    assert found.scores.shape[1] == 2


def test_what_it_cannot_look_for_is_refused(tiny):
    with pytest.raises(RecipeError, match="Grounding DINO takes prompts"):
        GroundingDinoDetector(tiny[0], Queries(((),), examples=((np.zeros((8, 8, 3), np.uint8),),)), ALL)
    with pytest.raises(RecipeError, match=r"the prompts have \d+ tokens together, the model reads 256"):
        GroundingDinoDetector(tiny[0], Queries((("a plane",) * 200,)), ALL)
    with pytest.raises(RecipeError, match=r"the prompt ' \. ' has no word"):
        GroundingDinoDetector(tiny[0], Queries(((" . ",),)), ALL)
