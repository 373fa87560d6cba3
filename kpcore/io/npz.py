"""NumPy files: NPY with a table or a structured array, and NPZ with named arrays."""

from __future__ import annotations

import copy
import math
import shutil
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from kpcore.io.cloud import (
    LABEL_ARRAYS,
    LABELS,
    Content,
    LabelField,
    NamedArrays,
    ReadError,
    Request,
    check_columns,
    check_extra,
    check_table,
    colors_of,
    fields_from,
    first_name_index,
    flags_from,
    from_columns,
    from_table,
    integer_range,
    join_warnings,
    labels_from,
    list_names,
    name_index,
    pieces_of,
    table_names,
)  # fmt: skip
from kpcore.io.las import Dimension, check_unchanged, state_of
from kpcore.io.layout import deciding, named, of_fields, ranges
from kpcore.io.table import nameless, points_first, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import IO
    from zipfile import ZipFile, ZipInfo

    from kpcore.io.cloud import Pieces
    from kpcore.io.layout import Layout
    from kpcore.io.table import Column, Table

Result = TypeVar("Result")
# Usual names of arrays; the first that is there is used.
POINTS = ("points", "xyz", "pos", "position", "positions", "coord", "coords")
COLORS = ("colors", "color", "rgb")
_MAX_HEADER = 1 << 16  # bytes; the header of a structured array names its fields


def npy_field_names(path: Path, size: int, request: Request) -> tuple[str, ...]:
    with path.open("rb") as file:
        return _column_names(*_header(file, "the array", size), request)


def _column_names(shape: tuple[int, ...], dtype: np.dtype, request: Request) -> tuple[str, ...]:
    """The names of the columns of an array of this shape and type."""
    if dtype.names:
        check_columns(dtype.names, request)
        return dtype.names
    if len(shape) != 2 or shape[1] < 3:
        raise ReadError(f"expected an (N, 3 or more) table of numbers, got {shape} {dtype}")
    return table_names(shape[1], request)


def read_npy(path: Path, size: int, request: Request) -> Content:
    with path.open("rb") as file:
        _header(file, "the array", size)
    return _npy_content(np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=_MAX_HEADER), request)


def _npy_content(array: np.ndarray, request: Request) -> Content:
    if not array.dtype.names:
        return from_table(array, request)
    return from_columns(NamedArrays((name, array[name]) for name in array.dtype.names), request)


def _header(file: IO[bytes], name: str, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an array; an error unless it fits into the `size` bytes of its file."""
    return _stored(file, name, size)[:2]


def _stored(file: IO[bytes], name: str, size: int) -> tuple[tuple[int, ...], np.dtype, bool]:
    """(shape, dtype, whether the first index changes fastest) of an array, with the file at its first byte."""
    start = file.read(12)
    version = start[6:7]
    wide = version in (b"\2", b"\3")
    length = int.from_bytes(start[8 : 12 if wide else 10], "little")
    if start[:6] != b"\x93NUMPY" or version not in (b"\1", b"\2", b"\3"):
        raise ReadError(f"{name} is not a NumPy array")
    if not 0 < length <= min(size, _MAX_HEADER):
        raise ReadError(f"damaged: {name} declares a header of {length} bytes")
    file.seek(8)
    read_header = np.lib.format.read_array_header_2_0 if wide else np.lib.format.read_array_header_1_0
    shape, is_fortran, dtype = read_header(file, max_header_size=_MAX_HEADER)
    if dtype.hasobject:
        raise ReadError(f"{name} holds Python objects, which kpcore does not unpickle")
    needed = math.prod(shape) * dtype.itemsize
    if any(num < 0 for num in shape) or needed > size - file.tell():
        raise ReadError(f"truncated: {name} of shape {shape} needs {needed} bytes, got {size - file.tell()}")
    return shape, dtype, is_fortran and len(shape) > 1


def _members(archive: ZipFile) -> list[tuple[str, ZipInfo]]:
    """[(name, entry)] of the arrays in an NPZ, with NumPy's names (without .npy); other members are not listed."""
    return [(info.filename[:-4], info) for info in archive.infolist() if info.filename.endswith(".npy")]


def _opened(archive: ZipFile, name: str, info: ZipInfo, work: Callable[[IO[bytes]], Result]) -> Result:
    """The result of `work` on an open member; any error becomes a ReadError that names the member."""
    try:
        with archive.open(info) as file:
            return work(file)
    except (ReadError, MemoryError):
        raise
    except Exception as error:  # zlib, zipfile, tokenize and ast raise their own types
        raise ReadError(f"{name} cannot be read: {' '.join(str(error).split())[:120]}") from None


def _array(archive: ZipFile, name: str, info: ZipInfo) -> np.ndarray:
    if info.file_size > 1032 * max(info.compress_size, 1):  # more than deflate can compress
        raise ReadError(f"damaged: {name} declares {info.file_size} bytes, compressed to {info.compress_size}")

    def work(file: IO[bytes]) -> np.ndarray:
        _header(file, name, info.file_size)
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=_MAX_HEADER)
        file.read(1)  # reaching the end makes zipfile compare the checksum
        return array

    return _opened(archive, name, info, work)


