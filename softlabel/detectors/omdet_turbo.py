"""OmDet-Turbo as a teacher that keeps the class vector of every box.

Zhao et al., "Real-time Transformer-based Open-Vocabulary Detection with Efficient Fusion Head" (arXiv:2403.06892),
through transformers. Classes and task are encoded once; per tile, that leaves the image encoder and the decoder, where
text and image meet.
"""

from typing import Any

import torch

from softlabel.detectors.engines import Network
from softlabel.detectors.pretrained import SIDE, PromptedDetector, class_scores
from softlabel.detectors.queries import Queries


class _OmDetTurboNetwork(Network):
    def __init__(self, model: Any, processor: Any, queries: Queries) -> None:
        super().__init__()
        self.model, self._processor, self._dtype = model, processor.image_processor, torch.float32
        phrasings = [*(phrasing for of_class in queries.prompts for phrasing in of_class), *queries.background]
        classes, task, mask = _encode(model, processor.tokenizer, phrasings)
        self._sizes = [len(of_class) for of_class in queries.prompts]
        if queries.combine == "mean":
            parts = classes.split([*self._sizes, len(queries.background)])
            means = [part.mean(0, keepdim=True) for part in parts[:-1]]
            classes, self._sizes = torch.cat([*means, parts[-1]]), [1] * queries.num_classes
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("task", task, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Any]:
        pixels = self._processor(
            images=list(tiles.permute(0, 3, 1, 2)), input_data_format="channels_first", return_tensors="pt"
        )["pixel_values"].to(tiles.device)
        batch = len(tiles)
        with torch.autocast(tiles.device.type, self._dtype, enabled=self._dtype != torch.float32):
            seen = self.model.encoder(self.model.vision_backbone(pixels), return_dict=True).extracted_states
            found = self.model.decoder(
                seen,
                self.get_buffer("classes").expand(-1, batch, -1),
                self.get_buffer("task").expand(-1, batch, -1),
                self.get_buffer("mask").expand(batch, -1),
                return_dict=True,
            )
        boxes, logits = found.decoder_coords[-1].float(), found.decoder_classes[-1].float()
        scores = class_scores(logits.sigmoid(), self._sizes)
        return torch.cat((boxes * SIDE, scores), -1).transpose(1, 2), None

    def lower_precision(self, dtype: torch.dtype) -> None:
        """By autocast; scores are decoded, and boxes scaled, in float32."""
        self._dtype = dtype


def _encode(model: Any, tokenizer: Any, phrasings: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For a batch of one: class embeddings (P, 1, D), the task's tokens (T, 1, D) and their mask (1, T)."""
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    classes = tokenizer(phrasings, **options)
    task = tokenizer([f"Detect {', '.join(phrasings)}."], **options)
    with torch.no_grad():
        return model.get_language_embedding(
            classes["input_ids"],
            classes["attention_mask"],
            task["input_ids"],
            task["attention_mask"],
            torch.tensor([len(phrasings)]),
        )


class OmDetTurboDetector(PromptedDetector):
    """An OmDet-Turbo over tiles of any shape."""

    name = "OmDet-Turbo"
    network = _OmDetTurboNetwork


load = OmDetTurboDetector.of
