"""Batches with soft labels, models to take their loss, and that loss."""

import torch
from ultralytics.cfg import get_cfg

from softlabel.detectors.soft_loss import soften
from softlabel.detectors.weights import build_model, default_train_args, finds_rotated

ANCHORS = "yolov5n-anchor.yaml"
NUM_CLASSES, NUM_IMAGES, SIZE = 3, 3, 96


def batch_of(model, seed=0, objects=9, regions=0):
    """A batch of three images, the middle one without objects, and boxes that may be tiny."""
    generator = torch.Generator().manual_seed(seed)
    columns = 5 if finds_rotated(model) else 4

    def boxes(count):
        xywh = torch.rand(count, 4, generator=generator) * torch.tensor([1, 1, 0.6, 0.6]) + 0.005
        return torch.cat((xywh, torch.rand(count, columns - 4, generator=generator) * 1.5), 1)

    images = torch.randint(0, 2, (objects,), generator=generator).sort().values * 2
    class_ids = torch.randint(0, NUM_CLASSES, (objects,), generator=generator)
    return {
        "img": torch.rand(NUM_IMAGES, 3, SIZE, SIZE, generator=generator),
        "batch_idx": images.float(),
        "cls": class_ids.float().view(-1, 1),
        "bboxes": boxes(objects),
        "vectors": torch.eye(NUM_CLASSES)[class_ids],
        "weights": torch.ones(objects),
        "region_idx": torch.randint(0, NUM_IMAGES, (regions,), generator=generator).float(),
        "region_bboxes": boxes(regions),
        "region_keeps": torch.ones(regions, NUM_CLASSES),
    }


def made(name, seed=0):
    torch.manual_seed(seed)
    model = build_model(name, NUM_CLASSES)
    model.args = get_cfg(overrides={**default_train_args(name), "imgsz": SIZE})
    return model.train()


def losses(model, batch, soft=None, smoothing=None):
    """The loss and its gradient."""
    model.zero_grad()
    model.criterion = model.init_criterion()
    if soft is not None:
        soften(model.criterion, soft, smoothing)
    torch.manual_seed(0)
    loss, _ = model.loss(batch)
    loss.sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat([grad.flatten() for grad in grads])
