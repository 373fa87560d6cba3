"""Pictures of what networks learn: effective receptive fields, deformed kernels, activations on input points.

The fields are those of `kpcore.effective_receptive_field`. Functions take `up`, the direction of an axis that points
upwards in the picture: (0, 0, 1) for most scans.
"""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kpcore.config import require
from kpcore.picture import (
    GAP,
    MARGIN,
    MARK,
    TOP,
    Page,
    Patch,
    View,
    draw_neighborhood,
    draw_spheres,
    heat,
    in_one_line,
    shortened,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

__all__ = ["Activation", "ImageField", "Patch", "PointField", "draw_activations", "draw_image_fields", "draw_kernels",
           "draw_objects", "draw_point_fields", "write_html"]  # fmt: skip

PANEL, PANELS_PER_ROW = (620, 480), 4  # width and height in pixels
_FIELD_WORDS = "0", "root of the share of the largest value", "1"


def _check(name: str, array: np.ndarray, shape: tuple[str | int, ...], sizes: dict[str, int], low: float = -np.inf,
           high: float = np.inf) -> None:  # fmt: skip
    """Check the shape of an array, whose letters are the same `sizes` everywhere, and the range of its values."""
    array = np.asarray(array)
    expected = tuple(sizes.get(n, n) for n in shape)
    if array.ndim != len(shape) or any(
        isinstance(n, int) and n != m for n, m in zip(expected, array.shape, strict=True)
    ):
        raise ValueError(f"{name}: expected ({', '.join(map(str, expected))}), got {array.shape}")
    sizes.update({n: m for n, m in zip(shape, array.shape, strict=True) if isinstance(n, str)})
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one, got {array.shape}")
    if not ((array >= low) & (array <= high) & np.isfinite(array)).all():
        words = "finite values" if low == -np.inf else f"values from {low:g} to {high:g}" if high < np.inf else \
            f"finite values of at least {low:g}"  # fmt: skip
        raise ValueError(f"{name}: expected {words}, got {array.min():g} to {array.max():g}")


def _check_spacing(spacing: float) -> None:
    if not 0 < spacing < np.inf:
        raise ValueError(f"spacing: expected a length above zero, got {spacing}")


@dataclass(frozen=True, eq=False)
class PointField:
    """A field over a point cloud.

    Parameters
    ----------
    points : (N, 3) array
    colors : (N, 3) uint8, or None for grey
        Colours of the points, 0 to 255.
    values : (N,) array
        The field, at least 0.
    center : (3,) array
        The position of the output, which is marked green.
    spacing : float
        Distance of neighbouring points; they are drawn as balls of this diameter.
    name, note : str
        Written below the picture.

    Examples
    --------
    >>> import numpy as np
    >>> from kpcore.visualization import PointField
    >>> points = np.random.default_rng(0).random((1000, 3))
    >>> near = np.exp(-((points - 0.5) ** 2).sum(axis=1) / 0.02)
    >>> field = PointField(points, None, near, points[0], 0.1, "output 0")
    """

    points: np.ndarray
    colors: np.ndarray | None
    values: np.ndarray
    center: np.ndarray
    spacing: float
    name: str
    note: str = ""

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        _check("points", self.points, ("N", 3), sizes)
        _check("values", self.values, ("N",), sizes, low=0)
        _check("center", self.center, (3,), sizes)
        _check_spacing(self.spacing)
        if self.colors is not None:
            _check("colors", self.colors, ("N", 3), sizes)
            if np.asarray(self.colors).dtype != np.uint8:
                raise TypeError(f"colors: expected uint8, got {np.asarray(self.colors).dtype}")


@dataclass(frozen=True, eq=False)
class Activation:
    """The activation of a feature on the points of an input.

    Parameters
    ----------
    points : (n, 2) or (n, 3) array
    values : (n,) array
        The activation of each point.
    spacing : float
        Distance of neighbouring points; they are drawn as balls of this diameter.
    name, note : str
        Written below the picture.
    """

    points: np.ndarray
    values: np.ndarray
    spacing: float
    name: str
    note: str = ""

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        _check("points", self.points, ("n", 2 if np.shape(self.points)[1:] == (2,) else 3), sizes)
        _check("values", self.values, ("n",), sizes)
        _check_spacing(self.spacing)


@dataclass(frozen=True, eq=False)
class ImageField:
    """A field over an image.

    Parameters
    ----------
    image : (H, W) or (H, W, 3) array of floats
        From 0 to 1.
    values : (H, W) array
        The field, at least 0.
    center : sequence of two int
        Row and column of the output, which is marked green.
    name, note : str
        Written below the picture.
    """

    image: np.ndarray
    values: np.ndarray
    center: Sequence[int]
    name: str
    note: str = ""

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        colored = (3,) if np.ndim(self.image) == 3 else ()
        _check("image", self.image, ("H", "W", *colored), sizes, low=0, high=1)
        if np.asarray(self.image).dtype.kind != "f":
            raise TypeError(f"image: expected floats from 0 to 1, got {np.asarray(self.image).dtype}")
        _check("values", self.values, ("H", "W"), sizes, low=0)
        _check("center", self.center, (2,), sizes)
        if not all(0 <= at < size for at, size in zip(self.center, (sizes["H"], sizes["W"]), strict=True)):
            raise ValueError(f"center: expected a row and a column of {sizes['H']} x {sizes['W']}, got {self.center}")


def field_colors(values: np.ndarray, colors: np.ndarray | None = None) -> np.ndarray:
    """(N, 3) uint8: the heat of a field over darkened colours, by the square root of the share of its largest value.

    Most of the mass of a field is at values of a few per cent of the largest, which would look like none.
    """
    strength = np.sqrt(values / (values.max(initial=0) or 1))[:, None]
    base = np.full((len(values), 3), 150) if colors is None else colors
    gray = base @ np.array([0.3, 0.59, 0.11])
    pale = 0.55 * (0.75 * gray[:, None] + 0.25 * base)
    mix = np.minimum(1, 1.6 * strength)  # from 40 % on, 16 % of the largest value, only heat
    return ((1 - mix) * pale + mix * 255 * heat(0.25 + 0.75 * strength[:, 0])[:, :3]).astype(np.uint8)


def draw_point_fields(path: str | os.PathLike[str], title: str, subtitle: str, fields: Sequence[PointField],
                      up: Sequence[float], across: int = PANELS_PER_ROW, *, theme: str = "dark") -> None:  # fmt: skip
    """Write a picture of fields over point clouds, as in figure 7 of Thomas et al. 2019; the outputs are green.

    theme : "dark" or "light", of the page, as for all pictures
    """
    _check_not_empty("fields", fields)
    images = []
    for field in fields:
        view = _view(field, up)
        colors = field_colors(field.values, field.colors)
        images.append(view.render(field.points, colors, field.spacing / 2, *PANEL, mark=field.center, theme=theme))
    page = _panels(title, subtitle, images, [(field.name, field.note) for field in fields], across, theme)
    _legend(page, field_colors(np.linspace(0, 1, 256) ** 2)[None], *_FIELD_WORDS)
    page.write(path)


def draw_image_fields(path: str | os.PathLike[str], title: str, subtitle: str, fields: Sequence[ImageField],
                      across: int = PANELS_PER_ROW, *, theme: str = "dark") -> None:  # fmt: skip
    """Write a picture of heat maps of fields over images; the pixels of the outputs are green."""
    _check_not_empty("fields", fields)
    images = []
    for field in fields:
        image = np.broadcast_to(np.atleast_3d(255 * field.image), (*field.values.shape, 3))
        colors = field_colors(field.values.ravel(), image.reshape(-1, 3)).reshape(image.shape)
        colors[tuple(field.center)] = MARK
        images.append(colors)
    page = _panels(title, subtitle, images, [(field.name, field.note) for field in fields], across, theme)
    _legend(page, field_colors(np.linspace(0, 1, 256) ** 2)[None], *_FIELD_WORDS)
    page.write(path)


def draw_activations(path: str | os.PathLike[str], title: str, subtitle: str, features: Sequence[Sequence[Activation]],
                     up: Sequence[float], *, cut: bool = True, theme: str = "dark") -> None:  # fmt: skip
    """Write a picture of activations on input points, as in figure 6 of Thomas et al. 2019.

    features : the inputs of each feature, which share a scale of colours
    cut : whether rooms are shown without their ceiling, which a table could be taken for
    """
    colormaps = require("matplotlib", "plot").colormaps
    _check_not_empty("features", features)
    images = []
    for inputs in features:
        if isinstance(inputs, Activation):
            raise TypeError("features: expected a sequence of inputs for each feature, got an Activation")
        values = np.concatenate([one.values for one in inputs])
        low, range_of_values = values.min(), np.ptp(values) or 1
        for one in inputs:
            colors = colormaps["coolwarm"]((one.values - low) / range_of_values, bytes=True)[:, :3]
            images.append(_cloud_image(one.points, colors, one.spacing, up, cut, theme))
    captions = [(one.name, one.note) for inputs in features for one in inputs]
    page = _panels(title, subtitle, images, captions, PANELS_PER_ROW, theme)
    _legend(page, colormaps["coolwarm"](np.linspace(0, 1, 256))[None], "lowest", "activation", "highest")
    page.write(path)


def draw_objects(path: str | os.PathLike[str], title: str, subtitle: str, objects: Sequence[Activation], *,
                 theme: str = "dark") -> None:  # fmt: skip
    """Write a picture of objects in a grid, coloured by height or other values."""
    colormaps = require("matplotlib", "plot").colormaps
    _check_not_empty("objects", objects)
    images = []
    for one in objects:
        low, range_of_values = one.values.min(), np.ptp(one.values) or 1
        colors = colormaps["viridis"]((one.values - low) / range_of_values, bytes=True)[:, :3]
        images.append(_cloud_image(one.points, colors, one.spacing, (0, 0, 1), cut=False, theme=theme))
    captions = [(one.name, one.note) for one in objects]
    _panels(title, subtitle, images, captions, PANELS_PER_ROW, theme).write(path)


def draw_kernels(path: str | os.PathLike[str], title: str, subtitle: str, patches: Sequence[Patch],
                 up: Sequence[float], *, theme: str = "dark") -> None:  # fmt: skip
    """Write a picture of kernel points over a neighbourhood, before and after they are moved.

    patches : one for each panel; `Patch.with_linear_influence(neighbors, kernel_points, radius, extent, caption)` makes
        one of neighbours (H, 3) and kernel points (K, 3) relative to the query
    """
    _check_not_empty("patches", patches)
    width = 2 * MARGIN + len(patches) * PANEL[0] + (len(patches) - 1) * GAP
    page = Page(width, TOP + PANEL[0] + 80, title, subtitle, theme)
    reach = 1.03 * max(np.linalg.norm([*p.kernel_points, *p.neighbors], axis=1).max() for p in patches)
    axes = View(patches[0].neighbors, _upward(up), cut=False).axes
    for number, patch in enumerate(patches):
        x = MARGIN + number * (PANEL[0] + GAP)
        draw_neighborhood(page.panel(x, TOP, PANEL[0], PANEL[0]), patch, axes, reach, theme)
        near = np.count_nonzero(patch.influence.any(axis=1))
        words = f"{patch.caption}: influence on {near} of {len(patch.neighbors)} neighbours"
        page.text(x + PANEL[0] / 2, TOP + PANEL[0] + 34, shortened(words, PANEL[0], 11), 11, ha="center")
    page.write(path)


def write_html(path: str | os.PathLike[str], field: PointField, up: Sequence[float]) -> None:
    """Write a page with a field over a point cloud that the mouse turns; it holds the points and loads nothing.

    The browser needs WebGL 2, which all have since 2021. A point takes 20 bytes: a million are a page of 20 MB.
    """
    view = _view(field, up)
    right, above = view.axes[0], _upward(up)
    points = (field.points - field.center) @ np.array([right, np.cross(above, right), above]).T
    # The output is the last point.
    colors = np.concatenate([field_colors(field.values, field.colors), np.array([MARK], np.uint8)])
    words = f"{field.name}: {field.note}" if field.note else field.name
    values = {
        "TITLE": html.escape(in_one_line(words)),
        "SPACING": repr(float(field.spacing)),
        "POINTS": _encoded(np.concatenate([points, np.zeros((1, 3))]).astype("<f4")),
        "COLORS": _encoded(colors),
    }
    Path(path).write_text(filled(Path(__file__).with_name("point_cloud.html"), values), encoding="utf-8")


def filled(template: Path, values: Mapping[str, str]) -> str:
    """The text of a template in which each {{NAME}} is replaced by the value of that name."""
    text = template.read_text(encoding="utf-8")
    return re.sub("{{([A-Z]+)}}", lambda name: values[name[1]], text)  # in one pass: a value may have braces itself


def _check_not_empty(name: str, values: Sequence[object]) -> None:
    if len(values) == 0:
        raise ValueError(f"{name}: expected at least one, got none")


def _upward(up: Sequence[float]) -> np.ndarray:
    """`up` with length 1; an error unless it is along an axis."""
    direction = np.array(up, float)
    if direction.shape != (3,) or np.count_nonzero(direction) != 1 or not np.isfinite(direction).all():
        raise ValueError(f"up: expected the direction of an axis such as (0, 0, 1), got {up}")
    return np.sign(direction)


def _encoded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _view(field: PointField, up: Sequence[float]) -> View:
    """A view in which ceiling and near walls are cut away, unless the output is there."""
    view = View(field.points, _upward(up))
    return view if view.shows(field.center[None])[0] else View(field.points, _upward(up), cut=False)


def _cloud_image(points: np.ndarray, colors: np.ndarray, spacing: float, up: Sequence[float],
                 cut: bool = True, theme: str = "dark") -> np.ndarray:  # fmt: skip
    """An image of a cloud; one of two dimensions is seen from above. With `cut` a room is shown without its ceiling."""
    if points.shape[1] == 3:
        return View(points, _upward(up), cut).render(points, colors, spacing / 2, *PANEL, theme=theme)
    flat = np.column_stack([points, np.zeros(len(points))])
    box = np.array([flat.min(0), flat.max(0)])
    return draw_spheres(flat, colors / np.float32(255), spacing / 2, box, *PANEL, theme)


def _panels(title: str, subtitle: str, images: Sequence[np.ndarray], captions: Sequence[tuple[str, str]],
            across: int, theme: str) -> Page:  # fmt: skip
    """A page with images in rows, each with a name and a note below, and room for a legend."""
    if across < 1:
        raise ValueError(f"across: expected at least 1, got {across}")
    across = min(across, len(images))
    width, height = PANEL
    rows = -(-len(images) // across)
    page = Page(2 * MARGIN + across * (width + GAP) - GAP, TOP + rows * (height + 90) + 80, title, subtitle, theme)
    for number, (image, (name, note)) in enumerate(zip(images, captions, strict=True)):
        x, y = MARGIN + number % across * (width + GAP), TOP + number // across * (height + 90)
        h, w = image.shape[:2]
        scale = min(width / w, height / h)  # images of other proportions are centred
        page.show(image, x + (width - scale * w) / 2, y + (height - scale * h) / 2, scale * w, scale * h)
        page.text(x + width / 2, y + height + 30, shortened(name, width, 11, bold=True), 11, weight="bold", ha="center")
        page.text(x + width / 2, y + height + 56, shortened(note, width, 9.5), 9.5, page.theme.pale, ha="center")
    return page


def _legend(page: Page, scale: np.ndarray, low: str, words: str, high: str) -> None:
    left, width, y = MARGIN, min(PANEL[0], page.width - 2 * MARGIN), page.height - 80
    page.show(scale, left, y, width, 14)
    for x, text, side in ((0, low, "left"), (width / 2, words, "center"), (width, high, "right")):
        page.text(left + x, y + 40, text, 10, page.theme.pale, ha=side)
