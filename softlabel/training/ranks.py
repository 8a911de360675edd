"""The workers of a Ray Train group, and what they tell each other."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray.train
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """The rank of this worker, from 0."""
    return ray.train.get_context().get_world_rank()


def world_size() -> int:
    """Workers in the group."""
    return ray.train.get_context().get_world_size()


def is_first() -> bool:
    """Whether this is the rank that writes files and messages."""
    return rank() == 0


def from_first(ask: Callable[[], T]) -> T:
    """What ``ask`` returned on the first rank, the only one to call it, on every rank."""
    return gather(ask() if is_first() else None)[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
