"""Names that leave the project: files named by ids, and a teacher in a few words."""

import re

from softlabel.store import digest

_MAX_LENGTH = 120  # file systems allow 255 bytes, and a digest and a suffix follow


def safe_name(text: str) -> str:
    """A file name for an id such as ``area/scene.tif#0_0_640x640``: readable, and different for every id.

    Letters, digits, dot, minus and underscore stay, and a digest of the whole id keeps names apart where the rest does
    not, also on a case-insensitive file system.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._")[-_MAX_LENGTH:]
    return f"{readable}-{digest(text)}"


def teacher_name(teacher: dict) -> str:
    """A store's teacher in short: digest of the weights, and architecture; if several are fused, those of each with its
    weight; and if a class was split, by what.

    Args:
        teacher: The fingerprint in ``store.json``.
    """
    if "subtyped" in teacher:
        return f"{teacher_name(teacher['subtyped'])}, {teacher['class']} by {teacher['by']['attribute']}"
    if "fused" not in teacher:
        return f"{teacher['weights']} {teacher['architecture']}"
    pairs = zip(teacher["weights"], teacher["fused"], strict=True)
    return f"fused({', '.join(f'{weight:g} x {teacher_name(one)}' for weight, one in pairs)})"
