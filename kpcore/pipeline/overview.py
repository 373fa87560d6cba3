"""The picture of a whole survey from above, from counts of points that workers add up: no point is held."""

from __future__ import annotations

import math
import zipfile
from typing import TYPE_CHECKING

import numpy as np

from kpcore import picture
from kpcore.files import replacing
from kpcore.pipeline.colors import named_colors
from kpcore.pipeline.surveys import are_far

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from kpcore.io import Reference
    from kpcore.pipeline.settings import Settings

__all__ = ["Overview"]

_BLOCK = 1 << 18  # points that are counted at once: about 20 MB
_LARGEST_COUNT = 2**32 - 1


class Overview:
    """Numbers of points by class in the pixels of a map.

    Pixels are squares, at most ``most_pixels ** 2`` of them and at most ``2 * most_pixels`` along an axis. Four bytes a
    pixel for each class and for points without a class: at most 4 MB · (num_classes + 1) by default. Pixels to which
    nothing is added take no memory on Linux.

    Parameters
    ----------
    low, high : (2,) or (3,) float64
        Corners of the box of the survey, in coordinates of the map. Only x and y are read.
    num_classes : int
    most_pixels : int

    Attributes
    ----------
    counts : (num_classes + 1, rows, columns) uint32
        Numbers of points; the last are those of points without a class. The first row is that of the smallest y.
        Beyond 2³² - 1 a number stays there.
    totals : (num_classes + 1,) int64
        Numbers of all points, inside of the box and outside.
    outside : int
        The number of points more than a pixel outside of the box, which are in no pixel.

    Examples
    --------
    >>> import numpy as np
    >>> from kpcore.pipeline.overview import Overview
    >>> overview = Overview((85_000, 446_000), (86_000, 446_500), num_classes=2, most_pixels=4)
    >>> overview.add(np.array([[85_010.0, 446_020.0], [85_020.0, 446_030.0], [85_990.0, 446_490.0]]), np.array([1, 1, -1]))
    >>> overview.counts[1]
    array([[2, 0, 0, 0, 0],
           [0, 0, 0, 0, 0],
           [0, 0, 0, 0, 0]], dtype=uint32)
    >>> overview.totals
    array([0, 2, 1])
    """  # noqa: E501

    counts: np.ndarray
    totals: np.ndarray
    outside: int

    def __init__(self, low: Sequence[float], high: Sequence[float], num_classes: int, most_pixels: int = 1000) -> None:
        self.low, self.high = (np.array(corner, np.float64)[:2] for corner in (low, high))
        for name, corner in (("low", self.low), ("high", self.high)):
            if corner.shape != (2,) or not np.isfinite(corner).all():
                raise ValueError(f"{name}: expected two finite coordinates, got {corner.tolist()}")
        if (self.low > self.high).any():
            raise ValueError(f"high: expected at least low, {self.low.tolist()}, got {self.high.tolist()}")
        for name, value in (("num_classes", num_classes), ("most_pixels", most_pixels)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.most_pixels = int(most_pixels)
        size = self.high - self.low
        longer, shorter = size.max(), size.min()
        # Rounded up, a survey as wide as it is high, and one much longer, have no more pixels than they may.
        side = max(math.sqrt(longer * shorter) / self.most_pixels, longer / (2 * self.most_pixels))
        self.pixel = float(side) or 1.0
        columns, rows = (min(2 * self.most_pixels, math.floor(extent / self.pixel) + 1) for extent in size)
        while rows * columns > max(self.most_pixels**2, 2 * self.most_pixels):
            self.pixel *= 1.0 + 0.5 / self.most_pixels
            columns, rows = (math.floor(extent / self.pixel) + 1 for extent in size)
        self.counts = np.zeros((num_classes + 1, rows, columns), np.uint32)
        self.totals = np.zeros(num_classes + 1, np.int64)
        self.outside = 0
        self._used = np.array([rows, columns, 0, 0])  # first row and column, last row and column + 1 with points

    @property
    def num_classes(self) -> int:
        return len(self.counts) - 1

    def add(self, xy: np.ndarray, classes: np.ndarray) -> None:
        """Count points.

        xy : (n, 2) or (n, 3) float64 coordinates of the map
        classes : (n,) integers; negative ones are of points without a class
        """
        xy, classes = np.asarray(xy), np.asarray(classes)
        if xy.ndim != 2 or xy.shape[1] not in (2, 3) or xy.dtype != np.float64:
            raise ValueError(f"xy: expected (n, 2) float64, got {xy.shape} {xy.dtype}")
        if classes.shape != (len(xy),) or classes.dtype.kind not in "iu":
            raise ValueError(f"classes: expected ({len(xy)},) integers, got {classes.shape} {classes.dtype}")
        if len(classes) and (largest := classes.max()) >= self.num_classes:
            raise ValueError(f"classes: expected at most {self.num_classes - 1}, got {largest}")
        for begin in range(0, len(xy), _BLOCK):
            self._add_block(xy[begin : begin + _BLOCK], classes[begin : begin + _BLOCK])

    def _add_block(self, xy: np.ndarray, classes: np.ndarray) -> None:
        numbers = np.where(classes < 0, self.num_classes, classes).astype(np.int64)
        self.totals += np.bincount(numbers, minlength=len(self.totals))
        rows_columns, inside = [], np.ones(len(xy), bool)
        for axis, size in ((1, self.counts.shape[1]), (0, self.counts.shape[2])):
            place = (xy[:, axis] - self.low[axis]) / self.pixel
            inside &= (place >= -1) & (place < size + 1)  # not if NaN; boxes in headers are rounded
            rows_columns.append(place)
        if not inside.all():
            self.outside += len(xy) - int(np.count_nonzero(inside))
            numbers, rows_columns = numbers[inside], [place[inside] for place in rows_columns]
        if not len(numbers):
            return
        rows, columns = (
            np.clip(place.astype(np.int64), 0, size - 1)
            for place, size in zip(rows_columns, self.counts.shape[1:], strict=True)
        )
        # Points of a block are near each other, so that only a part of the raster is read and written.
        first = np.array([rows.min(), columns.min()])
        size = np.array([rows.max(), columns.max()]) + 1 - first
        flat = (numbers * size[0] + (rows - first[0])) * size[1] + (columns - first[1])
        if len(self.totals) * size.prod() <= 4 * _BLOCK:
            counted = np.bincount(flat, minlength=len(self.totals) * size.prod())
            self._sum(counted.reshape(-1, *size), first, size)
        else:
            flat = (numbers * self.counts.shape[1] + rows) * self.counts.shape[2] + columns
            places, counted = np.unique(flat, return_counts=True)
            values = self.counts.reshape(-1)
            values[places] = np.minimum(values[places] + counted, _LARGEST_COUNT)
            self._widen(first, size)

    def _sum(self, counted: np.ndarray, first: np.ndarray, size: np.ndarray) -> None:
        (row, column), (last_row, last_column) = first, first + size
        window = self.counts[:, row:last_row, column:last_column]
        if self.totals.max() > _LARGEST_COUNT:
            window[...] = np.minimum(window.astype(np.int64) + counted, _LARGEST_COUNT)
        else:
            window += counted.astype(np.uint32)
        self._widen(first, size)

    def _widen(self, first: np.ndarray, size: np.ndarray) -> None:
        self._used = np.concatenate([np.minimum(self._used[:2], first), np.maximum(self._used[2:], first + size)])

    def merge(self, other: Overview) -> None:
        """Add the numbers of another overview with the same box, classes and pixels."""
        for name in ("num_classes", "most_pixels", "low", "high"):
            here, there = getattr(self, name), getattr(other, name)
            if not np.array_equal(here, there):
                raise ValueError(f"other: expected {name} {np.array(here).tolist()}, got {np.array(there).tolist()}")
        self.totals += other.totals
        self.outside += other.outside
        first, size = other._used[:2], other._used[2:] - other._used[:2]
        if (size > 0).all():
            self._sum(other._window(), first, size)

    def _window(self) -> np.ndarray:
        row, column, last_row, last_column = self._used
        return self.counts[:, row:last_row, column:last_column]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the numbers to an NPZ file; only the part of the raster that has points."""
        with replacing(path) as part, open(part, "wb") as file:
            np.savez_compressed(
                file, low=self.low, high=self.high, most_pixels=self.most_pixels, totals=self.totals,
                outside=self.outside, used=self._used, window=self._window(),
            )  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Overview:
        """The overview that `save` wrote; a ValueError that names the file if it is damaged."""
        try:
            with open(path, "rb") as data, np.load(data, allow_pickle=False) as file:
                overview = cls(file["low"], file["high"], len(file["totals"]) - 1, int(file["most_pixels"]))
                overview.totals, overview.outside = file["totals"], int(file["outside"])
                overview._used = file["used"]
                overview._window()[...] = file["window"]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
            raise ValueError(f"{path}: expected an overview of a survey, got a damaged file: {error}") from None
        return overview

    def draw(self, path: str | os.PathLike[str], title: str, subtitle: str, names: Settings | Sequence[str],
             boxes: Sequence[tuple[str, Sequence[float], Sequence[float]]] = (), *, theme: str = "dark",
             unit: str | None = None, reference: Reference | None = None) -> None:  # fmt: skip
        """Write the picture: each pixel in the colour of the class that most of its points have.

        Where points are sparse, pixels are taken together in squares of 2, 4, ... up to 64.

        Parameters
        ----------
        path : str or Path
            Of a PNG file.
        title, subtitle : str
            Points outside of the box are told at the end of the subtitle.
        names : settings, of which classes have the colours of `colors.class_colors`; or names of classes
        boxes : sequence of (name, (2,) or (3,) lower corner, upper corner)
            Tiles, which are outlined; at most 40 are named.
        theme : "dark" or "light"
        unit : str, optional
            Of coordinates; by default that which `reference` states.
        reference : Reference, optional
            The coordinate reference system. Without one, and with one of an unknown kind, +y is the north of a map if
            the box is far from the origin (`kpcore.pipeline.surveys.are_far`).
        """
        page = picture.theme_named(theme)
        names, colors = named_colors(names)
        if len(names) != self.num_classes:
            raise ValueError(f"names: expected {self.num_classes} classes, got {len(names)}")
        colors = np.vstack([colors, picture.rgb(page.unlabeled)])
        classes, size = self._majority()
        image = np.zeros((*classes.shape, 4), np.uint8)
        shown = classes >= 0
        image[shown, :3], image[shown, 3] = colors[classes[shown]], 255
        number = int(self.totals.sum())
        entries = [
            (name, f"{picture.share_words(total / number)} %", color)
            for name, total, color in zip([*names, "without a class"], self.totals.tolist(), colors, strict=True)
            if total
        ]
        legend = [group for group in (entries[:-1], entries[-1:]) if group] if self.totals[-1] else [entries]
        if self.outside:
            subtitle += f" · {self.outside:,} point{'' if self.outside == 1 else 's'} outside of the map"
        if reference is None or reference.kind == "unknown":
            is_map = bool(are_far(self.low, self.high))
        else:
            is_map = reference.kind in ("projected", "geographic")
        with replacing(path) as part:
            picture.draw_map(part, title, subtitle, image, self.low, self.high, self.pixel * size, boxes, legend,
                             is_map=is_map, theme=theme, unit=unit or picture.stated_unit(reference))  # fmt: skip

    def _majority(self) -> tuple[np.ndarray, int]:
        """(classes of squares of pixels, -1 where no point is; their side in pixels).

        The smallest side, a power of two, with which at most 15 % of the squares that have points have a single one. Of
        points at random, three fall into such a square, and 95 % of the squares have some.
        """
        total = self.counts.sum(axis=0, dtype=np.int64)
        for size in (1, 2, 4, 8, 16, 32, 64):
            taken = _in_squares(total, size)
            if np.count_nonzero(taken == 1) <= 0.15 * np.count_nonzero(taken) or max(taken.shape) <= 16:
                break
        most = np.zeros(taken.shape, np.int64)
        classes = np.full(taken.shape, -1)
        for number, counts in enumerate(self.counts):
            sums = _in_squares(counts, size)
            classes[sums > most] = number
            most = np.maximum(most, sums)
        return classes, size


def _in_squares(values: np.ndarray, size: int) -> np.ndarray:
    """Sums over squares of pixels, int64; those at the upper ends may be cut."""
    if size == 1:
        return values.astype(np.int64)
    rows = np.add.reduceat(values, np.arange(0, len(values), size), axis=0, dtype=np.int64)
    return np.add.reduceat(rows, np.arange(0, values.shape[1], size), axis=1)
