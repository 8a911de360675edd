"""Labelling on a real Ray: every tile once, whatever happens to scenes and shards."""

import re
import shutil
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from urllib.request import urlopen

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from conftest import tiny_recipe
from drivers import Driver, assert_same, by_tile
from made_stores import unpack

from softlabel import cli, packing
from softlabel.errors import RecipeError, StorageError, StoreError
from softlabel.evaluation.run import evaluate_store, numbers
from softlabel.imagery.run import tile
from softlabel.labelling import run as labelling
from softlabel.labelling.job import label_job
from softlabel.labelling.run import label
from softlabel.lease import Lease
from softlabel.records import LABELLED, REJECTED, detections_from_row
from softlabel.store import DONE, read_json, summary, write_json
from softlabel.tile_table import SHARD_TILES, read_tiles

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


FLOOR = 0.1


@pytest.fixture(scope="module")
def stores(recipe, tiles, weights, run_dir):
    """Two stores of all tiles: as the recipe has it, and above a higher floor."""
    jobs = [label_job(one, "teacher", weights, tiles, None) for one in (recipe, tiny_recipe(label={"floor": FLOOR}))]
    return label(recipe, jobs, run_dir)


@pytest.fixture(scope="module")
def undisturbed(stores):
    """A store of all tiles."""
    return stores[0]


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

    monkeypatch.setattr(labelling, "_results", never)
    before = {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    (again,) = label(recipe, [label_job(recipe, "teacher", weights, tiles, None)], run_dir)
    assert again == undisturbed
    assert {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


def test_a_rerun_does_only_what_is_missing(recipe, tiles, weights, tmp_path, undisturbed, capsys):
    job = label_job(recipe, "teacher", weights, tiles, None)
    folder = job.folder(tmp_path)
    shutil.copytree(undisturbed, folder)
    *kept, last = unpack(folder)
    assert kept
    last.unlink()
    last.with_name(f".{last.name}.0123").write_bytes(b"half written when the driver was killed")
    label(recipe, [job], tmp_path)
    assert " tiles in 1 shards\n" in capsys.readouterr().out
    assert list(folder.glob("**/*.parquet")) == [folder / "table" / "000000.parquet"]
    assert_same(by_tile(folder), by_tile(undisturbed))


def test_filtering_a_store_equals_labelling_at_the_threshold(stores):
    low, high = map(by_tile, stores)
    total = 0
    for tile_id, row in high.items():
        filtered, labelled = detections_from_row(low[tile_id]).above(FLOOR), detections_from_row(row)
        np.testing.assert_allclose(filtered.boxes, labelled.boxes, atol=1e-3)
        np.testing.assert_allclose(filtered.best, labelled.best, atol=1e-5)
        total += len(labelled.boxes)
    assert high.keys() == low.keys() and 0 < total < summary(stores[0])["boxes"]


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
    missing, empty, truncated, garbage, replaced = (Path(uri) for uri in uris[:5])
    shutil.copy(uris[5], replaced)
    assert tile(recipe, tmp_path) == tiles
    missing.unlink()
    empty.write_bytes(b"")
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 3])
    garbage.write_bytes(b"II*\x00" + bytes(range(256)) * 40)
    (after,) = label(recipe, [label_job(recipe, "after", weights, tiles, None)], tmp_path)
    found, expected = by_tile(after), by_tile(before)
    bad = {row["tile_id"]: row["scene_uri"] for row in read_tiles(tiles) if row["scene_uri"] in uris[:5]}
    assert {tile_id for tile_id, row in found.items() if row["status"] == "rejected"} == set(bad)
    for tile_id, uri in bad.items():
        assert Path(uri).name in found[tile_id]["reason"] and not found[tile_id]["retryable"]
        assert "was replaced after it was tiled" in found[tile_id]["reason"] or uri != str(replaced)
    healthy = found.keys() - bad.keys()
    assert_same({i: found[i] for i in healthy}, {i: expected[i] for i in healthy})
    counts = summary(after)
    assert counts["rejected"] == len(bad) and counts["requested"] == counts["labelled"] + counts["rejected"]
    rejected = pq.read_table(after / "rejected").to_pylist()
    assert {row["tile_id"]: row["scene_uri"] for row in rejected} == bad
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


