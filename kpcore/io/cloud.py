"""What every format ends in: a Cloud, and the rules by which columns become points, colours, labels and fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import DTypeLike

# Usual names of labels, the first there is counts: of a field, and of an array in an NPZ.
LABELS = ("label", "labels", "class", "classification", "semantic", "semantic_label", "class_id")
LABEL_ARRAYS = ("labels", "label", "classes", "y")
COLORS = (
    ("red", "green", "blue"),
    ("r", "g", "b"),
    ("rf", "gf", "bf"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
)
UNLABELED = -1


class ReadError(ValueError):
    """The file cannot be read; the message is one line that names the file and the reason."""


class MissingField(ReadError):
    """The file is sound, but has no field of a name that was asked for."""


@dataclass(frozen=True, eq=False)
class Cloud:
    """A point cloud ready for kpcore: float32 coordinates near the origin.

    points : (N, 3) float32, finite; the file's own coordinates are ``points + shift``.
    colors : (N, 3) uint8, or None.
    labels : (N,) int32, -1 for points without one (NaN, or all bits of an unsigned type of 32 or 64 set); or None.
    shift : (3,) float64, subtracted in float64 before rounding to float32. It is zero unless the largest coordinate
        exceeds both 1000 and ten extents of the cloud, where float32 would lose detail (half a metre at UTM northings).
        Points at (0, 0, 0), and those beyond twenty times the middle half of the others, have no say in it.
    left_out : how many points were left out for a coordinate that is NaN, infinite or beyond float32.
    names : the class names that labels index, or None.
    up : the axis that points away from the ground; a depth camera's own frame has y pointing down.
    fields : what else was asked for, by name in lower case, each (N,): float32 where that holds every value of the
        file's type (integers of up to 16 bits, float32), else float64.
    kept : (n,) bool, which of the file's points these are; None: all.
    rounding : the largest change of a coordinate by rounding to float32, in the file's unit.
    unlabeled : why labels is None, in words.
    """

    points: np.ndarray
    colors: np.ndarray | None
    labels: np.ndarray | None
    shift: np.ndarray
    left_out: int = 0
    names: tuple[str, ...] | None = None
    up: tuple[int, int, int] = (0, 0, 1)
    fields: dict[str, np.ndarray] = field(default_factory=dict)
    kept: np.ndarray | None = None
    rounding: float = 0.0
    unlabeled: str | None = None


class Content(NamedTuple):
    """What is in a file, as its format's reader gives it."""

    points: np.ndarray  #: (N, 3) float32 or float64
    names: tuple[str, ...]  #: of all fields that may be asked for
    fields: dict[str, np.ndarray]  #: by the name asked for, in the file's types
    colors: np.ndarray | None = None  #: (N, 3) uint8
    labels: np.ndarray | None = None  #: (N,) int32
    unlabeled: str | None = None  #: why there are no labels
    up: tuple[int, int, int] = (0, 0, 1)
    doubt: str | None = None  #: what may be another thing than it was read as, a warning


class Asked(NamedTuple):
    """What is wanted of a file besides points and colours; names as they were written."""

    fields: tuple[str, ...] = ()
    label: str | None = None  #: the field of the labels; None: the first there is of the usual names
    columns: tuple[str, ...] | None = None  #: names for the columns of a table that names none


class LabelField(NamedTuple):
    """Where in a file labels are, or are to be added."""

    name: str
    num: int  #: how many points the file has
    least: int  #: the smallest label that it can hold
    most: int  #: the largest
    write: Callable[
        [Path, np.ndarray, np.ndarray], None
    ]  #: (path, labels, kept): the file again with these labels of the points that are kept
    check: Callable[[Path], None] = lambda path: None  #: an error if that file cannot be written
    doubt: str | None = None  #: what will not be as it was, a warning


def whole(values: np.ndarray, least: float, most: float) -> np.ndarray:
    """Which values are whole numbers within limits."""
    return (values >= least) & (values <= most) & (values == np.floor(values))


