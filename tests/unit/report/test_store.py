"""`softlabel show`: the numbers are those of a loop over the rows, and the pictures show what the rows say."""

import io
import json
import re
from base64 import b64decode
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import shapely
from PIL import Image

from softlabel import rotated
from softlabel.cli import main
from softlabel.config import TruthSource
from softlabel.errors import StoreError
from softlabel.imagery.truth import read_truth
from softlabel.records import TILES, Detections, soft_labels_schema, soft_labels_table
from softlabel.report import figures
from softlabel.report import store as report
from softlabel.report.run import show
from softlabel.report.store import NUM_BINS, THRESHOLDS, Tally, doubts, reason_group, teacher_facts
from softlabel.shards import shard_file
from softlabel.store import finish, write_json, write_table
from softlabel.tile_table import write_tiles

CLASSES = ("car", "<b>&plane", "ship")
SIDE = 96
TEACHER = {
    "weights": "0123456789",
    "architecture": "yolov5n.yaml:n:nc=3",
    "classes": list(CLASSES),
    "imgsz": 96,
    "engine": "pytorch",
    "precision": "float32",
    "nms": {"floor": 0.01, "iou": 0.7, "max_det": 1000},
    "versions": {"torch": "2.1"},
}


def row(tile_id, best, class_ids, *, saturated=False):
    """A labelled row with a box per best score, side by side."""
    scores = np.full((len(best), len(CLASSES)), 0.001, np.float32)
    scores[np.arange(len(best)), class_ids] = best
    boxes = [[4 + 3 * i % 60, 8, 30 + 3 * i % 60, 40] for i in range(len(best))]
    return {
        "tile_id": tile_id,
        "boxes": boxes,
        "scores": scores.tolist(),
        "objectness": None,
        "saturated": saturated,
        "losses": None,
        "status": "labelled",
        "reason": None,
        "retryable": False,
    }


def rejected(tile_id, reason, retryable=False):
    empty = row(tile_id, [], [])
    return {**empty, "status": "rejected", "reason": reason, "retryable": retryable}


def tile_id_of(index):
    return f"sub/scene_{index // 4}.png#{index % 4 * SIDE}_0_{SIDE}x{SIDE}"


def table_of(rows):
    return pa.Table.from_pylist(rows, soft_labels_schema(len(CLASSES)))


