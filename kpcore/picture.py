"""Pictures of point clouds: points are shaded spheres drawn into a z-buffer in NumPy; matplotlib adds the text."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpcore.config import require

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from kpcore.io import Cloud

BACKGROUND, TEXT, PALE_TEXT = "#0f1319", "#e9ecf0", "#8d98a7"
MARK = (60, 220, 90)
DPI, MARGIN, GAP, TOP = 150, 48, 24, 130  # lengths are in pixels
MAIN_SIZE = (1560, 860)  # of the cloud
NEIGHBORHOOD_SIZE = 720
LEVEL_HEIGHT, LEVELS_PER_ROW = 300, 5


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
         levels: Sequence[tuple[np.ndarray, np.ndarray | None, float, str, str]], patch: Patch) -> None:  # fmt: skip
    """Write the picture of `kpcore demo FILE`: the cloud, one neighbourhood beside it, the levels below.

    levels : (points, colors or None, voxel, name, numbers as text) of each, the finest first.
    """
    view = View(cloud.points, np.array(cloud.up, float))
    across = min(len(levels), LEVELS_PER_ROW)
    rows = -(-len(levels) // across)
    width = 2 * MARGIN + MAIN_SIZE[0] + GAP + NEIGHBORHOOD_SIZE
    height = TOP + MAIN_SIZE[1] + rows * (LEVEL_HEIGHT + 100) + 40
    page = Page(width, height, title, subtitle)
    radius = min(0.5 * levels[0][2], 3 * view.pixel(*MAIN_SIZE)) or 0.5 * levels[0][2]
    page.show(view.render(cloud.points, cloud.colors, radius, *MAIN_SIZE), MARGIN, TOP, *MAIN_SIZE)

    left = MARGIN + MAIN_SIZE[0] + GAP
    page.text(left, 66, "One neighbourhood of level 0", 13, weight="bold")
    page.text(left, 104, patch.caption, 10, PALE_TEXT)
    draw_neighborhood(page.panel(left, TOP, NEIGHBORHOOD_SIZE, NEIGHBORHOOD_SIZE), patch, view.axes)
    page.show(heat(np.linspace(0, 1, 256))[None], left + 60, TOP + NEIGHBORHOOD_SIZE + 24, NEIGHBORHOOD_SIZE - 120, 14)
    for x, words in (
        (60, "0"),
        (NEIGHBORHOOD_SIZE / 2, "influence = max(0, 1 − distance / extent)"),
        (NEIGHBORHOOD_SIZE - 60, "1"),
    ):
        page.text(left + x, TOP + NEIGHBORHOOD_SIZE + 70, words, 10, PALE_TEXT, ha="center")
    page.text(
        left + NEIGHBORHOOD_SIZE / 2,
        TOP + NEIGHBORHOOD_SIZE + 106,
        "white: kernel points, larger where influence adds up",
        10,
        PALE_TEXT,
        ha="center",
    )

    w = (width - 2 * MARGIN - (LEVELS_PER_ROW - 1) * GAP) // LEVELS_PER_ROW
    for i, (points, colors, voxel, name, numbers) in enumerate(levels):
        x, y = MARGIN + i % across * (w + GAP), TOP + MAIN_SIZE[1] + 40 + i // across * (LEVEL_HEIGHT + 100)
        page.show(view.render(points, colors, 0.5 * voxel, w, LEVEL_HEIGHT), x, y, w, LEVEL_HEIGHT)
        page.text(x + w / 2, y + LEVEL_HEIGHT + 26, name, 10.5, weight="bold", ha="center")
        page.text(x + w / 2, y + LEVEL_HEIGHT + 50, numbers, 9.5, PALE_TEXT, ha="center")
    page.write(path)


def class_colors(number: int) -> np.ndarray:
    """(number, 3) uint8 colours that are easy to tell apart."""
    colormaps = require("matplotlib", "plot").colormaps
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # strong colours before pale ones
    return np.array([colormaps["tab20"](order[i % 20], bytes=True)[:3] for i in range(number)], np.uint8)


def draw_classes(path: Path, title: str, subtitle: str, cloud: Cloud, panels: Sequence[tuple[str, np.ndarray]],
                 legend: Sequence[tuple[str, np.ndarray]]) -> None:  # fmt: skip
    """Write a picture of a cloud in several colourings.

    panels : (name, (N, 3) uint8 colours) of each; legend : (name, colour) of each class.
    """
    view, w = View(cloud.points, np.array(cloud.up, float)), 1100
    across_box, up_box = (view.box[1] - view.box[0])[:2]
    h = int(np.clip(w * up_box / (across_box or 1), 300, 1100))
    width = 2 * MARGIN + len(panels) * w + (len(panels) - 1) * GAP
    across = max(1, (width - 2 * MARGIN) // 220)
    height = TOP + h + 70 + 36 * -(-len(legend) // across) + 30
    page = Page(width, height, title, subtitle)
    radius = 3 * view.pixel(w, h) or 1.0  # of a single point
    for i, (name, colors) in enumerate(panels):
        x = MARGIN + i * (w + GAP)
        page.show(view.render(cloud.points, colors, radius, w, h), x, TOP, w, h)
        page.text(x + w / 2, TOP + h + 34, name, 11, weight="bold", ha="center")
    for i, (name, color) in enumerate(legend):
        x, y = MARGIN + i % across * 220, TOP + h + 80 + 36 * (i // across)
        page.text(x, y, "●", 12, tuple(color / 255))
        page.text(x + 26, y, shortened(name, 190, 10), 10, PALE_TEXT)
    page.write(path)


def draw_confusion(path: Path, title: str, subtitle: str, names: Sequence[str], confusion: np.ndarray) -> None:
    """Write a picture of a confusion matrix: a row for each true class, shaded by its fraction of the row."""
    cell, left = 56, 220
    side = cell * len(names)
    page = Page(max(left + side + 2 * MARGIN, 900), TOP + side + 160, title, subtitle)
    fraction = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    page.show(heat(fraction), MARGIN + left, TOP, side, side)
    for i, name in enumerate(names):
        middle = TOP + (i + 0.6) * cell
        page.text(MARGIN + left - 14, middle, shortened(name, left - 14, 9), 9, ha="right")
        below = MARGIN + left + (i + 0.5) * cell
        page.text(
            below + 8, TOP + side + 22, shortened(name, 150, 9), 9, rotation=60, ha="right", rotation_mode="anchor"
        )
        for j in np.flatnonzero(confusion[i]):
            x = MARGIN + left + (j + 0.5) * cell
            page.text(x, middle, str(confusion[i, j]), 8, "black" if fraction[i, j] > 0.6 else TEXT, ha="center")
    page.write(path)


class Page:
    """A figure with a title; positions are in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str, subtitle: str) -> None:
        figure = require("matplotlib.figure", "plot")
        self.width, self.height = width, height
        self.figure = figure.Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
        self.text(MARGIN, 66, shortened(title, width - 2 * MARGIN, 21, bold=True), 21, weight="bold")
        self.text(MARGIN, 104, shortened(subtitle, width - 2 * MARGIN, 11), 11, PALE_TEXT)

    def text(self, x: float, y: float, words: str, size: float, color: Any = TEXT, **style: Any) -> None:
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, words, size=size, color=color, va="baseline", **style)

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
    letter = (0.62 if bold else 0.53) * size * DPI / 72  # the mean width
    words, most = in_one_line(words), int(width / letter)
    if len(words) > most:
        words = f"{words[: most // 2 - 1]} … {words[len(words) - most // 2 + 2 :]}"
    return words.replace("$", r"\$")


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
        low, high = np.percentile(points, [1.5, 98.5], axis=0)  # outliers must not shrink the rest
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
        """(right, above, toward) as rows: the first direction that covers 95 % of the image cells of the best one."""
        if self.up[1]:  # the frame of a depth camera: seen from beside the camera
            return _axes(np.array([0.25, 0.15, -1.0]), self.up)
        elevation = np.radians(50 if room else 30)
        azimuths = (-68, -112, 112, 68, -22, -158, 158, 22) if room else range(-75, 285, 15)
        candidates = []
        for azimuth in np.radians(azimuths):
            level = np.cos(elevation) * np.array([np.cos(azimuth), np.sin(azimuth)])
            axes = _axes(np.array([*level, np.sin(elevation)]), self.up)
            flat = points @ axes[:2].T
            cell = max(np.ptp(flat, axis=0) / [120, 66]) or 1  # the aspect ratio of MAIN_SIZE
            candidates.append((np.unique(np.floor((flat - flat.min(axis=0)) / cell) @ [1, 256]).size, axes))
        most_cells = max(cells for cells, _ in candidates)
        return next(axes for cells, axes in candidates if cells >= 0.95 * most_cells)

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
               mark: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
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
        return draw_spheres(flat, colors, radius, self.box, width, height)


