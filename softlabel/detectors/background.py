"""How much background counts in a loss, place by place: less where there may be an unlabelled object.

Shape suffixes: B images, P places (cells or anchor points of all levels), M regions, K classes.
"""

from collections.abc import Mapping

import torch

_CHUNK = 1 << 24
"""Pairs of a region and a place that are processed at a time."""


def kept_in_regions(
    batch: Mapping[str, torch.Tensor], points_P2: torch.Tensor, size_wh: torch.Tensor, least: float, num_images: int
) -> torch.Tensor:
    """The share of the background's loss that counts at each place: 1 outside all regions, inside several the least.

    Args:
        batch: ``region_idx`` (M,) image of each region, ``region_bboxes`` (M, 4) as centre and size in units of the
            image, or (M, 5) with an angle, and ``region_keeps`` (M, K) in [0, 1]: per class, the share inside.
        points_P2: x and y of each place.
        size_wh: Width and height of the image, in the unit of the points.
        least: Smaller regions are widened to this, as ultralytics' assigner widens objects, so that each has a place
            in it.
        num_images: B.

    Returns:
        (B, P, 1), or (B, P, K) where some region has different shares for different classes.
    """
    images_M, keeps_MK = batch["region_idx"].long(), batch["region_keeps"].to(points_P2)
    boxes_M = batch["region_bboxes"].to(points_P2).clone()
    boxes_M[:, :4] *= size_wh.to(points_P2).repeat(2)
    alike_M = (keeps_MK == keeps_MK[:, :1]).all(1)
    kept = points_P2.new_ones(num_images, len(points_P2), 1)
    for rows in _chunks(alike_M.nonzero().flatten(), len(points_P2)):
        inside = is_inside(points_P2, boxes_M[rows], least)
        lowered = torch.where(inside, keeps_MK[rows, :1], 1.0)
        kept[..., 0].scatter_reduce_(0, images_M[rows, None].expand_as(lowered), lowered, "amin")
    for keeps_K in keeps_MK[~alike_M].unique(dim=0):
        hit = torch.zeros_like(kept[..., 0])
        for rows in _chunks((keeps_MK == keeps_K).all(1).nonzero().flatten(), len(points_P2)):
            inside = is_inside(points_P2, boxes_M[rows], least).to(hit)
            hit.scatter_reduce_(0, images_M[rows, None].expand_as(inside), inside, "amax")
        kept = torch.where(hit[..., None] > 0, torch.minimum(kept, keeps_K), kept)
    return kept


def far_weight(overlaps: torch.Tensor, least: float) -> torch.Tensor:
    """Soft Sampling's weight of background (Wu et al., arXiv:1806.06986): ``least`` far from all labelled boxes, where
    an object may have been missed, and 1 beside them, where the hard negatives are.

    a + (1 - a) exp(-b exp(-c o)), a Gompertz curve, with the paper's b = 50 and c = 20. The paper's o is the overlap of
    a proposal with a labelled box; here it is that of the box that the model predicts at a place.
    """
    return least + (1 - least) * torch.exp(-50 * torch.exp(-20 * overlaps))


def trusted(
    batch: Mapping[str, torch.Tensor],
    points_P2: torch.Tensor,
    size_wh: torch.Tensor,
    least: float,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Soft Teacher's weight of background (Xu et al., arXiv:2106.09018): in tiles that a teacher labels while the
    student learns, that teacher's own background score at the same place; elsewhere 1.

    Args:
        batch: ``teacher_idx`` (M,) and ``teacher_bboxes``, the parts of such tiles, as regions in `kept_in_regions`.
        points_P2: As there, and so are ``size_wh`` and ``least``.
        scores: (B, P, 1 or K), the teacher's scores of an object: per class, or with anchors the objectness.
    """
    boxes = batch["teacher_bboxes"]
    parts = {"region_idx": batch["teacher_idx"], "region_bboxes": boxes, "region_keeps": boxes.new_zeros(len(boxes), 1)}
    elsewhere = kept_in_regions(parts, points_P2, size_wh, least, len(scores))
    return elsewhere + (1 - elsewhere) * (1 - scores)


def _chunks(rows: torch.Tensor, num_points: int) -> tuple[torch.Tensor, ...]:
    return rows.split(max(1, _CHUNK // max(num_points, 1))) if len(rows) else ()


def is_inside(points_P2: torch.Tensor, boxes: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """(boxes, P) bool: which points lie in which upright or rotated boxes, widened to ``least`` where smaller."""
    offset = points_P2[None] - boxes[:, None, :2]
    if boxes.shape[1] == 5:
        cos, sin = boxes[:, 4, None].cos(), boxes[:, 4, None].sin()
        x, y = offset.unbind(-1)
        offset = torch.stack((x * cos + y * sin, y * cos - x * sin), -1)
    return (offset.abs() <= boxes[:, None, 2:4].clamp(min=least) / 2).all(-1)
