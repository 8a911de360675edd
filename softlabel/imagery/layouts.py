"""Where things lie in a made-up scene: airports, harbours, car parks, empty land and water, as data to be painted."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from softlabel.config import Synthetic
from softlabel.imagery import drawing
from softlabel.imagery.drawing import Area, Colour, Part, Points, Thing

KINDS = ("airport", "harbour", "parking", "land", "harbour", "airport", "parking", "water", "harbour", "airport")
_LAND, _WATER, _APRON, _LOT, _QUAY, _TAKEN = range(6)
_LENGTHS_PX = {"plane": (35, 70), "car": (14, 22), "ship": (30, 80)}
_HEIGHTS_PX = {"plane": 5, "car": 2.5, "ship": 4}
_SHAPES = {"plane": drawing.plane, "car": drawing.car, "ship": drawing.ship}
_GAPS_PX = {"plane": 3, "car": 0.5, "ship": 2}
_PALETTE: dict[str, Colour] = {
    "grass": (92, 112, 62), "soil": (158, 134, 100), "sand": (204, 186, 146), "water": (34, 74, 98),
    "asphalt": (92, 94, 98), "concrete": (148, 146, 138), "paint": (214, 214, 204), "line": (196, 168, 62),
}  # fmt: skip
_MIN_INSIDE = 0.55  # of an object's hull: truth promises half, and the pixel counts of small cars are coarse

UvBox = tuple[float, float, float, float]  # (u0, v0, u1, v1) in the frame of a `Plan`
Spot = tuple[Points, float]  # centre (x, y) in scene pixels and heading in radians


@dataclass(frozen=True)
class Layout:
    """A scene before it is painted. ``sun_xy`` is the shadow's offset in pixels per pixel of height."""

    kind: str
    areas: tuple[Area, ...]
    things: tuple[Thing, ...]
    sun_xy: Points


class Plan:
    """A scene being laid out: which ground is for what, and which is taken.

    Layouts use a frame (u, v), in pixels, turned by ``theta`` about the scene's centre; `at` converts to scene pixels.
    """

    def __init__(self, settings: Synthetic, rng: np.random.Generator) -> None:
        """An empty plan with its own colours and direction."""
        self.size_px, self.difficulty, self.rng = settings.scene_size_px, settings.difficulty, rng
        self.theta = rng.uniform(0, 2 * np.pi)
        self.areas: list[Area] = []
        self.things: list[Thing] = []
        self._zones = np.full((self.size_px, self.size_px), _LAND, np.uint8)
        self.colours = {name: drawing.tint(rng, colour, 16) for name, colour in _PALETTE.items()}
        # or crisp bay lines among faint cars would be what a detector sees first
        self.colours["paint"] = drawing.mixed(self.colours["paint"], self.colours["asphalt"], 0.6 * self.difficulty)

    def at(self, u: float, v: float) -> Points:
        """Scene pixels (x, y) of a place in the frame."""
        cos, sin = np.cos(self.theta), np.sin(self.theta)
        return np.array([u * cos - v * sin, u * sin + v * cos]) + self.size_px / 2

    def count(self, low: float, high: float) -> int:
        """A random number for a 512 px scene, scaled to this scene's area; at least 1 if ``low`` is."""
        share = (self.size_px / 512) ** 2
        return max(round(self.rng.uniform(low, high) * share), 1 if low >= 1 else 0)

    def clutter(self, few: float, many: float) -> int:
        """How many look-alikes: Poisson with mean ``few`` at difficulty 0 and ``many`` at 1, per 512 px scene."""
        mean = few + (many - few) * self.difficulty
        return int(self.rng.poisson(mean * (self.size_px / 512) ** 2))

    def ground(self, name: str, uv_box: UvBox, zone: int, rough: float = 7, spread: float = 0) -> None:
        """Lay a rectangle of the frame in a colour of the palette, its brightness shifted by up to ``spread``."""
        u0, v0, u1, v1 = uv_box
        polygon = np.array([self.at(u0, v0), self.at(u1, v0), self.at(u1, v1), self.at(u0, v1)])
        colour = drawing.tint(self.rng, self.colours[name], spread)
        self.areas.append(Area(polygon, colour, *((4, 6) if name == "water" else (rough, 0))))
        if name not in ("paint", "line"):
            cv2.fillPoly(self._zones, [drawing.fixed_point(polygon)], zone, shift=4)

    def add(
        self,
        shape: list[Part],
        spot: Spot,
        zone: int | None,
        height_px: float = 0,
        label: str | None = None,
        *,
        opacity: float = 1,
    ) -> bool:
        """Put a shape at ``spot`` if its whole hull is on free ground of ``zone`` (None: always), else return False."""
        faint = 0.62 * self.difficulty + self.rng.uniform(-0.1, 0.1) * min(1, 2 * self.difficulty)
        thing = Thing(drawing.place(shape, *spot), height_px, opacity * float(np.clip(1 - faint, 0.2, 1)), label)
        if zone is not None and not self._claim(drawing.convex_hull(thing.points_N2), zone, label):
            return False
        self.things.append(thing)
        return True

    def fill(self, label: str, wanted: int, zone: int, propose: Callable[[], Spot]) -> None:
        """Add ``wanted`` objects where ``propose`` says, if there is room; give up on a full scene."""
        for _ in range(wanted * 15):
            if not wanted:
                return
            length = self.rng.uniform(*_LENGTHS_PX[label]) * (1 - 0.4 * self.difficulty**1.5)
            spot = propose()
            if self.add(_SHAPES[label](self.rng, length), spot, zone, _HEIGHTS_PX[label], label):
                wanted -= 1
                if label == "ship" and self.rng.random() < 0.4:
                    self.add(drawing.wake(length), spot, _WATER, opacity=0.4)

    def scatter(self, shape: Callable[[], list[Part]], number: int, zone: int, height_px: float = 0) -> None:
        """Add up to ``number`` pieces of clutter anywhere in a zone."""
        for _ in range(number):
            parts = shape()
            any(self.add(parts, self.anywhere(), zone, height_px) for _ in range(6))

    def anywhere(self) -> Spot:
        """A random spot anywhere in the scene."""
        return self.rng.uniform(0, self.size_px, 2), self.rng.uniform(0, 2 * np.pi)

    def _claim(self, hull_N2: Points, zone: int, label: str | None) -> bool:
        """Take a hull's pixels if they and a gap around them are free and (objects) enough is in the scene."""
        gap = _GAPS_PX.get(label or "", 1) + (2 * (1 - self.difficulty) if label in ("plane", "ship") else 0)
        low = np.clip(np.floor(hull_N2.min(axis=0) - 4), 0, self.size_px).astype(int)
        high = np.clip(np.ceil(hull_N2.max(axis=0) + 4), 0, self.size_px).astype(int)
        zones = self._zones[low[1] : high[1], low[0] : high[0]]
        if zones.size == 0:
            return False
        corners = drawing.fixed_point(hull_N2 - low)
        inside = cv2.fillConvexPoly(np.zeros_like(zones), corners, 1, shift=4)
        if label and inside.sum() < _MIN_INSIDE * cv2.contourArea(hull_N2.astype(np.float32)):
            return False
        ringed = cv2.polylines(inside.copy(), [corners], True, 1, 1 + round(2 * gap), shift=4)
        if (zones[ringed > 0] != zone).any():
            return False
        zones[inside > 0] = _TAKEN
        return True


