"""Tiles in one block of bytes, in memory or on disk."""

import os
import tempfile

import numpy as np
import pytest

from softlabel.training.packed import PackedTiles

SIZES = [(4, 6), (1, 1), (8, 3)]


def filled(on_disk):
    packed = PackedTiles(SIZES, on_disk=on_disk)
    for number in (2, 0, 1):
        packed[number][:] = number + 1
    packed.seal()
    return packed


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_image_is_where_it_was_put(on_disk):
    packed = filled(on_disk)
    assert len(packed) == 3
    for number, (size, image) in enumerate(zip(SIZES, packed, strict=True)):
        assert image.shape == (*size, 3) and (image == number + 1).all()
    with pytest.raises(ValueError, match="read-only"):
        packed[0][:] = 9


def test_a_file_has_no_name_and_a_child_sees_what_is_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    packed = filled(on_disk=True)
    assert not list(tmp_path.iterdir())
    child = os.fork()
    if not child:
        os._exit(0 if (packed[2] == 3).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_disk_that_is_full_is_an_error_at_once():
    with pytest.raises(OSError, match=r"space|large"):
        PackedTiles([(1 << 30, 1 << 30)], on_disk=True)


def test_the_room_is_taken_before_it_is_filled(monkeypatch):
    taken = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, start, size: taken.append(size) or os.truncate(file, size))
    np.testing.assert_equal(len(filled(on_disk=True)), 3)
    assert taken == [3 * (24 + 1 + 24)]
