"""Scenes of a STAC file, and of an API: an HTTP server here answers as one does."""

import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from conftest import tiny_recipe
from PIL import Image

from softlabel.cli import main
from softlabel.config import Stac
from softlabel.errors import RecipeError, SceneError
from softlabel.imagery.run import _fingerprint, tile
from softlabel.imagery.stac import list_items
from softlabel.store import digest
from softlabel.tile_table import read_tiles

_LONDON = {"type": "Polygon", "coordinates": [[[-0.5, 51.3], [0.3, 51.3], [0.3, 51.7], [-0.5, 51.7], [-0.5, 51.3]]]}


def item(name, west=0.0, south=51.0, when="2024-05-10T11:00:00Z", cloud=5.0, collection="c", **assets):
    bbox = [west, south, west + 1, south + 1]
    ring = [[bbox[0], bbox[1]], [bbox[2], bbox[1]], [bbox[2], bbox[3]], [bbox[0], bbox[3]], [bbox[0], bbox[1]]]
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": collection,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": bbox,
        "properties": {"datetime": when, "eo:cloud_cover": cloud},
        "links": [],
        "assets": {key: {"href": href} for key, href in (assets or {"visual": f"s3://archive/{name}.tif"}).items()},
    }


ITEMS = [
    item("a"),
    item("b", west=40),
    item("c", when="2024-07-01T00:00:00Z"),
    item("d", cloud=60.0),
    item("e", collection="other"),
]


def collection(folder, items):
    path = folder / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return str(path)


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({}, "abcde"),
        ({"bbox": [0.2, 51.2, 0.4, 51.4]}, "acde"),
        ({"bbox": [41.5, 51, 42, 52]}, ""),
        ({"bbox": [170, 51, -170, 52]}, ""),
        ({"bbox": [39, 51, 0.5, 52]}, "abcde"),
        ({"intersects": _LONDON}, "acde"),
        ({"datetime": "2024-05"}, "abde"),
        ({"datetime": "2024-05-10"}, "abde"),
        ({"datetime": "2024-05-11/.."}, "c"),
        ({"datetime": "../2024-06"}, "abde"),
        ({"query": {"eo:cloud_cover": {"lt": 20}}}, "abce"),
        ({"query": {"eo:cloud_cover": {"gte": 60, "lte": 60}}}, "d"),
        ({"query": {"eo:cloud_cover": {"in": [5.0]}}, "collections": ["c"], "datetime": "2024-05"}, "ab"),
        ({"query": {"platform": {"neq": "x"}}}, ""),
        ({"collections": ["other", "none"]}, "e"),
        ({"max_items": 2}, "ab"),
    ],
)
def test_a_file_is_filtered_as_an_api_would(tmp_path, filters, ids):
    settings = Stac.model_validate({"url": collection(tmp_path, ITEMS), **filters})
    if ids:
        assert list_items(settings) == [(name, f"s3://archive/{name}.tif") for name in ids]
    else:
        with pytest.raises(SceneError, match=r"no scene at .* passes the filters"):
            list_items(settings)


def test_an_item_of_a_time_span_is_found_by_any_time_in_it(tmp_path):
    long = item("long", when=None)
    long["properties"] |= {"start_datetime": "2024-01-01T00:00:00Z", "end_datetime": "2024-03-01T00:00:00Z"}
    found = partial(Stac, url=collection(tmp_path, [long]))
    assert list_items(found(datetime="2024-02-01"))
    for outside in ("2023", "2024-03-02/.."):
        with pytest.raises(SceneError, match="no scene"):
            list_items(found(datetime=outside))


def test_relative_assets_count_from_their_file(tmp_path):
    settings = Stac(url=collection(tmp_path, [item("a", visual="deep/a.tif")]))
    assert list_items(settings) == [("a", f"{tmp_path}/deep/a.tif")]


def test_relative_assets_of_a_file_in_a_bucket(in_bucket):
    (in_bucket / "items.json").write_text(
        json.dumps({"type": "FeatureCollection", "features": [item("a", visual="./a.tif")]})
    )
    assert list_items(Stac(url=f"{in_bucket}/items.json")) == [("a", f"{in_bucket}/a.tif")]


def test_items_of_two_collections_may_share_their_ids(tmp_path):
    settings = Stac(url=collection(tmp_path, [item("a"), item("a", collection="other")]))
    assert [name for name, _ in list_items(settings)] == ["c/a", "other/a"]


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (
            [item("a"), item("b", B04="b.tif", B08="b8.tif")],
            r"1 of 2 items .* no asset visual, the first: b, which has B04, B08",
        ),
        ([item("a"), item("a")], "an item twice"),
        ([item("a", visual="https://x/a.tif?sig=PLANTED")], "an address with a secret"),
        ([item("a", visual="https://me:PLANTED@x/a.tif")], "an address with a secret"),
        ([item("a", visual="https://x/a.tif?api_key=PLANTED")], "an address with a secret"),
        ([item("a", cloud="much")], "item a of .* cannot be filtered"),
        ([{"type": "Feature"}], "cannot read STAC items"),
    ],
)
def test_items_that_cannot_be_used_are_one_line(tmp_path, items, says):
    with pytest.raises(SceneError, match=says) as raised:
        list_items(
            Stac(url=collection(tmp_path, items), query={"eo:cloud_cover": {"lt": 99}} if len(items) < 2 else {})
        )
    assert "\n" not in str(raised.value) and "PLANTED" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", '{"type": "FeatureCollection"}', '{"type": "Catalog", "id": "x"}'])