def lay_out(settings: Synthetic, seed: int, index: int) -> Layout:
    """Decide what is where in scene ``index``. Objects never overlap; each is at least half inside."""
    rng = np.random.default_rng([seed, index, 0])
    plan, kind = Plan(settings, rng), KINDS[index % len(KINDS)]
    whole = (-settings.scene_size_px, -settings.scene_size_px, settings.scene_size_px, settings.scene_size_px)
    base = "water" if kind == "water" else str(rng.choice(["grass", "soil"], p=[0.7, 0.3]))
    plan.ground(base, whole, _WATER if kind == "water" else _LAND)
    _LAYOUTS[kind](plan)
    plan.scatter(lambda: drawing.tree(rng, rng.uniform(8, 20)), plan.count(10, 40), _LAND, 6)
    direction, per_height = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.3)
    sun_xy = np.array([np.cos(direction), np.sin(direction)]) * per_height
    return Layout(kind, tuple(plan.areas), tuple(plan.things), sun_xy)


def _airport(plan: Plan) -> None:
    """Runway, taxiway and apron in strips, planes by the terminal, cars behind it, sometimes a shore with ships."""
    size, rng, apron = plan.size_px, plan.rng, plan.rng.uniform(-0.12, 0.02) * plan.size_px
    depth, runway = max(0.36 * size, 100), apron - 80
    plan.ground("asphalt", (-size, runway - 24, size, runway + 24), _APRON)
    for u in np.arange(-size, size, 44.0):
        plan.ground("paint", (u, runway - 1.2, u + 24, runway + 1.2), _APRON)
    taxiway = rng.uniform(-0.3, 0.3) * size
    plan.ground("asphalt", (taxiway - 14, runway, taxiway + 14, apron + 1), _APRON)
    plan.ground("concrete", (-size, apron, size, apron + depth), _APRON, rough=4)
    plan.ground("line", (-size, apron + 0.45 * depth, size, apron + 0.45 * depth + 1.6), _APRON)
    if rng.random() < 0.35:
        plan.ground("water", (-size, -size, size, runway - 60), _WATER)
        plan.fill("ship", plan.count(1, 4), _WATER, plan.anywhere)
        _sea_clutter(plan)
    spots = _lot(plan, (taxiway, apron + depth + 46, taxiway + 0.5 * size, apron + depth + 140))

    def stand() -> Spot:
        heading = rng.choice([0.5, 0.5, 0.5, 0, 1, 1.5]) * np.pi + rng.normal(0, 0.12)
        return plan.at(rng.uniform(-0.7, 0.7) * size, apron + rng.uniform(0, depth)), plan.theta + heading

    plan.fill("plane", plan.count(6, 14), _APRON, lambda: stand() if rng.random() < 0.7 else plan.anywhere())
    plan.fill("car", plan.count(4, 16), _LOT, _any_of(rng, spots))
    for _ in range(plan.count(1, 3)):
        spot = plan.at(rng.uniform(-0.6, 0.6) * size, apron + depth + 22), plan.theta
        _house(plan, spot, rng.uniform(90, 200), 36)
    plan.scatter(lambda: drawing.cross(rng, rng.uniform(30, 64)), plan.clutter(0.3, 6), _APRON)
    plan.scatter(lambda: drawing.container(rng, rng.uniform(11, 22)), plan.clutter(0.5, 10), _APRON, 3)
    _land_clutter(plan)


