"""Shapes of made-up scenes and the brush that paints them; where they go is decided in layouts.py.

In scene pixels, x is right, y down; pixel k covers [k, k + 1). A shape is built around (0, 0) with its nose towards +x,
then turned by ``heading`` (radians, clockwise on screen) and moved. Colours are RGB in 0..255.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Image = NDArray[np.uint8]
Colour = tuple[float, float, float]

_SHARPNESS = 4  # things are painted at 4x and averaged down: edges end up within 1/8 px of where truth says
_SHIFT = 4  # fractional bits of the coordinates that cv2 takes
_GLASS: Colour = (28, 34, 44)
CAR_COLOURS: Sequence[tuple[str, Colour]] = (
    ("white", (240, 240, 238)), ("white", (225, 226, 228)), ("red", (200, 30, 28)), ("blue", (28, 60, 165)),
    ("black", (22, 22, 26)), ("yellow", (225, 185, 40)), ("green", (30, 110, 80)),
)  # fmt: skip
"""What cars are painted in, by the family that people would say."""
_PLANE_COLOURS: Sequence[Colour] = ((245, 245, 245), (228, 234, 240), (250, 240, 220), (205, 214, 224))
_HULL_COLOURS: Sequence[Colour] = (
    (150, 45, 35), (225, 228, 230), (196, 112, 40), (170, 176, 182), (18, 20, 24), (236, 214, 150),
)  # fmt: skip
_PAINTS: Sequence[Colour] = ((190, 60, 45), (45, 90, 160), (215, 150, 45), (60, 130, 90), (200, 200, 196))


class Part(NamedTuple):
    """One filled polygon of a shape."""

    polygon_N2: Points
    colour: Colour


@dataclass(frozen=True)
class Area:
    """A piece of ground: a flat colour that gets texture. ``rough`` and ``waves`` are noise amplitudes in 0..255."""

    polygon_N2: Points
    colour: Colour
    rough: float = 7
    waves: float = 0


@dataclass(frozen=True)
class Thing:
    """A shape in its place. Only a thing with a ``label`` (a class name) is an object, with a truth box."""

    parts: tuple[Part, ...]
    height_px: float = 0
    opacity: float = 1
    label: str | None = None

    @property
    def points_N2(self) -> Points:
        """All corners of all parts."""
        return np.concatenate([part.polygon_N2 for part in self.parts])


def place(parts: Sequence[Part], xy: Points, heading: float) -> tuple[Part, ...]:
    """Turn a shape built around (0, 0) and move it to its place in scene pixels."""
    cos, sin = np.cos(heading), np.sin(heading)
    turn = np.array([[cos, sin], [-sin, cos]])
    return tuple(Part(part.polygon_N2 @ turn + xy, part.colour) for part in parts)


def rectangle(length: float, width: float, x: float = 0, y: float = 0) -> Points:
    """Corners (4, 2) of a rectangle around (x, y), ``length`` along x."""
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (length / 2, width / 2) + (x, y)


def car(rng: np.random.Generator, length: float) -> list[Part]:
    """A rounded body with a roof between a windscreen and a rear window."""
    colour = tint(rng, _pick(rng, [paint for _, paint in CAR_COLOURS]), 8)
    width = length * rng.uniform(0.43, 0.48)
    body = [(-0.5, 0.36), (-0.44, 0.5), (0.4, 0.5), (0.5, 0.32)]
    screen = [(0.08, 0.34), (0.24, 0.42)]
    rear = [(-0.36, 0.4), (-0.26, 0.34)]
    return [
        Part(_mirrored(body) * (length, width), scaled(colour, 0.86)),
        Part(rectangle(0.34 * length, 0.7 * width, -0.09 * length), brightened(colour, 14)),
        Part(_mirrored(screen) * (length, width), _GLASS),
        Part(_mirrored(rear) * (length, width), _GLASS),
    ]


def plane(rng: np.random.Generator, length: float) -> list[Part]:
    """Fuselage, swept (or straight) wings with engines, tailplane and a coloured fin."""
    colour, accent = tint(rng, _pick(rng, _PLANE_COLOURS), 6), _pick(rng, _PAINTS)
    span, sweep, chord = rng.uniform(0.82, 1.0), rng.choice([0.02, 0.2, 0.28]), rng.uniform(0.09, 0.12)
    half, body = span / 2, rng.uniform(0.045, 0.06)
    wing = [(-chord - 0.04, 0), (-sweep - 0.02, half), (0.06 - sweep, half), (0.05 + chord, 0)]
    tail = [(-0.48, 0), (-0.49, 0.17), (-0.44, 0.17), (-0.36, 0)]
    fuselage = [(-0.5, 0.012), (-0.3, body * 0.9), (0.32, body), (0.43, body * 0.75), (0.5, 0.01)]
    engine_x = 0.06 - sweep * 0.4
    engines = [rectangle(0.11, 0.05, engine_x, side * half * 0.4) for side in (-1, 1)]
    parts = [Part(engine, scaled(colour, 0.55)) for engine in engines]
    parts += [Part(_mirrored(wing), scaled(colour, 0.88)), Part(_mirrored(tail), scaled(colour, 0.84))]
    parts += [Part(_mirrored(fuselage), colour), Part(rectangle(0.18, 0.028, -0.4), accent)]
    parts += [Part(_mirrored([(0.4, body * 0.6), (0.44, body * 0.5)]), _GLASS)]
    return [Part(part.polygon_N2 * length, part.colour) for part in parts]


def ship(rng: np.random.Generator, length: float) -> list[Part]:
    """A hull with a pointed bow, a deck, hatches or containers, and a bridge near the stern."""
    colour, deck = tint(rng, _pick(rng, _HULL_COLOURS), 8), tint(rng, (178, 160, 132), 22)
    beam = length * rng.uniform(0.22, 0.3)
    hull = np.array([(-0.5, 0.36), (-0.46, 0.47), (0.18, 0.5), (0.36, 0.32), (0.46, 0.1), (0.5, 0.01)])
    parts = [Part(_mirrored(hull) * (length, beam), colour)]
    parts += [Part(_mirrored(hull * (0.93, 0.74)) * (length, beam), deck)]
    cargo = int(rng.integers(2, 5))
    for x in np.linspace(-0.16, 0.24, cargo):
        box = rectangle(0.34 / cargo * length, 0.5 * beam, x * length)
        parts.append(Part(box, tint(rng, _pick(rng, _PAINTS), 10)))
    parts.append(Part(rectangle(0.13 * length, 0.66 * beam, -0.34 * length), (240, 240, 240)))
    parts.append(Part(rectangle(0.03 * length, 0.6 * beam, -0.275 * length), _GLASS))
    return parts


def wake(length: float) -> list[Part]:
    """Foam behind a moving ship: two arms of a V and a churned middle, starting 4 px behind its stern."""
    arm = np.array([(-0.5, 0.1), (-1.5, 0.32), (-1.5, 0.28), (-0.52, 0.04)]) * length
    middle = np.array([(-0.5, 0.07), (-1.6, 0.01), (-1.6, -0.01), (-0.5, -0.07)]) * length
    return [Part(polygon - (4, 0), (222, 230, 232)) for polygon in (arm, arm * (1, -1), middle)]


def container(rng: np.random.Generator, length: float) -> list[Part]:
    """Like a car in size, but square-cornered, of one colour, ribbed and without windows."""
    colour, width = tint(rng, _pick(rng, _PAINTS), 12), length * rng.uniform(0.36, 0.46)
    ribs = [rectangle(length * 0.05, width * 0.84, x * length) for x in (-0.3, -0.1, 0.1, 0.3)]
    return [Part(rectangle(length, width), colour), *(Part(rib, scaled(colour, 0.8)) for rib in ribs)]


def roof_unit(rng: np.random.Generator, length: float) -> list[Part]:
    """An air conditioner on a roof: a pale box with two dark fans."""
    colour, width = tint(rng, (186, 190, 192), 18), length * rng.uniform(0.5, 0.9)
    fans = [np.add(blob(rng, width * 0.5, width * 0.5, 0), (x * length, 0)) for x in (-0.22, 0.22)]
    return [Part(rectangle(length, width), colour), *(Part(fan, (74, 78, 84)) for fan in fans)]


def cross(rng: np.random.Generator, length: float) -> list[Part]:
    """A painted cross, as on closed runways: a plane's outline from above, without the body."""
    colour, width, at = tint(rng, (232, 226, 196), 14), length * 0.09, rng.uniform(-0.05, 0.15)
    return [
        Part(rectangle(length, width), colour),
        Part(rectangle(width, length * rng.uniform(0.6, 1), at * length), colour),
    ]


