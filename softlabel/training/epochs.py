"""The order of the tiles, and the seeds of their augmentation, epoch after epoch.

Loader workers live as long as a training, and work ahead: an epoch's first batches are made while the one before still
runs. So what becomes of a tile may depend neither on the worker that makes it nor on what that made before. Each tile
comes with a seed of its own, which follows from the run's seed, the epoch and the tile's place in it, and a training
that was resumed, or has another number of workers, sees what the undisturbed one saw.
"""

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Draw(NamedTuple):
    """A tile to augment, by its number in the data set, and what its augmentation is seeded by."""

    tile: int
    seed: int


class Mixture(NamedTuple):
    """A data set's tiles by their numbers: first ``soft`` ones with soft labels (or all, where there are no others),
    then ``truth`` ones that supplement them. These make a ``share`` of an epoch, which has as many tiles as ``soft``.
    """

    soft: int
    truth: int = 0
    share: float = 0.0

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """The tiles of an epoch; each comes once, or one that there are too few of as often as the others."""
        if not self.truth:
            return generator.permutation(self.soft)
        wanted = round(self.soft * self.share)
        soft = generator.permutation(self.soft)[: self.soft - wanted]
        truth = np.concatenate([generator.permutation(self.truth) for _ in range(math.ceil(wanted / self.truth))])
        return generator.permutation(np.concatenate([soft, self.soft + truth[:wanted]]))

    def partner(self) -> int:
        """A tile to mix with another, by the random numbers that ultralytics draws."""
        if self.truth and random.random() < self.share:
            return self.soft + random.randrange(self.truth)
        return random.randrange(self.soft)


class EpochBatches:
    """The batches of one rank, epoch after epoch without an end. Every rank has as many: some tiles come twice for it.

    Attributes:
        epoch: The one, from 0, that a new iterator begins with. An iterator counts by itself from there.
    """

    def __init__(self, mixture: Mixture, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.epoch = 0
        self._mixture, self._batch_size = mixture, batch_size
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._per_rank = math.ceil(mixture.soft / world_size)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self._per_rank / self._batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        """From the first batch of ``epoch`` on."""
        for epoch in itertools.count(self.epoch):
            draws = self._draws(epoch)
            for start in range(0, len(draws), self._batch_size):
                yield draws[start : start + self._batch_size]

    def _draws(self, epoch: int) -> list[Draw]:
        generator = np.random.default_rng([self._seed % 2**32, epoch])
        total = self._per_rank * self._world_size
        order = np.resize(self._mixture.order(generator), total)  # the first ones again at the end
        seeds = generator.integers(1 << 32, size=total)
        mine = slice(self._rank, None, self._world_size)
        return [Draw(*pair) for pair in zip(order[mine].tolist(), seeds[mine].tolist(), strict=True)]


def draw_by_epoch(loader: Any, mixture: Mixture, seed: int, rank: int = 0, world_size: int = 1) -> EpochBatches:
    """Let ultralytics' endless loader of a TileDataset take its batches from the EpochBatches that is returned."""
    batches = EpochBatches(mixture, loader.batch_size, seed, rank, world_size)
    loader.batch_sampler.sampler = batches  # what it would repeat, without a word on the epoch
    return batches


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Whatever draws at random on the CPU starts from a seed, and afterwards goes on where it was before.

    (Without loader workers the training draws from the same generators, the size of multi_scale for one.)
    """
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for CUDA
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
