"""Writing the points of a file in another format, with labels: where each column goes, and what cannot be kept."""

from __future__ import annotations

import itertools
import re
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from kpcore.io import las, layout, npz, pcd, ply, sweeps, text
from kpcore.io.cloud import (
    COLORS,
    LABEL_ARRAYS,
    LABELS,
    LabelField,
    ReadError,
    Request,
    first_name_index,
    integer_range,
    list_names,
    name_index,
)
from kpcore.io.table import Column, unique

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from kpcore.io.cloud import Pieces

TABLES = {
    ".ply": ply.table, ".pcd": pcd.table, ".las": las.table, ".laz": las.table, ".npy": npz.table_npy,
    ".npz": npz.table, ".xyz": text.table, ".txt": text.table, ".csv": text.table, ".pts": text.table,
    ".bin": sweeps.table,
}  # fmt: skip
CREATORS = {
    ".las": las, ".laz": las, ".ply": ply, ".npz": npz, ".pcd": pcd, ".csv": text, ".txt": text, ".xyz": text,
}  # fmt: skip
# Formats other than LAS and LAZ that are read piece by piece: (layout, blocks, content), see `kpcore.io.layout`.
LAYOUTS = {
    ".ply": (ply.layout, ply.blocks, layout.content),
    ".npy": (npz.layout_npy, npz.blocks_npy, npz.content_npy),
    ".npz": (npz.layout, npz.blocks, npz.content),
}
RGB = ("red", "green", "blue")
# Coordinates of a new LAS are whole numbers of a power of ten: of the first in which all are exact; if there is none,
# of the largest that divides the extent into a million parts. One part in a million of 1 km is 1 mm.
MOST_DECIMALS, PARTS = 9, 1e6
LARGEST_WHOLE = 2**31 - 2
LARGEST_STEP = 0.01  # of coordinates that do not fit into steps of 0.001
STANDARD = {one.name: one for one in las.standard_dimensions(8)}
MOST_EXTRA = 65_535 // 192  # descriptions of extra bytes that fit into a record of a LAS


@dataclass
class Values:
    """What is known of a column's values, after a pass over all of them."""

    low: float = np.inf
    high: float = -np.inf
    is_whole: bool = True
    of_256: bool = True  #: all are multiples of 256
    is_single: bool = True  #: float32 holds all
    decimals: list[int] = field(default_factory=lambda: [*range(3, MOST_DECIMALS + 1)])  #: of which all have no more

    def add(self, values: np.ndarray, decimals: bool = False) -> None:
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            used = values if finite.all() else values[finite]
            self.is_whole &= bool(finite.all() and (used == np.floor(used)).all())
            with np.errstate(over="ignore"):
                self.is_single &= bool((used.astype(np.float32) == used).all())
        else:
            used = values
            self.is_single &= bool((used.astype(np.float32).astype(np.float64) == used).all())
        if not len(used):
            return
        self.low, self.high = min(self.low, used.min().item()), max(self.high, used.max().item())
        self.of_256 &= self.within(0, 65_535) and not (used.astype(np.uint16) & np.uint16(255)).any()
        if decimals:
            self.decimals = [number for number in self.decimals if not _rounding(used, 10.0**-number)]

    def within(self, smallest: float, largest: float) -> bool:
        """Whether all are whole numbers in this range."""
        return self.is_whole and smallest <= self.low and self.high <= largest


def _rounding(values: np.ndarray, scale: float, offset: float = 0.0) -> float:
    """The largest change of values by rounding to whole numbers of `scale`.

    It is 0 if the numbers times the scale, rounded to the type of the values, are the values, or next to them.
    """
    exact = values.astype(np.float64)
    change = np.abs(np.rint((exact - offset) / scale) * scale + offset - exact)
    near = np.spacing(np.abs(values)).astype(np.float64) * (2.0 if values.dtype.itemsize == 8 else 0.5)
    return float(change.max(where=change > near, initial=0.0))


# Values of some points from the arrays of the source's columns.
Channel: TypeAlias = "Callable[[list[np.ndarray]], np.ndarray]"


class Move(NamedTuple):
    """A column of the new file, and where its values come from."""

    column: Column
    values: Channel | None  #: None: a new column


