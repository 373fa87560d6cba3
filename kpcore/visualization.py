"""Pictures of what networks learn: effective receptive fields, deformed kernels, activations on input points.

The fields are those of `kpcore.effective_receptive_field`.
"""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kpcore.picture import GAP, MARGIN, MARK, PALE_TEXT, TOP, Page, View, draw_neighborhood, draw_spheres, heat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kpcore.picture import Patch

__all__ = ["Activation", "ImageField", "PointField", "draw_activations", "draw_image_fields", "draw_kernels",
           "draw_point_fields", "write_html"]  # fmt: skip

PANEL, PANELS_PER_ROW = (620, 480), 4  # width and height in pixels
_FIELD_WORDS = "0", "root of the share of the largest value", "1"


@dataclass(frozen=True, eq=False)
class PointField:
    """A field over a point cloud."""

    points: np.ndarray  #: (N, 3)
    colors: np.ndarray | None  #: (N, 3) uint8 colours of the points
    values: np.ndarray  #: (N,) the field
    center: np.ndarray  #: (3,) the position of the output
    spacing: float  #: distance of neighbouring points
    name: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class Activation:
    """The activation of a feature on the points of an input."""

    points: np.ndarray  #: (n, 2) or (n, 3)
    values: np.ndarray  #: (n,) the activation
    spacing: float  #: distance of neighbouring points
    name: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class ImageField:
    """A field over an image."""

    image: np.ndarray  #: (H, W) or (H, W, 3), from 0 to 1
    values: np.ndarray  #: (H, W) the field
    center: tuple[int, int]  #: row and column of the output
    name: str
    note: str = ""


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


def draw_point_fields(path: Path, title: str, subtitle: str, fields: Sequence[PointField], up: Sequence[float],
                      across: int = PANELS_PER_ROW) -> None:  # fmt: skip
    """Write a picture of fields over point clouds, as in figure 7 of Thomas et al. 2019; the outputs are green."""
    images = []
    for field in fields:
        view = _view(field, up)
        colors = field_colors(field.values, field.colors)
        images.append(view.render(field.points, colors, field.spacing / 2, *PANEL, mark=field.center))
    page = _panels(title, subtitle, images, [(field.name, field.note) for field in fields], across)
    _legend(page, field_colors(np.linspace(0, 1, 256) ** 2)[None], *_FIELD_WORDS)
    page.write(path)


def draw_image_fields(path: Path, title: str, subtitle: str, fields: Sequence[ImageField],
                      across: int = PANELS_PER_ROW) -> None:  # fmt: skip
    """Write a picture of heat maps of fields over images; the pixels of the outputs are green."""
    images = []
    for field in fields:
        image = np.broadcast_to(np.atleast_3d(255 * field.image), (*field.values.shape, 3))
        colors = field_colors(field.values.ravel(), image.reshape(-1, 3)).reshape(image.shape)
        colors[field.center] = MARK
        images.append(colors)
    page = _panels(title, subtitle, images, [(field.name, field.note) for field in fields], across)
    _legend(page, field_colors(np.linspace(0, 1, 256) ** 2)[None], *_FIELD_WORDS)
    page.write(path)


def draw_activations(path: Path, title: str, subtitle: str, features: Sequence[Sequence[Activation]],
                     up: Sequence[float], *, cut: bool = True) -> None:  # fmt: skip
    """Write a picture of activations on input points, as in figure 6 of Thomas et al. 2019.

    features : the inputs of each feature, which share a scale of colours
    cut : whether rooms are shown without their ceiling, which a table could be taken for
    """
    from matplotlib import colormaps

    images = []
    for inputs in features:
        values = np.concatenate([one.values for one in inputs])
        low, range_of_values = values.min(), np.ptp(values) or 1
        for one in inputs:
            colors = colormaps["coolwarm"]((one.values - low) / range_of_values, bytes=True)[:, :3]
            images.append(_cloud_image(one.points, colors, one.spacing, up, cut))
    captions = [(one.name, one.note) for inputs in features for one in inputs]
    page = _panels(title, subtitle, images, captions, PANELS_PER_ROW)
    _legend(page, colormaps["coolwarm"](np.linspace(0, 1, 256))[None], "lowest", "activation", "highest")
    page.write(path)


def draw_objects(path: Path, title: str, subtitle: str, objects: Sequence[Activation]) -> None:
    """Write a picture of objects in a grid, coloured by height or other values."""
    from matplotlib import colormaps

    images = []
    for one in objects:
        low, range_of_values = one.values.min(), np.ptp(one.values) or 1
        colors = colormaps["viridis"]((one.values - low) / range_of_values, bytes=True)[:, :3]
        images.append(_cloud_image(one.points, colors, one.spacing, (0, 0, 1), cut=False))
    _panels(title, subtitle, images, [(one.name, one.note) for one in objects], PANELS_PER_ROW).write(path)


