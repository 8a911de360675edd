"""OWL-ViT and OWLv2 teachers against transformers' own forward pass and post-processing, on tiny untrained models."""

import numpy as np
import pytest
import torch
from tiny_owlvit import make, save
from torchvision.ops import batched_nms

from softlabel.detectors.hub import local_folder
from softlabel.detectors.owlvit import OwlVitDetector
from softlabel.detectors.queries import Queries
from softlabel.detectors.teachers import open_vocabulary_fingerprint
from softlabel.errors import RecipeError, WeightsError
from softlabel.records import Nms

SHAPES = [(96, 96), (60, 96), (96, 40), (96, 96)]
PROMPTS = (("a plane", "an aircraft seen from above", "planes"), ("a ship",), ("a car", "a small car"))
WORDS = ["a", "an", "plane", "planes", "aircraft", "ship", "car", "small", "seen", "from", "above", "trees"]
ALL = Nms(floor=0.0, iou=1.0)  # every patch answers, and none goes


@pytest.fixture(scope="module", params=["owlvit", "owlv2"])
def tiny(request, tmp_path_factory):
    """Folder, model and processor."""
    torch.manual_seed(0)
    model, processor = make(request.param, WORDS, image_size=64, patch_size=8)
    with torch.no_grad():
        for parameter in [*model.class_head.parameters(), *model.box_head.parameters()]:
            parameter.mul_(0.1)  # a fresh one is sure of everything, and its boxes have no size
    folder = tmp_path_factory.mktemp(request.param)
    save(folder, model, processor)
    return folder, model, processor


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