def label_field(source: Path, out: Path, label: str | None, into: str | None, extra: Mapping[str, np.dtype],
                values: np.ndarray | tuple[()], columns: Sequence[str] | None) -> LabelField:  # fmt: skip
    """The LabelField of a source of another format than `out`: everything that can be carried over is."""
    suffix = source.suffix.lower()
    with source.open("rb") as file:
        size, _ = state = las.state_of(file)
    named = {} if columns is None else {"columns": columns}  # of formats with columns that may have no names
    table = TABLES[suffix](source, size, **named)
    if table.num == 0:
        raise ReadError("holds no points")
    plan = _Plan(table, out, label, into, extra, values)
    limits = integer_range(plan.moves[plan.placed[plan.name]].column.dtype)

    def write_pieces(out: Path, pieces: Pieces) -> list[str]:
        """Labels are on disk until all are made, as the table is not read in the same pieces."""
        request = Request(columns=None if columns is None else tuple(columns))
        with source.open("rb") as file, ExitStack() as stack:
            las.check_unchanged(file, state)
            kinds = {
                "labels": np.dtype(np.int64),
                "kept": np.dtype(bool),
                **{f"extra {name}": extra[name] for name in extra},
            }
            made = {name: stack.enter_context(tempfile.TemporaryFile(dir=out.parent)) for name in kinds}
            first = 0
            for records in LAYOUTS[suffix][1](source, size, LAYOUTS[suffix][0](source, size, request)):
                kept, labels, more = pieces(first, records)
                first += len(records)
                for name, values in (
                    ("labels", labels),
                    ("kept", kept),
                    *((f"extra {name}", more[name]) for name in more),
                ):
                    made[name].write(values.astype(kinds[name]))
            las.check_unchanged(file, state)
            arrays = {name: layout.mapped(made[name], kind) for name, kind in kinds.items()}
            return plan.write(out, arrays["labels"], arrays["kept"], {name: arrays[f"extra {name}"] for name in extra})

    has_pieces = is_bounded(suffix, out.suffix.lower())
    return LabelField(plan.name, table.num, *limits, plan.write, write_pieces=write_pieces if has_pieces else None)


def is_bounded(before: str, after: str) -> bool:
    """Whether a file of one extension is written to another format piece by piece."""
    # The table of an NPZ is read as a whole, and a new NPZ is made as a whole.
    return before in (".ply", ".npy") and after in CREATORS and after != ".npz"