def crane(rng: np.random.Generator, length: float) -> list[Part]:
    """A quay or tower crane: a long boom across a shorter beam, with a counterweight."""
    colour = tint(rng, _pick(rng, ((222, 160, 40), (205, 205, 205), (190, 66, 46))), 12)
    return [
        Part(rectangle(length * 0.07, length * 0.42, -0.22 * length), scaled(colour, 0.8)),
        Part(rectangle(length, length * 0.06), colour),
        Part(rectangle(length * 0.12, length * 0.13, -0.4 * length), scaled(colour, 0.6)),
    ]


def building(rng: np.random.Generator, length: float, width: float) -> list[Part]:
    """A roof with a parapet; one narrower than 60 px is gabled, with one half darker."""
    colour = tint(rng, _pick(rng, ((170, 160, 150), (150, 96, 78), (206, 204, 198), (120, 124, 132))), 14)
    parts = [Part(rectangle(length, width), scaled(colour, 0.8)), Part(rectangle(length - 4, width - 4), colour)]
    if width < 60:
        parts.append(Part(rectangle(length - 4, width / 2 - 2, 0, width / 4 - 1), scaled(colour, 0.87)))
    return parts


def tree(rng: np.random.Generator, length: float) -> list[Part]:
    """A crown with a lit side."""
    colour = tint(rng, (46, 76, 36), 14)
    crown = blob(rng, length, length)
    return [Part(crown, colour), Part(crown * 0.55 + 0.12 * length, brightened(colour, 16))]