def _axes(toward: np.ndarray, up: np.ndarray) -> np.ndarray:
    """(right, above, toward) as rows: the axes of the image and the direction to the viewer."""
    toward = toward / np.linalg.norm(toward)
    right = np.cross(up, toward)
    right /= np.linalg.norm(right)
    return np.array([right, np.cross(toward, right), toward])


def _heights(fraction: np.ndarray) -> np.ndarray:
    colormaps = require("matplotlib", "plot").colormaps
    return colormaps["viridis"](0.15 + 0.83 * fraction)[:, :3].astype(np.float32)


def heat(influence: np.ndarray) -> np.ndarray:
    colormaps = require("matplotlib", "plot").colormaps
    return colormaps["plasma"](0.2 + 0.8 * influence)


def draw_spheres(flat: np.ndarray, colors: np.ndarray, radius: float, box: np.ndarray, width: int,
           height: int) -> np.ndarray:  # fmt: skip
    """An image of points, which are already in the axes of the view, as shaded spheres in a z-buffer."""
    oversampling = 2  # drawn twice as large, then averaged
    columns, rows = oversampling * width, oversampling * height
    scale = min([columns, rows] / ((box[1] - box[0])[:2] + 2 * radius))
    scale = min(scale, 32 * oversampling / radius)  # a single point does not fill the page
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
    background = np.array([int(BACKGROUND[i : i + 2], 16) / 255 for i in (1, 3, 5)], np.float32)
    image = np.where((front_point >= 0)[..., None], colors[front_point] * shade[..., None], background)
    return image.clip(0, 1).reshape(height, oversampling, width, oversampling, 3).mean(axis=(1, 3))


