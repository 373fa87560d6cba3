"""NumPy's files: NPY, a table or a structured array; NPZ, arrays by name."""

from __future__ import annotations

import zipfile

import numpy as np

from kpcore.io.cloud import (
    LABEL_ARRAYS,
    Columns,
    LabelField,
    ReadError,
    colors_of,
    first_of,
    found_fields,
    found_labels,
    from_columns,
    from_table,
    position,
    span,
)  # fmt: skip

POINTS = ("points", "xyz", "pos", "position", "positions", "coord", "coords")  # usual names, the first there is counts


def read_npy(path, size, asked):
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a lying header meets the file's size
    if not array.dtype.names:
        return from_table(array, asked)
    return from_columns(Columns((name, array[name]) for name in array.dtype.names), asked)


def read(path, size, asked):
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():  # deflate packs at most 1032 : 1
            if member.file_size > 1032 * max(member.compress_size, 1) or member.compress_size > size:
                raise ReadError(f"damaged: {member.filename} promises {member.file_size} bytes")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = head(file)
                if int(np.prod(shape, dtype=object)) * dtype.itemsize > member.file_size:
                    raise ReadError(f"damaged: {member.filename} promises an array of shape {shape}")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name.lower(): file[name] for name in file.files}

    def find(*names):
        return next((arrays[name] for name in names if name in arrays), None)

    tables = [array for array in arrays.values() if array.ndim == 2 and array.shape[1] >= 3]
    points = find(*POINTS)
    if points is None and len(tables) == 1:
        points = tables[0]
    if points is None:
        raise ReadError(f"has no array named points, only {' '.join(arrays)[:120] or 'none'}")
    rest = Columns((name, array) for name, array in arrays.items() if array is not points)
    content = from_table(points, asked._replace(fields=(), label=None))
    rgb = find("colors", "color", "rgb")
    own = Columns([*rest.pairs, *zip("xyz", points.T, strict=False)])
    labels, unlabeled = found_labels(own, asked, LABEL_ARRAYS)
    return content._replace(
        colors=content.colors if rgb is None else colors_of(rgb), labels=labels, unlabeled=unlabeled,
        names=own.names, fields=found_fields(own, asked),
    )  # fmt: skip


def label_field(source, label, into):
    label = into or label
    with np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    names = tuple(arrays)
    at = position(names, label) if label else first_of(names, LABEL_ARRAYS)
    name = (label or "labels") if at is None else names[at]
    points = next(array for one, array in arrays.items() if one.lower() in POINTS)
    values = arrays.setdefault(name, np.zeros(len(points), np.int32))

    def write(out, labels, kept):
        values[kept] = labels
        # Not np.savez_compressed: it takes names of arrays for its own arguments, and adds to the file's name.
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for one, array in arrays.items():
                with archive.open(f"{one}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)

    return LabelField(name, len(values), *span(values.dtype), write)
