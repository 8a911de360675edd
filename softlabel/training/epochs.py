"""The order of the tiles, and the seeds of their augmentation, epoch after epoch.

Loader workers live as long as a training run, and work ahead: an epoch's first batches are made while the epoch before
is still running. So what becomes of a tile may depend neither on the worker that augments it nor on what that worker
did before. Each tile comes with a seed of its own, which follows from the run's seed, the epoch and the tile's place in
it, and a run that was resumed, or has another number of loader workers, sees what an undisturbed one would have seen.
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
    """A tile to augment, by its number in the data set, and the seed for its augmentation."""

    tile: int
    seed: int


class Mixture(NamedTuple):
    """How a data set's tiles are numbered and mixed: first ``soft`` tiles with soft labels (or all, where there are no
    others), then ``truth`` tiles that supplement them. The latter make up a ``share`` of an epoch of ``soft`` tiles.
    """

    soft: int
    truth: int = 0
    share: float = 0.0

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """The tiles of an epoch, each at most once; tiles with truth that are too few repeat about equally often."""
        if not self.truth:
            return generator.permutation(self.soft)
        wanted = round(self.soft * self.share)
        soft = generator.permutation(self.soft)[: self.soft - wanted]
        truth = np.concatenate([generator.permutation(self.truth) for _ in range(math.ceil(wanted / self.truth))])
        return generator.permutation(np.concatenate([soft, self.soft + truth[:wanted]]))

    def partner(self) -> int:
        """A tile to mix with another, drawn from the random generator that ultralytics uses."""
        if self.truth and random.random() < self.share:
            return self.soft + random.randrange(self.truth)
        return random.randrange(self.soft)


class EpochBatches:
    """The batches of one rank, epoch after epoch without end. All ranks have equally many, so some tiles come twice.

    Attributes:
        epoch: The epoch, from 0, at which a new iterator begins. From there on the iterator counts by itself.
    """

    def __init__(self, mixture: Mixture, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.epoch = 0
        self._mixture, self._batch_size = mixture, batch_size
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._per_rank = math.ceil(mixture.soft / world_size)

    def __len__(self) -> int:
        """Batches per epoch."""
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
    """Make ultralytics' endless loader of a TileDataset take its batches from the EpochBatches that is returned."""
    batches = EpochBatches(mixture, loader.batch_size, seed, rank, world_size)
    loader.batch_sampler.sampler = batches  # which the loader repeats without telling it the epoch
    return batches


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start all random generators on the CPU from a seed, and afterwards let them go on from where they were before.

    (Without loader workers, training draws from the same generators: the size for multi_scale, for one.)
    """
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