def span(dtype: DTypeLike) -> tuple[int, int]:
    """(least, most): every whole number between them is exact in this type."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        most = 2 ** (np.finfo(dtype).nmant + 1)
        return -most, most
    return (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))


class Columns:
    """Named arrays of a file, in its order; a function in place of an array reads it when it is needed. A name is meant
    as it is written, else in any case, else after "scalar_", which CloudCompare puts in front."""

    pairs: list[tuple[str, np.ndarray | Callable[[], np.ndarray]]]

    def __init__(self, pairs: Iterable[tuple[str, np.ndarray | Callable[[], np.ndarray]]]) -> None:
        self.pairs = [(str(name), values) for name, values in pairs]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.pairs)

    def find(self, name: str) -> np.ndarray | None:
        """The array that the name means; None if none."""
        at = position(self.names, name)
        return None if at is None else self.at(at)

    def at(self, place: int) -> np.ndarray:
        name, values = self.pairs[place]
        values = np.asarray(values() if callable(values) else values)
        self.pairs[place] = (name, values)
        return values


def position(names: Sequence[str], name: str) -> int | None:
    """Which of a file's names is meant by a name, see `Columns`; None if none, an error if two are equally near."""
    small, bare = name.lower(), [one.lower().removeprefix("scalar_") for one in names]
    for nearness in (
        [one == name for one in names],
        [one.lower() == small for one in names],
        [one == small for one in bare],
    ):
        if sum(nearness) > 1:
            raise ReadError(f"has {sum(nearness)} fields named {name}")
        if any(nearness):
            return nearness.index(True)
    return None


def first_of(names: Sequence[str], usual: Iterable[str]) -> int | None:
    """The position of the first of the usual names that a file has; None if none."""
    return next((at for one in usual if (at := position(names, one)) is not None), None)