def _shape(archive: ZipFile, name: str, info: ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of a member."""
    return _opened(archive, name, info, lambda file: _header(file, name, info.file_size))


def _place_of_points(archive: ZipFile, members: list[tuple[str, ZipInfo]]) -> int | None:
    """The index of the member with the points: one of a usual name, else the only table. None: x, y, z are members."""
    names = [name for name, _ in members]
    at = first_name_index(names, POINTS)
    if at is not None:
        return at
    if all(name_index(names, axis) is not None for axis in "xyz"):
        return None
    tables = []
    for at, (name, info) in enumerate(members):
        try:
            shape, dtype = _shape(archive, name, info)
        except ReadError:
            continue  # a member that is not needed may be unreadable
        if len(shape) == 2 and shape[1] >= 3 and dtype.kind in "fiu" and name.lower() not in COLORS:
            tables.append(at)
    if len(tables) != 1:
        raise ReadError(f"has no array named points, only {list_names(names)}")
    return tables[0]


def field_names(path: Path, size: int, request: Request) -> tuple[str, ...]:
    with zipfile.ZipFile(path) as archive:
        members = _members(archive)
        at = _place_of_points(archive, members)
        if at is None:
            names = tuple(name for name, _ in members)
            check_columns(names, request)
            return names
        others = tuple(name for place, (name, _) in enumerate(members) if place != at)
        shape, dtype = _shape(archive, *members[at])
        hidden = _hidden(others, dtype, request)
        return (*others, *(name for name in _column_names(shape, dtype, request) if name not in hidden))


def _hidden(arrays: Iterable[str], dtype: np.dtype, request: Request) -> set[str]:
    """The columns of points that are not fields: where nothing names them, those that arrays have; y may be labels."""
    return set() if dtype.names or request.columns else {name.lower() for name in arrays}


def read(path: Path, size: int, request: Request) -> Content:
    with zipfile.ZipFile(path) as archive:
        members = _members(archive)
        arrays = [(name, partial(_array, archive, name, info)) for name, info in members]
        return _content(arrays, _place_of_points(archive, members), request)


def _content(arrays: list[tuple[str, Callable[[], np.ndarray]]], at: int | None, request: Request) -> Content:
    """The Content of named arrays, of which that of index `at` has the points; None: x, y and z are arrays."""
    if at is None:
        return from_columns(NamedArrays(arrays), request, _usual_labels(at))
    name_of_points, load = arrays[at]
    points, arrays = load(), arrays[:at] + arrays[at + 1 :]
    points_request = request._replace(fields=(), label=None)
    if points.dtype.names:
        named = [(name, points[name]) for name in points.dtype.names]
        content = from_columns(NamedArrays(named), points_request)
    else:
        content = from_table(points, points_request)
        hidden = _hidden((name for name, _ in arrays), points.dtype, request)
        pairs = zip(request.columns or "xyz", points.T, strict=False)
        named = [(name, values) for name, values in pairs if name not in hidden]
    others, columns = NamedArrays(arrays), NamedArrays([*arrays, *named])
    if (rgb := first_name_index(others.names, COLORS)) is not None:
        colors, warning = colors_of(others.at(rgb))
        content = content._replace(colors=colors, warning=join_warnings(content.warning, warning))
    if request.label is not None:
        labels, unlabeled, warning = labels_from(columns, request)
    elif first_name_index(others.names, LABEL_ARRAYS) is None and (request.columns or points.dtype.names):
        labels, unlabeled, warning = content.labels, content.unlabeled, None
    else:
        # Not from `columns`: y is a usual name of labels, but a coordinate among the points.
        labels, unlabeled, warning = labels_from(others, request, LABEL_ARRAYS)
    if arrays and not any(usual in name_of_points.lower() for usual in ("point", "xyz", "pos", "coord")):
        warning = join_warnings(warning, f"it has no array named points: {name_of_points} was read as the points")
    return content._replace(
        labels=labels, unlabeled=unlabeled, names=columns.names, fields=fields_from(columns, request),
        flags=flags_from(columns, request),
        warning=join_warnings(content.warning, warning),
    )  # fmt: skip


def _usual_labels(at: int | None) -> tuple[str, ...]:
    """Usual names of label arrays. y is one of them, unless x, y and z are arrays (`at` is None)."""
    return LABEL_ARRAYS if at is not None else tuple(name for name in LABEL_ARRAYS if name != "y")


# ---- piece by piece


class Stored(NamedTuple):
    """An array in a file, and where its values are in the records."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool = False  #: the first index changes fastest
    at: int | None = None  #: first byte in a record; None: not a part of it
    problem: str | None = None  #: why it cannot be read

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def values(self, records: np.ndarray, num: int) -> np.ndarray:
        """The values of records, some of `num`; of an array that is no part of them nothing but its shape and type."""
        if self.problem:
            raise ReadError(self.problem)
        shape = (len(records), *self.shape[1:]) if self.shape else ()
        if self.at is not None:
            strides = records.strides[0], *(self.dtype.itemsize,)[: len(shape) - 1]
            return np.ndarray(shape, self.dtype, records, self.at, strides)
        if self.shape and self.shape[0] != num and self.dtype.kind in "fiub":
            raise ReadError(f"holds {num} points but {self.shape[0]} {self.name}")
        return np.broadcast_to(np.zeros((), self.dtype), shape)


def _read_stored(file: IO[bytes], name: str, size: int) -> Stored:
    return Stored(name, *_stored(file, name, size))


def _blocks(stored: Stored, num: int, size: int, opened: Callable[[], IO[bytes]]) -> Generator[np.ndarray]:
    """(n, row bytes) uint8 of rows of an array, as many at a time as records of this size.

    `opened` opens the file or member; it is called once for each column of an array in which the first index changes
    fastest.
    """
    parts = math.prod(stored.shape[1:]) if stored.is_fortran else 1
    width = stored.row_bytes // max(1, parts)
    with ExitStack() as stack:
        files = []
        for part in range(parts):
            files.append(stack.enter_context(opened()))
            _stored(files[-1], stored.name, np.iinfo(np.int64).max)
            files[-1].seek(files[-1].tell() + part * num * width)
        for first, end in ranges(num, size):
            rows = [file.read((end - first) * width) for file in files]
            if any(len(one) < (end - first) * width for one in rows):
                raise ReadError(f"truncated: {stored.name} ends in the rows from {first} to {end - 1}")
            arrays = [np.frombuffer(one, np.uint8).reshape(end - first, width) for one in rows]
            yield arrays[0] if parts == 1 else np.concatenate(arrays, axis=1)
        files[-1].read(1)  # reaching the end makes zipfile compare the checksum


def _columns_in(stored: Stored, request: Request) -> tuple[Dimension, ...]:
    """The columns of the points, those without a name after x, y and z last."""
    if stored.dtype.names:
        return named(stored.dtype, stored.at)
    check_table(stored.shape, stored.dtype, request)
    names = [*table_names(stored.shape[1], request)]
    names += [""] * (stored.shape[1] - len(names))
    size = stored.dtype.itemsize
    return tuple(Dimension(name, stored.at + at * size, stored.dtype.str) for at, name in enumerate(names))


def layout_npy(path: Path, size: int, request: Request) -> Layout:
    """The fields of a structured array, or the columns of a table."""
    with path.open("rb") as file:
        stored = _read_stored(file, "the array", size)._replace(at=0)
    names = _column_names(stored.shape, stored.dtype, request)
    if len(stored.shape) != (1 if stored.dtype.names else 2):
        raise ReadError(f"expected a row for each point, got an array of shape {stored.shape}")
    columns = _columns_in(stored, request)
    fields = of_fields(stored.shape[0], stored.row_bytes, columns[: len(names)])
    return fields._replace(deciding=fields.deciding + _nameless(columns), about=stored)


def _nameless(columns: Iterable[Dimension]) -> tuple[Dimension, ...]:
    """The columns without names that may be colours."""
    return tuple(one for one in columns if not one.name)[:5]


def blocks_npy(path: Path, size: int, layout: Layout, names: Collection[str] | None = None) -> Iterator[np.ndarray]:
    """The records of a layout, (n, size) uint8, in the order of the file."""
    return _blocks(layout.about, layout.num, layout.size, lambda: path.open("rb"))


def content_npy(layout: Layout, records: np.ndarray, request: Request) -> Content:
    """The Content of records of a layout."""
    return _npy_content(layout.about.values(records, layout.num), request)


def _arrays(archive: ZipFile) -> tuple[list[Stored], int | None]:
    """(the arrays with the places of those with one number or row for each point, the index of the points)."""
    members = _members(archive)
    at = _place_of_points(archive, members)
    names = [name for name, _ in members]
    colors, stored, end = first_name_index(names, COLORS), [], 0
    num = _shape(archive, *members[name_index(names, "x") if at is None else at])[0][:1]
    for place, (name, info) in enumerate(members):
        try:
            one = _opened(
                archive, name, info, lambda file, name=name, info=info: _read_stored(file, name, info.file_size)
            )
        except ReadError as error:
            stored.append(Stored(name, (), np.dtype("V"), problem=str(error)))  # an error only where it is needed
            continue
        width = one.shape[1] if len(one.shape) == 2 else 1
        is_number = one.dtype.kind in "fiub" and len(one.shape) == 1 + (len(one.shape) == 2)
        is_used = place in (at, colors) or (width == 1 and place != at)
        if (
            one.shape[:1] == num
            and is_used
            and (is_number or (place == at and one.dtype.names and len(one.shape) == 1))
        ):
            one = one._replace(at=end)
            end += one.row_bytes
        stored.append(one)
    return stored, at


def layout(path: Path, size: int, request: Request) -> Layout:
    """The arrays with one number for each point, and the columns of the points, packed in the order of the file."""
    with zipfile.ZipFile(path) as archive:
        stored, at = _arrays(archive)
    record = sum(one.row_bytes for one in stored if one.at is not None)
    names = [one.name for one in stored]
    if at is not None and stored[at].at is None:
        shape, dtype = stored[at].shape, stored[at].dtype
        raise ReadError(f"{names[at]}: expected an (N, 3 or more) table of numbers, got {shape} {dtype}")
    others = [
        Dimension(one.name, one.at or 0, "V" if one.at is None or one.row_bytes > one.dtype.itemsize else one.dtype.str)
        for place, one in enumerate(stored)
        if place != at
    ]
    colors = first_name_index(names, COLORS)
    more = () if colors is None or colors == at or stored[colors].at is None else _parts(stored[colors])
    if at is None:
        check_columns(names, request)
        num = stored[name_index(names, "x")].shape[0]
        fields = of_fields(num, record, others)
        return fields._replace(deciding=fields.deciding + more, about=(tuple(stored), at))
    columns = _columns_in(stored[at], request)
    if stored[at].dtype.names:
        check_columns(stored[at].dtype.names, request)
    of_points = of_fields(stored[at].shape[0], record, [one for one in columns if one.name])
    hidden = _hidden((one.name for one in others), stored[at].dtype, request)
    fields = (*others, *(one for one in of_points.dimensions if one.name not in hidden))
    decide = (*of_points.deciding, *deciding(others), *_nameless(columns), *more)
    return of_points._replace(dimensions=fields, deciding=decide, about=(tuple(stored), at))


def _parts(stored: Stored) -> tuple[Dimension, ...]:
    """Each number of a row."""
    size = stored.dtype.itemsize
    return tuple(Dimension("", stored.at + at * size, stored.dtype.str) for at in range(stored.row_bytes // size))


def blocks(path: Path, size: int, layout: Layout, names: Collection[str] | None = None) -> Iterator[np.ndarray]:
    """The records of a layout; arrays other than `names`, and than those that decide or have the points, are zeros."""
    needed = {one.at for one in (*layout.axes, *layout.deciding)}
    needed |= {one.at for one in layout.dimensions if names is None or one.name in names}
    with zipfile.ZipFile(path) as archive:
        infos = [info for _, info in _members(archive)]
        used = [
            (one, _blocks(one, layout.num, layout.size, partial(archive.open, info)))
            for one, info in zip(layout.about[0], infos, strict=True)
            if one.at is not None and any(one.at <= at < one.at + one.row_bytes for at in needed)
        ]
        for first, end in ranges(layout.num, layout.size):
            records = np.zeros((end - first, layout.size), np.uint8)
            for one, values in used:
                records[:, one.at : one.at + one.row_bytes] = _next(one.name, values)
            yield records
        for one, values in used:
            _next(one.name, values)


def _next(name: str, values: Iterator[np.ndarray]) -> np.ndarray | None:
    """The next block of a member, None after the last; any error becomes a ReadError that names the member."""
    try:
        return next(values, None)
    except (ReadError, MemoryError, OSError):
        raise
    except Exception as error:  # of zlib and zipfile
        raise ReadError(f"{name} cannot be read: {' '.join(str(error).split())[:120]}") from None


def content(layout: Layout, records: np.ndarray, request: Request) -> Content:
    """The Content of records of a layout."""
    stored, at = layout.about
    return _content([(one.name, partial(one.values, records, layout.num)) for one in stored], at, request)


# ---- labels


def label_field(source: Path, label: str | None, into: str | None, extra: Mapping[str, np.dtype]) -> LabelField:
    label = into or label
    with source.open("rb") as file:
        state = state_of(file)
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():  # members that cannot be copied are reported early
            _opened(archive, info.filename, info, _read_through)
        members = _members(archive)
        names = [name for name, _ in members]
        at = _place_of_points(archive, members)
        shape, _ = _shape(archive, *members[name_index(names, "x") if at is None else at])
        num = shape[0] if shape else 0
        place = name_index(names, label) if label else first_name_index(names, _usual_labels(at))
        name = (label or "labels") if place is None else names[place]
        places, fields = {name: place}, {}  # of each field that is written; None: new
        for other in extra:
            places[other] = name_index(names, other)
        for other, where in places.items():
            if where is None:
                _, dtype = (None, np.dtype("V")) if at is None else _shape(archive, *members[at])
                if name_index(dtype.names or (), other) is not None:
                    raise ReadError(f"{other} is a column of the points, which labels cannot be written to; "
                                    "name a new array with into=")  # fmt: skip
                if other.lower() in (*POINTS, *COLORS) or {"/", "\\"} & {*other}:
                    argument = "into" if other == name else "extra"
                    raise ReadError(f"{argument}: expected a name for a new array of labels, got {other!r}")
                fields[other] = Stored(other, (num,), np.dtype(np.int32 if other == name else extra[other]))
                continue
            fields[other] = _opened(
                archive, *members[where], lambda file, other=other: _read_stored(file, other, sys.maxsize)
            )
            shape, dtype = fields[other].shape, fields[other].dtype
            if shape not in ((num,), (num, 1)) or dtype.kind not in "fiu":
                raise ReadError(f"{other}: expected one number for each of {num} points, got {shape} {dtype}")
            if other in extra:
                check_extra(names[where], dtype, extra[other])
    replaced = {members[where][1].header_offset: other for other, where in places.items() if where is not None}

    def write_pieces(out: Path, pieces: Pieces) -> list[str]:
        blocks_of = layout(source, state[0], Request())
        return write_records(out, pieces, blocks_of.size, blocks(source, state[0], blocks_of))

    def write(out: Path, labels: np.ndarray, kept: np.ndarray, extra: Mapping[str, np.ndarray]) -> list[str]:
        no_records = (np.empty((end - first, 0), np.uint8) for first, end in ranges(num, 1))
        return write_records(out, pieces_of(labels, kept, extra), 1, no_records)

    def write_records(out: Path, pieces: Pieces, size: int, of_file: Generator[np.ndarray]) -> list[str]:
        """The new values are on disk until all are made, as members of an archive are written one after the other."""
        with zipfile.ZipFile(source) as before, ExitStack() as stack:
            check_unchanged(before.fp, state)
            made = {other: stack.enter_context(tempfile.TemporaryFile(dir=out.parent)) for other in places}
            earlier = {
                other: _blocks(fields[other], num, size, partial(before.open, members[where][1]))
                for other, where in places.items()
                if where is not None
            }
            for open_members in (*earlier.values(), of_file):  # which an exception would leave open
                stack.callback(open_members.close)
            first = 0
            for records in of_file:
                records.flags.writeable = False
                chosen, labels, more = pieces(first, records)
                first += len(records)
                for other, values in ((name, labels), *more.items()):
                    array = np.zeros(len(records), fields[other].dtype)
                    if other in earlier:
                        array[:] = _next(other, earlier[other]).view(array.dtype)[:, 0]
                    array[chosen] = values
                    made[other].write(array)
            # Not np.savez_compressed: arrays called "file" or "allow_pickle" clash with its arguments, and it appends
            # .npz.
            with zipfile.ZipFile(out, "w") as after:
                after.comment = before.comment
                for info in before.infolist():
                    with before.open(info) as member, after.open(copy.copy(info), "w") as new:
                        if (other := replaced.get(info.header_offset)) is not None:
                            _write_array(new, fields[other], made[other])
                        else:
                            shutil.copyfileobj(member, new)
                for other, where in places.items():
                    if where is None:
                        with _new_member(after, other) as new:
                            _write_array(new, fields[other], made[other])
            check_unchanged(before.fp, state)
        return []

    return LabelField(name, num, *integer_range(fields[name].dtype), write, write_pieces=write_pieces)


def _write_array(file: IO[bytes], stored: Stored, values: IO[bytes]) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(stored.dtype), "fortran_order": False, "shape": stored.shape}
    np.lib.format.write_array_header_1_0(file, described)
    values.seek(0)
    shutil.copyfileobj(values, file, 1 << 20)


def _new_member(archive: ZipFile, name: str) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    return archive.open(info, "w", force_zip64=True)


def _read_through(file: IO[bytes]) -> None:
    while file.read(1 << 20):
        pass


# ---- a new file


def table(path: Path, size: int, columns: Sequence[str] | None = None) -> Table:
    """All arrays of one number or row for each point; columns of the points are named as when they are read."""
    with zipfile.ZipFile(path) as archive:
        members = _members(archive)
        names = [name for name, _ in members]
        at = _place_of_points(archive, members)
        num = _shape(archive, *members[name_index(names, "x") if at is None else at])[0][:1]
        colors = None if at is None else first_name_index(names, COLORS)
        chosen, missing, num_columns = [], [], []
        for place, (name, info) in enumerate(members):
            try:
                shape, dtype = _shape(archive, name, info)
            except ReadError:  # of Python objects, for example
                shape, dtype = (), np.dtype("V")
            if place == at or (shape[:1] == num and len(shape) <= 2 and dtype.kind in "fiub"):
                chosen.append(place)
            else:
                missing.append(f"array {name}")

    def load() -> list[tuple[str, np.ndarray]]:
        points, fields = [], []
        with zipfile.ZipFile(path) as archive:
            for place in chosen:
                name, values = members[place][0], _array(archive, *members[place])
                if place == at:
                    points = points_first(_columns_of(values, columns))
                    num_columns[:] = [len(points)]
                elif place == colors and values.ndim == 2 and values.shape[1] in (3, 4):
                    fields += zip(("red", "green", "blue", "alpha"), values.T, strict=False)
                else:
                    fields.append((name, values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values))
        return points + fields if points else points_first(fields)

    def label(names: list[str]) -> int | None:
        place = first_name_index(names[3:], _usual_labels(at))  # the first three are x, y, z
        if place is None:  # a column of the points
            return first_name_index(names[: num_columns[0]], LABELS) if num_columns else None
        return place + 3

    return table_of(load, label, missing)


def table_npy(path: Path, size: int, columns: Sequence[str] | None = None) -> Table:
    """All columns of an array."""
    with path.open("rb") as file:
        _header(file, "the array", size)

    def load() -> list[tuple[str, np.ndarray]]:
        array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=_MAX_HEADER)
        return points_first(_columns_of(array, columns))

    return table_of(load, lambda names: first_name_index(names, LABELS), [])


def _columns_of(array: np.ndarray, columns: Sequence[str] | None) -> list[tuple[str, np.ndarray]]:
    """[(name, values)] of a table or a structured array."""
    request = Request(columns=None if columns is None else tuple(columns))
    if array.dtype.names:
        check_columns(array.dtype.names, request)
        return [(name, array[name]) for name in array.dtype.names]
    from_table(array[:1000], request)  # raises an error unless it is a table of these columns
    return [*zip(columns or nameless(array), array.T, strict=True)]


def create(out: Path, num: int, columns: Sequence[Column], blocks: Iterable[list[np.ndarray]]) -> None:
    """Write arrays points, colors and one for each other column. Unlike other formats, all are in memory at once."""
    parts: list[list[np.ndarray]] = [[] for _ in columns]
    for arrays in blocks:
        for part, values in zip(parts, arrays, strict=True):
            part.append(values)
    whole = [np.concatenate(part).astype(one.dtype, copy=False) for part, one in zip(parts, columns, strict=True)]
    names = [one.name for one in columns]
    members = [("points", np.column_stack(whole[:3]))]
    if names[3:6] == ["red", "green", "blue"]:
        members.append(("colors", np.column_stack(whole[3:6])))
        names[3:6], whole[3:6] = [], []
    with zipfile.ZipFile(out, "w") as archive:
        for name, values in (*members, *zip(names[3:], whole[3:], strict=True)):
            with _new_member(archive, name) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)