def draw_neighborhood(axes: Any, patch: Patch, view: np.ndarray, reach: float | None = None) -> None:
    """Draw neighbours and kernel points, far ones first, and a line for each influence above 0.

    `reach` is half the width of the panel; by default the kernel fills it.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    points, kernel = patch.neighbors @ view.T, patch.kernel_points @ view.T
    total = patch.influence.sum(axis=0) / (patch.influence.sum(axis=0).max() or 1)
    reach = reach or 1.03 * (np.linalg.norm(kernel[:, :2], axis=1).max() + patch.extent)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.add_patch(Circle((0, 0), patch.radius, fill=False, ec=PALE_TEXT, lw=1.1, ls=(0, (6, 4))))
    for (x, y, _), weight in zip(kernel, total, strict=True):
        face, edge = (1, 1, 1, 0.01 + 0.05 * weight), (1, 1, 1, 0.08 + 0.3 * weight)
        axes.add_patch(Circle((x, y), patch.extent, fc=face, ec=edge, lw=0.8))

    n, k = np.nonzero(patch.influence)
    strength = patch.influence[n, k]
    colors = heat(strength)
    colors[:, 3] = 0.35 + 0.65 * strength
    segments = np.stack([points[n, :2], kernel[k, :2]], axis=1)
    axes.add_collection(LineCollection(segments, colors=colors, linewidths=0.8 + 2.6 * strength, zorder=2))

    best = patch.influence.max(axis=1)
    balls = [(z, xy, 0.026, heat(h) if h > 0 else PALE_TEXT) for (*xy, z), h in zip(points, best, strict=True)]
    balls += [(z, xy, 0.016 + 0.026 * w, TEXT) for (*xy, z), w in zip(kernel, total, strict=True)]
    for _, xy, size, color in sorted(balls, key=lambda ball: ball[0]):
        axes.add_patch(Circle(xy, size * reach, fc=color, ec=BACKGROUND, lw=1, zorder=3))
