"""The blocks of README and docs/, and a small data set on which their commands run."""

import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def blocks(page):
    """The code of a page: what is fenced, and what is indented by four after an empty line."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?<=\n\n)((?:    .*\n|\n(?=    ))+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [*fenced, *(re.sub(r"^    ", "", found, flags=re.MULTILINE) for found in indented)]


def lines(block):
    """The commands of a block as words, continued lines joined, comments left out."""
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def make_images(folder, count=12):
    """Images with a box each, as COCO; and as many that nobody has labelled."""
    images, notes = [], []
    for name in ("images", "archive"):
        (folder / name).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
            cv2.imwrite(str(folder / name / f"{i}.png"), pixels)
    for i in range(count):
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        notes.append({"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [8, 8, 20, 20]})
    categories = [{"id": 1, "name": "plane"}, {"id": 2, "name": "ship"}]
    truth = {"images": images, "annotations": notes, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(truth))