def _harbour(plan: Plan) -> None:
    """Water, a quay with cranes and containers, ships along it and under way, cars and sheds behind."""
    size, rng, quay = plan.size_px, plan.rng, plan.rng.uniform(-0.05, 0.22) * plan.size_px
    plan.ground("water", (-size, -size, size, quay), _WATER)
    plan.ground("concrete", (-size, quay, size, quay + 56), _QUAY)
    plan.ground("line", (-size, quay + 3, size, quay + 4.2), _QUAY)
    for u in rng.uniform(-0.5, 0.5, plan.count(0.6, 2) + plan.clutter(0, 2)) * size:
        plan.ground("concrete", (u, quay - rng.uniform(50, 130), u + rng.uniform(9, 18), quay + 1), _QUAY)
    spots = _lot(plan, (-0.2 * size, quay + 62, 0.4 * size, quay + 156))

    def berth() -> Spot:
        heading = plan.theta + rng.choice([0, np.pi]) + rng.normal(0, 0.03)
        return plan.at(rng.uniform(-0.6, 0.6) * size, quay - rng.uniform(7, 18)), heading

    plan.fill("ship", plan.count(5, 12), _WATER, lambda: berth() if rng.random() < 0.4 else plan.anywhere())
    plan.fill("car", plan.count(4, 14), _LOT, _any_of(rng, spots))
    plan.scatter(lambda: drawing.crane(rng, rng.uniform(36, 60)), plan.clutter(0.8, 5), _QUAY, 10)
    plan.scatter(lambda: drawing.container(rng, rng.uniform(14, 26)), plan.clutter(4, 16), _QUAY, 4)
    _sea_clutter(plan)
    _land_clutter(plan)


def _parking(plan: Plan) -> None:
    """Two roads that cross, car parks between them, buildings with things on their roofs."""
    size, rng = plan.size_px, plan.rng
    v, u = rng.uniform(-0.1, 0.1, 2) * size
    spots = [
        *_lot(plan, (u + 40, v + 40, u + 0.4 * size, v + 134)),
        *_lot(plan, (u - 0.36 * size, v - 84, u - 40, v - 36)),
    ]
    spots += [spot for _ in range(4) for spot in _road(plan, v, 0)]
    spots += _road(plan, u, np.pi / 2) if rng.random() < 0.6 else []
    plan.fill("car", plan.count(18, 42), _LOT, _any_of(rng, spots))
    for _ in range(2 * plan.count(2, 5)):
        _house(plan, (plan.anywhere()[0], plan.theta), rng.uniform(60, 130), rng.uniform(40, 80))
    _land_clutter(plan)


def _land(plan: Plan) -> None:
    """Fields, a track, a farm or two. No objects."""
    size, rng = plan.size_px, plan.rng
    for u in np.arange(-0.75, 0.75, 0.3) * size:
        for v in np.arange(-0.75, 0.75, 0.25) * size:
            field = str(rng.choice(["grass", "soil"], p=[0.7, 0.3]))
            plan.ground(field, (u, v, u + 0.3 * size - 3, v + 0.25 * size - 3), _LAND, rng.uniform(3, 10), spread=18)
    if rng.random() < 0.6:
        _road(plan, rng.uniform(-0.3, 0.3) * size, 0)
    for _ in range(plan.count(1, 4)):
        _house(plan, plan.anywhere(), rng.uniform(26, 60), rng.uniform(20, 34))
    _land_clutter(plan)


