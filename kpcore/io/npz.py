"""NumPy files: NPY with a table or a structured array, and NPZ with named arrays."""

from __future__ import annotations

import copy
import math
import shutil
import zipfile
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kpcore.io.cloud import (
    LABEL_ARRAYS,
    Content,
    LabelField,
    NamedArrays,
    ReadError,
    Request,
    check_columns,
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
    table_names,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from typing import IO
    from zipfile import ZipFile, ZipInfo

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
    array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=_MAX_HEADER)
    if not array.dtype.names:
        return from_table(array, request)
    return from_columns(NamedArrays((name, array[name]) for name in array.dtype.names), request)


def _header(file: IO[bytes], name: str, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an array; an error unless it fits into the `size` bytes of its file."""
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
    shape, _, dtype = read_header(file, max_header_size=_MAX_HEADER)
    if dtype.hasobject:
        raise ReadError(f"{name} holds Python objects, which kpcore does not unpickle")
    needed = math.prod(shape) * dtype.itemsize
    if any(num < 0 for num in shape) or needed > size - file.tell():
        raise ReadError(f"truncated: {name} of shape {shape} needs {needed} bytes, got {size - file.tell()}")
    return shape, dtype


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
        at = _place_of_points(archive, members)
        if at is None:
            return from_columns(NamedArrays(arrays), request, _usual_labels(at))
        points = arrays.pop(at)[1]()
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
        if arrays and not any(usual in members[at][0].lower() for usual in ("point", "xyz", "pos", "coord")):
            warning = join_warnings(warning, f"it has no array named points: {members[at][0]} was read as the points")
        return content._replace(
            labels=labels, unlabeled=unlabeled, names=columns.names, fields=fields_from(columns, request),
            flags=flags_from(columns, request),
            warning=join_warnings(content.warning, warning),
        )  # fmt: skip


def _usual_labels(at: int | None) -> tuple[str, ...]:
    """Usual names of label arrays. y is one of them, unless x, y and z are arrays (`at` is None)."""
    return LABEL_ARRAYS if at is not None else tuple(name for name in LABEL_ARRAYS if name != "y")


def label_field(source: Path, label: str | None, into: str | None) -> LabelField:
    label = into or label
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
        if place is None:
            _, dtype = (None, np.dtype("V")) if at is None else _shape(archive, *members[at])
            if name_index(dtype.names or (), name) is not None:
                raise ReadError(
                    f"{name} is a column of the points, which labels cannot be written to; name a new array with into="
                )
            if name.lower() in (*POINTS, *COLORS) or {"/", "\\"} & {*name}:
                raise ReadError(f"into: expected a name for a new array of labels, got {name!r}")
            values = np.zeros(num, np.int32)
        else:
            shape, dtype = _shape(archive, *members[place])
            if shape not in ((num,), (num, 1)) or dtype.kind not in "fiu":
                raise ReadError(f"{name}: expected one number for each of {num} points, got {shape} {dtype}")
            values = _array(archive, *members[place])
    replaced = None if place is None else members[place][1].header_offset

    def write(out: Path, labels: np.ndarray, kept: np.ndarray) -> None:
        values.reshape(-1)[kept] = labels
        # Not np.savez_compressed: arrays called "file" or "allow_pickle" clash with its arguments, and it appends .npz.
        with zipfile.ZipFile(source) as before, zipfile.ZipFile(out, "w") as after:
            after.comment = before.comment
            for info in before.infolist():
                with before.open(info) as member, after.open(copy.copy(info), "w") as new:
                    if info.header_offset == replaced:
                        np.lib.format.write_array(new, values, allow_pickle=False)
                    else:
                        shutil.copyfileobj(member, new)
            if replaced is None:
                info = zipfile.ZipInfo(f"{name}.npy")
                info.compress_type = zipfile.ZIP_DEFLATED
                with after.open(info, "w", force_zip64=True) as new:
                    np.lib.format.write_array(new, values, allow_pickle=False)

    return LabelField(name, num, *integer_range(values.dtype), write)


def _read_through(file: IO[bytes]) -> None:
    while file.read(1 << 20):
        pass
