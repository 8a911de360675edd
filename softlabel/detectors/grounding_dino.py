"""Grounding DINO and MM-Grounding-DINO as teachers that keep the class vector of every box.

Liu et al., "Grounding DINO" (arXiv:2303.05499), and Zhao et al., "An Open and Comprehensive Pipeline for Unified Object
Grounding and Detection" (arXiv:2401.02361), through transformers. All phrasings form one caption. Text and image are
fused layer by layer: only the text's own encoding is done once, and its fusion with the image is computed for every
tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from softlabel.detectors.engines import Network
from softlabel.detectors.pretrained import SIDE, PromptedDetector, class_scores
from softlabel.detectors.queries import Queries
from softlabel.errors import RecipeError


@dataclass(frozen=True)
class _Caption:
    """All phrasings as one text, and where the tokens of each are."""

    inputs: dict[str, torch.Tensor]
    tokens: tuple[tuple[int, ...], ...]


class _GroundingDinoNetwork(Network):
    def __init__(self, model: Any, processor: Any, queries: Queries) -> None:
        super().__init__()
        self.model, self._processor, self._dtype = model, processor.image_processor, torch.float32
        self._queries = queries
        phrasings = [*(phrasing for of_class in queries.prompts for phrasing in of_class), *queries.background]
        caption = _caption(processor.tokenizer, phrasings, model.config.max_text_len)
        self._tokens = caption.tokens
        self._names = tuple(caption.inputs)
        for name, value in caption.inputs.items():
            self.register_buffer(name, value, persistent=False)
        model.model.text_backbone = _EncodedOnce(model.model.text_backbone)

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Any]:
        pixels = self._processor(
            images=list(tiles.permute(0, 3, 1, 2)), input_data_format="channels_first", return_tensors="pt"
        ).to(tiles.device)
        text = {name: self.get_buffer(name).expand(len(tiles), -1) for name in self._names}
        with torch.autocast(tiles.device.type, self._dtype, enabled=self._dtype != torch.float32):
            found = self.model(**pixels, **text)
        logits, boxes = found.logits.float(), found.pred_boxes.float()
        scores = self._scores(logits.sigmoid())
        return torch.cat((boxes * SIDE, scores), -1).transpose(1, 2), None

    def _scores(self, of_token: torch.Tensor) -> torch.Tensor:
        """Class scores (B, A, K) from the scores of tokens (B, A, T)."""
        phrasings = torch.stack([of_token[..., list(places)].amax(-1) for places in self._tokens], -1)
        sizes = [len(of_class) for of_class in self._queries.prompts]
        return class_scores(phrasings, sizes, mean=self._queries.combine == "mean")

    def lower_precision(self, dtype: torch.dtype) -> None:
        """By autocast; scores are decoded, and boxes scaled, in float32."""
        self._dtype = dtype


class _EncodedOnce(torch.nn.Module):
    """A text encoder whose input is always the same."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._encoded: torch.Tensor | None = None

    def forward(self, input_ids: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        if self._encoded is None:
            self._encoded = self.encoder(input_ids, *inputs, **options).last_hidden_state[:1]
        return SimpleNamespace(last_hidden_state=self._encoded.expand(len(input_ids), -1, -1))


def _caption(tokenizer: Any, phrasings: Sequence[str], most: int) -> _Caption:
    starts, caption = [], ""
    for phrasing in (" ".join(phrasing.lower().split()).strip(". ") for phrasing in phrasings):
        starts.append((len(caption), len(caption) + len(phrasing)))
        caption += f"{phrasing}. "
    inputs = tokenizer(caption.strip(), return_tensors="pt", return_offsets_mapping=True)
    places = inputs.pop("offset_mapping")[0].tolist()
    if len(places) > most:
        raise RecipeError(f"the prompts have {len(places)} tokens together, the model reads {most}: give fewer")
    tokens = [
        tuple(i for i, (first, last) in enumerate(places) if start <= first < last <= stop) for start, stop in starts
    ]
    if empty := [phrasing for phrasing, found in zip(phrasings, tokens, strict=True) if not found]:
        raise RecipeError(f"the prompt {empty[0]!r} has no word: give one")
    return _Caption(dict(inputs), tuple(tokens))


class GroundingDinoDetector(PromptedDetector):
    """A Grounding DINO over tiles of any shape.

    The score of a phrasing is the best of its tokens', as in transformers' own post-processing; where a class has
    several phrasings, their mean or their best counts (``combine``).
    """

    name = "Grounding DINO"
    network = _GroundingDinoNetwork


load = GroundingDinoDetector.of