class _Plan:
    """The columns of the new file, decided after one pass over the source."""

    def __init__(self, table, out, label, into, extra, values):
        self.table, self.target, self.suffix = table, CREATORS[out.suffix.lower()], out.suffix.lower()
        self.is_las = self.target is las
        self.lost, self.renamed, self.notes = [*table.missing], [], []
        self.known = [Values() for _ in table.columns]
        num, not_finite = 0, []
        for arrays in table.blocks():
            for at, (known, array) in enumerate(zip(self.known, arrays, strict=True)):
                if self._is_looked_at(at, table.columns[at]):
                    known.add(array, decimals=self.is_las and at < 3)
            if self.is_las:
                not_finite.append(
                    num + np.flatnonzero(~np.logical_and.reduce([np.isfinite(one) for one in arrays[:3]]))
                )
            num += len(arrays[0])
        if self.is_las and (count := sum(map(len, not_finite))):
            raise ReadError(
                f"LAS holds no coordinates that are NaN or infinite, as {count} points have (the first is point "
                f"{np.concatenate(not_finite)[0]}): write a PLY, PCD, NPZ or CSV file"
            )
        self.moves: list[Move] = []
        self.placed: dict[str, int] = {}  # the move of each field that is written
        self._points()
        colors = self._colors()
        fields = self._fields(label, into, extra, values, colors)
        usual = None if table.label is None else table.names.index(table.label)
        for at, column in enumerate(table.columns):
            if at >= 3 and at not in colors:
                self._column(at, column, fields.get(at), is_label=at == usual)
        for key, (name, dtype) in fields.items():
            if not isinstance(key, int):
                self._add(name, Column(key, dtype), None)
        if self.is_las:
            self._frame()

    def _is_looked_at(self, at: int, column: Column) -> bool:
        """Whether the values of a column decide on its place or type."""
        if column.width > 1:
            return False
        plain = column.name.lower().removeprefix("scalar_")
        if at < 3 or plain in ("rgb", "rgba", *itertools.chain(*COLORS)):
            return True
        if self.is_las:
            return column.name == self.table.label or any(_is(column.name, name) for name in STANDARD)
        return self.target is ply and column.dtype.kind in "iu" and column.dtype.itemsize == 8

    # ---- which columns there are

    def _points(self) -> None:
        known, types = self.known[:3], [column.dtype for column in self.table.columns[:3]]
        single = all(one.is_single for one in known)
        for at, axis in enumerate("xyz"):
            dtype = types[at] if self.target is text else np.dtype(np.float32 if single else np.float64)
            if self.is_las:
                dtype = types[at] if types[at].kind == "f" else np.dtype(np.float64)
            self.moves.append(Move(Column(axis, dtype), lambda arrays, at=at, dtype=dtype: arrays[at].astype(dtype)))
        if self.target is pcd and not single:
            self.notes.append("its coordinates are float64, which PCL does not read")

    def _colors(self) -> list[int]:
        """The places of the columns of colours, which are moved to their standard names."""
        names, columns = self.table.names, self.table.columns
        for trio in COLORS:
            places = [name_index(names, name) for name in trio]
            if None in places or any(columns[at].width > 1 for at in places):
                continue
            known = [self.known[at] for at in places]
            low, high = min(one.low for one in known), max(one.high for one in known)
            dtype = np.result_type(*(columns[at].dtype for at in places))
            is_fraction = dtype.kind == "f" and high <= 1
            if low < 0 or not (is_fraction or all(one.within(0, 65_535) for one in known)):
                return []
            channels = [lambda arrays, at=at: arrays[at] for at in places]
            if not is_fraction:
                dtype = np.dtype(np.uint8 if high <= 255 else np.uint16)
            self._add_colors(channels, dtype, all(one.of_256 for one in known))
            return places
        at = next((place for name in ("rgb", "rgba") if (place := name_index(names, name)) is not None), None)
        if at is None or columns[at].width > 1:
            return []
        has_bits = columns[at].dtype.itemsize == 4
        if not has_bits and not self.known[at].within(0, 2**32 - 1):
            return []

        def byte(arrays: list[np.ndarray], shift: int) -> np.ndarray:
            bits = arrays[at].view(np.uint32) if has_bits else arrays[at].astype(np.uint32)
            return (bits >> shift & 255).astype(np.uint8)

        channels = [lambda arrays, shift=shift: byte(arrays, shift) for shift in (16, 8, 0)]
        self._add_colors(channels, np.dtype(np.uint8), False)
        if names[at].lower() == "rgba":
            self.moves.append(Move(Column("alpha", np.dtype(np.uint8)), lambda arrays: byte(arrays, 24)))
        return [at]

    def _add_colors(self, channels: list[Channel], dtype: np.dtype, of_256: bool) -> None:
        """Add red, green and blue: of 8 or 16 bits, or floats from 0 to 1."""
        is_byte, is_fraction, factor = dtype == np.uint8, dtype.kind == "f", 1.0
        if self.is_las:
            dtype, factor = np.dtype(np.uint16), 65_535.0 if is_fraction else 256.0 if is_byte else 1.0
            if is_fraction:
                self.notes.append("colours from 0 to 1 are rounded to 16 bits")
        elif self.target in (ply, pcd) and dtype == np.uint16 and of_256:
            dtype, factor = np.dtype(np.uint8), 1 / 256
        elif self.target in (ply, pcd) and dtype == np.uint16:
            self.notes.append("its colours have 16 bits, which some programs do not read")

        def converted(values: np.ndarray) -> np.ndarray:
            if factor != 1:
                values = np.rint(np.nan_to_num(values.astype(np.float64)) * factor)
            return values.astype(dtype)

        if self.target is pcd and dtype == np.uint8:  # as PCL stores them: 0x00RRGGBB in the bits of a float32

            def packed(arrays: list[np.ndarray]) -> np.ndarray:
                red, green, blue = (converted(channel(arrays)).astype(np.uint32) for channel in channels)
                return (red << 16 | green << 8 | blue).view(np.float32)

            self.moves.append(Move(Column("rgb", np.dtype(np.float32)), packed))
            return
        for name, channel in zip(RGB, channels, strict=True):
            self.moves.append(Move(Column(name, dtype), lambda arrays, channel=channel: converted(channel(arrays))))

    def _fields(self, label, into, extra, values, colors) -> dict[int | str, tuple[str, np.dtype]]:
        """What is written besides: {place of a column that it replaces, or its new name: (name, type)}."""
        names, fields = self.table.names, {}
        wanted = into or label
        if wanted is None:
            at = None if self.table.label is None else names.index(self.table.label)
        else:
            at = name_index(names, wanted)
        if self.is_las and (into is None or _is(into, "classification")):
            self.name = "classification"
        elif wanted is not None:
            self.name = wanted if at is None else names[at]
        else:
            usual = LABEL_ARRAYS if self.target is npz else LABELS
            default = "labels" if self.target is npz else "label"
            is_usual = at is not None and first_name_index([names[at]], usual) == 0 and names[at].lower() != "y"
            self.name = names[at] if is_usual else default
        int32 = np.dtype(np.int32)
        if at is None:
            fields[self.name] = (self.name, int32)
        else:
            self._check_replaced("into" if into else "label", at, colors)
            dtype = self.table.columns[at].dtype
            low, high = integer_range(dtype)
            fits = len(values) and low <= np.min(values) and np.max(values) <= high
            fields[at] = (self.name, dtype if fits else np.promote_types(dtype, int32))
        for name, dtype in extra.items():
            at = name_index(names, name)
            if at is None:
                fields[name] = (name, dtype)
            elif at in fields:
                raise ReadError(f"extra: {name} is the field of the labels")
            else:
                self._check_replaced("extra", at, colors)
                fields[at] = (name, np.promote_types(self.table.columns[at].dtype, dtype))
        return fields

    def _check_replaced(self, argument: str, at: int, colors: Sequence[int]) -> None:
        column = self.table.columns[at]
        if at < 3 or at in colors or column.width > 1:
            kind = "a coordinate" if at < 3 else "a colour" if at in colors else f"of {column.width} numbers"
            raise ReadError(f"{argument}: expected a field of one number for each point, got {column.name}, {kind}")

    def _column(self, at: int, column: Column, field: tuple[str, np.dtype] | None, is_label: bool) -> None:
        """Add the moves of a column of the source; `field`: what replaces its values at the points that are kept."""
        if column.width == 1 and field is not None:
            self._add(field[0], Column(*field), lambda arrays: arrays[at], at, is_label)
        elif column.width == 1 or self.target in (npz, pcd):
            self._add(None, column, lambda arrays: arrays[at], at, is_label)
        else:
            for number in range(column.width):
                part = Column(f"{column.name}_{number}", column.dtype)
                self._add(None, part, lambda arrays, number=number: arrays[at][:, number])

    def _add(self, field, column, values, at=None, is_label=False) -> None:
        """Add a column under a name and in a type that the target has; `field`: the name of what is written to it."""
        known = None if at is None or column.width > 1 else self.known[at]
        dtype = column.dtype
        if self.is_las and (name := self._standard_name(column, known, is_label, field)):
            dtype = np.dtype(STANDARD[name].dtype)
        else:
            dtype = self._type(column, known, field)
            if dtype is None:
                self.lost.append(column.name)
                return
            name = self._new_name(column.name, field if values is None else None)
        if self.is_las and name not in STANDARD and self._num_extra() == MOST_EXTRA:
            if field is not None:
                raise ReadError(f"{field}: a LAS has at most {MOST_EXTRA} extra dimensions")
            self.lost.append(column.name)
            return
        if field is not None:
            self.placed[field] = len(self.moves)
        self.moves.append(Move(Column(name, dtype, column.width), values))

    def _num_extra(self) -> int:
        return sum(move.column.name not in STANDARD for move in self.moves[3:])

    def _standard_name(self, column: Column, known: Values | None, is_label: bool, field: str | None) -> str | None:
        """The standard dimension that holds the column, if all values fit into it."""
        name = next((name for name in STANDARD if _is(column.name, name)), None)
        if field == self.name and field == "classification":
            return "classification"
        if is_label and field is None:
            name = "classification"
        if name is None or name in RGB or name in [move.column.name for move in self.moves]:
            return None
        if name == "classification" and self.name == "classification":
            return None  # of the labels
        dimension = STANDARD[name]
        if dimension.dtype == "<f8":
            return name if np.can_cast(column.dtype, np.float64, "safe") else None
        largest = (1 << dimension.bits) - 1 if dimension.bits else integer_range(dimension.dtype)[1]
        if field is not None:  # values that are not known yet
            fits = np.can_cast(column.dtype, bool if dimension.bits else dimension.dtype, "safe")
        else:
            smallest = 0 if dimension.bits else integer_range(dimension.dtype)[0]
            fits = known is not None and known.within(smallest, largest)
        return name if fits else None

    def _type(self, column: Column, known: Values | None, field: str | None) -> np.dtype | None:
        """The type of a column in the target; None if it has none."""
        dtype = column.dtype
        if self.target is npz:
            return dtype
        if dtype.kind == "b":
            return np.dtype(np.uint8)
        if dtype.kind == "f" and dtype.itemsize == 2:
            return np.dtype(np.float32)
        if self.target is ply and dtype.kind in "iu" and dtype.itemsize == 8:
            if field is not None:
                raise ReadError(f"{field}: expected a type of PLY, at most 32 bits for integers, got {dtype.name}")
            if known is None:
                return None
            for smaller in (np.int32, np.uint32, np.float64):
                if known.within(*integer_range(smaller)):
                    return np.dtype(smaller)
            return None
        return dtype

    def _new_name(self, name: str, field: str | None) -> str:
        """The name in the target; an error if that differs from the name of a new field."""
        taken = [move.column.name for move in self.moves]
        if self.is_las:
            taken = [one.lower() for one in (*taken, *STANDARD)]
        elif self.target is npz:
            taken += [*npz.POINTS, *npz.COLORS]
        elif self.target is pcd:
            taken += ["_"]
        new = unique(name, taken, lambda name: _name_in(self.suffix, name), str.lower if self.is_las else str)
        if new != name:
            if field is not None:
                argument, expected = "into, label" if field == self.name else "extra", "can hold and no other field has"
                raise ReadError(f"{argument}: expected a name that a {self.suffix} file {expected}, got {name!r}")
            self.renamed.append(f"{name} to {new}")
        return new

    # ---- a new LAS

    def _frame(self) -> None:
        known = self.known[:3]
        low, high = [one.low for one in known], [one.high for one in known]
        extent = max(b - a for a, b in zip(low, high, strict=True))
        offset = tuple(float(np.floor(value)) for value in low)
        reach = max(b - a for a, b in zip(offset, high, strict=True))
        exact = [number for number in known[0].decimals if all(number in one.decimals for one in known[1:])]
        parts = (number for number in range(3, MOST_DECIMALS) if 10.0**-number <= extent / PARTS)
        number = exact[0] if exact and reach * 10.0 ** exact[0] < LARGEST_WHOLE else next(parts, MOST_DECIMALS)
        scale = 10.0**-number
        if reach / scale >= LARGEST_WHOLE:  # as with a point at the origin beside UTM coordinates
            steps = (factor * 10.0**power for power in range(-3, 308) for factor in (1, 2, 5))
            scale = next((step for step in steps if extent / step < 2 * LARGEST_WHOLE), np.inf)
            offset = tuple(float(np.floor((a + b) / 2)) for a, b in zip(low, high, strict=True))
            if scale > LARGEST_STEP:
                reason = f"its 32 bits need steps of {scale:g}, more than {LARGEST_STEP}"
                raise ReadError(f"LAS cannot hold coordinates from {min(low):g} to {max(high):g}: {reason}; remove "
                                "outliers, or write a PLY, PCD, NPZ or CSV file")  # fmt: skip
        names = [move.column.name for move in self.moves]
        self.form = 8 if "nir" in names else 7 if "red" in names else 6
        if self.form == 8 and "red" not in names:
            self.notes.append("it has no colours, which are 0")
        if not {"return_number", "number_of_returns"} & {*names}:
            for name in ("return_number", "number_of_returns"):  # 0 is not valid
                column = Column(name, np.dtype(np.uint8))
                self.moves.append(Move(column, lambda arrays: np.ones(len(arrays[0]), np.uint8)))
        time = next((at for at, name in enumerate(self.table.names) if _is(name, "gps_time")), None)
        week = 604_800  # seconds: what is longer is counted from 1980
        self.frame = las.Frame(scale, offset, time is not None and self.known[time].high > week)

    # ---- writing

    def write(self, out: Path, labels: np.ndarray, kept: np.ndarray, extra: Mapping[str, np.ndarray]) -> list[str]:
        fields = {self.placed[self.name]: labels, **{self.placed[name]: values for name, values in extra.items()}}
        changed, rounding, counted = 0, 0.0, 0

        def blocks() -> Iterator[list[np.ndarray]]:
            nonlocal changed, rounding, counted
            done = 0
            for arrays in self.table.blocks():
                chosen = kept[counted : counted + len(arrays[0])]
                if len(chosen) < len(arrays[0]):
                    raise ReadError(f"changed while it was read: had {len(kept)} points")
                count, made = int(chosen.sum()), []
                for at, move in enumerate(self.moves):
                    column = move.column
                    shape = (len(chosen), column.width)[: 1 + (column.width > 1)]
                    values = np.zeros(shape, column.dtype) if move.values is None else move.values(arrays)
                    if at in fields:
                        values, lost = _cast(values, column.dtype, ~chosen)
                        changed += lost if at == self.placed[self.name] else 0
                        values[chosen] = fields[at][done : done + count]
                    made.append(values.astype(column.dtype, copy=False))
                if self.is_las:
                    for axis, offset in enumerate(self.frame.offset):
                        rounding = max(rounding, _rounding(made[axis], self.frame.scale, offset))
                counted, done = counted + len(chosen), done + count
                yield made

        columns = [move.column for move in self.moves]
        named = {"form": self.form, "frame": self.frame} if self.is_las else {}
        self.target.create(out, self.table.num, columns, blocks(), **named)
        if counted != len(kept):
            raise ReadError(f"changed while it was read: had {len(kept)} points, has {counted}")
        notes = []
        if rounding:
            notes.append(f"coordinates are rounded to {self.frame.scale:g}, by up to {rounding:.2g}")
        if changed:
            notes.append(f"{changed} points that get no new label have one that {self.name} does not hold: it is 0")
        if self.renamed:
            notes.append(f"renamed: {list_names([f'{one},' for one in self.renamed])[:-1]}")
        if self.lost:
            number = f"{len(self.lost)} {'parts are' if len(self.lost) > 1 else 'part is'}"
            notes.append(f"{number} not carried over: {list_names([f'{one},' for one in self.lost])[:-1]}")
        return [*notes, *self.notes]


