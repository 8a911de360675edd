"""Rates, busy share and the limiting stage, by hand; areas against known ones."""

import pytest

from softlabel.labelling.area import tile_km2
from softlabel.labelling.speed import Speed


def shard(actor, begin, end, busy_s, **values):
    row = {"tiles": 10, "empty": 0, "rejected": 0, "pixels": 1_000_000, "km2": 0.0, "device": "cpu"}
    return {**row, "actor": actor, "begin": begin, "end": end, "busy_s": busy_s, **values}


def test_rates_count_from_the_first_shard_to_the_last():
    speed = Speed()
    speed.add(shard("a", 100.0, 102.0, 2.0))
    speed.add(shard("b", 101.0, 104.0, 3.0, rejected=3, empty=1, km2=8.0))
    speed.add(shard("a", 102.0, 105.0, 3.0, device="cuda 0"))
    found = speed.summary()
    assert found["seconds"] == 5 and found["tiles_per_s"] == pytest.approx(26 / 5)
    assert found["megapixels_per_s"] == pytest.approx(3 / 5) and found["km2_per_s"] == pytest.approx(8 / 5)
    assert found["actors"] == 2 and found["devices"] == ["cpu", "cuda 0"]
    assert found["busy"] == 1 and found["limit"] == "model"
    assert speed.line() == "5.2 tiles/s, 0.6 megapixels/s, 1.6 km2/s; model busy 100%, limit: model"


@pytest.mark.parametrize(
    "crs",
    [
        'LOCAL_CS["site",UNIT["metre",1]]',
        'ENGCRS["a ship",EDATUM["x"],CS[Cartesian,2],AXIS["(E)",east],AXIS["(N)",north],LENGTHUNIT["metre",1]]',
        "IAU_2015:30100",  # the Moon
        "IAU_2015:49900",  # Mars
        "EPSG:4978",
        "EPSG:5703",
        "no CRS at all",
    ],
)
def test_no_crs_ends_a_run(crs):
    assert tile_km2({"window": [0, 0, 100, 100], "crs": crs, "transform": (10.0, 0, 5e5, 0, -10.0, 5e6)}) == 0


def test_an_idle_model_waits_for_reading():
    speed = Speed()
    speed.add(shard("a", 9.0, 10.0, 1.0))  # a row may come before that of an earlier shard
    speed.add(shard("a", 0.0, 1.0, 1.0))
    assert speed.busy == pytest.approx(0.2) and speed.limit == "reading"
    assert speed.summary()["km2_per_s"] is None and "km2" not in speed.line()


def test_an_actor_that_is_gone_waits_for_nothing():
    speed = Speed()
    speed.add(shard("killed", 0.0, 50.0, 50.0))
    speed.add(shard("its successor", 50.0, 100.0, 50.0))
    assert speed.busy == pytest.approx(1.0) and speed.limit == "model"


def tile(crs, transform, window=(0, 0, 1000, 500)):
    return {"crs": crs, "transform": transform, "window": window}


def test_a_projected_tile_has_the_area_of_its_pixels():
    utm = [0.5, 0.0, 500_000.0, 0.0, -0.5, 5_000_000.0]  # half a metre, at the central meridian (scale 0.9996)
    assert tile_km2(tile("EPSG:32633", utm)) == pytest.approx(0.5 * 0.25 / 0.9996**2, rel=1e-4)


def test_degrees_shrink_with_latitude():
    def at(latitude):
        return tile_km2(tile("EPSG:4326", [1e-5, 0.0, 10.0, 0.0, -1e-5, latitude]))

    assert at(0.0) == pytest.approx(1.1132 * 0.55287, rel=1e-3)  # a degree at the equator: 111.32 by 110.574 km
    assert at(60.0) == pytest.approx(at(0.0) / 2, rel=0.02)


def test_a_tile_without_a_known_crs_has_none():
    assert tile_km2(tile(None, None)) == tile_km2(tile("nonsense", [1.0, 0, 0, 0, -1.0, 0])) == 0
