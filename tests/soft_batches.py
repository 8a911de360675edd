"""Batches with soft labels, models to take their loss, and that loss."""

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.cfg import get_cfg

from softlabel.config import Soft
from softlabel.detectors.smoothing import OnlineSmoothing
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
        "box_weights": torch.ones(objects),
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


def of_rank(rank, world_size, names, meeting_point, answers):
    """One rank's gradients of softened losses under DDP, as ultralytics scales it, after an epoch of smoothing.

    Each rank has the same tiles, so that the normalisers of its loss are those of all ranks together: they are per rank
    in ultralytics' losses and in YOLOv5's.
    """
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world_size)
    for name in names:
        answers.put((name, world_size, *_second_gradient(name, world_size)))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def _second_gradient(name, world_size):
    model, smoothing = made(name), OnlineSmoothing(0.5, NUM_CLASSES)
    model.criterion = model.init_criterion()
    soften(model.criterion, Soft(background_far=0.25, smoothing=0.5), smoothing)
    whole = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    batch = soft_batch_of(name, copies=4 // world_size)
    for epoch in range(2):
        model.zero_grad()
        if epoch:  # the sums of the first one, added up as the trainer does
            sums = smoothing.sums.clone()
            if world_size > 1:
                dist.all_reduce(sums)
            smoothing.end_epoch(sums)
        loss, _ = whole(batch)
        (loss.sum() * world_size).backward()
    grads = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}
    return grads, smoothing.table.numpy()


def soft_batch_of(name, copies):
    """A batch whose labels are soft in every way, its images so often one after the other."""
    batch = batch_of(name, regions=5)
    generator = torch.Generator().manual_seed(1)
    batch["vectors"] = torch.rand(9, NUM_CLASSES, generator=generator)
    batch["weights"], batch["box_weights"] = torch.rand(2, 9, generator=generator)
    batch["region_keeps"] = torch.rand(5, NUM_CLASSES, generator=generator).round(decimals=1)
    again = [
        {key: values + NUM_IMAGES * i if key.endswith("_idx") else values for key, values in batch.items()}
        for i in range(copies)
    ]
    return {key: torch.cat([one[key] for one in again]) for key in batch}
