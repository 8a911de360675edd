"""What makes a search another search."""

from pathlib import Path

from conftest import CLASSES, tiny_recipe

from softlabel.calibration import Calibration, Mapping
from softlabel.search.run import Inputs


def test_other_calibrations_are_other_searches(tmp_path):
    folders = []
    for temperature in (None, 2.0, 3.0):
        path = tmp_path / "calibration.json"
        path.write_text(Calibration(CLASSES, (Mapping(temperature or 1.0),) * 3, (0.5,) * 3).to_json())
        train = {**tiny_recipe().train.model_dump(), "calibration": str(path) if temperature else None}
        inputs = Inputs(tiny_recipe(train=train), tmp_path, Path("tiles-a"), Path("label-b"), "val_1", None)
        folders.append(inputs.folder)
    assert len(set(folders)) == 3