def blob(rng: np.random.Generator, length: float, width: float, ragged: float = 0.12) -> Points:
    """An uneven ellipse (14, 2): trees, sandbars, whitecaps."""
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    radius = 1 + rng.uniform(-ragged, ragged, 14)
    return np.stack([np.cos(angles) * length / 2 * radius, np.sin(angles) * width / 2 * radius], axis=1)


def tint(rng: np.random.Generator, colour: Colour, spread: float) -> Colour:
    """A colour near ``colour``: brightness moves by up to ``spread``, each channel by a third of that."""
    return _clipped(np.array(colour) + rng.uniform(-spread, spread) + rng.uniform(-spread, spread, 3) / 3)


def scaled(colour: Colour, factor: float) -> Colour:
    """A colour darkened (or, above 1, lightened) by a factor."""
    return _clipped(np.array(colour) * factor)


def brightened(colour: Colour, amount: float) -> Colour:
    """A colour with ``amount`` added to each channel; unlike `scaled` it lightens black too."""
    return _clipped(np.array(colour) + amount)


def mixed(colour: Colour, other: Colour, share: float) -> Colour:
    """A colour with a ``share`` in [0, 1] of another in it."""
    return _clipped(np.array(colour) * (1 - share) + np.array(other) * share)


def texture(rng: np.random.Generator, size_px: int, octaves: Sequence[int]) -> NDArray[np.float32]:
    """Noise (S, S) of about unit variance: random grids of ``octaves`` cells a side, resized and added."""
    total = np.zeros((size_px, size_px), np.float32)
    for cells in octaves:
        grid = rng.standard_normal((cells, cells), dtype=np.float32)
        total += cv2.resize(grid, (size_px, size_px), interpolation=cv2.INTER_CUBIC)
    return total / np.float32(np.sqrt(len(octaves)) * 0.75)