def test_a_store_that_another_run_writes_is_left_alone(recipe, tiles, weights, tmp_path, undisturbed):
    job = label_job(recipe, "teacher", weights, tiles, None)
    folder = job.folder(tmp_path)
    shutil.copytree(undisturbed, folder)
    (folder / DONE).unlink()
    with Lease(folder), pytest.raises(StoreError, match="is being written by process"):
        label(recipe, [job], tmp_path)
    label(recipe, [job], tmp_path)
    assert (folder / DONE).exists() and not list(folder.glob("*lease*"))


def test_sigterm_ends_a_run_in_order_and_the_same_command_finishes_it(tiles, weights, tmp_path, undisturbed):
    """A driver of its own, with a Ray of its own, told to stop once it has committed its first shard."""
    recipe, run_dir = tiny_recipe(label={"weights": str(weights)}, execution={"batch_size": 1}), tmp_path / "run"
    shutil.copytree(tiles, run_dir / tiles.name)
    driver = Driver(recipe, run_dir)
    assert driver.wait_until(lambda: driver.shards)
    driver.process.terminate()
    assert driver.wait() == 143 and "stopped; the same command goes on from here" in driver.said
    (folder,) = run_dir.glob("label-*")
    assert not list(folder.glob("*lease*")) and not (folder / DONE).exists()
    (again,) = label(recipe, [label_job(recipe, "labels", weights, tiles, None)], run_dir)
    assert again == folder
    assert_same(by_tile(folder), by_tile(undisturbed))


@contextmanager
def served(folder):
    """The files of a folder over HTTP, with ranges, as an object store gives them; names in ``lost`` are not found."""
    lost = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = folder / self.path.lstrip("/")
            if path.name in lost or not path.is_file():
                self.send_error(404)
                return
            data, wanted = path.read_bytes(), self.headers.get("Range")
            first, last = 0, len(data) - 1
            if wanted:
                begin, _, end = wanted.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end or last), last)
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[first : last + 1])

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", lost
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_what_failed_for_a_while_is_taken_up_again(weights, tiles, tmp_path, undisturbed):
    scene = Path(read_tiles(tiles)[0]["scene_uri"])
    with served(scene.parent) as (url, lost):
        recipe = tiny_recipe(
            tiles={"scenes": f"{url}/{scene.name}", "size_px": 128}, label={"max_rejected_fraction": 1.0}
        )
        remote = tile(recipe, tmp_path)
        job = label_job(recipe, "labels", weights, remote, None)
        lost.add(scene.name)
        (folder,) = label(recipe, [job], tmp_path)
        assert summary(folder)["retryable"] == summary(folder)["rejected"] == summary(folder)["requested"] == 4
        label(recipe, [job], tmp_path)
        assert summary(folder)["rejected"] == 4  # not without being asked
        lost.clear()
        label(recipe, [job], tmp_path, retry_rejected=True)
    assert summary(folder)["labelled"] == 4 and summary(folder)["retryable"] == 0
    expected = by_tile(undisturbed)
    assert_same(by_tile(folder), {tile_id: expected[tile_id] for tile_id in by_tile(folder)})
    assert not list((folder / "rejected").iterdir())


def test_what_was_there_is_not_read_again_with_it(recipe, tiles, weights, tmp_path, undisturbed):
    folder = shutil.copytree(undisturbed, label_job(recipe, "teacher", weights, tiles, None).folder(tmp_path))
    (path,) = (folder / "table").iterdir()
    made = pq.read_table(path)
    rows = made.to_pylist()
    rows[0]["saturated"] = not rows[0]["saturated"]  # as no run would have it
    rows[1] |= {"status": REJECTED, "reason": "not there just now", "retryable": True}
    pq.write_table(pa.Table.from_pylist(rows, made.schema), path, row_group_size=SHARD_TILES)
    said = read_json(folder / DONE)
    write_json(folder / DONE, said | {"labelled": said["labelled"] - 1, "rejected": 1, "retryable": 1})
    label(recipe, [label_job(recipe, "teacher", weights, tiles, None)], tmp_path, retry_rejected=True)
    assert summary(folder)["labelled"] == said["labelled"] and summary(folder)["retryable"] == 0
    after = pq.read_table(path).to_pylist()
    assert after[1]["status"] == LABELLED
    assert repr([after[0], *after[2:]]) == repr([rows[0], *rows[2:]])  # where NaN is NaN