def write_store(run_dir, rows, *, teacher=TEACHER, shard_tiles=8, scenes=True):
    """A finished store with its tiles and, if asked, the scenes they were cut from."""
    store, tiles = run_dir / "label-made-up-0123456789", run_dir / "tiles-0123456789"
    write_json(store / "store.json", {"teacher": teacher, "tiles": tiles.name, "splits": None, "with_losses": False})
    for start in range(0, len(rows), shard_tiles):
        write_table(shard_file(store, start // shard_tiles), table_of(rows[start : start + shard_tiles]))
    finish(store, {"name": "made-up"})
    tile_rows = []
    for label in rows:
        scene_id, window = label["tile_id"].split("#")
        path = run_dir / "scenes" / scene_id
        if scenes and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((SIDE, 4 * SIDE, 3), 40, np.uint8)
            pixels[:, :, 1] = np.arange(4 * SIDE) // SIDE * 50  # each tile has its green
            Image.fromarray(pixels).save(path)
        tile_rows.append(
            {
                **dict.fromkeys(TILES.names),
                "tile_id": label["tile_id"],
                "scene_id": scene_id,
                "scene_uri": str(path),
                "window": [int(window.split("_")[0]), 0, SIDE, SIDE],
                "bands": [1, 2, 3],
                "group": scene_id,
            }
        )
    write_tiles(tiles, tile_rows)
    return store


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    found = []
    for index in range(40):
        count = int(rng.integers(0, 12)) if index % 5 else 0
        best = np.where(rng.random(count) < 0.6, rng.uniform(0.01, 0.1, count), rng.random(count))
        best[:1] = 0.3  # on a threshold: not above it
        found.append(row(tile_id_of(index), best, rng.integers(0, 3, count), saturated=index % 9 == 1))
    for index in (3, 17):
        reason = f"cannot read scene /somewhere else/sub/scene_{index // 4}.png: bad byte {index} in line {7 * index}"
        found[index] = rejected(found[index]["tile_id"], reason, retryable=index == 3)
    found[21] = rejected(found[21]["tile_id"], "the network was away", retryable=True)
    return found


@pytest.fixture(scope="module")
def shown(rows, tmp_path_factory):
    """A store, what was written beside it and what was printed."""
    store = write_store(tmp_path_factory.mktemp("run"), rows)
    output = store / "show"
    return store, output, show(store, output, 6)


def best_of(label):
    return [float(max(scores)) for scores in label["scores"]]


def tally_of(rows, num_doubtful=6, shard_tiles=7):
    tally = Tally(len(CLASSES), num_doubtful)
    for start in range(0, len(rows), shard_tiles):
        tally.add(table_of(rows[start : start + shard_tiles]))
    return tally


def test_the_counts_are_those_of_a_loop(rows):
    tally = tally_of(rows)
    labelled = [label for label in rows if label["status"] == "labelled"]
    assert (tally.requested, tally.labelled, tally.rejected) == (40, 37, 3)
    assert tally.saturated == sum(label["saturated"] for label in labelled) > 0
    above = {0: -1.0, **dict(enumerate((float(np.float32(t)) for t in THRESHOLDS), start=1))}
    for i, threshold in above.items():
        counts, empty = Counter(), 0
        for label in labelled:
            scores = np.float32(label["scores"]).reshape(-1, len(CLASSES))
            kept = [vector for vector in scores if float(vector.max()) > threshold]
            counts.update(int(vector.argmax()) for vector in kept)
            empty += not kept
        assert tally.boxes_HK[i].tolist() == [counts[class_id] for class_id in range(len(CLASSES))]
        assert tally.empty_H[i] == empty
    assert len(set(tally.boxes_HK.sum(axis=1))) == 4 and len(set(tally.empty_H)) > 2


def test_the_histograms_hold_every_box_once_in_its_bin(rows):
    tally = tally_of(rows)
    expected = np.zeros((len(CLASSES), NUM_BINS), int)
    for label in rows:
        for vector in np.float32(label["scores"]).reshape(-1, len(CLASSES)):
            expected[vector.argmax(), min(int(float(vector.max()) * 100), 99)] += 1
    np.testing.assert_array_equal(tally.histograms_KB, expected)
    assert tally_of([row("a#0", [1.0, 0.005], [1, 1])]).histograms_KB[1, [0, -1]].tolist() == [1, 1]


@pytest.mark.parametrize("shard_tiles", [1, 7, 100])
def test_the_most_doubtful_come_first_whatever_the_shards(rows, shard_tiles):
    expected = []
    for label in rows:
        doubt = sum(min(s, 1 - s) for s in best_of(table_of([label]).to_pylist()[0]))
        if doubt > 0:
            expected.append((-doubt, label["tile_id"]))
    found = tally_of(rows, 6, shard_tiles).doubtful
    assert [tile.tile_id for tile in found] == [tile_id for _, tile_id in sorted(expected)[:6]]
    np.testing.assert_allclose([tile.doubt for tile in found], [-doubt for doubt, _ in sorted(expected)[:6]])
    labels = {label["tile_id"]: label for label in rows}
    assert all(len(tile.detections.boxes) == len(labels[tile.tile_id]["boxes"]) for tile in found)


def test_equal_doubt_goes_by_name_and_no_doubt_is_never_shown():
    same = [row(name, [0.4], [0]) for name in ("c#0", "a#0", "d#0", "b#0")]
    sure = [row("sure#0", [1.0], [0]), row("empty#0", [], []), rejected("gone#0", "gone")]
    for order in (same + sure, sure[::-1] + same[::-1]):
        assert [tile.tile_id for tile in tally_of(order, 3, 2).doubtful] == ["a#0", "b#0", "c#0"]
        assert len(tally_of(order, 9, 2).doubtful) == 4


def test_one_open_question_weighs_more_than_the_noise_above_the_floor():
    noise, question = np.full(20, 0.011, np.float32), np.float32([0.5, 0.012])
    found = doubts(np.repeat([0, 2], [20, 2]), np.concatenate([noise, question]), 3)
    assert found[2] > found[0] > found[1] == 0


@pytest.mark.parametrize(
    ("reason", "tile_id"),
    [
        (
            "cannot read scene /a b/sub/scene_1.tif: X=0, Y=17, RequestId 4QZ8: short by 2.5 %",
            "sub/scene_1.tif#0_0_9x9",
        ),
        ("cannot read scene s3://other/sub/x.tif: X=3, Y=1, RequestId 9AAB: short by 17 %", "sub/x.tif#9_9_9x9"),
    ],
)
def test_reasons_are_told_apart_by_their_words(reason, tile_id):
    expected = "cannot read scene SCENE: X=N, Y=N, RequestId N: short by N %"
    assert reason_group(reason, tile_id) == expected
    assert reason_group(reason.replace("short", "long"), tile_id) != expected


def test_rejected_reasons_are_grouped_with_an_example(rows, shown):
    reasons, rest = report.top_reasons(tally_of(rows))
    assert [(reason.tiles, reason.retryable) for reason in reasons] == [(2, 1), (1, 1)]
    assert reasons[0].example == rows[3]["reason"] and rest == ""
    lines = shown[2].splitlines()
    assert any(re.fullmatch(rf"\s+2\s+1  {re.escape(rows[3]['reason'])}", line) for line in lines)
    assert any(re.fullmatch(r"\s+1\s+1  the network was away", line) for line in lines)


def test_reasons_without_end_do_not_fill_the_memory():
    words_ = ("".join(chr(97 + int(digit)) for digit in f"{index:04d}") for index in range(1500))
    tally = tally_of([rejected(f"s#{word}", f"no {word}") for word in words_], shard_tiles=500)
    assert len(tally.reasons) == 1001 and sum(reason.tiles for reason in tally.reasons.values()) == 1500
    assert report.top_reasons(tally)[1] == "991 tiles for 991 other reasons"


def test_empty_tiles_are_told_apart():
    ids = ["a#0_0_8x8", "a#8_0_8x8", "a#16_0_8x8"]
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float32))
    tally = Tally(3, 4)
    table = soft_labels_table(3, ids, [nothing] * 3, [None] * 3, [None, None, "cut"], [False] * 3, {ids[1]})
    tally.add(table)
    assert (tally.requested, tally.labelled, tally.empty, tally.rejected) == (3, 1, 1, 1)
    assert report.tile_counts(tally)["empty"] == "1 (no valid pixel)"


