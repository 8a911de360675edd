"""How well do words find things? A trained OWL-ViT on made-up tiles that it has not seen.

python benchmarks/open_vocabulary.py --model tests/assets/tiny-owlvit --json words.json

mAP50 by class names, by phrases that training left out and by example crops; what words for absent classes find; what
each background prompt takes away, right and wrong; and how far scores are from chances before and after calibration.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine
from tiny_owlvit import CLASSES, SCENE, SIDE, UNSEEN, made_tiles

from softlabel.detectors.owlvit import OwlVitDetector
from softlabel.detectors.queries import Queries
from softlabel.evaluation.calibrate import calibrate
from softlabel.evaluation.matching import TileResult, match, to_columns
from softlabel.evaluation.metrics import evaluate
from softlabel.records import Nms, Truth

_ABSENT = ("a bridge", "a horse", "a tennis court", "a giraffe", "a submarine", "a wind turbine")
"""The first three were in training as words of which there is nothing, the others were not."""

_BACKGROUND = ("a tree", "a building", "a container", "a crane", "the water", "a road")
_NMS = Nms(0.01, 0.5)
_THRESHOLD = 0.3
_TILES_PER_SCENE = (SCENE // SIDE) ** 2


def main() -> int:
    """Measure all, print the tables, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--scenes", type=int, default=60, help="made-up scenes, 16 tiles each (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes; training had 0 (default: 1)")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    found = {"machine": machine(), **measure(arguments.model, arguments.scenes, arguments.seed)}
    print(_tables(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def measure(model: Path, num_scenes: int, seed: int) -> dict[str, Any]:
    """All of it."""
    tiles = made_tiles(num_scenes, seed)
    images = [image for image, _, _ in tiles]
    truths = [Truth(boxes, ids.astype(np.int32), np.zeros(len(ids), bool)) for _, boxes, ids in tiles]

    def results(queries: Queries) -> list[TileResult]:
        found = OwlVitDetector(model, queries, _NMS).detect(images)
        return [TileResult(truth, one, None) for truth, one in zip(truths, found, strict=True)]

    names = Queries(tuple((f"a {name}",) for name in CLASSES))
    by_names = results(names)
    ways = {
        "a plane, a ship, a car": by_names,
        "phrases never seen": results(Queries(tuple((UNSEEN[name],) for name in CLASSES))),
        "both, mean of embeddings": results(Queries(tuple((f"a {name}", UNSEEN[name]) for name in CLASSES))),
        "both, max of scores": results(Queries(tuple((f"a {name}", UNSEEN[name]) for name in CLASSES), combine="max")),
        "three example crops": results(Queries(((),) * len(CLASSES), _crops(seed + 1))),
    }
    groups = [str(i // _TILES_PER_SCENE) for i in range(len(tiles))]
    absent = OwlVitDetector(model, Queries(tuple((words,) for words in _ABSENT)), _NMS).detect(images)
    return {
        "tiles": len(tiles),
        "objects": sum(len(truth.boxes) for truth in truths),
        "ways": {name: _scores(found) for name, found in ways.items()},
        "absent": {
            words: int(sum((one.above(_THRESHOLD).class_ids == k).sum() for one in absent))
            for k, words in enumerate(_ABSENT)
        },
        "background": [
            _absorbed(by_names, results(Queries(names.prompts, background=(prompt,))), prompt) for prompt in _BACKGROUND
        ],
        "calibration": {
            method: calibrate(by_names, CLASSES, groups, method)[1] for method in ("isotonic", "temperature")
        },
    }


def _crops(seed: int, each: int = 3) -> tuple[tuple[Any, ...], ...]:
    """The largest whole objects of each class on some other tiles, cut out closely."""
    found: list[list[tuple[float, Any]]] = [[] for _ in CLASSES]
    for image, boxes, ids in made_tiles(12, seed):
        for (x0, y0, x1, y1), class_id in zip(boxes.astype(int).tolist(), ids.tolist(), strict=True):
            if min(x0, y0) > 0 and max(x1, y1) < len(image):
                found[class_id].append(((x1 - x0) * (y1 - y0), image[y0:y1, x0:x1]))
    return tuple(tuple(crop for _, crop in sorted(one, key=lambda pair: -pair[0])[:each]) for one in found)


def _scores(results: Sequence[TileResult]) -> dict[str, float]:
    metrics = evaluate(results, CLASSES)
    return {"map50": metrics.map50, **{name: metrics.per_class[name]["ap50"] for name in CLASSES}}


def _absorbed(before: Sequence[TileResult], after: Sequence[TileResult], prompt: str) -> dict[str, Any]:
    """What is gone above the threshold, and what that does to mAP50."""
    counts = [_right_and_wrong(results) for results in (before, after)]
    return {
        "prompt": prompt,
        "wrong_gone": counts[0][1] - counts[1][1],
        "right_gone": counts[0][0] - counts[1][0],
        "map50": _scores(after)["map50"],
    }


def _right_and_wrong(results: Sequence[TileResult]) -> tuple[int, int]:
    columns = to_columns(results, len(CLASSES))
    (matches,) = match(columns, [0.5])
    above = columns.scores > _THRESHOLD
    return int((matches.found & above).sum()), int((matches.counted & ~matches.found & above).sum())


def _tables(found: dict) -> str:
    about = found["machine"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, no GPU; {about['date']}, commit {about['commit']}; "
        f"{found['tiles']} tiles, {found['objects']} objects",
        "",
        f"| looked for by | mAP50 | {' | '.join(CLASSES)} |",
        "|---|---|" + "---|" * len(CLASSES),
        *(
            f"| {name} | {' | '.join(f'{row[key]:.3f}' for key in ('map50', *CLASSES))} |"
            for name, row in found["ways"].items()
        ),
        "",
        f"Boxes above {_THRESHOLD} of absent classes: "
        + ", ".join(f"{words} {count}" for words, count in found["absent"].items()),
        "",
        f"| background prompt | wrong boxes above {_THRESHOLD} gone | right ones gone | mAP50 |",
        "|---|---|---|---|",
        *(
            f"| {row['prompt']} | {row['wrong_gone']} | {row['right_gone']} | {row['map50']:.3f} |"
            for row in found["background"]
        ),
        "",
        "| calibration | class | boxes | right | ECE | ECE calibrated, on tiles left out |",
        "|---|---|---|---|---|---|",
        *(
            f"| {method} | {row['class']} | {row['boxes']} | {row['right']} | {row['ece']:.3f} | "
            f"{row['ece_calibrated']:.3f} |"
            for method, rows in found["calibration"].items()
            for row in rows
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
