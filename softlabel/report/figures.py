"""The report's pictures: overlays as PNG, and those of a store as PNG or JPEG.

Nothing here decides what is shown (page.py and run.py do). The same input gives the same bytes: no dates, no pyplot
state.
"""

import colorsys
import functools
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from softlabel import rotated
from softlabel.records import Detections, Truth

Pixels = NDArray[np.uint8]

TRUTH_RGB = (0, 200, 90)
SOFT_RGB = (230, 30, 40)
CLASS_RGB = (
    (255, 69, 58), (0, 190, 255), (255, 214, 10), (255, 90, 220), (110, 235, 60), (255, 149, 0), (165, 130, 255),
    (0, 220, 175),
)  # fmt: skip
"""Colours of the first classes, bright enough to be seen on imagery; `class_rgb` makes more."""
_MIN_SIDE_PX, _MAX_SIDE_PX = 480, 800
_LOG_ZERO = 0.7
"""What stands for an empty bin on a logarithmic scale: just below one box."""
_GAP_PX, _CAPTION_PX, _LEGEND_PX = 8, 17, 20
_THIN_FROM = 60
"""From so many soft labels on, an overlay's tags show the score alone."""


@dataclass(frozen=True)
class Overlay:
    """One tile with its truth and the soft labels it got, both in tile pixels.

    ``image`` is (H, W, 3) uint8 RGB; ``detections`` are already filtered by the threshold in ``title``.
    """

    title: str
    image: Pixels
    truth: Truth
    detections: Detections
    classes: Sequence[str]


def draw_overlay(overlay: Overlay) -> Pixels:
    """Truth in green and soft labels in red on the tile, (H', W', 3) uint8.

    H' and W' are H and W times a factor: a whole number that brings a small tile near 480 px, or below 1 for one
    over 800 px. Green lies on and outside the box's edge and red on and inside it, so that where both agree both are
    seen. Ignored truth is a hairline. Each soft label carries its best class and score.
    """
    factor = _display_factor(overlay.image.shape)
    return np.asarray(_with_boxes(_resized(overlay.image, factor), overlay, factor))