def decoded(name: bytes) -> str:
    """The text of bytes in UTF-8, or else in Latin-1."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")


def listed(names: Iterable[str]) -> str:
    """Names for a message of one line."""
    text = " ".join(name if name.isprintable() else repr(name)[1:-1] for name in names)
    return (text if len(text) <= 400 else f"{text[:400]} ...") or "none"


def from_columns(columns: Columns, asked: Asked, label_names: Sequence[str] = LABELS) -> Content:
    """Content of `Columns`."""
    check_columns(columns.names, asked)
    xyz = [columns.find(axis) for axis in "xyz"]
    if missing := [axis for axis, values in zip("xyz", xyz, strict=True) if values is None]:
        raise ReadError(f"has no field {' '.join(missing)}; there are {listed(columns.names)}")
    if any(values.dtype.kind not in "fiu" or values.ndim != 1 for values in xyz):
        raise ReadError("x, y and z are not plain numbers")
    for axis, values in zip("xyz", xyz, strict=True):
        check_exact(axis, values)
    single = all(values.dtype.newbyteorder("=") in (np.float16, np.float32) for values in xyz)
    points = np.column_stack([values.astype(np.float32 if single else np.float64, copy=False) for values in xyz])

    colors, doubts = None, []
    for names in COLORS:
        rgb = [columns.find(name) for name in names]
        if colors is None and all(values is not None for values in rgb):
            colors, doubt = colors_of(np.column_stack(rgb))
            doubts.append(doubt)
    packed = next((values for name in ("rgb", "rgba") if (values := columns.find(name)) is not None), None)
    if colors is None and packed is not None:
        colors, doubt = packed_colors_of(packed)
        doubts.append(doubt)
    labels, unlabeled, doubt = labels_from(columns, asked, label_names)
    fields = fields_from(columns, asked)
    return Content(points, columns.names, fields, colors, labels, unlabeled, doubt=joined(*doubts, doubt))


def check_columns(names: Sequence[str], asked: Asked) -> None:
    """An error if names are passed for columns of a file that names them itself, and otherwise."""
    if asked.columns and [name.lower() for name in asked.columns] != [name.lower() for name in names]:
        raise ReadError(f"names its columns itself, {listed(names)}; columns= is for a table without names")


def check_fields(names: Sequence[str], asked: Asked) -> None:
    """An error that lists the fields there are, unless all that was asked for are among them."""
    wanted = (*asked.fields, *([] if asked.label is None else [asked.label]))
    if missing := sorted({name for name in wanted if position(names, name) is None}):
        raise MissingField(f"has no field {' '.join(missing)}; there are {listed(names)}")


def fields_from(columns: Columns, asked: Asked) -> dict[str, np.ndarray]:
    """The fields that were asked for."""
    check_fields(columns.names, asked)
    return {name: columns.find(name) for name in asked.fields}


def labels_from(
    columns: Columns, asked: Asked, usual: Sequence[str] = LABELS
) -> tuple[np.ndarray | None, str | None, str | None]:
    """(labels or None, why there are none, a doubt or None) of the field that was asked for, else of the first of the
    usual names."""
    if asked.label is not None:
        check_fields(columns.names, asked)
        labels, reason = labels_of(columns.find(asked.label), f"field {asked.label}", blank=True)
        if reason:
            raise ReadError(reason)
        return labels, None, None
    places = [at for name in usual if (at := position(columns.names, name)) is not None]
    if not places:
        return None, "none of its fields has a usual name of labels", None
    first, *others = dict.fromkeys(places)
    name = f"field {columns.names[first]}"
    labels, reason = labels_of(columns.at(first), name)
    for at in others:  # such as numbers of objects, and classes
        other, _ = labels_of(columns.at(at), "")
        if other is not None and not np.array_equal(labels, other):
            return labels, reason, f"its labels are {name}, {columns.names[at]} holds others: label= names one"
    return labels, reason, None


def joined(*doubts: str | None) -> str | None:
    """One text of those there are."""
    return "; ".join(filter(None, doubts)) or None


def labels_of(values: np.ndarray, name: str, blank: bool = False) -> tuple[np.ndarray | None, str | None]:
    """(labels or None, why there are none) of anything that holds whole numbers.

    NaN, and the largest of an unsigned type of 32 or 64 bits, mean a point without a label: -1. Unless `blank`, labels
    that are 0 throughout (never classified) are none.
    """
    values = np.asarray(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        return None, f"{name} is not one plain number for each point: {values.shape[1:]} {values.dtype}"
    if np.can_cast(values.dtype, np.int32):
        return (values.astype(np.int32), None) if blank or values.any() else (None, f"{name} is 0 throughout")
    none = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    all_bits = values.dtype.type(2**32 - 1) if values.dtype.kind == "f" else 2**32 - 1  # in float32 it is 2**32
    none |= (values == all_bits) | (values == (2**64 - 1 if values.dtype.kind == "u" else -1))
    labels = np.where(none, 0, values)
    right = whole(labels, -(2.0**31), 2.0**31 - 1)
    if not right.all():
        at = int(right.argmin())
        return None, f"{name} holds {values[at]} (point {at}), which is no label: expected whole numbers of 32 bits"
    if len(values) and none.all():
        return None, f"{name} is {values[0]} throughout"
    if not (blank or labels.any() or none.any()):
        return None, f"{name} is 0 throughout"
    return np.where(none, UNLABELED, labels).astype(np.int32), None


def from_table(table: np.ndarray, asked: Asked) -> Content:
    """Content of a table without names: x y z, and r g b where there are three more columns that can be nothing else.

    Never labels, as nothing tells x y z r g b label (S3DIS) from x y z intensity r g b (PTS).
    """
    if table.ndim != 2 or table.shape[1] < 3 or table.dtype.kind not in "fiu":
        raise ReadError(f"expected an (N, 3 or more) table of numbers, got {table.shape} {table.dtype}")
    num, width = table.shape
    if asked.columns:
        if len(asked.columns) != width:
            raise ReadError(f"has {width} columns, but columns names {len(asked.columns)}: {listed(asked.columns)}")
        return from_columns(Columns(zip(asked.columns, table.T, strict=True)), asked)
    if num < width and width > 9:
        raise ReadError(f"expected a row for each point, got {table.shape}: transpose it, or name its columns")
    columns = dict(zip("xyz", table.T, strict=False))
    if width == 6 and may_be_colors(table[:, 3:]):
        columns |= zip("rgb", table[:, 3:].T, strict=True)
    content = from_columns(Columns(columns.items()), asked)
    doubt = None
    if "r" not in columns and any(_are_bytes(table[:, at : at + 3]) for at in (3, 4)):
        doubt = (f"its {width} columns without names may hold colours, as x y z r g b label or x y z intensity r g b: "
                 "none were read; columns= names them")  # fmt: skip
    reason = "its columns have no names: give them with columns= (in settings, columns of [data])"
    return content._replace(unlabeled=content.unlabeled and reason, doubt=doubt)


def may_be_colors(rgb: np.ndarray) -> bool:
    """Whether three columns may be 8-bit colours: numbers of returns, rings and classes are whole, too, but small."""
    return _are_bytes(rgb) and bool((rgb.max(axis=0) > 31).all())


def _are_bytes(rgb: np.ndarray) -> bool:
    return rgb.shape[1] == 3 and rgb.size > 0 and bool(rgb.max() > 1 and whole(rgb, 0, 255).all())


def colors_of(rgb: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    """(uint8, a doubt or None) from 8-bit, 16-bit or 0..1 colours; NaN is black.

    None if all are black, as where a field was left blank, or if they are of another kind, which is a doubt.
    """
    if rgb.ndim != 2 or rgb.shape[1] < 3 or rgb.dtype.kind not in "fiu":
        raise ReadError(f"expected (N, 3) colours, got {rgb.shape} {rgb.dtype}")
    rgb = np.nan_to_num(rgb[:, :3], posinf=np.inf, neginf=-np.inf) if rgb.dtype.kind == "f" else rgb[:, :3]
    if not rgb.any():
        return None, None
    low, high, is_float = rgb.min(), rgb.max(), rgb.dtype.kind == "f"
    if low < 0 or high > 65535 or (is_float and 1 < high < 2 and (rgb != np.floor(rgb)).any()):
        return None, f"its colours, {low:g} to {high:g}, are neither 0 to 1 nor of 8 or 16 bits: none were read"
    if is_float and high <= 1:
        rgb = np.round(rgb * 255)
    if high > 255:
        rgb = rgb // 256
    dark = f"its colours, up to {high:g}, were read as 16 bits, and are dark" if high > 255 and rgb.max() < 32 else None
    return rgb.astype(np.uint8), dark


def packed_colors_of(values: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    """(uint8, a doubt or None) of 0xRRGGBB in 4 bytes of any type, or in whole numbers."""
    if values.ndim == 1 and values.dtype.itemsize == 4 and values.dtype.kind in "fiu":
        bits = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).view(np.uint32)
    elif values.ndim == 1 and values.dtype.kind in "fiu" and whole(values, 0, 2.0**32 - 1).all():
        bits = values.astype(np.uint32)
    else:
        return None, "its field rgb holds no packed colours: none were read"
    return colors_of(np.column_stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255]).astype(np.uint8))


def cloud_of(content: Content) -> Cloud:
    """The Cloud of the content that a reader returns."""
    points, colors, labels = content.points, content.colors, content.labels
    if len(points) == 0:
        raise ReadError("holds no points")
    fields = {name.lower(): _field(name, values) for name, values in content.fields.items()}
    for name, array in (("colors", colors), ("labels", labels), *fields.items()):
        if array is not None and len(array) != len(points):
            raise ReadError(f"holds {len(points)} points but {len(array)} {name}")

    low, high, kept = *_corners(points), None
    if not (max(np.abs(low).max(), np.abs(high).max()) <= np.finfo(np.float32).max):  # or NaN
        kept = (np.abs(points) <= np.finfo(np.float32).max).all(axis=1)
        if not kept.any():
            raise ReadError(f"holds no finite points: all {len(points)} have a coordinate that is NaN or infinite")
        points, colors, labels = (a if a is None else a[kept] for a in (points, colors, labels))
        fields = {name: values[kept] for name, values in fields.items()}
    shift = _shift(points)
    exact = points - shift if shift.any() else points
    points = np.ascontiguousarray(exact, np.float32)
    rounding = 0.0
    if exact.dtype != np.float32:
        change = exact - points
        rounding = float(np.abs(change, out=change).max())
    left_out = 0 if kept is None else len(kept) - len(points)
    return Cloud(points, colors, labels, shift, left_out, None, content.up, fields, kept, rounding,
                 content.unlabeled if labels is None else None)  # fmt: skip


def _shift(points: np.ndarray) -> np.ndarray:
    """What is subtracted, see `Cloud`; of a cloud without outliers floor(lowest) or zero.

    One point at (0, 0, 0) in a scan at UTM northings would switch it off if all points had a say: 0.25 m lost.
    """
    zeros = (points[:, 0] == 0) & (points[:, 1] == 0) & (points[:, 2] == 0)
    placed = points[~zeros] if zeros.any() else points
    if len(placed) == 0:
        return np.zeros(3)
    low, high = _corners(placed)
    least, most = np.quantile(placed[:: 1 + len(placed) // 100_000].astype(np.float64), (0.25, 0.75), axis=0)
    reach = 20.0 * (most - least).max()
    if reach and ((low < least - reach).any() or (high > most + reach).any()):
        near = placed[((placed >= least - reach) & (placed <= most + reach)).all(axis=1)]
        low, high = _corners(near)
    far = max(np.abs(low).max(), np.abs(high).max()) > max(1000.0, 10.0 * (high - low).max())
    return np.floor(low) if far else np.zeros(3)


def _corners(points: np.ndarray) -> np.ndarray:
    """The least and the largest along each axis; NaN where there is one. Column by column: five times as fast."""
    return np.array([[f(points[:, axis]) for axis in range(points.shape[1])] for f in (np.min, np.max)], np.float64)


def _field(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        raise ReadError(f"field {name} is not one plain number for each point: {values.shape[1:]} {values.dtype}")
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        raise ReadError(f"field {name} is {values.dtype}, which float64 does not hold")
    check_exact(f"field {name}", values)
    return values.astype(np.result_type(values.dtype, np.float32))  # float32 or float64


def check_exact(name: str, values: np.ndarray) -> None:
    """An error for integers that float64 cannot tell from their neighbours."""
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8 and (largest := _largest(values)) > 2**53:
        raise ReadError(f"{name} holds {largest}, which float64 cannot tell from its neighbours")


def _largest(values: np.ndarray) -> int:
    return max(abs(int(values.min(initial=0))), int(values.max(initial=0)))
