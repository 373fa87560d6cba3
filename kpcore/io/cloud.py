"""The `Cloud` that files are read into, and the rules that turn columns into points, colours, labels and fields."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import DTypeLike

    from kpcore.io.reference import Reference

# Usual names of a field of labels, and of an array of labels in an NPZ. The first one that a file has is used.
LABELS = ("label", "labels", "class", "classification", "semantic", "semantic_label", "class_id")
LABEL_ARRAYS = ("labels", "label", "classes", "y")
COLORS = (
    ("red", "green", "blue"),
    ("r", "g", "b"),
    ("rf", "gf", "bf"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
)
# Names of one field: PDAL's of a dimension, as it writes it into extra bytes, and that of kpcore's feature.
SPELLINGS = (("heightaboveground", "height_above_ground"),)
# Flags of points, bits of a LAS and fields elsewhere, by which points can be left out.
FLAGS = ("withheld", "overlap", "synthetic", "key_point")
UNLABELED = -1


class ReadError(ValueError):
    """The file cannot be read; the message is one line that names the file and the reason."""

    errno: int | None = None  #: of the OSError that was the reason, if it was one


class MissingField(ReadError):
    """The file is valid, but has no field with a requested name."""


class OtherColumns(ReadError):
    """The file is valid, but its columns are not those that `columns` names."""


@dataclass(frozen=True, eq=False)
class Cloud:
    """A point cloud ready for kpcore: float32 coordinates near the origin.

    points : (N, 3) float32, finite; the file's own coordinates are ``points + shift``.
    colors : (N, 3) uint8, or None.
    labels : (N,) int32, or None. A point without a label has -1; in the file that is NaN, or the largest value of an
        unsigned type of 32 or 64 bits.
    shift : (3,) float64, subtracted in float64 before rounding to float32. It is zero unless the largest coordinate
        exceeds both 1000 and ten extents of the cloud, where float32 would lose detail (half a metre at UTM northings).
        Points at (0, 0, 0) and outliers, farther from the middle half of the points than twenty times its size, are
        not counted.
    left_out : the number of points left out because a coordinate is NaN, infinite or too large for float32.
    names : the class names that labels index, or None.
    up : the axis that points away from the ground; in a depth camera's frame y points down.
    fields : the requested fields by name in lower case, each (N,): float32 where that holds every value of the file's
        type (integers of up to 16 bits, float32), else float64.
    kept : (n,) bool, True for the file's points that are in the cloud, in the file's order; None: all are.
    rounding : the largest change of a coordinate by rounding to float32, in the file's unit.
    unlabeled : the reason why labels is None, as text.
    exact : (N, 3) float64, the file's own coordinates, if they were requested; otherwise None.
    reference : what a LAS or LAZ states of its coordinate reference system, or None; see `Reference`.
    dropped : the number of points left out as the caller asked, by the label ("7"), the flag or "zeros" for which they
        were; the first reason counts. Every point of the file is one of points, left_out and these.
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
    exact: np.ndarray | None = None
    reference: Reference | None = None
    dropped: dict[str, int] = field(default_factory=dict)


class Content(NamedTuple):
    """The content of a file as the reader of its format returns it."""

    points: np.ndarray  #: (N, 3) float32 or float64
    names: tuple[str, ...]  #: of all fields that can be requested
    fields: dict[str, np.ndarray]  #: by requested name, in the file's types
    colors: np.ndarray | None = None  #: (N, 3) uint8
    labels: np.ndarray | None = None  #: (N,) int32
    unlabeled: str | None = None  #: why there are no labels
    up: tuple[int, int, int] = (0, 0, 1)
    warning: str | None = None  #: what may have been read as the wrong thing
    reference: Reference | None = None
    flags: dict[str, np.ndarray] | None = None  #: the requested flags that the file has; not 0: set


class Request(NamedTuple):
    """What to read from a file besides points and colours. Names are in the case that the caller wrote."""

    fields: tuple[str, ...] = ()
    label: str | None = None  #: the field of the labels; None: the first usual name that the file has
    columns: tuple[str, ...] | None = None  #: names for the columns of a table without names
    ignore: tuple[int | str, ...] = ()  #: labels and flags; points with one of them are left out
    drop_zeros: bool = False  #: whether points at (0, 0, 0) are left out
    exact: bool = False  #: whether the file's coordinates are to be kept in float64
    is_part: bool = False  #: whether the rows are some of a file's


