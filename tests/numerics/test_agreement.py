"""How well candidates agree, worked out by hand, by every NMS there is."""

import math

import pytest
import torch
from whole_batches import kept

from softlabel.detectors import agreement as module
from softlabel.detectors.agreement import agreement, agreement_upright, all_ious
from softlabel.detectors.nms import suppressed
from softlabel.detectors.rotated_nms import suppressed_rotated
from softlabel.records import Nms

NAN = math.nan


def decoded(*candidates, angle=None):
    """Of (x0, y0, x1, y1, class_id, score), two classes."""
    columns = []
    for x0, y0, x1, y1, class_id, score in candidates:
        scores = [score / 2, score / 2]
        scores[class_id] = score
        columns.append([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, *scores, *([] if angle is None else [angle])])
    return torch.tensor(columns).T


def agreed(found, nms):
    """By score, as the NMS of one image and that of a batch both say."""
    rotated = found.shape[0] == 7
    one = (suppressed_rotated if rotated else suppressed)(found, 2, nms)
    ((rows,), _) = kept(found[None], 2, nms, rotated=rotated)
    torch.testing.assert_close(rows, one, equal_nan=True)
    return dict(zip(one[:, 4:6].amax(1).mul(100).round().int().tolist(), one[:, -1].tolist(), strict=True))


WHOLE, HIGH, HIGHER = (0, 0, 10, 10), (0, 0, 10, 8), (0, 0, 10, 9)  # IoU with the first 0.8 and 0.9


def test_agreement_is_the_mean_iou_of_a_box_s_candidates_by_their_scores():
    found = decoded(
        (*WHOLE, 0, 0.9),
        (*HIGH, 0, 0.5),
        (*HIGHER, 0, 0.3),
        (*WHOLE, 1, 0.8),
        (*WHOLE, 0, 0.05),
        (40, 0, 50, 10, 0, 0.7),
    )
    expected = {90: (0.5 * 0.8 + 0.3 * 0.9) / 0.8, 80: NAN, 70: NAN}  # another class, and nobody near
    for order in (range(6), (5, 3, 2, 4, 1, 0)):
        assert agreed(found[:, list(order)], Nms(0.1, 0.7)) == pytest.approx(expected, nan_ok=True)
    with_lower = {**expected, 90: (0.5 * 0.8 + 0.3 * 0.9 + 0.05) / 0.85}
    assert agreed(found, Nms(0.01, 0.7)) == pytest.approx(with_lower, nan_ok=True)
    assert agreed(found, Nms(0.1, 0.85)) == pytest.approx({90: 0.9, 80: NAN, 70: NAN, 50: 0.8 / 0.9}, nan_ok=True)


@pytest.mark.parametrize("score", [0.5, 0.7])  # worse than both, or better than the second, but suppressed
def test_what_overlaps_two_boxes_counts_for_both(score):
    found = decoded((0, 0, 10, 10, 0, 0.9), (6, 0, 16, 10, 0, 0.6), (3, 0, 13, 10, 0, score))
    assert agreed(found, Nms(0.1, 0.5)) == pytest.approx({90: 7 / 13, 60: 7 / 13})


def test_where_max_det_cuts_what_is_worse_than_the_first_box_cut_off_does_not_count():
    found = decoded((*WHOLE, 0, 0.9), (*HIGHER, 0, 0.7), (40, 0, 50, 10, 0, 0.6), (*HIGH, 0, 0.5))
    assert agreed(found, Nms(0.1, 0.7, 1))[90] == pytest.approx(0.9)
    assert agreed(found, Nms(0.1, 0.7, 2))[90] == pytest.approx((0.7 * 0.9 + 0.5 * 0.8) / 1.2)


def test_without_nms_nothing_is_known():
    found = decoded((*WHOLE, 0, 0.9), (*WHOLE, 0, 0.8))
    assert agreed(found, Nms(0.1, 1.0)) == pytest.approx({90: NAN, 80: NAN}, nan_ok=True)


def test_rotated_boxes_agree_by_probabilistic_iou():
    """1 - sqrt(1 - exp(-BD)), and BD is 0.5 ln((h1^2 + h2^2) / (2 h1 h2)) where all but the height is alike."""
    found = decoded((0, 0, 40, 10, 0, 0.9), (0, 1, 40, 9, 0, 0.5), (0, 0, 40, 10, 1, 0.4), angle=0.3)
    bd = 0.5 * math.log((100 + 64) / 160)
    expected = {90: 1 - math.sqrt(1 - math.exp(-bd)), 40: NAN}
    assert agreed(found, Nms(0.1, 0.7)) == pytest.approx(expected, nan_ok=True, rel=1e-3)
    cut = decoded((0, 0, 40, 10, 0, 0.9), (99, 0, 139, 10, 0, 0.7), (0, 1, 40, 9, 0, 0.5), angle=0.3)
    assert math.isnan(agreed(cut, Nms(0.1, 0.7, 1))[90]) and agreed(cut, Nms(0.1, 0.7, 2))[90] > 0.8


@pytest.mark.parametrize("limit", [0.05, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("most", [1 << 19, 10])
def test_near_pairs_are_all_that_matter(limit, most, monkeypatch):
    """Boxes of all widths, with some that are no numbers: as if every pair were compared."""
    monkeypatch.setattr(module, "_MOST_PAIRS", most)
    generator = torch.Generator().manual_seed(0)
    centre, half = (torch.rand(600, 2, generator=generator) * side for side in (200, 1))
    half = half.pow(3) * 60 + 0.01
    centre[300:], half[300:] = centre[:300] + half[:300] * 0.01, half[:300] * 1.02
    boxes = torch.cat((centre - half, centre + half), 1)
    boxes[7], boxes[8, 2] = NAN, math.inf
    ids, best = torch.randint(0, 3, (600,), generator=generator), torch.rand(600, generator=generator) + 0.01
    places = torch.randperm(600, generator=generator)[:200]
    found = agreement_upright(boxes, ids, best, places, limit)
    every = agreement(boxes[None], ids[None], best[None], places[None], all_ious, limit, 100)[0]
    torch.testing.assert_close(found, every, rtol=1e-5, atol=0, equal_nan=True)
    assert int((~found.isnan()).sum()) > 20
