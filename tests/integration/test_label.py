"""Labelling on a real Ray: every tile once, whatever happens to scenes and shards."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tiny_recipe

from softlabel.config import dump_recipe, load_recipe
from softlabel.errors import RecipeError, StoreError
from softlabel.evaluation.run import evaluate_store, numbers
from softlabel.imagery.run import tile
from softlabel.labelling import run as labelling
from softlabel.labelling.lease import Lease
from softlabel.labelling.run import label, label_job
from softlabel.records import detections_from_row
from softlabel.store import DONE, read_json, read_soft_labels, read_tiles, summary, write_json

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


@pytest.fixture(scope="module")
def undisturbed(recipe, tiles, weights, run_dir):
    """A store of all tiles."""
    (folder,) = label(recipe, [label_job(recipe, "teacher", weights, tiles, None)], run_dir)
    return folder


def by_tile(folder):
    rows = list(read_soft_labels(folder))
    assert len({row["tile_id"] for row in rows}) == len(rows)
    return {row["tile_id"]: row for row in rows}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for tile_id, row in found.items():
        assert row["status"] == expected[tile_id]["status"]
        np.testing.assert_allclose(row["boxes"], expected[tile_id]["boxes"], atol=1e-2)
        np.testing.assert_allclose(row["scores"], expected[tile_id]["scores"], atol=1e-4)


def test_every_tile_is_one_row_with_class_vectors(undisturbed, tiles):
    rows = by_tile(undisturbed)
    assert rows.keys() == {row["tile_id"] for row in read_tiles(tiles)}
    counts = summary(undisturbed)
    assert counts["requested"] == counts["labelled"] == len(rows)
    assert counts["boxes"] == sum(len(row["boxes"]) for row in rows.values()) > 0
    found = [detections_from_row(row) for row in rows.values() if row["boxes"]]
    assert all(one.scores.shape[1] == 3 and (one.best > 0.01).all() for one in found)
    assert any(len(np.unique(one.class_ids)) > 1 for one in found)


def test_a_second_run_does_no_work_and_adds_no_row(recipe, tiles, weights, run_dir, undisturbed, monkeypatch):
    def never(*_):
        raise AssertionError("a finished store was labelled again")

    monkeypatch.setattr(labelling, "_run", never)
    before = {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    (again,) = label(recipe, [label_job(recipe, "teacher", weights, tiles, None)], run_dir)
    assert again == undisturbed
    assert {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


def test_a_rerun_does_only_what_is_missing(recipe, tiles, weights, tmp_path, undisturbed):
    job = label_job(recipe, "teacher", weights, tiles, None)
    folder = job.folder(tmp_path)
    shutil.copytree(undisturbed, folder)
    shards = sorted(folder.glob("shard-*.parquet"))
    assert len(shards) > 1
    kept = shards[0].stat().st_mtime_ns
    shards[-1].unlink()
    (folder / DONE).unlink()
    (folder / f".{shards[-1].name}.0123").write_bytes(b"half written when the driver was killed")
    label(recipe, [job], tmp_path)
    assert shards[0].stat().st_mtime_ns == kept
    assert_same(by_tile(folder), by_tile(undisturbed))


def test_filtering_a_store_equals_labelling_at_the_threshold(recipe, tiles, weights, tmp_path, undisturbed):
    threshold = 0.1
    high = tiny_recipe(label={"floor": threshold})
    (folder,) = label(high, [label_job(high, "teacher", weights, tiles, None)], tmp_path)
    low, total = by_tile(undisturbed), 0
    for tile_id, row in by_tile(folder).items():
        filtered, labelled = detections_from_row(low[tile_id]).above(threshold), detections_from_row(row)
        np.testing.assert_allclose(filtered.boxes, labelled.boxes, atol=1e-3)
        np.testing.assert_allclose(filtered.best, labelled.best, atol=1e-5)
        total += len(labelled.boxes)
    assert 0 < total < summary(undisturbed)["boxes"]


def test_several_teachers_and_splits_in_one_run(recipe, tiles, weights, anchor_weights, tmp_path, undisturbed):
    jobs = [
        label_job(recipe, "one", weights, tiles, ["train_1", "val_1"]),
        label_job(recipe, "two", weights, tiles, ["test"], with_losses=True),
        label_job(recipe, "anchors", anchor_weights, tiles, ["val_1"], with_losses=True),
    ]
    one, two, anchors = label(recipe, jobs, tmp_path)
    everything = by_tile(undisturbed)
    for folder, splits in ((one, ["train_1", "val_1"]), (two, ["test"])):
        wanted = {row["tile_id"] for row in read_tiles(tiles, splits)}
        assert_same(by_tile(folder), {tile_id: everything[tile_id] for tile_id in wanted})
    assert all(row["losses"] is None for row in by_tile(one).values())
    assert all(len(row["losses"]) == 6 for row in by_tile(two).values())
    assert all(row["objectness"] is None for row in by_tile(two).values())
    assert all(len(row["losses"]) == 18 for row in by_tile(anchors).values())
    for found in map(detections_from_row, by_tile(anchors).values()):
        assert len(found.boxes) == len(found.objectness) > 0
        assert (found.scores <= found.objectness[:, None]).all()
    assert set(evaluate_losses(recipe, tiles, anchors, tmp_path)) == {"box", "obj", "cls"}


def evaluate_losses(recipe, tiles, store, run_dir):
    return numbers(evaluate_store(recipe, store.name, tiles, "val_1", store, run_dir))["losses"]


def test_bad_scenes_are_rows_with_reasons_and_cost_nothing_else(weights, tmp_path):
    recipe = tiny_recipe(label={"max_rejected_fraction": 1.0})
    tiles = tile(recipe, tmp_path)
    (before,) = label(recipe, [label_job(recipe, "before", weights, tiles, None)], tmp_path)
    uris = list(dict.fromkeys(row["scene_uri"] for row in read_tiles(tiles)))
    missing, empty, truncated, garbage = (Path(uri) for uri in uris[:4])
    missing.unlink()
    empty.write_bytes(b"")
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 3])
    garbage.write_bytes(b"II*\x00" + bytes(range(256)) * 40)
    (after,) = label(recipe, [label_job(recipe, "after", weights, tiles, None)], tmp_path)
    found, expected = by_tile(after), by_tile(before)
    bad = {row["tile_id"]: row["scene_uri"] for row in read_tiles(tiles) if row["scene_uri"] in uris[:4]}
    assert {tile_id for tile_id, row in found.items() if row["status"] == "rejected"} == set(bad)
    for tile_id, uri in bad.items():
        assert Path(uri).name in found[tile_id]["reason"]
    healthy = found.keys() - bad.keys()
    assert_same({i: found[i] for i in healthy}, {i: expected[i] for i in healthy})
    counts = summary(after)
    assert counts["rejected"] == len(bad) and counts["requested"] == counts["labelled"] + counts["rejected"]
    rejected = pq.read_table(after / "rejected" / "rejected.parquet")
    assert set(rejected["tile_id"].to_pylist()) == set(bad)
    strict = tiny_recipe()
    with pytest.raises(StoreError, match=r"tiles were rejected .*max_rejected_fraction"):
        label(strict, [label_job(strict, "after", weights, tiles, None)], tmp_path)


def test_a_store_of_another_teacher_is_refused_with_the_difference(recipe, tiles, weights, tmp_path, undisturbed):
    job = label_job(recipe, "teacher", weights, tiles, None)
    folder = job.folder(tmp_path)
    shutil.copytree(undisturbed, folder)
    identity = read_json(folder / "store.json")
    identity["teacher"]["imgsz"] = 999
    write_json(folder / "store.json", identity)
    with pytest.raises(StoreError, match=r"teacher.*999"):
        label(recipe, [job], tmp_path)


def test_weights_of_other_classes_are_refused(tiles, weights):
    with pytest.raises(RecipeError, match="knows the classes car, plane, ship"):
        other = tiny_recipe(classes=["car", "plane"])
        label_job(other, "teacher", weights, tiles, None)


def test_more_actors_than_cpus_are_refused_at_once(tiles, weights, tmp_path):
    greedy = tiny_recipe(execution={"actors": 3, "cpus_per_actor": 1})
    with pytest.raises(RecipeError, match=r"labelling needs 3\.25 CPU"):
        label(greedy, [label_job(greedy, "teacher", weights, tiles, None)], tmp_path)


def test_a_store_that_another_run_writes_is_left_alone(recipe, tiles, weights, tmp_path):
    job = label_job(recipe, "teacher", weights, tiles, ["test"])
    with Lease(job.folder(tmp_path)), pytest.raises(StoreError, match="is being written by process"):
        label(recipe, [job], tmp_path)
    (folder,) = label(recipe, [job], tmp_path)
    assert not list(folder.glob("*lease*"))


def test_sigterm_ends_a_run_in_order_and_the_same_command_finishes_it(tiles, weights, tmp_path, undisturbed):
    """A driver of its own, with a Ray of its own, told to stop once it has committed its first shard."""
    recipe_file, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe_file.write_text(dump_recipe(tiny_recipe(label={"weights": str(weights)}, execution={"batch_size": 1})))
    shutil.copytree(tiles, run_dir / tiles.name)
    job = Path(__file__).parents[2] / "jobs" / "label.py"
    command = [sys.executable, str(job), "--config", str(recipe_file), "--run-dir", str(run_dir)]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 300
    while not list(run_dir.glob("label-*/shard-*.parquet")):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    driver.terminate()
    _, error = driver.communicate(timeout=120)
    assert driver.returncode == 143 and "stopped; the same command goes on from here" in error
    (folder,) = run_dir.glob("label-*")
    assert not list(folder.glob("*lease*")) and not (folder / DONE).exists()
    recipe = load_recipe(recipe_file)
    (again,) = label(recipe, [label_job(recipe, "labels", weights, tiles, None)], run_dir)
    assert again == folder
    assert_same(by_tile(folder), by_tile(undisturbed))
