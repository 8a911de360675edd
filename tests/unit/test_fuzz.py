"""Whatever is in a truth file, a scene, a store or a weights file: a result, rejected rows or a declared error.

Never another exception, a hang, a crash, or gigabytes for a small window. fuzzing.py damages and reads, in a process of
its own.
"""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzzing
import numpy as np
import pyarrow as pa
import pytest

from softlabel import store, tile_table
from softlabel.config import TruthSource
from softlabel.errors import SceneError, StoreError, TruthError
from softlabel.imagery.scenes import TileReader, describe_scene
from softlabel.imagery.truth import read_truth
from softlabel.records import TILES, soft_labels_schema

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SHORT = {"truth": 1_000, "rasters": 600, "stores": 350, "bombs": 50, "weights": 300}
LONG = {"truth": 50_000, "rasters": 30_000, "stores": 19_900, "bombs": 100, "weights": 100_000}


def feed(target: str, count: int, folder: Path, first: int = 0) -> list[dict]:
    """What became of each input, those included that ended their process: it is started again after them."""
    folder.mkdir(exist_ok=True)
    outcomes: list[dict] = []
    while len(outcomes) < count:
        numbers = str(first + len(outcomes)), str(count - len(outcomes))
        command = [sys.executable, fuzzing.__file__, target, *numbers, str(folder)]
        run = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        outcomes += map(json.loads, run.stdout.splitlines())
        if run.returncode:
            assert run.returncode < 0 or "Timeout (" in run.stderr, run.stderr[-4_000:]  # else fuzzing.py is at fault
            what = f"ended its process ({run.returncode}): {run.stderr[-2_000:]}"
            outcomes.append(
                {"number": first + len(outcomes), "outcome": "ended", "seconds": 0, "grown_mb": 0, "detail": what}
            )
    return outcomes


def check(target: str, outcomes: list[dict]) -> None:
    """No input may fail; enough must get past the parsers, and enough must not, or little was tried."""
    shares, slowest = Counter(row["outcome"] for row in outcomes), max(outcomes, key=lambda row: row["seconds"])
    print(f"{target}: {dict(shares)}, slowest {slowest['seconds']:.2f} s (number {slowest['number']})")
    bad = [row for row in outcomes if row["outcome"] in ("failed", "ended")]
    assert not bad, f"{len(bad)} {target} inputs, the first is number {bad[0]['number']}: {bad[0]['detail']}"
    assert shares["declared"] > 0.1 * len(outcomes)
    assert target == "bombs" or shares["result"] + shares["rejected"] > 0.1 * len(outcomes)


@pytest.mark.parametrize("target", SHORT)
def test_damaged_inputs_end_well(target, tmp_path):
    check(target, feed(target, SHORT[target], tmp_path))


@pytest.mark.long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("target", LONG)
def test_many_damaged_inputs_end_well(target, tmp_path):
    half = LONG[target] // 2
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(feed, target, half, tmp_path / str(first), first) for first in (0, half)]
    check(target, [row for one in halves for row in one.result()])


def _bomb(tmp_path, name, *, in_overviews):
    """A file of ``fuzzing`` that claims one block of 60,000 px squared, in its image or in its overviews only."""
    whole = {case.name: path.read_bytes() for case in fuzzing.raster_cases(tmp_path) for path in case.files}[name]
    for seed in range(100):
        first, blocks = np.random.default_rng(seed).random(2)
        if (first < 0.3) == in_overviews and blocks < 0.5:
            (tmp_path / name).write_bytes(fuzzing.bomb(whole, b"", np.random.default_rng(seed)))
            return str(tmp_path / name)
    raise AssertionError("no seed")