def theirs(tiny, images, texts):
    """transformers' answer to each image: boxes, best scores, which text."""
    _, model, processor = tiny
    found = []
    for image in images:
        inputs = processor(text=[list(texts)], images=image, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        (result,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.0, target_sizes=[image.shape[:2]]
        )
        found.append((result["boxes"].numpy(), result["scores"].numpy(), result["labels"].numpy()))
    return found


def clipped(boxes, image):
    height, width = image.shape[:2]
    boxes = np.clip(boxes, 0, [width, height, width, height])
    return boxes, (boxes[:, 2:] > boxes[:, :2]).all(axis=1)


def assert_answers_equal(ours, boxes, scores, image):
    """Box for box, best first; boxes in shares of the tile."""
    boxes, inside = clipped(boxes, image)
    order = np.argsort(-scores[inside], kind="stable")
    assert len(ours.boxes) == inside.sum() > 10
    np.testing.assert_allclose(ours.best, scores[inside][order], atol=1e-5)
    near = np.abs(ours.boxes[:, None] - boxes[inside][order][None]).max(-1) / max(image.shape) < 1e-5
    assert near.any(axis=1).all() and near.any(axis=0).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_prompt_a_class_is_transformers_own_answer(tiny, images, batch_size):
    prompts = tuple((phrasings[0],) for phrasings in PROMPTS)
    found = OwlVitDetector(tiny[0], Queries(prompts), ALL, batch_size=batch_size).detect(images)
    answers = theirs(tiny, images, [phrasings[0] for phrasings in PROMPTS])
    for ours, image, (boxes, scores, labels) in zip(found, images, answers, strict=True):
        assert ours.scores.shape == (len(ours.boxes), 3)
        assert_answers_equal(ours, boxes, scores, image)
        _, inside = clipped(boxes, image)
        np.testing.assert_array_equal(
            np.bincount(ours.class_ids, minlength=3), np.bincount(labels[inside], minlength=3)
        )


def test_the_best_of_several_phrasings_is_the_best_of_all_texts(tiny, images):
    """Lists of unequal length: transformers sees them as one."""
    found = OwlVitDetector(tiny[0], Queries(PROMPTS, combine="max"), ALL).detect(images)
    texts = [text for phrasings in PROMPTS for text in phrasings]
    owners = np.repeat(np.arange(3), [len(phrasings) for phrasings in PROMPTS])
    for ours, image, (boxes, scores, labels) in zip(found, images, theirs(tiny, images, texts), strict=True):
        assert_answers_equal(ours, boxes, scores, image)
        _, inside = clipped(boxes, image)
        np.testing.assert_array_equal(
            np.bincount(ours.class_ids, minlength=3), np.bincount(owners[labels[inside]], minlength=3)
        )


def test_phrasings_are_averaged_as_embeddings(tiny, images):
    _, model, processor = tiny
    found = OwlVitDetector(tiny[0], Queries(PROMPTS), ALL).detect(images[:1])[0]
    base = getattr(model, model.config.model_type)
    with torch.no_grad():
        pixels = processor(images=images[0], return_tensors="pt")["pixel_values"]
        features = model.image_embedder(pixels)[0].flatten(1, 2)
        means = []
        for phrasings in PROMPTS:
            tokens = processor.tokenizer(list(phrasings), padding="max_length", return_tensors="pt")
            embedded = base.get_text_features(**tokens).pooler_output
            means.append((embedded / embedded.norm(dim=-1, keepdim=True)).mean(0))
        logits = model.class_predictor(features, torch.stack(means)[None])[0][0]
    expected = logits.sigmoid().numpy()
    for row in found.scores:
        assert np.abs(expected - row).max(axis=1).min() < 1e-5


def test_what_suits_the_background_best_is_no_box(tiny, images):
    classes = tuple((phrasings[0],) for phrasings in PROMPTS[:2])
    background = ("trees", PROMPTS[2][0])
    kept = OwlVitDetector(tiny[0], Queries(classes, background=background), ALL).detect(images)
    texts = [*(phrasings[0] for phrasings in classes), *background]
    some = 0
    for ours, image, (boxes, scores, labels) in zip(kept, images, theirs(tiny, images, texts), strict=True):
        _, inside = clipped(boxes, image)
        is_object = inside & (labels < 2)
        assert len(ours.boxes) == is_object.sum()
        np.testing.assert_allclose(ours.best, np.sort(scores[is_object])[::-1], atol=1e-5)
        some += is_object.sum()
    assert 0 < some < sum(len(boxes) for boxes, _, _ in theirs(tiny, images, texts))


def test_an_example_is_transformers_image_guided_answer(tiny, images):
    """OWL-ViT's own post-processing scales scores for display and does an NMS: compared are its raw outputs."""
    _, model, processor = tiny
    crops = tuple(image[:40, :30].copy() for image in images[1:3])
    for crop in crops:
        (ours,) = OwlVitDetector(tiny[0], Queries(((),), ((crop,),)), ALL).detect(images[:1])
        inputs = processor(images=images[0], query_images=crop, return_tensors="pt")
        with torch.no_grad():
            outputs = model.image_guided_detection(**inputs)
        scores = outputs.logits[0, :, 0].sigmoid().numpy()
        sides = max(images[0].shape) if model.config.model_type == "owlv2" else images[0].shape[0]
        x, y, width, height = (outputs.target_pred_boxes[0].numpy() * sides).T
        boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
        assert_answers_equal(ours, boxes, scores, images[0])
    both = OwlVitDetector(tiny[0], Queries(((), ("a ship",)), (crops, ())), ALL).detect(images[:1])[0]
    assert both.scores.shape[1] == 2


def test_nms_is_class_wise_and_keeps_whole_vectors(tiny, images):
    nms = Nms(floor=0.3, iou=0.5)
    everything = OwlVitDetector(tiny[0], Queries(PROMPTS, combine="max"), ALL).detect(images)
    found = OwlVitDetector(tiny[0], Queries(PROMPTS, combine="max"), nms).detect(images)
    for ours, before in zip(found, everything, strict=True):
        above = before.best > 0.3
        boxes, best, ids = before.boxes[above], before.best[above], before.class_ids[above]
        kept = batched_nms(*(torch.from_numpy(np.asarray(one)) for one in (boxes, best, ids)), 0.5).numpy()
        # Clipping comes after NMS: boxes at the border may differ by it.
        assert abs(len(ours.boxes) - len(kept)) <= 0.1 * len(kept)
        assert (ours.best > 0.3).all() and ours.scores.shape[1] == 3


def test_a_tile_s_boxes_are_the_same_in_any_company_and_on_any_thread(tiny, images):
    queries = Queries(PROMPTS)
    alone = [OwlVitDetector(tiny[0], queries, Nms(0.3, 0.5)).detect([image])[0] for image in images]
    together = OwlVitDetector(tiny[0], queries, Nms(0.3, 0.5), threads=2, batch_size=2).detect(images * 3)
    for index, found in enumerate(together):
        reference = alone[index % len(images)]
        np.testing.assert_allclose(found.boxes, reference.boxes, atol=1e-2)
        np.testing.assert_allclose(found.scores, reference.scores, atol=1e-4)


def test_half_precision_of_the_tower_finds_nearly_the_same(tiny, images):
    queries = Queries(PROMPTS)
    exact = OwlVitDetector(tiny[0], queries, ALL).detect(images)
    rough = OwlVitDetector(tiny[0], queries, ALL, precision="bfloat16").detect(images)
    for a, b in zip(exact, rough, strict=True):
        assert a.scores.dtype == b.scores.dtype == np.float32
        assert abs(a.best.mean() - b.best.mean()) < 0.05


def test_queries_are_part_of_the_fingerprint(tiny, images):
    classes, nms = ("plane", "ship", "car"), Nms()
    plain = open_vocabulary_fingerprint(tiny[0], classes, Queries(PROMPTS), nms, "float32")
    assert plain == open_vocabulary_fingerprint(tiny[0], classes, Queries(PROMPTS), nms, "float32")
    for other in (
        Queries((("a plane",), *PROMPTS[1:])),
        Queries(PROMPTS, combine="max"),
        Queries(PROMPTS, background=("water",)),
        Queries(((), *PROMPTS[1:]), ((images[0],), (), ())),
    ):
        found = open_vocabulary_fingerprint(tiny[0], classes, other, nms, "float32")
        assert {key for key in plain if plain[key] != found[key]} == {"queries"}


def test_a_prompt_that_is_too_long_is_named(tiny):
    with pytest.raises(RecipeError, match=r"'a car.*' has \d+ tokens, the model reads 16: shorten it"):
        OwlVitDetector(tiny[0], Queries((("a car " * 20,),)), ALL)


def test_what_is_no_model_is_said_in_a_line(tiny, tmp_path, monkeypatch):
    assert local_folder(str(tiny[0])) == tiny[0]
    with pytest.raises(WeightsError, match=r"no model that transformers knows: give one of .*owlvit, owlv2"):
        local_folder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(WeightsError, match="is clip: give one of "):
        local_folder(str(tmp_path))
    (tmp_path / "config.json").write_text((tiny[0] / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"has no \.safetensors, and no other weights are read"):
        local_folder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((tiny[0] / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="cannot be loaded"):
        OwlVitDetector(tmp_path, Queries(PROMPTS), ALL)


def test_a_hub_that_cannot_be_reached_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="nobody/no-such-model is no folder here, and the hub gave no such model"):
        local_folder("nobody/no-such-model")
    with pytest.raises(WeightsError, match="no model at no such folder/: give an existing folder or file, or the name"):
        local_folder("no such folder/")