def class_rgb(class_id: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every picture."""
    if class_id < len(CLASS_RGB):
        return CLASS_RGB[class_id]
    hue = class_id * 0.618034 % 1  # the golden ratio: neighbours in number lie far apart in hue
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.7, 0.95))
    return red, green, blue


def draw_soft_labels(image: Pixels, found: Detections, classes: Sequence[str], side_px: int, *, scores: bool) -> Pixels:
    """Soft labels in the colours of their best classes on a tile whose longer side becomes ``side_px``.

    Boxes above 0.5 are thick, the best ones on top. With ``scores`` each carries its best score, clear of those of
    better boxes where there is room, and a strip below the tile names the colours.

    Returns:
        (H', W', 3) uint8.
    """
    factor = side_px / max(image.shape[:2])
    photo = _resized(image, factor)
    draw = ImageDraw.Draw(photo)
    draw.fontmode = "1"
    best_first = np.argsort(-found.best, kind="stable").tolist()
    boxes, rgbs = found.boxes * factor, [class_rgb(class_id) for class_id in found.class_ids.tolist()]
    for i in reversed(best_first):
        _outline(draw, found, i, factor, rgbs[i], offsets=(0, 1) if found.best[i] > 0.5 else (0,))
    if not scores:
        return np.asarray(photo)
    texts = [f"{score:.2f}" for score in found.best]
    places = _tag_places(boxes[best_first], [texts[i] for i in best_first], photo.size)
    for i, xy in reversed(list(zip(best_first, places, strict=True))):
        _tag_at(draw, xy, texts[i], rgbs[i])
    return np.asarray(_with_legend(photo, [(classes[i], class_rgb(i)) for i in np.unique(found.class_ids).tolist()]))


def contact_sheet(pictures: Sequence[Pixels], captions: Sequence[str], side_px: int) -> Pixels:
    """Small pictures (at most ``side_px`` wide), each over its caption, 4 columns to 3 rows; (H, W, 3) uint8."""
    columns = math.ceil(math.sqrt(len(pictures) * 4 / 3))
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    heights = [max(len(pictures[i]) for i in row) + 2 * _GAP_PX + _CAPTION_PX for row in rows]
    sheet = Image.new("RGB", (columns * (side_px + _GAP_PX) + _GAP_PX, sum(heights) + _GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), _font(_CAPTION_PX - 4)
    y = _GAP_PX
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = _GAP_PX + column * (side_px + _GAP_PX)
            sheet.paste(Image.fromarray(pictures[i]), (x, y))
            caption = _fitting(captions[i], font, side_px)
            draw.text((x, y + len(pictures[i]) + 2), caption, font=font, fill=(40, 40, 40))
        y += height
    return np.asarray(sheet)


def enlarged(image: Pixels, side_px: int) -> Pixels:
    """A picture whose longer side becomes ``side_px``."""
    return np.asarray(_resized(image, side_px / max(image.shape[:2])))


def png(pixels: Pixels) -> bytes:
    """Pixels (H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)  # 6, the default: three times as long, 8 % less
    return buffer.getvalue()


def jpeg(pixels: Pixels, max_bytes: int) -> bytes:
    """Pixels (H, W, 3) as JPEG: the best of several renderings that fits ``max_bytes``, else the smallest."""
    data, photo = b"", Image.fromarray(pixels)
    for shrink, quality in ((1.0, 85), (1.0, 70), (0.75, 70), (0.5, 70), (0.5, 50), (0.3, 50)):
        buffer = io.BytesIO()
        size_wh = (max(1, round(photo.width * shrink)), max(1, round(photo.height * shrink)))
        # full chroma: the usual halving would smear thin coloured lines
        photo.resize(size_wh, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality, subsampling=0)
        data = buffer.getvalue()
        if len(data) <= max_bytes:
            break
    return data


def histograms_png(histograms: Sequence[tuple[str, NDArray[np.int64], tuple[int, int, int]]], x_label: str) -> bytes:
    """Histograms over [0, 1] as PNG, a panel each in rows of four, with one logarithmic scale for all.

    Args:
        histograms: Per panel its title, its counts (B,) in bins of equal width, and its colour.
        x_label: What stands under each column.
    """
    columns = min(4, len(histograms))
    rows = math.ceil(len(histograms) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.1 * rows + 0.3), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    top = max(max(int(counts.max()) for _, counts, _ in histograms), 10)
    for axes, (title, counts, rgb) in zip(panels, histograms, strict=False):
        _draw_histogram(axes, counts, tuple(part / 255 for part in rgb))
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)
        axes.set(xlim=(0, 1), ylim=(_LOG_ZERO, top * 1.6))
    for axes in panels[len(histograms) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(histograms) - columns) : len(histograms)]:
        axes.set_xlabel(x_label, fontsize=8.5)
        axes.tick_params(labelbottom=True)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_histogram(axes: Axes, counts: NDArray[np.int64], rgb: tuple[float, ...]) -> None:
    edges = np.linspace(0, 1, len(counts) + 1)
    axes.set_yscale("log")
    axes.stairs(np.maximum(counts, _LOG_ZERO), edges, baseline=_LOG_ZERO, fill=True, color=rgb)
    axes.stairs(np.maximum(counts, _LOG_ZERO), edges, baseline=_LOG_ZERO, color="#1b1f24", linewidth=0.5)
    axes.grid(visible=True, axis="y", color="#dfe3e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{tick:.1g}" for tick in np.linspace(0, 1, 6)])
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not counts.any():
        axes.text(0.5, 0.5, "no box", transform=axes.transAxes, ha="center", color="#59626e")