def test_the_terminal_says_who_labelled_and_what_came_of_it(rows, shown):
    text = shown[2]
    for fact in ("0123456789", "yolov5n.yaml:n:nc=3", "pytorch", "float32", "floor 0.01, iou 0.7, max_det 1,000"):
        assert fact in text
    tally = tally_of(rows)
    assert re.search(r"tiles asked for +40\n", text) and re.search(r"rejected +3 \(7.5 %\)", text)
    for i, name in enumerate(CLASSES):
        assert re.search(rf"^{name} +" + " +".join(map(str, tally.boxes_HK[:, i])) + "$", text, re.MULTILINE)
    shares = " +".join(f"{100 * empty / 37:.1f} %" for empty in tally.empty_H)
    assert re.search(rf"^tiles without a box +{shares}$", text, re.MULTILINE)
    assert "> 0.01 (floor)" in text and "> 0.5" in text


def coco_of(output):
    return json.loads((output / "doubtful" / "coco.json").read_text())


def test_what_is_to_be_corrected_is_pixels_and_boxes_of_the_most_doubtful(rows, shown):
    _, output, _ = shown
    document, expected = coco_of(output), tally_of(rows).doubtful
    assert [image["tile_id"] for image in document["images"]] == [tile.tile_id for tile in expected]
    assert document["categories"] == [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    for image, tile in zip(document["images"], expected, strict=True):
        pixels = np.asarray(Image.open(output / "doubtful" / "images" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3) == (SIDE, SIDE, 3)
        green = int(tile.tile_id.split("#")[1].split("_")[0]) // SIDE * 50
        assert (pixels == (40, green, 40)).all()
        kept = tile.detections.above(0.1)
        found = [box for box in document["annotations"] if box["image_id"] == image["id"]]
        np.testing.assert_allclose([box["score"] for box in found], kept.best, atol=1e-4)
        xywh = np.array([box["bbox"] for box in found])
        np.testing.assert_allclose(np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]), kept.boxes, atol=1e-2)
        assert [box["category_id"] - 1 for box in found] == kept.class_ids.tolist()
    assert len({box["id"] for box in document["annotations"]}) == len(document["annotations"]) > 6


def test_the_corrected_tiles_can_be_read_as_truth(shown):
    _, output, _ = shown
    document = coco_of(output)
    source = TruthSource(format="coco", path=str(output / "doubtful" / "coco.json"))
    truth = read_truth(source, CLASSES)
    assert not truth.rejected
    for image in document["images"]:
        assert (output / "doubtful" / "images" / image["file_name"]).exists()


def has_colour(pixels, rgb):
    return (np.asarray(pixels) == rgb).all(axis=-1)


def test_overlays_show_boxes_in_class_colours(rows, shown):
    _, output, _ = shown
    overlays = sorted((output / "overlays").iterdir())
    assert [path.name for path in overlays] == [image["file_name"] for image in coco_of(output)["images"]]
    for path, tile in zip(overlays, tally_of(rows).doubtful, strict=True):
        pixels = np.asarray(Image.open(path))
        drawn = set(tile.detections.above(0.1).class_ids.tolist())
        assert {i for i in range(3) if has_colour(pixels, figures.class_rgb(i)).sum() > 40} == drawn
    sheet = np.asarray(Image.open(output / "contact.png"))
    assert sheet.shape[1] > 3 * SIDE and has_colour(sheet, figures.class_rgb(0)).any()