def draw_kernels(path: Path, title: str, subtitle: str, patches: Sequence[Patch], up: Sequence[float]) -> None:
    """Write a picture of kernel points over a neighbourhood, before and after they are moved."""
    width = 2 * MARGIN + len(patches) * PANEL[0] + (len(patches) - 1) * GAP
    page = Page(width, TOP + PANEL[0] + 80, title, subtitle)
    reach = 1.03 * max(np.linalg.norm([*p.kernel_points, *p.neighbors], axis=1).max() for p in patches)
    axes = View(patches[0].neighbors, np.array(up, float), cut=False).axes
    for number, patch in enumerate(patches):
        x = MARGIN + number * (PANEL[0] + GAP)
        draw_neighborhood(page.panel(x, TOP, PANEL[0], PANEL[0]), patch, axes, reach)
        near = np.count_nonzero(patch.influence.any(axis=1))
        words = f"{patch.caption}: influence on {near} of {len(patch.neighbors)} neighbours"
        page.text(x + PANEL[0] / 2, TOP + PANEL[0] + 34, words, 11, ha="center")
    page.write(path)


def write_html(path: Path, field: PointField, up: Sequence[float]) -> None:
    """Write a page with a field over a point cloud that the mouse turns; it holds the points and loads nothing."""
    view = _view(field, up)
    right, above = view.axes[0], np.array(up, float)
    points = (field.points - field.center) @ np.array([right, np.cross(above, right), above]).T
    words = html.escape(f"{field.name}: {field.note}".encode("utf-8", "backslashreplace").decode())
    page = Path(__file__).with_name("point_cloud.html").read_text(encoding="utf-8")
    for name, value in (
        ("TITLE", words),
        ("SPACING", repr(float(field.spacing))),
        ("POINTS", _encoded(points.astype("<f4"))),
        ("COLORS", _encoded(field_colors(field.values, field.colors))),
    ):
        page = page.replace(f"{{{{{name}}}}}", value)
    path.write_text(page, encoding="utf-8")


def _encoded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _view(field: PointField, up: Sequence[float]) -> View:
    """A view in which ceiling and near walls are cut away, unless the output is there."""
    view = View(field.points, np.array(up, float))
    return view if view.shows(field.center[None])[0] else View(field.points, np.array(up, float), cut=False)


def _cloud_image(points: np.ndarray, colors: np.ndarray, spacing: float, up: Sequence[float],
                 cut: bool = True) -> np.ndarray:  # fmt: skip
    """An image of a cloud; one of two dimensions is seen from above. With `cut` a room is shown without its ceiling."""
    if points.shape[1] == 3:
        return View(points, np.array(up, float), cut).render(points, colors, spacing / 2, *PANEL)
    flat = np.column_stack([points, np.zeros(len(points))])
    return draw_spheres(flat, colors / np.float32(255), spacing / 2, np.array([flat.min(0), flat.max(0)]), *PANEL)


def _panels(title: str, subtitle: str, images: Sequence[np.ndarray], captions: Sequence[tuple[str, str]],
            across: int) -> Page:  # fmt: skip
    """A page with images in rows, each with a name and a note below, and room for a legend."""
    across = min(across, len(images))
    width, height = PANEL
    rows = -(-len(images) // across)
    page = Page(2 * MARGIN + across * (width + GAP) - GAP, TOP + rows * (height + 90) + 80, title, subtitle)
    for number, (image, (name, note)) in enumerate(zip(images, captions, strict=True)):
        x, y = MARGIN + number % across * (width + GAP), TOP + number // across * (height + 90)
        h, w = image.shape[:2]
        scale = min(width / w, height / h)  # images of other proportions are centred
        page.show(image, x + (width - scale * w) / 2, y + (height - scale * h) / 2, scale * w, scale * h)
        page.text(x + width / 2, y + height + 30, name, 11, weight="bold", ha="center")
        page.text(x + width / 2, y + height + 56, note, 9.5, PALE_TEXT, ha="center")
    return page


def _legend(page: Page, scale: np.ndarray, low: str, words: str, high: str) -> None:
    left, width, y = MARGIN, min(PANEL[0], page.width - 2 * MARGIN), page.height - 80
    page.show(scale, left, y, width, 14)
    for x, text, side in ((0, low, "left"), (width / 2, words, "center"), (width, high, "right")):
        page.text(left + x, y + 40, text, 10, PALE_TEXT, ha=side)
