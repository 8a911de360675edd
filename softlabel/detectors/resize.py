"""cv2.resize for a whole batch on the device that holds it: bilinear, bit for bit.

OpenCV scales uint8 with 11-bit fixed-point weights (modules/imgproc/src/resize.cpp), columns first.
"""

from functools import lru_cache

import numpy as np
import torch

_ONE = 2048  # 1.0 as an 11-bit weight


def resized(tiles_BHWC: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """What ``cv2.resize(tile, size_hw[::-1], interpolation=cv2.INTER_LINEAR)`` makes of each tile, uint8."""
    (height, width), device = tiles_BHWC.shape[1:3], tiles_BHWC.device
    if (height, width) == size_hw:
        return tiles_BHWC
    tiles = tiles_BHWC.int()
    if (height, width) == (2 * size_hw[0], 2 * size_hw[1]):  # when halving, OpenCV takes the mean of four
        rows = tiles[:, ::2] + tiles[:, 1::2]
        return ((rows[:, :, ::2] + rows[:, :, 1::2] + 2) >> 2).to(torch.uint8)
    left, right, a, b = _taps(width, size_hw[1], True, device)
    columns = (tiles[:, :, left] * a[:, None] + tiles[:, :, right] * b[:, None]) >> 4
    above, below, a, b = _taps(height, size_hw[0], False, device)
    upper, lower = (columns[:, above] * a[:, None, None]) >> 16, (columns[:, below] * b[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).to(torch.uint8)


@lru_cache(maxsize=64)
def _taps(size: int, new: int, are_columns: bool, device: torch.device) -> tuple[torch.Tensor, ...]:
    """For each new pixel, the two old ones that it lies between, and their weights."""
    at = ((np.arange(new) + 0.5) * (size / new) - 0.5).astype(np.float32)
    first = np.floor(at).astype(np.int64)
    share = at - first.astype(np.float32)
    if are_columns:  # beyond the edge, one pixel gets all the weight; rows keep both weights, on the same pixel
        outside = (first < 0) | (first >= size - 1)
        share[outside] = 0
    weights = np.rint(np.stack([(np.float32(1) - share), share]) * np.float32(_ONE)).astype(np.int32)
    taps = np.clip(np.stack([first, first + 1]), 0, size - 1)
    return tuple(torch.from_numpy(one).to(device) for one in (*taps, *weights))