def test_blocks_too_large_to_decode_for_a_tile_are_refused(tmp_path):
    uri = _bomb(tmp_path, "tiled-deflate.tif", in_overviews=False)
    row = {"scene_uri": uri, "scene_stamp": None, "window": [0, 0, 8, 8], "bands": [1, 2, 3], "stretch": None}
    for read in (lambda: describe_scene(uri, (1, 2, 3), None), lambda: TileReader().read(row)):
        with pytest.raises(SceneError, match=r"blocks of 60000x60000 px, 10,800 MB.*TILED=YES"):
            read()


def test_so_are_those_of_overviews_that_the_stretch_is_taken_from(tmp_path):
    uri = _bomb(tmp_path, "deflate-16.tif", in_overviews=True)
    with pytest.raises(SceneError, match="blocks of 60000x60000 px"):
        describe_scene(uri, (1, 2, 3), None)


def test_a_scene_that_became_complex_is_an_error(tmp_path):
    """NumPy has no complex_int16, which GDAL reads: its name raised TypeError."""
    path = tmp_path / "a.tif"
    with fuzzing.rasterio.open(path, "w", "GTiff", 8, 8, 3, dtype="complex_int16"):
        pass
    row = {"scene_uri": str(path), "scene_stamp": None, "window": [0, 0, 8, 8], "bands": [1, 2, 3], "stretch": [0, 9]}
    with pytest.raises(SceneError, match="not what was tiled"):
        TileReader().read(row)


def test_names_of_a_source_keep_an_error_on_one_line(tmp_path):
    path = tmp_path / "truth.json"
    categories = [{"id": 1, "name": "a\nb"}, {"id": 2, "name": "c"}]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    with pytest.raises(TruthError, match=r"the source has 'a\\nb', 'c'") as caught:
        read_truth(TruthSource(format="coco", path=str(path)), ("car",))
    assert "\n" not in str(caught.value)


def test_a_class_number_too_long_for_decimals_is_an_error(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(f"names:\n  ? 0x{'f' * 5_000}\n  : car\n")
    with pytest.raises(TruthError, match="needs `names`"):
        read_truth(TruthSource(format="yolo", path=str(path)), ("car",))


@pytest.mark.parametrize("text", ["[]", "3", '{"format_version": "2"}', '{"format_version": null}', "[" * 100_000])
def test_what_is_no_summary_is_a_store_error(tmp_path, text):
    (tmp_path / "done.json").write_text(text)
    with pytest.raises(StoreError, match=r"done\.json.*run its step again"):
        store.summary(tmp_path)


def test_a_table_of_something_else_is_no_table_of_tiles(tmp_path):
    tile_table.write_tiles(tmp_path, [fuzzing.tile_row(0)])
    store.write_table(tmp_path / "table" / "000000.parquet", TILES.empty_table().drop_columns(["split"]))
    with pytest.raises(StoreError, match="no table of tiles"):
        tile_table.read_tiles(tmp_path)
    store.write_table(tmp_path / tile_table.MANIFEST, pa.table({"test": ["many"]}))
    with pytest.raises(StoreError, match="no table of tiles"):
        tile_table.read_tiles(tmp_path, ["test"])


def test_text_that_is_not_utf8_is_a_store_error(tmp_path):
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xc3(")]
    )
    store.write_table(tmp_path / "x", pa.table({"reason": text}))
    with pytest.raises(StoreError, match="UTF8"):
        store.read_table(tmp_path / "x")


def test_a_damaged_page_never_reads_as_other_labels(tmp_path):
    """Without checksums one in forty does."""
    path, rows = tmp_path / "shard-000000.parquet", [fuzzing.soft_label(number) for number in range(6)] * 20
    store.write_table(path, pa.Table.from_pylist(rows, soft_labels_schema(3)))
    whole, good = path.read_bytes(), store.read_table(path)
    refused = 0
    for seed in range(300):
        path.write_bytes(fuzzing.pages(whole, b"", np.random.default_rng(seed)))
        try:
            assert store.read_table(path).equals(good)
        except StoreError:
            refused += 1
    assert refused > 200
