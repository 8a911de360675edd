"""Crops through a classifier, a CLIP and a SigLIP against transformers' own forward pass, on tiny untrained models."""

import numpy as np
import pytest
import torch
from tiny_owlvit import make_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from softlabel.detectors import crop_networks
from softlabel.detectors.crops import crop_classifier, prompted_crops
from softlabel.errors import RecipeError, WeightsError

SIDE, TOKENS = 32, 16
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": SIDE, "patch_size": 8}
WORDS = {"red": ("a red car", "a dark red car"), "white": ("a white car",), "blue": ("blue",)}


@pytest.fixture(scope="module")
def crops():
    rng = np.random.default_rng(0)
    shapes = [(20, 40), (40, 20), (1, 1), (3, 3), (2, 90), *[(24, 24)] * 70]
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def prompted(request, tmp_path_factory):
    """Folder, model and processor."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["red", "white", "blue", "dark", "car", "a"], TOKENS)
    text = {
        **TOWER,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    size = {"height": SIDE, "width": SIDE}
    if request.param == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
        images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
        processor = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    else:
        tokenizer.model_input_names = ["input_ids"]  # as SigLIP's own: it was trained without a mask
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
        processor = SiglipProcessor(image_processor=SiglipImageProcessor(size=size), tokenizer=tokenizer)
    folder = tmp_path_factory.mktemp(request.param)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_shares_are_those_of_the_whole_model(prompted, crops):
    folder, model, processor = prompted
    one_each = {name: phrasings[:1] for name, phrasings in WORDS.items()}
    attribute = prompted_crops(str(folder), one_each)
    found = attribute.shares(iter(crops))
    texts = [phrasings[0] for phrasings in one_each.values()]
    squares = [crop_networks._square(crop) for crop in crops]
    inputs = processor(
        text=texts,
        images=squares,
        return_tensors="pt",
        padding="max_length",
        max_length=TOKENS,
        input_data_format="channels_last",
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    expected = logits.softmax(1) if attribute.architecture == "clip" else logits.sigmoid()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert found.shape == (75, 3) and found.dtype == np.float32 and attribute.names == tuple(WORDS)
    assert attribute.shares([]).shape == (0, 3)


def test_several_phrasings_count_as_their_mean(prompted, crops):
    folder, *_ = prompted
    one = prompted_crops(str(folder), WORDS).shares(crops[:3])
    same = prompted_crops(str(folder), {**WORDS, "red": ("a dark red car", "a red car")}).shares(crops[:3])
    np.testing.assert_allclose(one, same, atol=1e-6)


def test_the_identity_holds_model_and_words(prompted):
    folder, *_ = prompted
    first = prompted_crops(str(folder), WORDS)
    assert first.identity() != prompted_crops(str(folder), {**WORDS, "blue": ("a blue car",)}).identity()
    assert first.identity()["attribute"] == "prompts" and first.weights == folder


def test_a_prompt_that_is_too_long_and_a_broken_model_are_one_line(prompted, crops, tmp_path):
    folder, *_ = prompted
    with pytest.raises(RecipeError, match="tokens, the model reads 16: shorten it"):
        prompted_crops(str(folder), {"a": ("zzz qqq " * 10,), "b": ("b",)}).shares(crops[:1])
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match=r"cannot be loaded .*: is it whole"):
        prompted_crops(str(tmp_path), WORDS).shares(crops[:1])
    with pytest.raises(WeightsError, match=r"give an image classifier \(\*ForImageClassification\)"):
        crop_classifier(str(folder))


@pytest.mark.parametrize("independent", [False, True])
def test_a_classifier_tells_its_own_classes_apart(tmp_path, crops, independent):
    torch.manual_seed(0)
    names = {0: "sedan", 1: "van", 2: "truck"}
    config = ViTConfig(**VISION, id2label=names, label2id={name: k for k, name in names.items()})
    config.problem_type = "multi_label_classification" if independent else None
    model = ViTForImageClassification(config).eval()
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    attribute = crop_classifier(str(tmp_path))
    assert attribute.names == ("sedan", "van", "truck") and attribute.identity()["attribute"] == "classifier"
    squares = [crop_networks._square(crop) for crop in crops]
    pixels = processor(images=squares, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    with torch.no_grad():
        logits = model(pixels).logits
    expected = logits.sigmoid() if independent else logits.softmax(1)
    np.testing.assert_allclose(attribute.shares(crops), expected.numpy(), atol=1e-5)
    with pytest.raises(WeightsError, match="is vit, which compares no images with words: give a CLIP or SigLIP"):
        prompted_crops(str(tmp_path), WORDS)


def test_a_crop_is_padded_to_a_square_around_its_middle():
    crop = np.full((2, 5, 3), 7, np.uint8)
    square = crop_networks._square(crop)
    assert square.shape == (5, 5, 3) and (square[1:3] == 7).all() and (np.delete(square, [1, 2], 0) == 114).all()
    assert crop_networks._square(crop.swapaxes(0, 1)).shape == (5, 5, 3)
