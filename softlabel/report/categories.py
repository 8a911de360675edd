"""What a vocabulary found: objects per class and scene, and how well they fit truth, where there is any. No pixels.

Shape suffixes: N counts objects of a scene, K the vocabulary's classes.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCORE_BINS = 100


@dataclass(frozen=True, order=True)
class Example:
    """A box to show: its score, its tile, and (x0, y0, x1, y1) in the tile's pixels."""

    score: float
    tile_id: str
    box: tuple[float, float, float, float]


class Census:
    """Counts, filled tile by tile and scene by scene; its size grows with scenes times the classes in them.

    Attributes:
        rows: A dict per scene and class found in it: scene_id, class, count, best (score).
        histograms_KB: Scores of all objects in 100 bins of equal width over [0, 1].
        examples: Per class the highest-scoring boxes, best first.
    """

    def __init__(self, classes: Sequence[str], num_examples: int) -> None:
        self.classes, self._num_examples = tuple(classes), num_examples
        self.rows: list[dict[str, Any]] = []
        self.num_scenes = 0
        self.histograms_KB = np.zeros((len(classes), _SCORE_BINS), np.int64)
        self._examples: list[list[Example]] = [[] for _ in classes]

    @property
    def examples(self) -> list[list[Example]]:
        """Per class, best first."""
        return [sorted(heap, reverse=True) for heap in self._examples]

    def add_scene(self, scene_id: str, scores_NK: NDArray[np.float32]) -> None:
        """Count the objects of a scene, each of them given once."""
        self.num_scenes += 1
        if not len(scores_NK):
            return
        best_N, class_ids_N = scores_NK.max(axis=1), scores_NK.argmax(axis=1)
        bins_N = np.minimum(best_N.astype(np.float64) * _SCORE_BINS, _SCORE_BINS - 1).astype(np.int64)
        np.add.at(self.histograms_KB, (class_ids_N, bins_N), 1)
        for k in np.unique(class_ids_N).tolist():
            of_class = class_ids_N == k
            best = round(float(best_N[of_class].max()), 4)
            self.rows.append(
                {"scene_id": scene_id, "class": self.classes[k], "count": int(of_class.sum()), "best": best}
            )

    def add_example(self, class_id: int, example: Example) -> None:
        """Keep a box if it is among the best of its class."""
        heap = self._examples[class_id]
        if len(heap) < self._num_examples:
            heapq.heappush(heap, example)
        else:
            heapq.heappushpop(heap, example)

    def table(self) -> list[dict[str, Any]]:
        """Per class: class, objects, scenes, per_scene (over those with any), median (score); most scenes first."""
        found = []
        for k, name in enumerate(self.classes):
            counts = [row["count"] for row in self.rows if row["class"] == name]
            objects = sum(counts)
            found.append(
                {
                    "class": name,
                    "objects": objects,
                    "scenes": len(counts),
                    "per_scene": objects / len(counts) if counts else None,
                    "median": _median(self.histograms_KB[k]) if objects else None,
                }
            )
        return sorted(found, key=lambda row: (-row["scenes"], -row["objects"], row["class"]))

    def counts(self) -> dict[str, dict[str, int]]:
        """Objects by class, then by scene."""
        found: dict[str, dict[str, int]] = {name: {} for name in self.classes}
        for row in self.rows:
            found[row["class"]][row["scene_id"]] = row["count"]
        return found


def against_truth(
    counts: Mapping[str, Mapping[str, int]], truth: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    """How well what was found fits what is there, for each class that truth knows.

    Args:
        counts: Objects found by class and scene.
        truth: Objects that are there, by class and by every scene where somebody looked for that class.

    Returns:
        Per class, over those scenes: class, scenes (that have it), presence_precision and presence_recall (None if
        undefined), truth and found (objects), count_error (the mean over scenes of |found - truth|, divided by the mean
        of truth; None without truth).
    """
    rows = []
    for name, there in truth.items():
        found = {scene: counts.get(name, {}).get(scene, 0) for scene in there}
        has = {scene for scene, count in there.items() if count}
        says = {scene for scene, count in found.items() if count}
        off = sum(abs(found[scene] - count) for scene, count in there.items())
        total = sum(there.values())
        rows.append(
            {
                "class": name,
                "scenes": len(has),
                "presence_precision": len(has & says) / len(says) if says else None,
                "presence_recall": len(has & says) / len(has) if has else None,
                "truth": total,
                "found": sum(found.values()),
                "count_error": off / total if total else None,
            }
        )
    return rows


def _median(histogram_B: NDArray[np.int64]) -> float:
    """The median, as the middle of its bin."""
    half = int(np.searchsorted(np.cumsum(histogram_B), histogram_B.sum() / 2))
    return (half + 0.5) / _SCORE_BINS