def test_a_file_without_items_is_one_line(tmp_path, text):
    (tmp_path / "items.json").write_text(text)
    with pytest.raises(SceneError, match=r"cannot read STAC items at .*give tiles.stac.url"):
        list_items(Stac(url=str(tmp_path / "items.json")))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"datetime": "yesterday"}, "tiles.stac: "),
        ({"intersects": {"type": "Nope", "coordinates": []}}, "tiles.stac: "),
        ({"intersects": {"type": "Point"}}, "tiles.stac: "),
        ({"query": {"eo:cloud_cover": {"below": 2}}}, "unknown operator below: use one of eq, neq"),
    ],
)
def test_filters_that_mean_nothing_are_one_line(tmp_path, arguments, says):
    with pytest.raises(RecipeError, match=says):
        list_items(Stac.model_validate({"url": collection(tmp_path, ITEMS), **arguments}))


def test_two_places_or_a_secret_are_refused_in_the_recipe(capsys):
    for values, says in [
        ({"url": "x", "bbox": [0, 0, 1, 1], "intersects": _LONDON}, "give one of"),
        ({"url": "https://me:secret@x"}, "come with secrets"),
        ({"url": "x", "bbox": [0, 2, 1, 1]}, "its south above its north"),
    ]:
        with pytest.raises(ValueError, match=says):
            Stac.model_validate(values)
    assert main(["tile", "--config", "demo", "--set", "tiles.stac.url=items.json", "--dry-run"]) == 2
    assert "give one of tiles.scenes (a path), tiles.stac and tiles.synthetic" in capsys.readouterr().err


class _Api(BaseHTTPRequestHandler):
    """Two pages of items; ``asked`` has what was asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        conforms = [f"https://api.stacspec.org/v1.0.0/{name}" for name in self.server.conforms]
        links = [
            {"rel": rel, "href": f"{self.server.url}{path}", "type": "application/json", "method": method}
            for rel, path, method in (("self", "/", "GET"), ("root", "/", "GET"), ("search", "/search", "POST"))
        ]
        root = {"type": "Catalog", "id": "x", "description": "x", "stac_version": "1.0.0", "conformsTo": conforms}
        self.answer({**root, "links": links})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        if self.server.failures and self.server.failures.pop():
            self.answer({}, 503)
            return
        more = {
            "rel": "next",
            "href": f"{self.server.url}/search",
            "method": "POST",
            "body": {"token": 2},
            "merge": True,
        }
        page, links = (ITEMS[2:], []) if "token" in asked else (ITEMS[:2], [more])
        self.answer({"type": "FeatureCollection", "features": page, "links": links})

    def answer(self, value, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def api():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Api) as server:
        server.url, server.asked, server.failures = f"http://127.0.0.1:{server.server_port}", [], []
        server.conforms = ("core", "item-search", "item-search#query")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_an_api_is_asked_page_by_page_and_tried_again(api):
    api.failures = [True]
    settings = Stac(url=api.url, collections=["c"], datetime="2024-05", query={"eo:cloud_cover": {"lt": 20}})
    assert [name for name, _ in list_items(settings)] == list("abcde")
    first, again, second = api.asked
    assert first == again and second["token"] == 2
    assert first["collections"] == ["c"] and first["query"] == {"eo:cloud_cover": {"lt": 20}}
    assert first["datetime"] == "2024-05-01T00:00:00Z/2024-05-31T23:59:59Z"


def test_an_api_that_cannot_filter_by_properties_is_refused(api):
    api.conforms = ("core", "item-search")
    with pytest.raises(SceneError, match="does not conform to QUERY"):
        list_items(Stac(url=api.url, query={"eo:cloud_cover": {"lt": 20}}))
    assert not api.asked and list_items(Stac(url=api.url))


@pytest.mark.parametrize("text", ["2024-05-10", "2024", "2024-05", '"2024-05-10/.."'])
def test_a_time_may_stand_in_a_recipe_as_it_is(text):
    assert Stac.model_validate(yaml.safe_load(f"{{url: x, datetime: {text}}}")).datetime == text.strip('"')


def test_no_more_is_asked_for_than_is_wanted(api):
    assert [name for name, _ in list_items(Stac(url=api.url, max_items=2))] == ["a", "b"]
    assert len(api.asked) == 1


def test_an_api_that_is_none_is_one_line_that_may_be_tried_again(api):
    with pytest.raises(SceneError, match=r"cannot search http://127.0.0.1:1 \(.*check tiles.stac") as raised:
        list_items(Stac(url="http://127.0.0.1:1"))
    assert raised.value.retryable and "\n" not in str(raised.value)


def test_items_become_tiles(tmp_path):
    (tmp_path / "scenes").mkdir()
    Image.new("RGB", (300, 200)).save(tmp_path / "scenes" / "a.tif")
    path = collection(tmp_path, [item("one/a", visual="scenes/a.tif")])
    recipe = tiny_recipe(tiles={"stac": {"url": path, "bbox": [0, 51, 1, 52]}, "size_px": 128, "bands": [3, 2, 1]})
    rows = read_tiles(tile(recipe, tmp_path / "run"))
    assert {row["scene_id"] for row in rows} == {"one/a"} and {tuple(row["bands"]) for row in rows} == {(3, 2, 1)}
    assert len(rows) == 6


def test_what_was_tiled_before_there_was_stac_keeps_its_name():
    assert digest(_fingerprint(tiny_recipe(), [("a", "b")], None)) == "b9362cbf2b"
