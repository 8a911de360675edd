"""How fast a labelling run is, how busy its model was, and which stage was the limit."""

from dataclasses import dataclass, field

_BUSY = 0.85  # above it the model is what the run waits for


@dataclass
class Speed:
    """Adds up what the actors report on each shard (softlabel.labelling.labeller)."""

    tiles: int = 0
    pixels: int = 0
    km2: float = 0.0
    busy_s: float = 0.0
    first: float = float("inf")
    last: float = 0.0
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)

    def add(self, row: dict) -> None:
        """Add one shard."""
        self.tiles += row["tiles"] - row["empty"] - row["rejected"]
        self.pixels += row["pixels"]
        self.km2 += row["km2"]
        self.busy_s += row["busy_s"]
        self.first, self.last = min(self.first, row["begin"]), max(self.last, row["end"])
        begin, end = self.spans.get(row["actor"], (float("inf"), 0.0))
        self.spans[row["actor"]] = min(begin, row["begin"]), max(end, row["end"])
        self.devices.add(row["device"])

    @property
    def seconds(self) -> float:
        """From the first shard in an actor's hands to the last one committed; excludes starting Ray and the model."""
        return max(self.last - self.first, 1e-9)

    @property
    def busy(self) -> float:
        """Share in [0, 1] of each actor's time, from its first shard to its last, that its model spent on tiles."""
        present = sum(end - begin for begin, end in self.spans.values())
        return min(1.0, self.busy_s / max(present, 1e-9))

    @property
    def limit(self) -> str:
        """The stage that the other one waited for."""
        return "model" if self.busy >= _BUSY else "reading"

    def summary(self) -> dict:
        """The numbers for the store's summary."""
        return {
            "seconds": round(self.seconds, 3),
            "tiles_per_s": round(self.tiles / self.seconds, 3),
            "megapixels_per_s": round(self.pixels / 1e6 / self.seconds, 3),
            "km2_per_s": round(self.km2 / self.seconds, 6) if self.km2 else None,
            "actors": len(self.spans),
            "devices": sorted(self.devices),
            "busy": round(self.busy, 3),
            "limit": self.limit,
        }

    def line(self) -> str:
        """One line for a person to read."""
        found = self.summary()
        ground = f", {found['km2_per_s']:.3g} km2/s" if self.km2 else ""
        return (
            f"{found['tiles_per_s']:.1f} tiles/s, {found['megapixels_per_s']:.1f} megapixels/s{ground}; "
            f"model busy {found['busy']:.0%}, limit: {found['limit']}"
        )