def _water(plan: Plan) -> None:
    """Open water, half the time with a beach. No objects."""
    if plan.rng.random() < 0.5:
        shore = plan.rng.uniform(0.2, 0.4) * plan.size_px
        plan.ground("sand", (-plan.size_px, shore, plan.size_px, plan.size_px), _LAND)
    _sea_clutter(plan)


def _lot(plan: Plan, uv_box: UvBox) -> list[Spot]:
    """A car park and its marked bays, in rows along u."""
    u0, v0, u1, v1 = uv_box
    plan.ground("asphalt", uv_box, _LOT)
    pitch, spots = 17 - 5 * plan.difficulty, []
    for v in np.arange(v0 + 17, v1 - 14, 46):
        for u in np.arange(u0 + pitch, u1 - pitch, pitch):
            plan.ground("paint", (u - pitch / 2 - 0.5, v - 13, u - pitch / 2 + 0.5, v + 13), _LOT)
            spots.append((plan.at(u, v), plan.theta + plan.rng.choice([0.5, 1.5]) * np.pi + plan.rng.normal(0, 0.04)))
    return spots


def _road(plan: Plan, offset: float, turn: float) -> list[Spot]:
    """A road with a broken centre line, along u (``turn`` 0) or v (pi / 2), and spots in its two lanes."""
    size, rng, along_u = plan.size_px, plan.rng, turn == 0

    def lay(name: str, start: float, end: float, width: float) -> None:
        box = (start, offset - width / 2, end, offset + width / 2)
        plan.ground(name, box if along_u else (box[1], box[0], box[3], box[2]), _LOT)

    lay("asphalt", -size, size, 40)
    for start in np.arange(-size, size, 30.0):
        lay("paint", start, start + 14, 1.4)
    spots = []
    for along, lane in zip(rng.uniform(-0.7, 0.7, 12) * size, rng.choice([-1, 1], 12), strict=True):
        across = offset + 10 * lane + rng.normal(0, 1)
        xy = plan.at(along, across) if along_u else plan.at(across, along)
        spots.append((xy, plan.theta + turn + (np.pi if lane > 0 else 0) + rng.normal(0, 0.04)))
    return spots


def _house(plan: Plan, spot: Spot, length: float, width: float) -> None:
    """A building, if there is room, with units on its roof; the harder the scene, the more of them."""
    if not plan.add(drawing.building(plan.rng, length, width), spot, _LAND, 12):
        return
    for _ in range(int(plan.rng.poisson(0.5 + 4 * plan.difficulty))):
        offset = drawing.place([Part((plan.rng.uniform(-0.36, 0.36, (1, 2))) * (length, width), (0, 0, 0))], *spot)
        unit = drawing.roof_unit(plan.rng, plan.rng.uniform(10, 18))
        plan.add(unit, (offset[0].polygon_N2[0], spot[1]), None)


def _land_clutter(plan: Plan) -> None:
    """What passes for cars and planes on land."""
    rng = plan.rng
    plan.scatter(lambda: drawing.container(rng, rng.uniform(12, 24)), plan.clutter(0.5, 10), _LAND, 3)
    plan.scatter(lambda: drawing.crane(rng, rng.uniform(36, 66)), plan.clutter(0.1, 2), _LAND, 10)
    plan.scatter(lambda: drawing.cross(rng, rng.uniform(30, 60)), plan.clutter(0.2, 3), _LAND)


def _sea_clutter(plan: Plan) -> None:
    """What passes for ships: sandbars, pontoons, whitecaps."""
    rng = plan.rng

    def bar() -> list[Part]:
        length = rng.uniform(30, 76)
        return [Part(drawing.blob(rng, length, length * rng.uniform(0.2, 0.34)), plan.colours["sand"])]

    def cap() -> list[Part]:
        return [Part(drawing.blob(rng, rng.uniform(5, 16), rng.uniform(1.5, 3.5)), (226, 232, 234))]

    def pontoon() -> list[Part]:
        length, colour = rng.uniform(26, 70), plan.colours["concrete"]
        return [Part(drawing.rectangle(length, length * rng.uniform(0.16, 0.26)), colour)]

    plan.scatter(bar, plan.clutter(0.4, 6), _WATER)
    plan.scatter(cap, plan.clutter(6, 40), _WATER)
    plan.scatter(pontoon, plan.clutter(0.2, 6), _WATER, 1)


def _any_of(rng: np.random.Generator, spots: list[Spot]) -> Callable[[], Spot]:
    return lambda: spots[int(rng.integers(len(spots)))]


_LAYOUTS = {"airport": _airport, "harbour": _harbour, "parking": _parking, "land": _land, "water": _water}