def test_every_actor_sees_its_own_gpu_alone(weights, tmp_path):
    """With GPUs that Ray only counts: what an actor may see is Ray's to say, and softlabel's not to widen."""
    recipe = tiny_recipe(
        tiles={"synthetic": {"num_scenes": 40, "scene_size_px": 256}, "size_px": 64},
        label={"engine": "pytorch", "precision": "float32"},
        execution={"actors": 2, "gpus_per_actor": 1, "cpus_per_actor": 0.5, "reader_cpus_per_actor": 0.5},
    )
    (folder,) = label(recipe, [label_job(recipe, "labels", weights, tile(recipe, tmp_path), None)], tmp_path)
    speed = summary(folder)["speed"]
    assert speed["actors"] == 2 and speed["devices"] == ["cpu 0", "cpu 1"]
    assert 0 < speed["busy"] <= 1 and speed["limit"] in ("model", "reading")
    assert speed["megapixels_per_s"] == pytest.approx(speed["tiles_per_s"] * 64 * 64 / 1e6, rel=0.05)
    assert speed["km2_per_s"] > 0


def test_a_pool_may_begin_with_no_actor(recipe, weights, tiles, tmp_path):
    execution = recipe.execution.model_copy(update={"actors": (0, 1)})
    (folder,) = label(
        recipe.model_copy(update={"execution": execution}), [label_job(recipe, "none", weights, tiles, None)], tmp_path
    )
    assert summary(folder)["requested"] == summary(folder)["labelled"] > 0


