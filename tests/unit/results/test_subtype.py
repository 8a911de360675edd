"""A class split into finer ones: vectors, crops, shards, and what is refused."""

import numpy as np
import pytest
from made_stores import CLASSES, detections, made_store, made_tile, write_finer, write_store

from softlabel import rotated
from softlabel.cli import main
from softlabel.errors import SceneError, StoreError
from softlabel.records import EMPTY, Detections
from softlabel.results import run
from softlabel.results.colour import Colour
from softlabel.results.crops import cut_out
from softlabel.results.fuse import fuse_job
from softlabel.results.names import teacher_name
from softlabel.results.stores import open_store, read_all
from softlabel.results.subtype import finer_scores, subtype_job
from softlabel.store import DONE, STORE, read_json, summary

RED, BLUE = (200, 20, 30), (20, 40, 180)
FINER = [f"car-{name}" for name in Colour.names]
CAR, OTHER_CAR, PLANE = (0, 0, 20, 20, 0, 0.8), (30, 30, 50, 40, 0, 0.3), (0, 40, 20, 60, 1, 0.5)


def painted(_row):
    """A tile with a red car and a blue one."""
    image = np.full((64, 64, 3), 128, np.uint8)
    image[0:20, 0:20], image[30:40, 30:50] = RED, BLUE
    return image


def gone(row):
    raise SceneError(f"cannot read scene {row['scene_uri']}: no such file")


def tiles(count=4, **options):
    return [made_tile("s", (64 * i, 0, 64, 64), detections(CAR, PLANE, OTHER_CAR), **options) for i in range(count)]


def job_of(run_dir, made=None, split_class="car", attribute=None, **options):
    return subtype_job(made_store(run_dir, made or tiles(), **options), split_class, attribute or Colour())


def write(job, read=painted, **options):
    return write_finer(job, read, **options)