def _is(name: str, standard: str) -> bool:
    """Whether the name is that of a standard dimension, as LAS, PDAL or CloudCompare spell it."""
    return re.sub(r"[_ ]", "", name.lower().removeprefix("scalar_")) == standard.replace("_", "")


def _cast(values: np.ndarray, dtype: np.dtype, others: np.ndarray) -> tuple[np.ndarray, int]:
    """(values in another type, 0 where it does not hold them; the number of such values that are of `others`)."""
    if np.can_cast(values.dtype, dtype, "safe"):
        return values.astype(dtype), 0
    smallest, largest = integer_range(dtype) if dtype.kind in "iub" else (-np.inf, np.inf)
    with np.errstate(invalid="ignore"):
        fits = (values >= smallest) & (values <= largest)
        if dtype.kind in "iub" and values.dtype.kind == "f":
            fits &= values == np.floor(values)
    # NaN, -1 and the largest unsigned number mean a point without a label, which a new label of 0 means too.
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    missing |= values == (np.iinfo(values.dtype).max if values.dtype.kind == "u" else -1)
    return np.where(fits, values, 0).astype(dtype), int((~fits & ~missing & others).sum())


def _name_in(suffix: str, name: str) -> str:
    """A name that a format can hold."""
    name = "".join(letter if letter.isprintable() else "_" for letter in name).strip() or "_"
    if suffix in (".las", ".laz"):
        while len(name.encode()) > 32:
            name = name[:-1]
        return name
    if suffix == ".npz":
        return re.sub(r"[/\\]", "_", name)
    if suffix == ".csv":
        return re.sub(r'["#;\t]|//', "_", name)
    name = re.sub(r"\s", "_", name)
    return re.sub(r'["#;,]|//', "_", name) if suffix in (".txt", ".xyz") else name