def test_gpus_are_used_where_the_recipe_says_nothing_of_them(recipe, weights, tmp_path, monkeypatch, capsys):
    """With GPUs that Ray only counts, and the test's Ray for the command's own."""
    monkeypatch.setattr(cli, "ray_session", lambda run_dir, verbose: nullcontext(True))
    values = recipe.model_dump(mode="json", exclude={"execution"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run")]
    flags += ["--set", f"label.weights={weights}", "--set", "label.precision=float32", "--set", "tiles.size_px=32"]
    assert cli.main(["label", *flags]) == 0
    assert "labelling: 2 actors of 1 CPU and 1 GPU, pytorch in float32" in capsys.readouterr().out
    (folder,) = (tmp_path / "run").glob("label-labels-*")
    assert summary(folder)["speed"]["devices"] == ["cpu 0", "cpu 1"]
    assert cli.main(["evaluate", *flags]) == 0  # which joins no cluster, and finds what GPUs have labelled
    assert cli.main(["evaluate", *flags, "--set", "execution.device=cpu"]) == 2
    assert f"{folder.name[:13]}" in (error := capsys.readouterr().err) and folder.name not in error


def test_an_actor_keeps_the_memory_of_a_pass_for_the_next(recipe, weights, tiles, tmp_path, monkeypatch):
    class Measured(labelling._Labeller):
        def __call__(self, read):
            before = getrusage(RUSAGE_SELF).ru_minflt
            for _ in range(20):
                [torch.ones(1 << 22) for _ in range(3)]  # 48 MiB, 12,288 pages of 4 KiB
            (tmp_path / "faults").write_text(str(getrusage(RUSAGE_SELF).ru_minflt - before))
            return super().__call__(read)

    monkeypatch.setattr(labelling, "_Labeller", Measured)
    label(recipe, [label_job(recipe, "teacher", weights, tiles, None)], tmp_path)
    assert int((tmp_path / "faults").read_text()) < 2 * 12_288


def test_the_driver_keeps_nothing_of_the_shards_that_are_done(many_tiles, weights, small_tiles, tmp_path, monkeypatch):
    """Of ten shards Ray Data noted two blocks each, until the end."""
    kept = []

    class Counting(labelling._Watching):
        def after_execution_succeeds(self, executor):
            kept.extend(len(blocks) for operator in executor._topology for blocks in operator.get_stats().values())

    monkeypatch.setattr(labelling, "_Watching", Counting)
    label(many_tiles(), [label_job(many_tiles(), "labels", weights, small_tiles, None)], tmp_path)
    assert len(kept) >= 2 and sum(kept) <= 2


@pytest.mark.parametrize(
    ("error", "ends"),
    [(StorageError("not there just now"), nullcontext()), (ValueError("odd"), pytest.raises(ValueError))],
)
def test_actors_of_a_run_that_failed_make_room_for_those_of_the_next(
    weights, tiles, tmp_path, monkeypatch, error, ends
):
    class FailsOnce(labelling._Labeller):
        def __call__(self, read):
            if not (tmp_path / "failed").exists():
                (tmp_path / "failed").touch()
                raise error
            return super().__call__(read)

    monkeypatch.setattr(labelling, "_Labeller", FailsOnce)
    recipe = tiny_recipe(execution={"gpus_per_actor": 2, "stall_minutes": 0.5}, label={"precision": "float32"})
    jobs = [label_job(recipe, "labels", weights, tiles, None)]
    with ends:  # it holds the error, and so the actors
        label(recipe, jobs, tmp_path)
    (folder,) = label(recipe, jobs, tmp_path)
    assert (tmp_path / "failed").exists() and summary(folder)["requested"] == summary(folder)["labelled"] > 0


def test_packing_has_the_memory_of_the_actors(many_tiles, weights, small_tiles, tmp_path, monkeypatch):
    """By themselves they end a second or two after Ray Data has dropped them, and packing begins at once."""
    left = []

    def packed(*store):
        end = time.monotonic() + 1
        while (labellers := _labellers()) and time.monotonic() < end:
            time.sleep(0.01)
        left.extend(labellers)
        return packing.pack_store(*store)

    monkeypatch.setattr(labelling, "pack_store", packed)
    label(many_tiles(), [label_job(many_tiles(), "labels", weights, small_tiles, None)], tmp_path)
    assert not left


def _labellers():
    """The processes of labelling's actors, by the name that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            found += [process] if any("_Labeller" in word for word in process.cmdline()) else []
    return found


def test_packing_says_that_it_waits_for_a_cpu(monkeypatch):
    said = []

    def say(text):
        said.append(text)
        ray.kill(busy)

    busy = ray.remote(num_cpus=3)(threading.Event).remote()
    ray.get(busy.is_set.remote())
    monkeypatch.setattr(packing, "_LONG_S", 0.5)
    monkeypatch.setattr(packing, "say", say)
    done, waiting = packing._wait([ray.remote(num_cpus=1)(lambda: 1).remote()])
    assert ray.get(done) == [1] and not waiting
    assert said == ["packing: nothing was packed for 0.5 s; 0 CPU free, and each task needs one"]


def test_what_was_labelled_is_counted_on_ray_s_dashboard(recipe, weights, tiles, tmp_path):
    (folder,) = label(recipe, [label_job(recipe, "counted", weights, tiles, None)], tmp_path)
    metrics = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    deadline, counted = time.monotonic() + 60, dict[str, float]()
    while "tiles" not in counted and time.monotonic() < deadline:
        lines = urlopen(metrics, timeout=30).read().decode().splitlines()
        found = (re.match(r'ray_softlabel_(\w+)_total\{.*store="label-counted-.*\} (.+)', line) for line in lines)
        counted = {one[1]: float(one[2]) for one in found if one}
    told = summary(folder)
    assert (counted["tiles"], counted["boxes"]) == (told["requested"], told["boxes"])
    assert counted["pixels"] == sum(width * height for *_, width, height in (t["window"] for t in read_tiles(tiles)))
    assert counted["busy_s"] > 0 and counted["km2"] > 0
