"""Tiles of known sizes one after the other in one block of bytes, in memory or in a file on this machine's disk.

A process that forks shares the block with its children.
"""

import os
import tempfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class PackedTiles:
    """Room for images (height, width, 3) uint8, each of a size known in advance; threads may fill them in.

    The file has no name: the system frees it when the last process that has it open ends, however it ends.

    Args:
        sizes_hw: Height and width of each.
        on_disk: Whether to use a file in the folder for temporary files (TMPDIR) instead of memory.

    Raises:
        OSError: The disk is full.
    """

    def __init__(self, sizes_hw: Sequence[tuple[int, int]], *, on_disk: bool) -> None:
        self._shapes = [(height, width, 3) for height, width in sizes_hw]
        self._ends = np.cumsum([num_bytes(size) for size in sizes_hw])
        total = int(self._ends[-1])
        self._bytes = _mapped_file(total) if on_disk else np.empty(total, np.uint8)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._shapes)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """A view of one image."""
        shape, end = self._shapes[index], self._ends[index]
        return self._bytes[end - num_bytes(shape) : end].reshape(shape)

    def seal(self) -> None:
        """Refuse to be written to from now on: an in-place augmentation would still be there in the next epoch."""
        self._bytes.flags.writeable = False


def num_bytes(size_hw: Sequence[int]) -> int:
    """Size in bytes of a three-band image, given its height and width."""
    return size_hw[0] * size_hw[1] * 3


def _mapped_file(size: int) -> NDArray[np.uint8]:
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill whoever fills in an image
        return np.memmap(file, np.uint8, "r+", shape=(size,))