def test_a_sure_box_is_thick_lies_where_it_was_found_and_is_named_below():
    image = np.full((480, 480, 3), 128, np.uint8)
    boxes = np.float32([[100, 100, 200, 200], [300, 300, 400, 400]])
    found = Detections(boxes, np.float32([[0.9, 0, 0], [0, 0.4, 0]]))
    pixels = figures.draw_soft_labels(image, found, CLASSES, 480, scores=True)
    sure, unsure = (has_colour(pixels, figures.class_rgb(i))[:480] for i in (0, 1))
    assert sure[100:102, 100:200].all() and sure[198:200, 100:200].all() and not sure[102:198, 102:198].any()
    assert unsure[399, 300:400].all() and not unsure[301:399, 301:399].any()
    assert (pixels[102:198, 102:198] == 128).all()
    assert pixels.shape[0] > 480 and has_colour(pixels[480:], figures.class_rgb(1)).any()
    assert (pixels[80:100, 100:130] != 128).any(), "the score stands above the box"
    bare = figures.draw_soft_labels(image, found, CLASSES, 240, scores=False)
    assert bare.shape == (240, 240, 3) and has_colour(bare, figures.class_rgb(0))[50:52, 50:100].all()


def test_colours_of_many_classes_differ():
    assert len({figures.class_rgb(i) for i in range(80)}) == 80


def panels_of(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_histograms_are_as_high_as_their_counts():
    counts = np.zeros((2, NUM_BINS), int)
    counts[0, 20:30], counts[1, 80:90] = 1000, 10
    rgb = figures.class_rgb(0), figures.class_rgb(1)
    png = figures.histograms_png([("a$b$", counts[0], rgb[0]), ("b", counts[1], rgb[1])], "score")
    many, few = (has_colour(panels_of(png), colour) for colour in rgb)
    height = [np.ptp(np.nonzero(mask.any(axis=1))[0]) for mask in (many, few)]
    assert 2.2 < height[0] / height[1] < 3.2, "log(1000 / 0.7) over log(10 / 0.7) is 2.7"
    assert np.nonzero(many.any(axis=0))[0].max() < np.nonzero(few.any(axis=0))[0].min()
    assert png == figures.histograms_png([("a$b$", counts[0], rgb[0]), ("b", counts[1], rgb[1])], "score")


def test_the_page_has_the_counts_and_the_pictures_within_itself(rows, shown):
    _, output, _ = shown
    text = (output / "index.html").read_text()
    tally = tally_of(rows)
    assert "&lt;b&gt;&amp;plane" in text and "<b>&plane" not in text
    for i in range(len(CLASSES)):
        cells = "".join(f'<td class="n">{count}</td>' for count in tally.boxes_HK[:, i])
        assert cells in text
    assert "3 (7.5 %)" in text and "the network was away" in text and TEACHER["weights"] in text
    for image in coco_of(output)["images"]:
        assert image["tile_id"] in text and f"overlays/{image['file_name']}" in text
    jpegs = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert len(jpegs) == 6
    assert all(np.asarray(Image.open(io.BytesIO(b64decode(jpeg)))).std() > 5 for jpeg in jpegs)
    assert re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(text) < 2_000_000 and not re.search(r"(src|href)=\"(https?:)?//", text)


def test_many_pictures_stay_a_small_page():
    noise = np.random.default_rng(0).integers(0, 255, (640, 640, 3), np.uint8)
    assert len(figures.jpeg(noise, 40_000)) <= 40_000 < len(figures.jpeg(noise, 10**7))


def test_a_second_call_replaces_the_first_and_a_correction_is_never_lost(rows, tmp_path):
    store = write_store(tmp_path, rows)
    output = tmp_path / "elsewhere"
    show(store, output, 6)
    first = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    show(store, output, 6)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == first
    show(store, output, 2)
    assert len(list((output / "overlays").iterdir())) == len(list((output / "doubtful" / "images").iterdir())) == 2
    document = coco_of(output)
    document["annotations"].pop()
    corrected = json.dumps(document)
    (output / "doubtful" / "coco.json").write_text(corrected)
    with pytest.raises(StoreError, match=r"coco\.json was edited.*--output"):
        show(store, output, 6)
    assert (output / "doubtful" / "coco.json").read_text() == corrected


def test_a_scene_that_is_gone_costs_its_own_picture_only(rows, tmp_path):
    store = write_store(tmp_path, rows)
    first, *others = tally_of(rows).doubtful
    lost = first.tile_id.split("#")[0]
    (tmp_path / "scenes" / lost).unlink()
    text = show(store, tmp_path / "out", 6)
    assert f"no picture of {first.tile_id}: cannot read scene" in text
    kept = [tile.tile_id for tile in others if not tile.tile_id.startswith(f"{lost}#")]
    assert [image["tile_id"] for image in coco_of(tmp_path / "out")["images"]] == kept
    assert first.tile_id in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [row("s.png#0_0_96x96", [], []), row("s.png#96_0_96x96", [], [])],
        [rejected("s.png#0_0_96x96", "no such file"), rejected("s.png#96_0_96x96", "no such file")],
        [],
    ],
    ids=["no boxes", "all rejected", "no tiles"],
)
def test_nothing_found_is_shown_as_such(rows, tmp_path):
    store = write_store(tmp_path, rows)
    text = show(store, tmp_path / "out", 24)
    assert re.search(r"^all classes +0 +0 +0 +0$", text, re.MULTILINE) and "0 doubtful tiles" in text
    assert "There is none." in (tmp_path / "out" / "index.html").read_text()
    assert coco_of(tmp_path / "out")["images"] == []
    assert (tmp_path / "out" / "histograms.png").exists() and not (tmp_path / "out" / "contact.png").exists()


