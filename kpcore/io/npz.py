"""NumPy's files: NPY, a table or a structured array; NPZ, arrays by name."""

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
    Asked,
    Columns,
    Content,
    LabelField,
    ReadError,
    colors_of,
    fields_from,
    first_of,
    from_columns,
    from_table,
    joined,
    labels_from,
    listed,
    position,
    span,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import IO
    from zipfile import ZipFile, ZipInfo

Made = TypeVar("Made")
POINTS = ("points", "xyz", "pos", "position", "positions", "coord", "coords")  # usual names, the first there is counts
COLORS = ("colors", "color", "rgb")
_LONGEST = 1 << 16  # bytes of a header, which names the fields of a structured array


def read_npy(path: Path, size: int, asked: Asked) -> Content:
    with path.open("rb") as file:
        _header(file, "it", size)
    array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=_LONGEST)
    if not array.dtype.names:
        return from_table(array, asked)
    return from_columns(Columns((name, array[name]) for name in array.dtype.names), asked)


def _header(file: IO[bytes], name: str, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an array in so many bytes; an error if these cannot hold it."""
    start = file.read(12)
    version = start[6:7]
    wide = version in (b"\2", b"\3")
    length = int.from_bytes(start[8 : 12 if wide else 10], "little")
    if start[:6] != b"\x93NUMPY" or version not in (b"\1", b"\2", b"\3"):
        raise ReadError(f"{name} is no NumPy array")
    if not 0 < length <= min(size, _LONGEST):
        raise ReadError(f"damaged: {name} promises a header of {length} bytes")
    file.seek(8)
    head = np.lib.format.read_array_header_2_0 if wide else np.lib.format.read_array_header_1_0
    shape, _, dtype = head(file, max_header_size=_LONGEST)
    if dtype.hasobject:
        raise ReadError(f"{name} holds Python objects, which are not read")
    needed = math.prod(shape) * dtype.itemsize
    if any(num < 0 for num in shape) or needed > size - file.tell():
        raise ReadError(f"truncated: {name} of shape {shape} needs {needed} bytes, {size - file.tell()} are there")
    return shape, dtype


def _members(archive: ZipFile) -> list[tuple[str, ZipInfo]]:
    """[(name, entry)] of the arrays in an NPZ, by the names that NumPy gives them; nothing else in it counts."""
    return [(info.filename[:-4], info) for info in archive.infolist() if info.filename.endswith(".npy")]


def _opened(archive: ZipFile, name: str, info: ZipInfo, work: Callable[[IO[bytes]], Made]) -> Made:
    """What the work makes of an open member; whatever is wrong with that is a ReadError that names it."""
    try:
        with archive.open(info) as file:
            return work(file)
    except (ReadError, MemoryError):
        raise
    except Exception as error:  # zlib, zipfile, tokenize and ast have theirs
        raise ReadError(f"{name} cannot be read: {' '.join(str(error).split())[:120]}") from None


def _array(archive: ZipFile, name: str, info: ZipInfo) -> np.ndarray:
    if info.file_size > 1032 * max(info.compress_size, 1):  # deflate packs at most 1032 : 1
        raise ReadError(f"damaged: {name} promises {info.file_size} bytes, packed in {info.compress_size}")

    def work(file: IO[bytes]) -> np.ndarray:
        _header(file, name, info.file_size)
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=_LONGEST)
        file.read(1)  # at the end zipfile compares checksums
        return array

    return _opened(archive, name, info, work)


def _shape(archive: ZipFile, name: str, info: ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of a member."""
    return _opened(archive, name, info, lambda file: _header(file, name, info.file_size))


def _place_of_points(archive: ZipFile, members: list[tuple[str, ZipInfo]]) -> int | None:
    """Which member is the points: of a usual name, else the only table. None: x, y and z are members."""
    names = [name for name, _ in members]
    at = first_of(names, POINTS)
    if at is not None:
        return at
    if all(position(names, axis) is not None for axis in "xyz"):
        return None
    tables = []
    for at, (name, info) in enumerate(members):
        try:
            shape, dtype = _shape(archive, name, info)
        except ReadError:
            continue  # not needed
        if len(shape) == 2 and shape[1] >= 3 and dtype.kind in "fiu" and name.lower() not in COLORS:
            tables.append(at)
    if len(tables) != 1:
        raise ReadError(f"has no array named points, only {listed(names)}")
    return tables[0]


def read(path: Path, size: int, asked: Asked) -> Content:
    with zipfile.ZipFile(path) as archive:
        members = _members(archive)
        arrays = [(name, partial(_array, archive, name, info)) for name, info in members]
        at = _place_of_points(archive, members)
        if at is None:
            return from_columns(Columns(arrays), asked, _usual_labels(at))
        points = arrays.pop(at)[1]()
        alone = asked._replace(fields=(), label=None)
        if points.dtype.names:
            named = [(name, points[name]) for name in points.dtype.names]
            content = from_columns(Columns(named), alone)
        else:
            content = from_table(points, alone)
            named = [*zip(asked.columns or "xyz", points.T, strict=False)]
            if not asked.columns:  # y may be an array of labels
                taken = {name.lower() for name, _ in arrays}
                named = [(name, values) for name, values in named if name not in taken]
        rest, columns = Columns(arrays), Columns([*arrays, *named])
        if (rgb := first_of(rest.names, COLORS)) is not None:
            colors, doubt = colors_of(rest.at(rgb))
            content = content._replace(colors=colors, doubt=joined(content.doubt, doubt))
        if asked.label is not None:
            labels, unlabeled, doubt = labels_from(columns, asked)
        elif first_of(rest.names, LABEL_ARRAYS) is None and (asked.columns or points.dtype.names):
            labels, unlabeled, doubt = content.labels, content.unlabeled, None
        else:
            labels, unlabeled, doubt = labels_from(rest, asked, LABEL_ARRAYS)  # y of the points is a coordinate
        if arrays and not any(usual in members[at][0].lower() for usual in ("point", "xyz", "pos", "coord")):
            doubt = joined(doubt, f"it has no array named points: {members[at][0]} was read as these")
        return content._replace(
            labels=labels, unlabeled=unlabeled, names=columns.names, fields=fields_from(columns, asked),
            doubt=joined(content.doubt, doubt),
        )  # fmt: skip


def _usual_labels(at: int | None) -> tuple[str, ...]:
    """Usual names of labels, by the place of the points: y is one unless it is a coordinate."""
    return LABEL_ARRAYS if at is not None else tuple(name for name in LABEL_ARRAYS if name != "y")


def label_field(source: Path, label: str | None, into: str | None) -> LabelField:
    label = into or label
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():  # what cannot be copied is said before the work
            _opened(archive, info.filename, info, _read_through)
        members = _members(archive)
        names = [name for name, _ in members]
        at = _place_of_points(archive, members)
        shape, _ = _shape(archive, *members[position(names, "x") if at is None else at])
        num = shape[0] if shape else 0
        place = position(names, label) if label else first_of(names, _usual_labels(at))
        name = (label or "labels") if place is None else names[place]
        if place is None:
            _, dtype = (None, np.dtype("V")) if at is None else _shape(archive, *members[at])
            if position(dtype.names or (), name) is not None:
                raise ReadError(f"{name} is a column of the points, which is not written to; into= names a new array")
            if name.lower() in (*POINTS, *COLORS) or {"/", "\\"} & {*name}:
                raise ReadError(f"expected a name for a new array of labels, got {name!r}")
            values = np.zeros(num, np.int32)
        else:
            shape, dtype = _shape(archive, *members[place])
            if shape not in ((num,), (num, 1)) or dtype.kind not in "fiu":
                raise ReadError(f"{name} is {shape} {dtype}, not a number for each of {num} points")
            values = _array(archive, *members[place])
    replaced = None if place is None else members[place][1].header_offset

    def write(out: Path, labels: np.ndarray, kept: np.ndarray) -> None:
        values.reshape(-1)[kept] = labels
        # Not np.savez_compressed: it takes names of arrays for its own arguments, and adds to the file's name.
        with zipfile.ZipFile(source) as before, zipfile.ZipFile(out, "w") as after:
            after.comment = before.comment
            for info in before.infolist():
                with before.open(info) as old, after.open(copy.copy(info), "w") as new:
                    if info.header_offset == replaced:
                        np.lib.format.write_array(new, values, allow_pickle=False)
                    else:
                        shutil.copyfileobj(old, new)
            if replaced is None:
                info = zipfile.ZipInfo(f"{name}.npy")
                info.compress_type = zipfile.ZIP_DEFLATED
                with after.open(info, "w", force_zip64=True) as new:
                    np.lib.format.write_array(new, values, allow_pickle=False)

    return LabelField(name, num, *span(values.dtype), write)


def _read_through(file: IO[bytes]) -> None:
    while file.read(1 << 20):
        pass