def overlay_png(overlay: Overlay, max_bytes: int) -> bytes:
    """The drawn overlay as PNG: the best of several renderings that fits ``max_bytes``, else the smallest.

    Only the photograph loses colours and size, never boxes and text.
    """
    data = b""
    for data in _renderings(overlay):
        if len(data) <= max_bytes:
            break
    return data


def _renderings(overlay: Overlay) -> Iterator[bytes]:
    """PNGs of the overlay, best first."""
    full = _display_factor(overlay.image.shape)
    for shrink in (1.0, 0.7, 0.5):
        photo = _resized(overlay.image, full * shrink)
        for colours in (None, 128, 48, 16):
            reduced = photo.quantize(colours).convert("RGB") if colours else photo
            buffer = io.BytesIO()
            _indexed(_with_boxes(reduced, overlay, full * shrink)).save(buffer, "PNG")
            yield buffer.getvalue()


def _indexed(image: Image.Image) -> Image.Image:
    """The same colours as a palette where 256 are enough (a third of the bytes), else the image as it is."""
    pixels = np.asarray(image)
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) > 256:
        return image
    indexed = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), "L")
    indexed.putpalette(colours.tobytes())
    return indexed


def _display_factor(shape: tuple[int, ...]) -> float:
    side = max(*shape[:2], 1)
    return _MAX_SIDE_PX / side if side > _MAX_SIDE_PX else max(1, round(_MIN_SIDE_PX / side))


def _resized(image: Pixels, factor: float) -> Image.Image:
    photo = Image.fromarray(np.ascontiguousarray(image, np.uint8))
    size_wh = (max(1, round(photo.width * factor)), max(1, round(photo.height * factor)))
    return photo if factor == 1 else photo.resize(size_wh, Image.Resampling.LANCZOS)


def _with_boxes(photo: Image.Image, overlay: Overlay, factor: float) -> Image.Image:
    photo = photo.copy()
    draw = ImageDraw.Draw(photo)
    draw.fontmode = "1"
    truth = overlay.truth
    for i, ignore in enumerate(truth.ignore):
        _outline(draw, truth, i, factor, TRUTH_RGB, offsets=(0,) if ignore else (-2, -1, 0))
    found = overlay.detections
    for i in range(len(found.boxes)):
        _outline(draw, found, i, factor, SOFT_RGB, offsets=(0, 1))
    named = len(overlay.classes) > 1 and len(found.boxes) < _THIN_FROM
    for box, class_id, score in zip(found.boxes * factor, found.class_ids, found.best, strict=True):
        name = f"{overlay.classes[class_id]} " if named else ""
        _tag(draw, box, f"{name}{score:.2f}", photo.size)
    return photo


def _outline(
    draw: ImageDraw.ImageDraw,
    of: Detections | Truth,
    i: int,
    factor: float,
    rgb: tuple[int, int, int],
    offsets: tuple[int, ...],
) -> None:
    """One-pixel frames of a box, or a polygon of the same thickness where it is rotated."""
    if of.xywhr is None:
        _rectangle(draw, of.boxes[i] * factor, rgb, offsets)
        return
    corners = rotated.corners(of.xywhr[i : i + 1].astype(np.float64))[0] * factor
    draw.polygon([(float(x), float(y)) for x, y in corners], outline=rgb, width=len(offsets))


def _rectangle(draw: ImageDraw.ImageDraw, box: NDArray, rgb: tuple[int, int, int], offsets: tuple[int, ...]) -> None:
    """One-pixel frames; offset 0 is the box's outermost pixel (max edges are exclusive), positive goes inside."""
    x0, y0, x1, y1 = (int(edge) for edge in np.round(box))
    for offset in offsets:
        corners = (x0 + offset, y0 + offset, x1 - 1 - offset, y1 - 1 - offset)
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            draw.rectangle(corners, outline=rgb)