def paint_ground(rng: np.random.Generator, areas: Sequence[Area], size_px: int) -> Image:
    """Areas in order, later ones on top, with land noise and wind-driven waves where they ask for them."""
    canvas = np.zeros((size_px, size_px, 3), np.uint8)
    amplitude = np.zeros((size_px, size_px, 3), np.uint8)
    for area in areas:
        corners = [fixed_point(area.polygon_N2)]
        cv2.fillPoly(canvas, corners, area.colour, cv2.LINE_AA, _SHIFT)
        cv2.fillPoly(amplitude, corners, (area.rough, area.waves, 0), cv2.LINE_AA, _SHIFT)
    noise = texture(rng, size_px, (5, 17, 60, size_px // 2)) * amplitude[..., 0]
    noise += _waves(rng, size_px) * amplitude[..., 1]
    return np.clip(canvas + noise[..., None], 0, 255).astype(np.uint8)


def paint_shadows(canvas: Image, things: Sequence[Thing], sun_xy: Points, darkness: float) -> None:
    """Darken, in place, what ``things`` shade. ``sun_xy``: shadow offset in pixels per pixel of height."""
    mask = np.zeros(canvas.shape[:2], np.uint8)
    for thing in (thing for thing in things if thing.height_px > 0):
        offset = sun_xy * thing.height_px
        for part in thing.parts:
            # sweeping each part keeps a plane's shadow plane-shaped; one hull over all would not
            swept = convex_hull(np.concatenate([part.polygon_N2, part.polygon_N2 + offset]))
            cv2.fillConvexPoly(mask, fixed_point(swept), round(255 * thing.opacity), cv2.LINE_AA, _SHIFT)
    light = 255 - cv2.blur(mask, (3, 3)).astype(np.float32) * darkness
    canvas[:] = (canvas * (light / 255)[..., None]).astype(np.uint8)


def paint_thing(canvas: Image, thing: Thing) -> None:
    """Paint a thing in place, averaged down from 4x and blended with what is under it by its opacity."""
    size = np.array(canvas.shape[1::-1])
    x0, y0 = np.clip(np.floor(thing.points_N2.min(axis=0)) - 1, 0, size).astype(int)
    x1, y1 = np.clip(np.ceil(thing.points_N2.max(axis=0)) + 1, 0, size).astype(int)
    if x1 <= x0 or y1 <= y0:
        return
    under = canvas[y0:y1, x0:x1]
    large = cv2.resize(under, None, fx=_SHARPNESS, fy=_SHARPNESS, interpolation=cv2.INTER_NEAREST)
    for part in thing.parts:
        cv2.fillPoly(large, [fixed_point((part.polygon_N2 - (x0, y0)) * _SHARPNESS)], part.colour, shift=_SHIFT)
    painted = cv2.resize(large, (int(x1 - x0), int(y1 - y0)), interpolation=cv2.INTER_AREA)
    canvas[y0:y1, x0:x1] = cv2.addWeighted(painted, thing.opacity, under, 1 - thing.opacity, 0)


def develop(rng: np.random.Generator, canvas: Image, difficulty: float) -> Image:
    """What air and sensor do: haze in drifts, blur, noise. All grow with ``difficulty``."""
    size_px = canvas.shape[0]
    drift = np.clip(0.7 + 0.3 * texture(rng, size_px, (3, 6)), 0, 1) * 0.4 * difficulty
    image = canvas + (np.array([178, 188, 200], np.float32) - canvas) * drift[..., None]
    image = cv2.GaussianBlur(image, (0, 0), 0.35 + 1.1 * difficulty)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(1.5 + 15 * difficulty)
    return np.clip(image * np.float32(rng.uniform(0.92, 1.08)) + noise + 0.5, 0, 255).astype(np.uint8)


def convex_hull(points_N2: Points) -> Points:
    """Corners (M, 2) of the convex hull, in order; M <= N."""
    return np.asarray(cv2.convexHull(points_N2.astype(np.float32))[:, 0], np.float64)


def fixed_point(polygon_N2: Points) -> NDArray[np.int32]:
    """Corners as cv2 takes them: whole numbers of pixels are pixel centres, not edges; in 1/16 px."""
    return np.round((polygon_N2 - 0.5) * 2**_SHIFT).astype(np.int32)


def _waves(rng: np.random.Generator, size_px: int) -> NDArray[np.float32]:
    """Noise (S, S) stretched across the wind."""
    large = int(size_px * 1.5)
    grid = rng.standard_normal((large // 4, large // 20), dtype=np.float32)
    crests = cv2.resize(grid, (large, large), interpolation=cv2.INTER_CUBIC)
    turn = np.asarray(cv2.getRotationMatrix2D((large / 2, large / 2), rng.uniform(0, 180), 1), np.float64)
    turn[:, 2] -= (large - size_px) / 2
    return cv2.warpAffine(crests, turn, (size_px, size_px)) + texture(rng, size_px, (4, 9)) * 0.5


def _mirrored(side: Sequence[tuple[float, float]] | Points) -> Points:
    """A polygon symmetric about the x axis, made from its y >= 0 side, which is given from stern to bow."""
    points = np.array(side, dtype=float)
    return np.concatenate([points, points[::-1] * (1, -1)])


def _pick(rng: np.random.Generator, colours: Sequence[Colour]) -> Colour:
    return colours[int(rng.integers(len(colours)))]


def _clipped(values: NDArray[np.float64]) -> Colour:
    red, green, blue = np.clip(values, 0, 255).tolist()
    return red, green, blue