def test_a_timid_teacher_is_shown_from_its_floor(tmp_path):
    store = write_store(tmp_path, [row("s.png#0_0_96x96", [0.05, 0.02], [0, 1])])
    show(store, tmp_path / "out", 24)
    assert [box["score"] for box in coco_of(tmp_path / "out")["annotations"]] == [0.05, 0.02]
    assert "above the floor" in (tmp_path / "out" / "index.html").read_text()


def test_a_fused_store_names_its_teachers(rows, tmp_path):
    other = {**TEACHER, "weights": "9876543210"}
    fused = {"fused": [TEACHER, other], "weights": [0.5, 0.25], "classes": list(CLASSES)}
    text = show(write_store(tmp_path, rows, teacher=fused), tmp_path / "out", 2)
    assert "0123456789" in text and "9876543210" in text and "0.5, 0.25" in text
    assert re.search(r"best class +all +> 0.1", text)


def test_the_command_line_shows_a_store(rows, tmp_path, capsys):
    store = write_store(tmp_path, rows)
    assert main(["show", str(store), "--doubtful", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(store / "show" / "index.html")
    assert len(list((store / "show" / "overlays").iterdir())) == 2


def refusal(capsys, *words):
    """What is said of a store that cannot be shown."""
    assert main(["show", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("softlabel show: ") and error.count("\n") == 1
    return error


def test_what_cannot_be_shown_is_said_in_one_line(rows, tmp_path, capsys):
    store = write_store(tmp_path, rows)
    assert "is no store of soft labels" in refusal(capsys, tmp_path / "gone")
    assert "is no store of soft labels" in refusal(capsys, tmp_path / "tiles-0123456789")
    shard_file(store, 1).write_bytes(b"PAR1")
    assert "000001.parquet cannot be read" in refusal(capsys, store)
    (store / "done.json").unlink()
    assert f"{store} is not finished" in refusal(capsys, store)
    finish(store, {"requested": len(rows)})
    (tmp_path / "tiles-0123456789" / "shards.parquet").unlink()
    assert "needs its tiles beside it" in refusal(capsys, store)
    assert not (store / "show").exists()


def test_a_rotated_box_is_drawn_turned():
    image = np.full((400, 400, 3), 128, np.uint8)
    xywhr = np.float32([[200, 200, 200, 100, np.pi / 4]])
    found = Detections(rotated.hulls(xywhr), np.float32([[0.9, 0, 0]]), xywhr=xywhr)
    drawn = has_colour(figures.draw_soft_labels(image, found, CLASSES, 400, scores=False), figures.class_rgb(0))
    rows, columns = np.nonzero(drawn)
    on_edge = np.abs(shapely.distance(shapely.points(columns, rows), rotated.polygons(xywhr)[0].exterior))
    assert on_edge.max() < 3 and len(rows) > 600
    assert not drawn[95:105, 95:105].any(), "a corner of the hull"


def test_a_long_class_map_is_said_in_short():
    becomes = {f"c{i}": None for i in range(78)}
    facts = teacher_facts({"weights": "w", "class_map": {"airplane": "plane", **becomes, "boat": "ship"}})
    assert facts == {"weights": "w", "class_map": "airplane → plane, boat → ship; 78 left out"}
