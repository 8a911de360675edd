"""What a labelling job is: one teacher over some splits of one tile set, and which rows it is asked for.

Reading tasks get one: nothing here may import torch, which would cost each of them seconds and half a gigabyte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from softlabel.labelling.queries import Queries
from softlabel.records import Nms
from softlabel.store import num_tile_shards, read_tile_shard, step_dir


@dataclass(frozen=True)
class LabelJob:
    """One teacher over some splits (null: every tile) of one tile set.

    ``teacher`` is its fingerprint. With ``queries`` it is an OWL-ViT: ``weights`` is a folder, or a hub's
    ``name@revision``, and its image size is its own.
    """

    name: str
    weights: Path | str
    teacher: dict
    tiles: Path
    splits: tuple[str, ...] | None
    num_classes: int
    imgsz: int | None
    nms: Nms
    engine: str
    precision: str
    with_losses: bool = False
    queries: Queries | None = None

    def identity(self) -> dict:
        """All that determines the store."""
        return {
            "teacher": self.teacher,
            "tiles": self.tiles.name,
            "splits": list(self.splits) if self.splits is not None else None,
            "with_losses": self.with_losses,
        }

    def folder(self, run_dir: Path) -> Path:
        """Where its store is."""
        return step_dir(run_dir, f"label-{self.name}", self.identity())

    def shards(self) -> list[tuple[int, int]]:
        """(shard, tiles asked for in it) of the shards that hold any."""
        counts = ((shard, len(self.tile_rows(shard, ("split",)))) for shard in range(num_tile_shards(self.tiles)))
        return [(shard, count) for shard, count in counts if count]

    def tile_rows(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """The rows of a shard's tiles that are asked for, in their order."""
        return read_tile_shard(self.tiles, shard, columns, self.splits)
