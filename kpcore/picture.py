"""Pictures of point clouds: points are shaded spheres drawn into a z-buffer in NumPy; matplotlib adds the text."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpcore.config import require

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from kpcore.io import Cloud, Reference

MARK = (60, 220, 90)
DPI, MARGIN, GAP, TOP = 150, 48, 24, 130  # lengths are in pixels
MAIN_SIZE = (1560, 860)  # of the cloud
NEIGHBORHOOD_SIZE = 720
LEVEL_HEIGHT, LEVELS_PER_ROW = 300, 5


@dataclass(frozen=True)
class Theme:
    """The colours of a page as "#rrggbb".

    background, text, pale : of the page, of its text, and of text that matters less
    same, differs, unlabeled : of points where labels agree with predicted classes, where not, and that have no label
    empty, full : of the cells of a confusion matrix with none and all points of a row
    """

    background: str
    text: str
    pale: str
    same: str
    differs: str
    unlabeled: str
    empty: str
    full: str


THEMES = {
    "dark": Theme("#0f1319", "#e9ecf0", "#8d98a7", "#68727e", "#ff4b4b", "#3a424d", "#181e27", "#5aa9ff"),
    "light": Theme("#ffffff", "#14181f", "#5b6675", "#b4bcc6", "#d3122a", "#dde2e8", "#eef2f7", "#1759a6"),
}


def theme_named(name: str) -> Theme:
    """The theme dark or light; an error for another name."""
    if name not in THEMES:
        raise ValueError(f"theme: expected {' or '.join(THEMES)}, got {name!r}")
    return THEMES[name]


def rgb(color: str) -> np.ndarray:
    """(3,) uint8 of a colour "#rrggbb"."""
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)


@dataclass(frozen=True, eq=False)
class Patch:
    """One neighbourhood: H neighbours and K kernel points relative to the query, and their (H, K) influences."""

    neighbors: np.ndarray
    kernel_points: np.ndarray
    influence: np.ndarray
    radius: float
    extent: float
    caption: str

    @classmethod
    def with_linear_influence(cls, neighbors: np.ndarray, kernel_points: np.ndarray, radius: float, extent: float,
                              caption: str) -> Patch:  # fmt: skip
        """A Patch whose influences are max(0, 1 - distance / extent)."""
        distance = np.linalg.norm(neighbors[:, None] - kernel_points, axis=2)
        return cls(neighbors, kernel_points, np.maximum(0, 1 - distance / extent), radius, extent, caption)


def draw(path: Path, title: str, subtitle: str, cloud: Cloud,
         levels: Sequence[tuple[np.ndarray, np.ndarray | None, float, str, str]], patch: Patch, *,
         theme: str = "dark", unit: str | None = None) -> None:  # fmt: skip
    """Write the picture of `kpcore demo FILE`: the cloud, one neighbourhood beside it, the levels below.

    levels : (points, colors or None, voxel, name, numbers as text) of each, the finest first.
    """
    view = View(cloud.points, np.array(cloud.up, float))
    across = min(len(levels), LEVELS_PER_ROW)
    rows = -(-len(levels) // across)
    width = 2 * MARGIN + MAIN_SIZE[0] + GAP + NEIGHBORHOOD_SIZE
    height = TOP + MAIN_SIZE[1] + 40 + rows * (LEVEL_HEIGHT + 100) + 40
    page = Page(width, height, title, subtitle, theme)
    radius = min(0.5 * levels[0][2], 3 * view.pixel(*MAIN_SIZE)) or 0.5 * levels[0][2]
    page.show(view.render(cloud.points, cloud.colors, radius, *MAIN_SIZE, theme=theme), MARGIN, TOP, *MAIN_SIZE)
    draw_scale(page, view, radius, MAIN_SIZE, MARGIN, TOP + MAIN_SIZE[1] + 30, unit or unit_of(cloud))
    if on_map(cloud):
        draw_north(page, view, MARGIN + MAIN_SIZE[0] - 40, TOP + MAIN_SIZE[1] + 20)

    left, pale = MARGIN + MAIN_SIZE[0] + GAP, page.theme.pale
    page.text(left, 66, "One neighbourhood of level 0", 13, weight="bold")
    page.text(left, 104, patch.caption, 10, pale)
    draw_neighborhood(page.panel(left, TOP, NEIGHBORHOOD_SIZE, NEIGHBORHOOD_SIZE), patch, view.axes, theme=theme)
    scale = heat(np.linspace(0, 1, 256), theme)[None]
    page.show(scale, left + 60, TOP + NEIGHBORHOOD_SIZE + 24, NEIGHBORHOOD_SIZE - 120, 14)
    for x, words in (
        (60, "0"),
        (NEIGHBORHOOD_SIZE / 2, "influence = max(0, 1 − distance / extent)"),
        (NEIGHBORHOOD_SIZE - 60, "1"),
    ):
        page.text(left + x, TOP + NEIGHBORHOOD_SIZE + 70, words, 10, pale, ha="center")
    page.text(
        left + NEIGHBORHOOD_SIZE / 2,
        TOP + NEIGHBORHOOD_SIZE + 106,
        f"{'white' if theme == 'dark' else 'black'}: kernel points, larger where influence adds up",
        10,
        pale,
        ha="center",
    )

    w = (width - 2 * MARGIN - (LEVELS_PER_ROW - 1) * GAP) // LEVELS_PER_ROW
    for i, (points, colors, voxel, name, numbers) in enumerate(levels):
        x, y = MARGIN + i % across * (w + GAP), TOP + MAIN_SIZE[1] + 80 + i // across * (LEVEL_HEIGHT + 100)
        page.show(view.render(points, colors, 0.5 * voxel, w, LEVEL_HEIGHT, theme=theme), x, y, w, LEVEL_HEIGHT)
        page.text(x + w / 2, y + LEVEL_HEIGHT + 26, name, 10.5, weight="bold", ha="center")
        page.text(x + w / 2, y + LEVEL_HEIGHT + 50, numbers, 9.5, pale, ha="center")
    page.write(path)


def draw_classes(path: str | os.PathLike[str], title: str, subtitle: str, cloud: Cloud,
                 panels: Sequence[tuple[str, np.ndarray]], legend: Sequence[Sequence[tuple[str, str, np.ndarray]]], *,
                 theme: str = "dark", unit: str | None = None, width: int | None = None) -> None:  # fmt: skip
    """Write a picture of a cloud in several colourings, with a scale bar, and an arrow to the north for maps.

    Parameters
    ----------
    path : str or Path
    title, subtitle : str
    cloud : Cloud
        The north is drawn for one that `on_map` says is on a map.
    panels : sequence of (name, (N, 3) uint8 colours)
    legend : sequence of groups, each a sequence of (name, number as text, colour)
        A group begins a line.
    theme : "dark" or "light"
    unit : str, optional
        Of coordinates, see `length_words`; by default that which the file of the cloud states.
    width : int, optional
        Of a panel in pixels.
    """
    view, w = View(cloud.points, np.array(cloud.up, float)), width or (1300 if len(panels) == 1 else 800)
    across_box, up_box = (view.box[1] - view.box[0])[:2]
    h = int(np.clip(w * up_box / (across_box or 1), 0.3 * w, w))
    width = 2 * MARGIN + len(panels) * w + (len(panels) - 1) * GAP
    if np.isfinite(view.max_height):
        subtitle += " · ceiling and near walls are cut away"
    page = Page(width, TOP + h + 160 + legend_height(legend, width) + 30, title, subtitle, theme)
    radius = drawn_radius(view, cloud.points, w, h)
    for i, (name, colors) in enumerate(panels):
        x = MARGIN + i * (w + GAP)
        page.show(view.render(cloud.points, colors, radius, w, h, theme=theme), x, TOP, w, h)
        page.text(x + w / 2, TOP + h + 40, name, 12, weight="bold", ha="center")
    draw_scale(page, view, radius, (w, h), MARGIN, TOP + h + 90, unit or unit_of(cloud))
    if on_map(cloud):
        draw_north(page, view, width - MARGIN - 50, TOP + h + 66)
    draw_legend(page, legend, TOP + h + 160)
    page.write(path)


def draw_map(path: str | os.PathLike[str], title: str, subtitle: str, image: np.ndarray, low: np.ndarray,
             high: np.ndarray, pixel: float, outlines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
             legend: Sequence[Sequence[tuple[str, str, np.ndarray]]], *, is_map: bool, theme: str = "dark",
             unit: str | None = None) -> None:  # fmt: skip
    """Write a picture of a raster seen from above, with outlines, a scale bar, and an arrow to the north for maps.

    Parameters
    ----------
    path : str or Path
    title, subtitle : str
    image : (rows, columns, 4) uint8
        Colours of the pixels, of which the last value is 255, or 0 for a pixel that shows what is behind; the first row
        is that of the smallest y.
    low, high : (2,) float64
        Coordinates of the lower corner of the first pixel, and of the upper end of the map, in the last pixels.
    pixel : float
        The side of a pixel, in the unit of the coordinates.
    outlines : sequence of (name, (2,) or (3,) lower corner, upper corner)
        Boxes, such as those of tiles. Names are written in those where they have room, if there are at most 40.
    legend, theme, unit : see `draw_classes`
    is_map : bool
        Whether +y is the north.
    """
    rows, columns = image.shape[:2]
    zoom = int(np.clip(_LONGEST_MAP / max(rows, columns), 1, 100))  # whole, so that all pixels are equal
    # The last pixels are cut where the box ends.
    w, h = np.clip(np.ceil(zoom / pixel * (high - low)), zoom, (zoom * columns, zoom * rows)).astype(int).tolist()
    box_w, box_h = max(w, 240), max(h, 60)
    width = max(box_w + 2 * MARGIN, 900)
    page = Page(width, TOP + box_h + 170 + legend_height(legend, width) + 30, title, subtitle, theme)
    x, y = (width - w) / 2, TOP + (box_h - h) / 2
    axes = page.panel(x - 8, y - 8, w + 16, h + 16)
    corners = [zoom / pixel * (np.array([a[:2], b[:2]], np.float64) - low) for _, a, b in outlines]
    thin = 0.9 if len(corners) <= 100 else 0.4
    _add_boxes(axes, corners, facecolor=page.theme.empty, edgecolor="none", zorder=1)
    squares, ends = image.repeat(zoom, axis=0).repeat(zoom, axis=1), (0, zoom * columns, 0, zoom * rows)
    shown = axes.imshow(squares, interpolation="none", aspect="auto", origin="lower", extent=ends, zorder=2)
    axes.set(xlim=(-8, w + 8), ylim=(-8, h + 8))
    shown.set_clip_path(require("matplotlib.patches", "plot").Rectangle((0, 0), w, h, transform=axes.transData))
    _add_boxes(axes, corners, facecolor="none", edgecolor=page.theme.text, linewidth=thin, alpha=0.6, zorder=3)
    if len(corners) <= 40:
        for (name, *_), (least, most) in zip(outlines, corners, strict=True):
            _name_box(page, x, y + h, name, least, most)
    right = MARGIN if w < box_w else x
    draw_bar(page, zoom / pixel, max(w, box_w), right, TOP + box_h + 96, unit)
    if is_map:
        _draw_arrow(page, np.array([0.0, -1.0]), width - right - 40, TOP + box_h + 80)
    draw_legend(page, legend, TOP + box_h + 170)
    page.write(path)


_LONGEST_MAP = 1400  # pixels


def _add_boxes(axes: Any, corners: Sequence[np.ndarray], **style: Any) -> None:
    collections = require("matplotlib.collections", "plot")
    squares = [[(a[0], a[1]), (b[0], a[1]), (b[0], b[1]), (a[0], b[1])] for a, b in corners]
    axes.add_collection(collections.PolyCollection(squares, **style), autolim=False)


def _name_box(page: Page, x: float, y: float, name: str, least: np.ndarray, most: np.ndarray) -> None:
    """The name of a box in its upper left corner; (x, y) is the place of the corners' origin on the page.

    A box with less room than six letters gets none.
    """
    patheffects = require("matplotlib.patheffects", "plot")
    size = 8
    room = most[0] - least[0] - 12
    if room < _text_width("letter", size) or most[1] - least[1] < 26:
        return
    around = patheffects.withStroke(linewidth=2.2, foreground=page.theme.background)
    page.text(x + least[0] + 6, y - most[1] + 20, shortened(name, room, size), size, path_effects=[around])


def _legend_lines(legend: Sequence[Sequence[tuple[str, str, np.ndarray]]], width: int) -> tuple[int, int, list[int]]:
    """(width of a column, number of columns, number of lines of each group) on a page of a width."""
    column = 26 + max(
        (_text_width(f"{name}  {number}", _LEGEND_SIZE) for group in legend for name, number, _ in group), default=0
    )
    column = min(column + 30, width - 2 * MARGIN)
    across = max(1, (width - 2 * MARGIN) // column)
    return column, across, [-(-len(group) // across) for group in legend]


def legend_height(legend: Sequence[Sequence[tuple[str, str, np.ndarray]]], width: int) -> int:
    """The height in pixels of a legend as `draw_legend` draws it on a page of a width."""
    _, _, rows = _legend_lines(legend, width)
    return _LEGEND_LINE * sum(rows) + 20 * (len(rows) - 1)


def draw_legend(page: Page, legend: Sequence[Sequence[tuple[str, str, np.ndarray]]], y: float) -> None:
    """Squares of colours with names and numbers in columns; a group begins a line. The first line is at y."""
    column, across, rows = _legend_lines(legend, page.width)
    for group, lines in zip(legend, rows, strict=True):
        for i, (name, number, color) in enumerate(group):
            x, below = MARGIN + i % across * column, y + _LEGEND_LINE * (i // across)
            page.swatch(x, below, color)
            name = shortened(name, column - 26 - _text_width(f"  {number}", _LEGEND_SIZE), _LEGEND_SIZE)
            page.text(x + 30, below, name, _LEGEND_SIZE)
            page.text(x + 30 + _text_width(f"{name}  ", _LEGEND_SIZE), below, number, _LEGEND_SIZE, page.theme.pale)
        y += _LEGEND_LINE * lines + 20


def draw_confusion(path: Path, title: str, subtitle: str, names: Sequence[str], confusion: np.ndarray, *,
                   theme: str = "dark") -> None:  # fmt: skip
    """Write a picture of a confusion matrix: a row for each true class, with its shares in % and numbers of points.

    Numbers are left out where there are more than 12 classes, shares where there are more than 40.
    """
    number = len(names)
    cell, size = (92, 11) if number <= 12 else (58, 9.5) if number <= 24 else (38, 7) if number <= 40 else (16, 5)
    left, right, side = 250, 190, cell * number
    page = Page(max(left + side + right + 2 * MARGIN, 900), TOP + 50 + side + 230, title, subtitle, theme)
    total = confusion.sum(axis=1, keepdims=True)
    fraction, top = confusion / np.maximum(total, 1), TOP + 50
    empty, full = (rgb(color) / 255 for color in (page.theme.empty, page.theme.full))
    page.show(empty + fraction[..., None] * (full - empty), MARGIN + left, top, side, side)
    page.text(MARGIN + left + side / 2, top - 22, "predicted class", 11, page.theme.pale, ha="center")
    page.text(MARGIN, top - 22, "true class", 11, page.theme.pale)
    page.text(MARGIN + left + side + 18, top - 22, "number", 11, page.theme.pale)
    label_size = min(11, 0.5 * cell)
    for i, name in enumerate(names):
        middle = top + (i + 0.5) * cell + 7
        page.text(MARGIN + left - 14, middle, shortened(name, left - 14, label_size), label_size, ha="right")
        page.text(MARGIN + left + side + 18, middle, f"{total[i, 0]:,}", label_size, page.theme.pale)
        below = MARGIN + left + (i + 0.5) * cell
        page.text(
            below + 8, top + side + 26, shortened(name, 190, label_size), label_size, rotation=55, ha="right",
            rotation_mode="anchor"
        )  # fmt: skip
        for j in np.flatnonzero(confusion[i]) if number <= 40 else ():
            x = MARGIN + left + (j + 0.5) * cell
            color = page.theme.background if fraction[i, j] > 0.55 else page.theme.text
            page.text(x, middle - (8 if number <= 12 else 0), share_words(fraction[i, j]), size, color, ha="center")
            if number <= 12:
                page.text(x, middle + 18, _short_number(confusion[i, j]), 8, color, ha="center", alpha=0.75)
    page.write(path)


_LEGEND_SIZE, _LEGEND_LINE = 11.5, 40


def share_words(share: float) -> str:
    """A share in per cent: one digit after the point below 10 %, and none that rounds to nothing or to all."""
    if 0 < share < 0.0005:
        return "<0.1"
    if 0.995 <= share < 1:
        return f"{min(100 * share, 99.9):.1f}"
    return f"{100 * share:.1f}" if 0 < share < 0.0995 else f"{100 * share:.0f}"


def _short_number(number: int) -> str:
    """A number in at most five characters, up to billions."""
    for least, size, letter in ((10**9, 10**9, "G"), (10**6, 10**6, "M"), (10**4, 10**3, "k")):
        if number >= least:
            return f"{number / size:.{0 if number >= 100 * size else 1}f}{letter}"
    return str(number)


_UNITS = {"m": "m", "metre": "m", "meter": "m", "metres": "m", "meters": "m", "ft": "ft", "foot": "ft", "feet": "ft"}


def length_words(length: float, unit: str | None) -> str:
    """A length with its unit: from km to mm for metres, "ft" for any foot, "units" where the unit is not known."""
    unit = _UNITS.get(unit.lower().replace("us survey ", ""), unit) if unit else "units"
    if unit == "m":
        size, word = next(
            (s, w) for s, w in ((1000, "km"), (1, "m"), (0.01, "cm"), (0, "mm")) if length >= 0.999999 * s
        )
        return f"{length / (size or 0.001):g} {word}"
    return f"{length:g} {unit}"


def round_length(largest: float) -> float:
    """The largest of the lengths ..., 1, 2, 5, 10, 20, 50, ... up to a length above zero."""
    power = 10.0 ** math.floor(math.log10(largest))
    return max(digit * power for digit in (1, 2, 5) if digit * power <= largest * (1 + 1e-9))


def on_map(cloud: Cloud) -> bool:
    """Whether y is the north of a map: z is up, and the file states a projected or geographic reference system.

    If it states none: coordinates are as far from zero as those of projections are.
    """
    if tuple(cloud.up) != (0, 0, 1):
        return False
    if cloud.reference is None or cloud.reference.kind == "unknown":
        return bool(np.any(cloud.shift))
    return cloud.reference.kind in ("projected", "geographic")


def unit_of(cloud: Cloud) -> str | None:
    """The unit of x and y that a file states, "m" or "ft"; None for other units, and where it states none."""
    return stated_unit(cloud.reference)


def stated_unit(reference: Reference | None) -> str | None:
    """The unit of x and y of a reference system, "m" or "ft"; None for other units, and where it states none."""
    metres = None if reference is None else reference.horizontal
    if metres is None:
        return None
    return "m" if metres == 1 else "ft" if abs(metres - 0.3048) < 1e-5 else None


def draw_scale(page: Page, view: View, radius: float, size: tuple[int, int], x: float, y: float,
               unit: str | None) -> None:  # fmt: skip
    """A scale bar of a round length, at most a quarter of an image wide, with its lower left corner at x, y.

    It holds for lengths along the width of the image, which are level.
    """
    draw_bar(page, pixels_of_unit(view.box, radius, *size), size[0], x, y, unit)


def draw_bar(page: Page, pixels: float, width: int, x: float, y: float, unit: str | None) -> None:
    """A bar of a round length, at most a quarter of a width in pixels; `pixels` are those of a length of 1."""
    length = round_length(width / (4 * pixels))
    page.line([x, x, x + length * pixels, x + length * pixels], [y - 12, y, y, y - 12])
    page.text(x + length * pixels + 12, y, length_words(length, unit), 11)


def draw_north(page: Page, view: View, x: float, y: float) -> None:
    """An arrow along +y as the view shows it, around x, y, with the letter N before its tip."""
    right, above = view.axes[:2, 1]
    _draw_arrow(page, np.array([right, -above]) / max(math.hypot(right, above), 1e-9), x, y)


def _draw_arrow(page: Page, direction: np.ndarray, x: float, y: float) -> None:
    tip, tail = np.array([x, y]) + 26 * direction, np.array([x, y]) - 26 * direction
    side = 8 * np.array([-direction[1], direction[0]])
    back = tip - 18 * direction
    page.line(*zip(tail, tip, strict=True))
    page.line(*zip(back + side, tip, back - side, strict=True))
    letter = tip + 22 * direction
    page.text(letter[0], letter[1] + 8, "N", 11, ha="center", weight="bold")


class Page:
    """A figure with a title; positions are in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str, subtitle: str, theme: str = "dark") -> None:
        figure = require("matplotlib.figure", "plot")
        self.width, self.height, self.theme = width, height, theme_named(theme)
        self.figure = figure.Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=self.theme.background)
        self.text(MARGIN, 66, shortened(title, width - 2 * MARGIN, 21, bold=True), 21, weight="bold")
        self.text(MARGIN, 104, shortened(subtitle, width - 2 * MARGIN, 11), 11, self.theme.pale)

    def text(self, x: float, y: float, words: str, size: float, color: Any = None, **style: Any) -> None:
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, words, size=size, color=color or self.theme.text, va="baseline", **style)

    def line(self, x: Sequence[float], y: Sequence[float], width: float = 1.5) -> None:
        lines = require("matplotlib.lines", "plot")
        x, y = np.array(x) / self.width, 1 - np.array(y) / self.height
        self.figure.add_artist(lines.Line2D(x, y, color=self.theme.text, lw=width, solid_joinstyle="miter"))

    def swatch(self, x: float, y: float, color: np.ndarray, size: float = 20) -> None:
        """A square with its lower left corner at x, y."""
        patches = require("matplotlib.patches", "plot")
        place = x / self.width, 1 - y / self.height
        self.figure.add_artist(patches.Rectangle(place, size / self.width, size / self.height, fc=tuple(color / 255)))

    def panel(self, x: float, y: float, w: float, h: float) -> Any:
        place = x / self.width, 1 - (y + h) / self.height, w / self.width, h / self.height
        axes = self.figure.add_axes(place)
        axes.set_axis_off()
        return axes

    def show(self, image: np.ndarray, x: float, y: float, w: float, h: float) -> None:
        self.panel(x, y, w, h).imshow(image, interpolation="none", aspect="auto")

    def write(self, path: str | os.PathLike[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that the font lacks become boxes
            FigureCanvasAgg(self.figure).print_png(path)


def in_one_line(words: str) -> str:
    """Words in one line, without what is no UTF-8, as file names may have both."""
    return " ".join(words.split()).encode("utf-8", "backslashreplace").decode()


def shortened(words: str, width: float, size: float, bold: bool = False) -> str:
    """Words for matplotlib, which reads $ as mathematics: in one line, of at most `width` pixels in this size of type.

    What is too long loses its middle, since names of files differ at their ends.
    """
    words, most = in_one_line(words), int(width / _letter_width(size, bold))
    if len(words) > most:
        words = f"{words[: most // 2 - 1]} … {words[len(words) - most // 2 + 2 :]}"
    return words.replace("$", r"\$")


def _letter_width(size: float, bold: bool = False) -> float:
    """The mean width of a letter in pixels."""
    return (0.62 if bold else 0.53) * size * DPI / 72


def _text_width(words: str, size: float) -> int:
    return math.ceil(len(words) * _letter_width(size))


class View:
    """The view of a cloud in all its drawings: direction, parts that are cut away, and the colours of heights."""

    up: np.ndarray
    low: float  # heights of the first and the last colour
    high: float
    max_height: float  # points above are cut away
    axes: np.ndarray  # (right, above, toward) as rows
    walls: list[tuple[np.ndarray, float]]  # (direction, bound) of the near walls of a room, which are cut away
    box: np.ndarray  # (2, 3): minimum and maximum of the visible points along the axes

    def __init__(self, points: np.ndarray, up: np.ndarray, cut: bool = True) -> None:
        self.up = up
        # At random: every n-th point of a scan may be a single laser beam.
        if len(points) > 100_000:
            points = points[np.random.default_rng(0).integers(len(points), size=100_000)]
        points = points[_are_near(points)]
        low, high = np.percentile(points, [0.5, 99.5], axis=0)  # outliers must not shrink the rest
        margin = 0.08 * (high - low).max()
        points = points[((points >= low - margin) & (points <= high + margin)).all(axis=1)]
        height = points @ up
        self.low, self.high = np.percentile(height, [1, 99])
        self.max_height = self._ceiling(points, height) if cut else np.inf
        room = np.isfinite(self.max_height)
        inside = points[height < self.max_height]
        self.axes = self._view(inside, room)
        self.walls = []
        for axis in np.eye(3)[up == 0] if room else ():
            axis = axis * np.sign(axis @ self.axes[2])
            self.walls.append((axis, (inside @ axis).max() - 0.025 * np.ptp(inside, axis=0).max()))
        flat = points[self._visible(points)] @ self.axes.T
        self.box = np.array([flat.min(axis=0), flat.max(axis=0)])

    def _ceiling(self, points: np.ndarray, height: np.ndarray) -> float:
        """A height just below the ceiling if the cloud is a room (wide, and mostly covered at the top); else inf."""
        low, high = np.percentile(height, [0.5, 99.5])
        ground = points[:, self.up == 0]
        size = np.ptp(ground, axis=0).max()
        if not 0 < high - low < 0.8 * size:
            return np.inf
        cells = np.floor((ground - ground.min(axis=0)) / (size / 32)) @ [1, 64]
        covered = np.unique(cells[height > high - 0.08 * (high - low)]).size
        return high - 0.1 * (high - low) if covered > 0.6 * np.unique(cells).size else np.inf

    def _view(self, points: np.ndarray, room: bool) -> np.ndarray:
        """(right, above, toward) as rows: the first direction that covers most of the image cells of the best one."""
        if self.up[1]:  # the frame of a depth camera: seen from beside the camera
            return _axes(np.array([0.25, 0.15, -1.0]), self.up)
        elevation = np.radians(50 if room else 30)
        # Of outdoor scenes the views from the south come first, in which north is up, as on maps.
        around = (-90 + sign * angle for angle in range(0, 181, 15) for sign in (1, -1))
        azimuths = (-68, -112, 112, 68, -22, -158, 158, 22) if room else tuple(dict.fromkeys(around))
        candidates = []
        for azimuth in np.radians(azimuths):
            level = np.cos(elevation) * np.array([np.cos(azimuth), np.sin(azimuth)])
            axes = _axes(np.array([*level, np.sin(elevation)]), self.up)
            flat = points @ axes[:2].T
            cell = max(np.ptp(flat, axis=0) / [120, 66]) or 1  # the aspect ratio of MAIN_SIZE
            candidates.append((np.unique(np.floor((flat - flat.min(axis=0)) / cell) @ [1, 256]).size, axes))
        most_cells = max(cells for cells, _ in candidates)
        return next(axes for cells, axes in candidates if cells >= (0.95 if room else 0.85) * most_cells)

    def shows(self, points: np.ndarray) -> np.ndarray:
        """True for points that are not cut away."""
        keep = points @ self.up < self.max_height
        for axis, bound in self.walls:
            keep &= points @ axis < bound
        return keep

    def _visible(self, points: np.ndarray) -> np.ndarray:
        """True for points that are not cut away; for all if none would be left."""
        keep = self.shows(points)
        return keep if keep.any() else ~keep

    def pixel(self, width: int, height: int) -> float:
        """The length that one pixel stands for."""
        return max((self.box[1] - self.box[0])[:2] / [width, height])

    def render(self, points: np.ndarray, colors: np.ndarray | None, radius: float, width: int, height: int,
               mark: np.ndarray | None = None, theme: str = "dark") -> np.ndarray:  # fmt: skip
        """An orthographic image (height, width, 3) in 0..1; points are spheres of this radius, at least one pixel.

        `mark` is a position that gets a green disc, which no point hides.
        """
        if colors is None:
            colors = _heights(((points @ self.up - self.low) / (self.high - self.low or 1)).clip(0, 1))
        else:
            colors = colors / np.float32(255)
        keep = self._visible(points)
        flat, colors = points[keep] @ self.axes.T, colors[keep]
        if mark is not None:
            disc = np.mgrid[-7:8, -7:8].reshape(2, -1).T / 7  # of 7 pixels, before all points
            disc = 7 * self.pixel(width, height) * disc[np.linalg.norm(disc, axis=1) <= 1]
            disc = self.axes @ mark + np.column_stack([disc, np.full(len(disc), np.ptp(flat[:, 2]) + 9 * radius)])
            flat = np.concatenate([flat, disc])
            colors = np.concatenate([colors, np.broadcast_to(np.float32(MARK) / 255, disc.shape)])
        return draw_spheres(flat, colors, radius, self.box, width, height, theme)


def _are_near(points: np.ndarray) -> np.ndarray:
    """True for points within twenty times the size of the shortest half of the coordinates along an axis.

    Others are far outliers, such as returns of nothing, which many scanners write as (0, 0, 0): at UTM coordinates
    these are thousands of kilometres away. Up to half of the points may be such.
    """
    ordered = np.sort(points.astype(np.float64), axis=0)
    half = (len(points) + 1) // 2
    width = ordered[half - 1 :] - ordered[: len(points) - half + 1]
    start = width.argmin(axis=0)
    axes = np.arange(points.shape[1])
    middle, reach = ordered[start + half // 2, axes], 20 * width[start, axes].max()
    if reach == 0:  # half of the points are at one place
        return np.ones(len(points), bool)
    return (np.abs(points - middle) <= reach).all(axis=1)


def drawn_radius(view: View, points: np.ndarray, width: int, height: int) -> float:
    """The radius by which points cover a surface in an image of this size: 2 to 8 pixels.

    It is 0.8 of the distance of as many points on a square lattice over those 16 x 16 pixels that have any.
    """
    flat = points[view.shows(points)] @ view.axes[:2].T
    pixel = view.pixel(width, height)
    if not pixel or not len(flat):
        return 1.0
    cells = np.floor((flat - view.box[0, :2]) / (16 * pixel))
    inside = ((cells >= 0) & (cells < [width / 16, height / 16])).all(axis=1)
    covered = np.unique(cells[inside] @ [1, 4096]).size * (16 * pixel) ** 2
    return float(np.clip(0.8 * math.sqrt(covered / max(1, inside.sum())), 2 * pixel, 8 * pixel))


def pixels_of_unit(box: np.ndarray, radius: float, width: int, height: int) -> float:
    """The number of pixels for a length of 1 in an image that shows a box of points with a radius."""
    scale = min([width, height] / ((box[1] - box[0])[:2] + 2 * radius))
    return min(scale, 32 / radius)  # a single point does not fill the page


def _axes(toward: np.ndarray, up: np.ndarray) -> np.ndarray:
    """(right, above, toward) as rows: the axes of the image and the direction to the viewer."""
    toward = toward / np.linalg.norm(toward)
    right = np.cross(up, toward)
    right /= np.linalg.norm(right)
    return np.array([right, np.cross(toward, right), toward])


def _heights(fraction: np.ndarray) -> np.ndarray:
    colormaps = require("matplotlib", "plot").colormaps
    return colormaps["viridis"](0.15 + 0.83 * fraction)[:, :3].astype(np.float32)


def heat(influence: np.ndarray, theme: str = "dark") -> np.ndarray:
    """Colours of values from 0 to 1: the largest is light on a dark page and dark on a light one."""
    colormaps = require("matplotlib", "plot").colormaps
    return colormaps["plasma"](0.2 + 0.8 * influence if theme == "dark" else 0.9 - 0.8 * influence)


def draw_spheres(flat: np.ndarray, colors: np.ndarray, radius: float, box: np.ndarray, width: int,
                 height: int, theme: str = "dark") -> np.ndarray:  # fmt: skip
    """An image of points, which are already in the axes of the view, as shaded spheres in a z-buffer."""
    oversampling = 2  # drawn twice as large, then averaged
    columns, rows = oversampling * width, oversampling * height
    scale = oversampling * pixels_of_unit(box, radius, width, height)
    pixel_radius = max(radius * scale, 0.75 * oversampling)
    reach = int(pixel_radius)
    order = np.argsort(flat[:, 2])  # the farthest first: if a pixel is assigned twice, the last assignment counts
    flat, colors = (flat[order] - (box[0] + box[1]) / 2) * scale, colors[order]
    x = np.floor(flat[:, 0] + columns / 2)
    y = np.floor(rows / 2 - flat[:, 1])
    inside = (x >= -reach) & (x < columns + reach) & (y >= -reach) & (y < rows + reach)
    stride = columns + 4 * reach
    pixel = ((y[inside] + 2 * reach) * stride + x[inside] + 2 * reach).astype(np.int64)
    depth, colors = flat[inside, 2].astype(np.float32), colors[inside]

    nearest = np.full(stride * (rows + 4 * reach), -np.inf, np.float32)
    front_point = np.full(nearest.size, -1, np.int32)
    shade = np.ones(nearest.size, np.float32)
    for dx in range(-reach, reach + 1):
        for dy in range(-reach, reach + 1):
            if dx * dx + dy * dy > pixel_radius * pixel_radius:
                continue
            bulge = (pixel_radius * pixel_radius - dx * dx - dy * dy) ** 0.5
            at, depth_here = pixel + (dy * stride + dx), depth + np.float32(bulge)
            front = np.flatnonzero(depth_here > nearest[at])
            at = at[front]
            nearest[at], front_point[at] = depth_here[front], front
            if pixel_radius >= 4:  # lit from the upper left
                shade[at] = 0.62 + 0.5 * max(0.0, (-0.45 * dx - 0.6 * dy + 0.66 * bulge) / pixel_radius)

    nearest, front_point, shade = (
        image.reshape(-1, stride)[2 * reach : 2 * reach + rows, 2 * reach : 2 * reach + columns]
        for image in (nearest, front_point, shade)
    )
    # Eye-dome lighting: pixels are darker if those around are nearer, which shows edges and hollows without normals.
    hidden, step = np.zeros(nearest.shape, np.float32), 2 * oversampling
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)):
        with np.errstate(invalid="ignore"):  # where both are background
            nearer = np.roll(nearest, (step * dy, step * dx), (0, 1)) - nearest - step
        hidden += np.nan_to_num(nearer, nan=0, posinf=0, neginf=0).clip(0, 10 * oversampling)
    shade = 1.12 * shade * np.exp(-hidden / (60 * oversampling))
    background = rgb(THEMES[theme].background) / np.float32(255)
    image = np.where((front_point >= 0)[..., None], colors[front_point] * shade[..., None], background)
    return image.clip(0, 1).reshape(height, oversampling, width, oversampling, 3).mean(axis=(1, 3))


def draw_neighborhood(axes: Any, patch: Patch, view: np.ndarray, reach: float | None = None,
                      theme: str = "dark") -> None:  # fmt: skip
    """Draw neighbours and kernel points, far ones first, and a line for each influence above 0.

    `reach` is half the width of the panel; by default the kernel fills it.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    page = THEMES[theme]
    ink = tuple(rgb(page.text) / 255) if theme == "light" else (1, 1, 1)
    points, kernel = patch.neighbors @ view.T, patch.kernel_points @ view.T
    total = patch.influence.sum(axis=0) / (patch.influence.sum(axis=0).max() or 1)
    reach = reach or 1.03 * (np.linalg.norm(kernel[:, :2], axis=1).max() + patch.extent)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.add_patch(Circle((0, 0), patch.radius, fill=False, ec=page.pale, lw=1.1, ls=(0, (6, 4))))
    for (x, y, _), weight in zip(kernel, total, strict=True):
        face, edge = (*ink, 0.01 + 0.05 * weight), (*ink, 0.08 + 0.3 * weight)
        axes.add_patch(Circle((x, y), patch.extent, fc=face, ec=edge, lw=0.8))

    n, k = np.nonzero(patch.influence)
    strength = patch.influence[n, k]
    colors = heat(strength, theme)
    colors[:, 3] = 0.35 + 0.65 * strength
    segments = np.stack([points[n, :2], kernel[k, :2]], axis=1)
    axes.add_collection(LineCollection(segments, colors=colors, linewidths=0.8 + 2.6 * strength, zorder=2))

    best = patch.influence.max(axis=1)
    balls = [(z, xy, 0.026, heat(h, theme) if h > 0 else page.pale) for (*xy, z), h in zip(points, best, strict=True)]
    balls += [(z, xy, 0.016 + 0.026 * w, page.text) for (*xy, z), w in zip(kernel, total, strict=True)]
    for _, xy, size, color in sorted(balls, key=lambda ball: ball[0]):
        axes.add_patch(Circle(xy, size * reach, fc=color, ec=page.background, lw=1, zorder=3))