def test_the_likeliest_finer_class_keeps_the_whole_score():
    scores = np.array([[0.1, 0.8, 0.2], [0.4, 0.3, 0.1]], np.float32)
    found = finer_scores(scores, 1, np.array([True, False]), np.array([[0.6, 0.4, 0.0]], np.float32))
    np.testing.assert_allclose(found[0], [0.1, 0.8, 0.8 * 0.4 / 0.6, 0, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(found[1], np.array([0.4, 0.3, 0.3, 0.3, 0.1], np.float32))
    assert found.dtype == np.float32 and found[0, 1] == scores[0, 1]


def test_of_what_is_not_known_every_finer_class_has_the_whole_score():
    scores = np.array([[0.9, 0.1]], np.float32)
    found = finer_scores(scores, 0, np.array([True]), np.zeros((1, 2), np.float32))
    np.testing.assert_array_equal(found, np.array([[0.9, 0.9, 0.1]], np.float32))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_threshold_keeps_the_boxes_that_it_kept_and_their_classes(place):
    rng = np.random.default_rng(place)
    scores = rng.random((500, 3)).astype(np.float32)
    scores[:50, 1] = scores[:50, 0]  # classes that tie
    before = Detections(np.zeros((500, 4), np.float32), scores)
    is_split = before.class_ids == place
    shares = rng.random((is_split.sum(), 4)).astype(np.float32)
    after = Detections(before.boxes, finer_scores(scores, place, is_split, shares))
    np.testing.assert_array_equal(after.best, before.best)
    for threshold in (0.3, 0.5, 0.9, *scores[:20].max(axis=1)):
        np.testing.assert_array_equal(after.is_above(threshold), before.is_above(threshold))
    parents = np.array([k for k in range(3) for _ in range(4 if k == place else 1)])
    np.testing.assert_array_equal(parents[after.class_ids], before.class_ids)
    np.testing.assert_array_equal(after.class_ids[is_split] - place, shares.argmax(axis=1))


def test_crops_are_inside_the_tile_and_have_a_pixel():
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    found = detections((1.5, 2.2, 4.1, 5, 0, 0.9), (7.9, 7.9, 8, 8, 0, 0.9), (3, 3, 3, 3, 0, 0.9), (0, 0, 8, 8, 0, 0.9))
    crops = cut_out(image, found)
    for crop, part in zip(crops, (image[2:5, 1:5], image[7:, 7:], image[3:4, 3:4], image), strict=True):
        np.testing.assert_array_equal(crop, part)


@pytest.mark.parametrize("degrees", [0, 30, 75])
def test_a_rotated_box_shows_its_interior_alone(degrees):
    box = np.array([[40, 30, 30, 8, np.deg2rad(degrees)]])
    y, x = np.mgrid[:64, :80] + 0.5
    cos, sin = np.cos(box[0, 4]), np.sin(box[0, 4])
    across, down = (x - 40) * cos + (y - 30) * sin, (y - 30) * cos - (x - 40) * sin
    image = np.zeros((64, 80, 3), np.uint8)
    image[(abs(across) < 16) & (abs(down) < 5)] = RED
    image[(abs(across) < 16) & (abs(down) < 5) & (across > 3)] = BLUE
    found = Detections(rotated.hulls(box).astype(np.float32), np.ones((1, 3), np.float32), xywhr=box.astype(np.float32))
    (crop,) = cut_out(image, found)
    assert crop.shape == (8, 30, 3)
    assert (crop[:, :16] == RED).all() and (crop[:, 20:] == BLUE).all()


def test_a_finer_store_has_the_same_tiles_boxes_and_order(tmp_path):
    made = [*tiles(3), made_tile("t", (0, 0, 64, 64), reason="cut short"), made_tile("u", (0, 0, 64, 64), reason=EMPTY)]
    made.append(made_tile("v", (0, 0, 64, 64), detections(PLANE)))
    job = job_of(tmp_path, made, shard_tiles=2)
    assert write(job)["boxes"] == 10
    store = open_store(job.output)
    assert store.folder.parent == tmp_path and store.folder.name.startswith("subtypes-")
    assert store.classes == [*FINER, "plane", "ship"] and store.parents == dict.fromkeys(FINER, "car")
    before, after = list(read_all(job.store)), list(read_all(store))
    assert len(before) == len(after) == 6
    for old, new in zip(before, after, strict=True):
        assert (old.tile, old.status, old.reason, old.retryable) == (new.tile, new.status, new.reason, new.retryable)
        np.testing.assert_array_equal(old.found.boxes, new.found.boxes)
        np.testing.assert_array_equal(old.found.best, new.found.best)
        assert [store.parents.get(store.classes[k], store.classes[k]) for k in new.found.class_ids] == [
            CLASSES[k] for k in old.found.class_ids
        ]
    assert [store.classes[k] for k in after[0].found.class_ids] == ["car-red", "plane", "car-blue"]
    found = summary(job.output)
    assert [found[key] for key in ("requested", "labelled", "empty", "rejected", "retryable")] == [6, 4, 1, 1, 0]
    assert teacher_name(store.teacher) == "w1 yolov5n.yaml:n:nc=3, car by colour"


def test_crops_are_cut_from_the_tile_as_the_attribute_prepares_it(tmp_path):
    """A white car in a dim picture: its box alone would look grey."""

    def dim(_row):
        image = np.full((64, 64, 3), 40, np.uint8)
        image[0:20, 0:20], image[30:40, 30:50] = 160, (100, 10, 15)
        return image

    job = job_of(tmp_path, tiles(1))
    write(job, dim)
    (tile,) = read_all(open_store(job.output))
    assert [job.classes[k] for k in tile.found.class_ids] == ["car-white", "plane", "car-red"]


def test_objectness_and_rotated_boxes_are_kept(tmp_path):
    xywhr = np.array([[10, 10, 18, 8, 0.3], [40, 35, 12, 6, 0.1]], np.float32)
    scores = np.array([[0.8, 0.1, 0.1], [0.3, 0.1, 0.1]], np.float32)
    objectness = np.array([0.9, 0.5], np.float32)
    turned = Detections(rotated.hulls(xywhr), scores, True, objectness, xywhr)
    made = [made_tile("s", (0, 0, 64, 64), turned), made_tile("s", (64, 0, 64, 64), reason="cut short")]
    made.append(made_tile("s", (128, 0, 64, 64), turned.at(np.array([1]))))
    job = job_of(tmp_path, made)
    write(job)
    old, _, other = read_all(open_store(job.output))
    assert old.found.saturated and other.found.objectness.tolist() == [0.5]
    np.testing.assert_array_equal(old.found.objectness, objectness)
    np.testing.assert_array_equal(old.found.xywhr, xywhr)
    np.testing.assert_array_equal(old.found.best, turned.best)


def test_only_tiles_with_a_box_of_the_class_are_read(tmp_path):
    job = job_of(tmp_path, [made_tile("s", (0, 0, 64, 64), detections(PLANE))])
    write(job, gone)
    (tile,) = read_all(open_store(job.output))
    np.testing.assert_allclose(tile.found.scores, [[0.05] * len(FINER) + [0.5, 0.05]], rtol=1e-6)


def test_a_tile_that_cannot_be_read_is_rejected_and_may_be_had_later(tmp_path, capsys):
    job = job_of(tmp_path, [*tiles(30), made_tile("t", (0, 0, 64, 64), detections(CAR))], shard_tiles=8)
    write(job, lambda row: gone(row) if row["scene_id"] == "t" else painted(row))
    *others, last = read_all(open_store(job.output))
    assert all(tile.status == "labelled" and len(tile.found.boxes) == 3 for tile in others)
    assert (last.status, last.reason, last.retryable) == (
        "rejected",
        "cannot read scene /gone/t: no such file",
        True,
    )
    run._check_unread(job, summary(job.output))
    assert "1 of 31 labelled tiles could not be read" in capsys.readouterr().out
    assert len(list((job.output / "rejected").iterdir())) == 1
    write(
        job,
        lambda row: painted(row) if row["scene_id"] == "t" or row["window"][0] >= 24 * 64 else gone(row),
        again=True,
    )
    *_, last = read_all(open_store(job.output))
    assert last.status == "labelled" and len(last.found.boxes) == 1
    assert not list((job.output / "rejected").iterdir())


def test_many_tiles_that_cannot_be_read_are_an_error_once_all_is_done(tmp_path):
    job = job_of(tmp_path)
    write(job, gone)
    with pytest.raises(StoreError, match=r"4 of 4 labelled tiles could not be read .*--retry-rejected"):
        run._check_unread(job, summary(job.output))


def test_a_half_written_store_is_gone_on_with(tmp_path):
    job = job_of(tmp_path, tiles(6), shard_tiles=2)
    write(job, only=2)
    assert not (job.output / DONE).exists()
    with pytest.raises(StoreError, match="is not finished"):
        open_store(job.output)
    seen = []
    counts = write(job, lambda row: seen.append(row["tile_id"]) or painted(row))
    assert len(seen) == 2 and counts["labelled"] == 6 and len(list(read_all(open_store(job.output)))) == 6


def test_the_folder_depends_on_all_that_determines_the_result(tmp_path):
    class Other(Colour):
        def identity(self):
            return {**super().identity(), "centre": 1}

    folders = {job_of(tmp_path, split_class=name).output for name in CLASSES}
    assert len({*folders, job_of(tmp_path, attribute=Other()).output}) == 4
    assert job_of(tmp_path).output in folders


def test_a_finer_store_can_be_split_again_and_fused(tmp_path):
    job = job_of(tmp_path)
    write(job)
    second = subtype_job(job.output, "car-red", Colour())
    assert second.classes[3:12] == [*(f"car-red-{name}" for name in Colour.names), "car-orange-brown"]
    assert set(second.identity()["parents"].values()) == {"car"} and "car-red" not in second.identity()["parents"]
    other = subtype_job(write_store(tmp_path, tiles(), weights="w2"), "car", Colour())
    write(other)
    fused = fuse_job([job.output, other.output], [1, 1], 0.05, 0.5, tmp_path).identity()
    assert fused["parents"] == dict.fromkeys(FINER, "car")


@pytest.mark.parametrize(
    ("split_class", "names", "problem"),
    [
        ("bus", ("a", "b"), r"label-w1 has no class bus: split one of car, plane, ship$"),
        ("car", ("red",), "car would become car-red alone: give at least two"),
        ("car", ("x", "x"), "splitting car would make two classes of one name, car-x: rename"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, split_class, names, problem):
    attribute = type("Named", (Colour,), {"names": names})()
    with pytest.raises(StoreError, match=problem):
        job_of(tmp_path, split_class=split_class, attribute=attribute)


def said(capsys, *words):
    assert main(["subtype", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("softlabel subtype: ")
    return captured.err


def test_mistakes_are_one_line_before_a_ray_is_started(tmp_path, capsys):
    store = made_store(tmp_path, tiles())
    words = tmp_path / "words.txt"
    words.write_text("# nothing yet\n")
    by_prompts = (store, "--class", "car", "--by", "prompts", "--model", tmp_path)
    assert "has no class bus: split one of car, plane, ship" in said(capsys, store, "--class", "bus")
    assert "--by colour takes no --model" in said(capsys, store, "--class", "car", "--model", "x")
    assert "--by classifier takes a --model" in said(capsys, store, "--class", "car", "--by", "classifier")
    assert "--by prompts takes a --prompts" in said(capsys, *by_prompts)
    assert f"{words} names no class: write one a line" in said(capsys, *by_prompts, "--prompts", words)
    words.write_text("red: a red car\nblue: a blue car\n")
    assert f"{tmp_path} is no model that transformers knows" in said(capsys, *by_prompts, "--prompts", words)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert "has no .safetensors" in said(capsys, *by_prompts, "--prompts", words)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "which compares no images with words" in said(capsys, *by_prompts, "--prompts", words)
    by_classifier = (store, "--class", "car", "--by", "classifier", "--model", tmp_path)
    assert "is BertModel: give an image classifier (*ForImageClassification)" in said(capsys, *by_classifier)
    (store / DONE).unlink()
    assert "is not finished" in said(capsys, store, "--class", "car")
    assert "is no store of soft labels" in said(capsys, tmp_path / "gone", "--class", "car")
    assert not list(tmp_path.glob("subtypes-*"))


def test_store_json_says_what_it_was_made_of(tmp_path):
    job = job_of(tmp_path)
    write(job)
    found = read_json(job.output / STORE)
    assert found["teacher"]["subtyped"]["weights"] == "w1" and found["teacher"]["by"]["attribute"] == "colour"
    assert found["with_losses"] is False and found["rejected"] == 0
