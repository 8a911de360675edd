"""Names for files and teachers."""

import re

from softlabel.results.names import safe_name, teacher_name


def test_names_are_safe_readable_and_as_many_as_the_ids():
    ids = [
        "a/b.tif",
        "a_b.tif",
        "A/b.tif",
        "../a b.tif",
        "a/b.tif#0_0_64x64",
        "a/b.tif#0_64_64x64",
        "",
        "ä/" + "x" * 999,
    ]
    names = [safe_name(one) for one in ids]
    assert len({name.lower() for name in names}) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) and len(name) < 200 for name in names)
    assert names[0].startswith("a_b.tif-") and safe_name("a/b.tif") == names[0]


def test_a_teacher_is_its_weights_and_architecture():
    one = {"weights": "0123456789", "architecture": "yolov5n.yaml:n:nc=3", "imgsz": 64}
    two = {**one, "weights": "abcdefabcd"}
    assert teacher_name(one) == "0123456789 yolov5n.yaml:n:nc=3"
    fused = {"fused": [one, two], "weights": [2.0, 0.5], "classes": ["car"]}
    assert teacher_name(fused) == f"fused(2 x {teacher_name(one)}, 0.5 x {teacher_name(two)})"