#: pieces(first_row, records) -> (chosen, labels, extra) is called for one block of a file after the other, in the order
#: of the file, with its (n, record size) uint8 records. `chosen`, (n,) bool, says which points of it get `labels`, (m,)
#: integers, and the {name: (m,) values} of further fields in `extra`.
Pieces: TypeAlias = "Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]]"


class LabelField(NamedTuple):
    """The place in a file that labels are written to: an existing field, or a new one."""

    name: str
    num_points: int  #: of the file
    smallest: int  #: label that the field can hold
    largest: int
    #: write(path, labels, kept, extra) writes a copy of the file in which the points where kept is True have these
    #: labels, and these values in further fields. It returns what is missing or changed in the copy, in words.
    write: Callable[[Path, np.ndarray, np.ndarray, Mapping[str, np.ndarray]], list[str]]
    check: Callable[[Path], None] = lambda path: None  #: raises an error if no file can be written to that path
    #: like `write`, but with `Pieces` instead of whole arrays; None: a file of this format is not written so
    write_pieces: Callable[[Path, Pieces], list[str]] | None = None
    extra: Mapping[str, np.dtype] = MappingProxyType({})  #: types of the further fields


def pieces_of(labels: np.ndarray, kept: np.ndarray, extra: Mapping[str, np.ndarray]) -> Pieces:
    """The `Pieces` of whole arrays, for blocks in the order of the file."""
    done = 0

    def piece(first_row: int, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        nonlocal done
        chosen = kept[first_row : first_row + len(records)]
        rows = slice(done, done := done + int(chosen.sum()))
        return chosen, labels[rows], {name: values[rows] for name, values in extra.items()}

    return piece


def check_extra(name: str, present: DTypeLike, dtype: np.dtype) -> None:
    """Raise an error unless a field of the present type holds every value of `dtype`, for `extra`."""
    if not np.can_cast(dtype, present, "safe"):
        raise ReadError(
            f"extra: field {name} is {np.dtype(present).name}, which does not hold {dtype.name}; name another"
        )


def are_integers(values: np.ndarray, smallest: float, largest: float) -> np.ndarray:
    """True for each value that is a whole number from smallest to largest."""
    return (values >= smallest) & (values <= largest) & (values == np.floor(values))


def integer_range(dtype: DTypeLike) -> tuple[int, int]:
    """(smallest, largest): this type represents every whole number between them exactly."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        largest = 2 ** (np.finfo(dtype).nmant + 1)
        return -largest, largest
    return (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))


class NamedArrays:
    """The named arrays of a file, in the file's order.

    A function in place of an array reads the array when it is needed. `name_index` says how names are matched.
    """

    pairs: list[tuple[str, np.ndarray | Callable[[], np.ndarray]]]

    def __init__(self, pairs: Iterable[tuple[str, np.ndarray | Callable[[], np.ndarray]]]) -> None:
        self.pairs = [(str(name), values) for name, values in pairs]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.pairs)

    def find(self, name: str) -> np.ndarray | None:
        """The array with this name; None if there is none."""
        index = name_index(self.names, name)
        return None if index is None else self.at(index)

    def at(self, index: int) -> np.ndarray:
        name, values = self.pairs[index]
        values = np.asarray(values() if callable(values) else values)
        self.pairs[index] = (name, values)
        return values


def name_index(names: Sequence[str], name: str) -> int | None:
    """The index of a name among a file's names; None if it is not there.

    A name that is spelled exactly so comes first, then one in other case, then one after the prefix "scalar_", which
    CloudCompare adds, then another spelling of it (`SPELLINGS`). Two equally good matches are an error.
    """
    lower = name.lower()
    spellings = next((group for group in SPELLINGS if lower in group), ())
    exact = [other == name for other in names]
    any_case = [other.lower() == lower for other in names]
    prefixed = [other.lower().removeprefix("scalar_") == lower for other in names]
    spelled = [other.lower().removeprefix("scalar_") in spellings for other in names]
    for matches in (exact, any_case, prefixed, spelled):
        if sum(matches) > 1:
            raise ReadError(f"has {sum(matches)} fields named {name}")
        if any(matches):
            return matches.index(True)
    return None


def first_name_index(names: Sequence[str], usual: Iterable[str]) -> int | None:
    """The index among a file's names of the first usual name that it has; None if it has none."""
    return next((index for name in usual if (index := name_index(names, name)) is not None), None)


def decode_text(name: bytes) -> str:
    """Text from bytes in UTF-8, or in Latin-1 if they are not UTF-8."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")


def list_names(names: Iterable[str]) -> str:
    """Names separated by spaces, for an error message of one line; at most 400 characters of them."""
    text = " ".join(name if name.isprintable() else repr(name)[1:-1] for name in names)
    return (text if len(text) <= 400 else f"{text[:400]} ...") or "none"


def from_columns(columns: NamedArrays, request: Request, label_names: Sequence[str] = LABELS) -> Content:
    """The Content of named columns."""
    check_columns(columns.names, request)
    xyz = [columns.find(axis) for axis in "xyz"]
    if missing := [axis for axis, values in zip("xyz", xyz, strict=True) if values is None]:
        raise ReadError(f"has no field {' '.join(missing)}; there are {list_names(columns.names)}")
    if any(values.dtype.kind not in "fiu" or values.ndim != 1 for values in xyz):
        raise ReadError("x, y, z: expected one number for each point")
    for axis, values in zip("xyz", xyz, strict=True):
        check_exact(axis, values)
    single = all(values.dtype.newbyteorder("=") in (np.float16, np.float32) for values in xyz)
    points = np.column_stack([values.astype(np.float32 if single else np.float64, copy=False) for values in xyz])

    colors, messages = None, []
    for names in COLORS:
        rgb = [columns.find(name) for name in names]
        if colors is None and all(values is not None for values in rgb):
            colors, warning = colors_of(np.column_stack(rgb))
            messages.append(warning)
    packed = next((values for name in ("rgb", "rgba") if (values := columns.find(name)) is not None), None)
    if colors is None and packed is not None:
        colors, warning = packed_colors_of(packed)
        messages.append(warning)
    labels, unlabeled, warning = labels_from(columns, request, label_names)
    fields = fields_from(columns, request)
    return Content(points, columns.names, fields, colors, labels, unlabeled, warning=join_warnings(*messages, warning),
                   flags=flags_from(columns, request))  # fmt: skip


def check_columns(names: Sequence[str], request: Request) -> None:
    """Raise an error if `columns=` was passed for a file whose columns have other names already."""
    if request.columns and [name.lower() for name in request.columns] != [name.lower() for name in names]:
        raise OtherColumns(
            f"its columns have names already, {list_names(names)}; columns= is for a table without names"
        )


def check_fields(names: Sequence[str], request: Request) -> None:
    """Raise an error that lists the file's fields if a requested one is missing."""
    wanted = (*request.fields, *([] if request.label is None else [request.label]))
    if missing := sorted({name for name in wanted if name_index(names, name) is None}):
        by_lower = {name.lower(): name for name in names}
        near = difflib.get_close_matches(missing[0].lower(), by_lower, 1, 0.75)
        advice = f"; did you mean {list_names([by_lower[near[0]]])}?" if near else ""
        raise MissingField(f"has no field {' '.join(missing)}; there are {list_names(names)}{advice}")


def fields_from(columns: NamedArrays, request: Request) -> dict[str, np.ndarray]:
    """The requested fields by name."""
    check_fields(columns.names, request)
    return {name: columns.find(name) for name in request.fields}


def flags_from(columns: NamedArrays, request: Request) -> dict[str, np.ndarray]:
    """The flags to ignore that the file has."""
    flags = {one: columns.find(one) for one in request.ignore if isinstance(one, str)}
    return {name: values for name, values in flags.items() if values is not None}


def labels_from(
    columns: NamedArrays, request: Request, usual: Sequence[str] = LABELS
) -> tuple[np.ndarray | None, str | None, str | None]:
    """(labels or None, the reason why there are none, a warning or None).

    The labels are those of the requested field, otherwise those of the first usual name that the file has.
    """
    if request.label is not None:
        check_fields(columns.names, request)
        values = columns.find(request.label)
        labels, reason = labels_of(values, f"field {request.label}", True, not request.is_part)
        if reason:
            raise ReadError(reason)
        return labels, None, None
    places = [at for name in usual if (at := name_index(columns.names, name)) is not None]
    if not places:
        return None, "no field has a usual name for labels", None
    first, *others = dict.fromkeys(places)
    name = f"field {columns.names[first]}"
    labels, reason = labels_of(columns.at(first), name, allow_zeros=0 in request.ignore)
    for at in others:  # for example object numbers beside classes
        other, _ = labels_of(columns.at(at), "")
        if other is not None and not np.array_equal(labels, other):
            advice = "choose one with label="
            return labels, reason, f"its labels were read from {name}, but {columns.names[at]} holds others: {advice}"
    return labels, reason, None


def join_warnings(*messages: str | None) -> str | None:
    """One text of all warnings that are not None; None if all are."""
    return "; ".join(filter(None, messages)) or None


def labels_of(
    values: np.ndarray, name: str, allow_zeros: bool = False, are_all: bool = True
) -> tuple[np.ndarray | None, str | None]:
    """(labels or None, the reason why there are none) from an array of whole numbers, all of a file.

    An array of zeros (never classified) counts as no labels, unless `allow_zeros`, and so does one without any label.
    """
    labels, reason = labels_of_some(values, name, are_all)
    if labels is None:
        return None, reason
    values = np.asarray(values)
    if len(labels) and not np.can_cast(values.dtype, np.int32) and (labels == UNLABELED).all():
        return None, f"{name} is {values.flat[0]} throughout"
    return (labels, None) if allow_zeros or labels.any() else (None, f"{name} is 0 throughout")


def labels_of_some(values: np.ndarray, name: str, are_all: bool = True) -> tuple[np.ndarray | None, str | None]:
    """(labels or None, the reason why there are none) from whole numbers of a file, each by itself.

    NaN, and the largest value of an unsigned type of 32 or 64 bits, mean a point without a label, which gets -1. The
    reason has the row of a value that is no label if they are all that the file has (`are_all`).
    """
    values = np.asarray(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        return None, f"{name}: expected one number for each point, got {values.shape} {values.dtype}"
    labels, valid = checked_labels(values)
    if not valid.all():
        row = int(valid.argmin())
        place = f" (point {row})" if are_all else ""
        return None, f"{name} holds {values[row]}{place}, which is not a label: expected 32-bit whole numbers"
    return labels, None


@np.errstate(over="ignore")  # of limits in float16
def checked_labels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int32 labels, whether each value is a label or means that there is none) from numbers; the others are 0."""
    if np.can_cast(values.dtype, np.int32):
        return values.astype(np.int32), np.ones(len(values), bool)
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    all_bits = values.dtype.type(2**32 - 1) if values.dtype.kind == "f" else 2**32 - 1  # in float32 it is 2**32
    missing |= (values == all_bits) | (values == (2**64 - 1 if values.dtype.kind == "u" else -1))
    labels = np.where(missing, 0, values)
    valid = are_integers(labels, -(2.0**31), 2.0**31 - 1)
    return np.where(missing, UNLABELED, np.where(valid, labels, 0)).astype(np.int32), valid


def from_table(table: np.ndarray, request: Request) -> Content:
    """The Content of a table without column names.

    The columns are x y z, and r g b if there are exactly three more that can only be colours. They are never labels,
    as x y z r g b label (S3DIS) and x y z intensity r g b (PTS) cannot be told apart.
    """
    if not request.is_part:
        check_table(table.shape, table.dtype, request)
    width = table.shape[1]
    if request.columns:
        return from_columns(NamedArrays(zip(table_names(width, request), table.T, strict=True)), request)
    columns = dict(zip("xyz", table.T, strict=False))
    if width == 6 and may_be_colors(table[:, 3:]):
        columns |= zip("rgb", table[:, 3:].T, strict=True)
    content = from_columns(NamedArrays(columns.items()), request)
    warning = None
    if "r" not in columns and any(_are_bytes(table[:, at : at + 3]) for at in (3, 4)):
        warning = (f"its {width} columns have no names and may hold colours, as in x y z r g b label or "
                   "x y z intensity r g b; no colours were read: name the columns with columns=")  # fmt: skip
    reason = "its columns have no names: pass them as columns= (in settings, columns of [data])"
    return content._replace(unlabeled=content.unlabeled and reason, warning=warning)


def check_table(shape: tuple[int, ...], dtype: np.dtype, request: Request) -> None:
    """Raise an error unless an array of this shape and type is a table with a row for each point."""
    if len(shape) != 2 or shape[1] < 3 or dtype.kind not in "fiu":
        raise ReadError(f"expected an (N, 3 or more) table of numbers, got {shape} {dtype}")
    if not request.columns and shape[0] < shape[1] and shape[1] > 9:
        raise ReadError(
            f"expected a row for each point, got {shape}: transpose the array, or name its columns with columns="
        )


def table_names(width: int, request: Request) -> tuple[str, ...]:
    """The names of `width` columns that have none: as many of the request, or x y z.

    Whether three more are r g b depends on all of their values.
    """
    if request.columns and len(request.columns) != width:
        raise OtherColumns(
            f"has {width} columns, got {len(request.columns)} names in columns=: {list_names(request.columns)}"
        )
    return request.columns or ("x", "y", "z")


def may_be_colors(rgb: np.ndarray) -> bool:
    """Whether three columns may be 8-bit colours: each exceeds 31, which return, ring and class numbers seldom do."""
    return _are_bytes(rgb) and bool((rgb.max(axis=0) > 31).all())


def _are_bytes(rgb: np.ndarray) -> bool:
    return rgb.shape[1] == 3 and rgb.size > 0 and bool(rgb.max() > 1 and are_integers(rgb, 0, 255).all())


def colors_of(rgb: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    """(uint8 colours or None, a warning or None) from colours of 8 bits, of 16 bits or from 0 to 1; NaN becomes black.

    The result is None if all are black, as in a field that was never filled, and None with a warning if the values are
    in none of these ranges.
    """
    if rgb.ndim != 2 or rgb.shape[1] < 3 or rgb.dtype.kind not in "fiu":
        raise ReadError(f"expected (N, 3) colours, got {rgb.shape} {rgb.dtype}")
    rgb = np.nan_to_num(rgb[:, :3], posinf=np.inf, neginf=-np.inf) if rgb.dtype.kind == "f" else rgb[:, :3]
    if not rgb.any():
        return None, None
    low, high, is_float = rgb.min(), rgb.max(), rgb.dtype.kind == "f"
    if low < 0 or high > 65535 or (is_float and 1 < high < 2 and (rgb != np.floor(rgb)).any()):
        return None, f"its colours, {low:g} to {high:g}, are neither 0 to 1 nor 8-bit nor 16-bit: no colours were read"
    if is_float and high <= 1:
        rgb = np.round(rgb * 255)
    rgb = color_bytes(rgb, high > 255)
    dark = (
        f"its colours, up to {high:g}, were read as 16-bit and are very dark" if high > 255 and rgb.max() < 32 else None
    )
    return rgb, dark


def color_bytes(rgb: np.ndarray, wide: bool) -> np.ndarray:
    """uint8 colours from whole numbers of 16 bits (`wide`) or 8 bits."""
    return (rgb // 256 if wide else rgb).astype(np.uint8)


def packed_colors_of(values: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    """(uint8 colours or None, a warning or None) from 0xRRGGBB in any type of 4 bytes, or as whole numbers."""
    if values.ndim == 1 and values.dtype.itemsize == 4 and values.dtype.kind in "fiu":
        bits = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).view(np.uint32)
    elif values.ndim == 1 and values.dtype.kind in "fiu" and are_integers(values, 0, 2.0**32 - 1).all():
        bits = values.astype(np.uint32)
    else:
        return None, "its field rgb does not hold packed colours (0xRRGGBB): no colours were read"
    return colors_of(np.column_stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255]).astype(np.uint8))


def cloud_of(content: Content, request: Request) -> Cloud:
    """The Cloud made from a file's Content: points shifted and rounded; none that is not finite, or ignored."""
    points, colors, labels = content.points, content.colors, content.labels
    if len(points) == 0:
        raise ReadError("holds no points")
    fields = {name.lower(): field_values(name, values) for name, values in content.fields.items()}
    flags = {name: field_values(name, values) for name, values in (content.flags or {}).items()}
    for name, array in (("colors", colors), ("labels", labels), *fields.items(), *flags.items()):
        if array is not None and len(array) != len(points):
            raise ReadError(f"holds {len(points)} points but {len(array)} {name}")

    low, high, kept = *_corners(points), None
    if not (max(np.abs(low).max(), np.abs(high).max()) <= np.finfo(np.float32).max):  # or NaN
        kept = (np.abs(points) <= np.finfo(np.float32).max).all(axis=1)
        if not kept.any():
            raise ReadError(
                f"has no finite points: all {len(points)} have a coordinate that is NaN, infinite or beyond float32"
            )
    left_out, dropped = 0 if kept is None else int((~kept).sum()), {}
    for name, ignored in ignored_points(points, labels, flags, request):
        if number := int((ignored if kept is None else ignored & kept).sum()):
            dropped[name] = number
            kept = ~ignored if kept is None else kept & ~ignored
    if kept is not None:
        if not kept.any():
            reasons = ", ".join(f"{name} ({number})" for name, number in dropped.items())
            raise ReadError(f"has no points but those that are not read: {reasons}")
        points, colors, labels = (a if a is None else a[kept] for a in (points, colors, labels))
        fields = {name: values[kept] for name, values in fields.items()}
    shift, in_file = _shift(points), points
    exact = points - shift if shift.any() else points
    points = np.ascontiguousarray(exact, np.float32)
    rounding = 0.0
    if exact.dtype != np.float32:
        change = exact - points
        rounding = float(np.abs(change, out=change).max())
    return Cloud(points, colors, labels, shift, left_out, None, content.up, fields, kept, rounding,
                 content.unlabeled if labels is None else None,
                 in_file.astype(np.float64, copy=False) if request.exact else None, content.reference,
                 dropped)  # fmt: skip


def ignored_points(
    points: np.ndarray, labels: np.ndarray | None, flags: dict[str, np.ndarray], request: Request
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, True for each of its points) of the labels and flags to ignore that the file has, and of zeros."""
    for one in request.ignore:
        if isinstance(one, str):
            if one in flags:
                yield one, (flags[one] != 0) & ~np.isnan(flags[one])
        elif labels is not None:
            yield str(one), labels == one
    if request.drop_zeros:
        yield "zeros", are_at(points, (0, 0, 0))


def are_at(points: np.ndarray, place: Sequence[float] | np.ndarray) -> np.ndarray:
    """True for each point at exactly this place."""
    return (points[:, 0] == place[0]) & (points[:, 1] == place[1]) & (points[:, 2] == place[2])


def _shift(points: np.ndarray) -> np.ndarray:
    """The shift of a `Cloud`: zero, or the lowest corner rounded down.

    Outliers are not counted: a single point at (0, 0, 0) in a scan at UTM northings would make the extent so large that
    the shift were zero, and float32 would lose 0.25 m.
    """
    zeros = are_at(points, (0, 0, 0))
    placed = points[~zeros] if zeros.any() else points
    if len(placed) == 0:
        return np.zeros(3)
    low, high = _corners(placed)
    lower, upper = np.quantile(placed[:: 1 + len(placed) // 100_000].astype(np.float64), (0.25, 0.75), axis=0)
    reach = 20.0 * (upper - lower).max()
    if reach and ((low < lower - reach).any() or (high > upper + reach).any()):
        near = placed[((placed >= lower - reach) & (placed <= upper + reach)).all(axis=1)]
        low, high = _corners(near)
    far = max(np.abs(low).max(), np.abs(high).max()) > max(1000.0, 10.0 * (high - low).max())
    return np.floor(low) if far else np.zeros(3)


def _corners(points: np.ndarray) -> np.ndarray:
    """(2, D): the minimum and maximum of each axis, NaN if one is there. Column by column is five times as fast."""
    return np.array([[f(points[:, axis]) for axis in range(points.shape[1])] for f in (np.min, np.max)], np.float64)


def field_values(name: str, values: np.ndarray) -> np.ndarray:
    """The values of a field as float32 where that holds every value of their type, else float64."""
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        raise ReadError(f"field {name}: expected one number for each point, got {values.shape} {values.dtype}")
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        raise ReadError(f"field {name} is {values.dtype}, which float64 cannot represent")
    check_exact(f"field {name}", values)
    return values.astype(np.result_type(values.dtype, np.float32))  # float32 or float64


def check_exact(name: str, values: np.ndarray) -> None:
    """Raise an error for integers beyond 2**53, which float64 cannot represent exactly."""
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8 and (largest := _largest(values)) > 2**53:
        raise ReadError(f"{name} holds {largest}, which float64 cannot represent exactly")


def _largest(values: np.ndarray) -> int:
    return max(abs(int(values.min(initial=0))), int(values.max(initial=0)))