def _tag(draw: ImageDraw.ImageDraw, box: NDArray, text: str, size_wh: tuple[int, int]) -> None:
    """White text on red above the box, or below its top edge at the top of the image."""
    width, height = _tag_size(text)
    x = int(np.clip(round(box[0]), 0, max(0, size_wh[0] - width)))
    y = round(box[1]) - height
    _tag_at(draw, (x, y if y >= 0 else max(0, round(box[1]))), text, SOFT_RGB)


@functools.cache
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)  # unpacks a font at each call


def _tag_size(text: str) -> tuple[int, int]:
    left, top, right, bottom = _font(13).getbbox(text)
    return int(right - left + 4), int(bottom - top + 4)


def _tag_at(draw: ImageDraw.ImageDraw, xy: tuple[int, int], text: str, rgb: tuple[int, int, int]) -> None:
    font = _font(13)
    left, top, _, _ = font.getbbox(text)
    (x, y), (width, height) = xy, _tag_size(text)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=rgb)
    draw.text((x + 2 - left, y + 2 - top), text, font=font, fill=_text_rgb(rgb))


def _tag_places(boxes: NDArray, texts: Sequence[str], size_wh: tuple[int, int]) -> list[tuple[int, int]]:
    """Top left corners of tags at the boxes' corners: of eight places, the one that overlaps the fewest tags before."""
    taken = np.zeros((0, 4))
    for box, text in zip(boxes, texts, strict=True):
        width, height = _tag_size(text)
        x0, y0, x1, y1 = (round(float(edge)) for edge in box)
        corners = [(x0, y0 - height), (x1 - width, y0 - height), (x0, y1), (x1 - width, y1)]
        corners += [(x1, y0), (x1, y1 - height), (x0 - width, y0), (x0 - width, y1 - height)]
        room_xy = np.maximum(np.subtract(size_wh, (width, height)), 0)
        spots = np.clip(corners, 0, room_xy)
        spots = np.hstack([spots, np.add(spots, (width, height))])
        crossed = (spots[:, None, :2] < taken[None, :, 2:]) & (spots[:, None, 2:] > taken[None, :, :2])
        number = crossed.all(axis=2).sum(axis=1)
        taken = np.vstack([taken, spots[np.argmin(number)]])
    return [(int(x), int(y)) for x, y in taken[:, :2]]


def _text_rgb(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is legible on a colour (ITU-R BT.601 luma)."""
    luma = float(np.dot(rgb, (0.299, 0.587, 0.114)))
    return (0, 0, 0) if luma > 140 else (255, 255, 255)


def _with_legend(photo: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """A strip below with a swatch and a name per entry, in as many lines as they need."""
    font = _font(12)
    placed, x, line = [], _GAP_PX, 0
    for name, rgb in entries:
        text = _fitting(name, font, photo.width - 3 * _GAP_PX - 12)
        width = 12 + _GAP_PX // 2 + round(font.getlength(text))
        if x > _GAP_PX and x + width > photo.width:
            x, line = _GAP_PX, line + 1
        placed.append((text, rgb, x, photo.height + line * _LEGEND_PX))
        x += width + 2 * _GAP_PX
    both = Image.new("RGB", (photo.width, photo.height + (line + 1) * _LEGEND_PX * bool(entries)), (28, 32, 36))
    both.paste(photo)
    draw = ImageDraw.Draw(both)
    for text, rgb, x, y in placed:
        draw.rectangle((x, y + 4, x + 11, y + 15), fill=rgb)
        draw.text((x + 12 + _GAP_PX // 2, y + 3), text, font=font, fill=(235, 235, 235))
    return both


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    """Cut the middle out of a text that is too wide: names of tiles differ at their ends."""
    start, end = text[: len(text) // 2], text[len(text) // 2 :]
    while len(end) > 1 and font.getlength(text) > width_px:
        start, end = (start[:-1], end) if len(start) > len(end) / 4 else (start, end[1:])
        text = f"{start}\N{HORIZONTAL ELLIPSIS}{end}"
    return text
