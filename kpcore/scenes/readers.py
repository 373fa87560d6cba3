"""One function per file format, each strict about what the file promises, all ending in the same Cloud."""

import io
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kpcore.config import require

# Usual names of labels, the first there is counts: of a field, and of an array in an NPZ.
LABELS = ("label", "labels", "class", "classification", "semantic", "semantic_label", "class_id")
LABEL_ARRAYS = ("labels", "label", "classes", "y")


@dataclass(frozen=True, eq=False)
class Cloud:
    """A point cloud ready for kpcore: float32 coordinates near the origin.

    points : (N, 3) float32, finite; the file's own coordinates are ``points + shift``.
    colors : (N, 3) uint8, or None.
    labels : (N,) int32, or None.
    shift : (3,) float64, subtracted in float64 before rounding to float32. It is zero unless the largest coordinate
        exceeds both 1000 and ten extents of the cloud, where float32 would lose detail (half a metre at UTM northings).
    left_out : how many points were left out for a coordinate that is NaN, infinite or beyond float32.
    names : the class names that labels index, or None.
    up : the axis that points away from the ground; a depth camera's own frame has y pointing down.
    fields : what else was asked for, by name, each (N,) float32.
    kept : (n,) bool, which of the file's points these are; None: all.
    """

    points: np.ndarray
    colors: np.ndarray | None
    labels: np.ndarray | None
    shift: np.ndarray
    left_out: int = 0
    names: tuple[str, ...] | None = None
    up: tuple[int, int, int] = (0, 0, 1)
    fields: dict = field(default_factory=dict)
    kept: np.ndarray | None = None


class ReadError(ValueError):
    """The file cannot be read; the message is one line that names the file and the reason."""


def read(path, *, fields=(), label=None):
    """Read a point cloud from a file; its extension names the format.

    PLY, PCD (ascii, binary, binary_compressed), LAS, LAZ and COPC, NPY (a table or a structured array), NPZ (points,
    colors, labels), XYZ / TXT / CSV (comma, semicolon, tab or space; with a header line or without), KITTI .bin.
    A table without names holds x y z [r g b [label]]. The result is a `Cloud`. Raises ReadError for anything that is
    not a whole and valid file, ModuleNotFoundError where the format needs a package that is not installed.

    `fields` are names of what else to read, such as intensity; an error unless they are there. `label` names the field
    of the labels; not given, it is the first there is of the usual names, unless that is 0 throughout.
    """
    path = Path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the readers' grumbles: each is an error here, or of no consequence
        try:
            return _read(path, tuple(name.lower() for name in fields), label and label.lower())
        except (ImportError, MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except ReadError as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
        except BaseException as error:  # lazrs is Rust: its panics arrive as bare BaseExceptions
            said = " ".join(str(error).split())[:160] or type(error).__name__
            reason = f"damaged, or not what its extension says: {said}"
    raise ReadError(f"{path}: {reason}")


def _read(path, fields, label):
    if path.is_dir():
        raise ReadError("is a directory")
    if path.exists() and not path.is_file():
        raise ReadError("is not a regular file")
    size = path.stat().st_size
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ReadError(f"unknown extension {path.suffix!r}; kpcore reads {' '.join(READERS)}")
    if size == 0:
        raise ReadError("is empty")
    with path.open("rb") as file:
        start = file.read(11)
    found = next((kind for signature, kind, _ in SIGNATURES if start.startswith(signature)), None)
    expected = next((kind for _, kind, suffixes in SIGNATURES if path.suffix.lower() in suffixes), None)
    if found != expected:
        raise ReadError(f"is a {found} file" if found else f"is not a {expected} file")

    asked = {*fields, *([] if label is None else [label])}
    points, colors, labels, more, *up = reader(path, size, asked)
    if missing := sorted(asked - more.keys()):
        raise ReadError(f"has no field {' '.join(missing)}")
    if len(points) == 0:
        raise ReadError("holds no points")
    if label is not None:
        labels = _labels(more[label], blank=True)
        if labels is None:
            raise ReadError(f"field {label} holds no labels, which are whole numbers")
    more = {name: _field(name, more[name]) for name in fields}
    for name, array in (("colors", colors), ("labels", labels), *more.items()):
        if array is not None and len(array) != len(points):
            raise ReadError(f"holds {len(points)} points but {len(array)} {name}")

    keep = (np.abs(points) <= np.finfo(np.float32).max).all(axis=1)  # False for NaN as well
    if not keep.any():
        raise ReadError(f"holds no finite points: all {len(points)} have a coordinate that is NaN or infinite")
    kept = None if keep.all() else keep
    points, colors, labels = (a if a is None or kept is None else a[kept] for a in (points, colors, labels))
    more = {name: values if kept is None else values[kept] for name, values in more.items()}
    low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    far = max(np.abs(low).max(), np.abs(high).max()) > max(1000.0, 10.0 * (high - low).max())
    shift = np.floor(low) if far else np.zeros(3)
    if far:
        points = points - shift
    points = np.ascontiguousarray(points, np.float32)
    return Cloud(points, colors, labels, shift, int((~keep).sum()), None, *up, fields=more, kept=kept)


def _field(name, values):
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        raise ReadError(f"field {name} is not one plain number for each point")
    return values.astype(np.float32)


def _from_columns(columns, asked):
    """(points, colors, labels, fields) from a mapping of field names to arrays."""
    columns = {name.lower().removeprefix("scalar_"): np.asarray(values) for name, values in columns.items()}
    missing = [axis for axis in "xyz" if axis not in columns]
    if missing:
        raise ReadError(f"has no field {' '.join(missing)}, only {' '.join(columns)[:120] or 'none'}")
    xyz = [columns[axis] for axis in "xyz"]
    if any(values.dtype.kind not in "fiu" for values in xyz):
        raise ReadError("x, y and z are not plain numbers")
    single = all(values.dtype in (np.float16, np.float32) for values in xyz)
    points = np.column_stack([values.astype(np.float32 if single else np.float64) for values in xyz])

    colors = None
    for names in (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")):
        if colors is None and all(name in columns for name in names):
            colors = _colors(np.column_stack([columns[name] for name in names]))
    packed = columns.get("rgb", columns.get("rgba"))
    if colors is None and packed is not None and packed.ndim == 1 and packed.dtype.itemsize == 4:
        bits = np.ascontiguousarray(packed).view(np.uint32)
        colors = _colors(np.column_stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255]).astype(np.uint8))

    labels = next((_labels(columns[name]) for name in LABELS if name in columns), None)
    return points, colors, labels, {name: columns[name] for name in asked if name in columns}


def _from_table(table, asked):
    """(points, colors, labels, fields) from x y z [r g b [label]]; what cannot be colours is something else."""
    if table.ndim != 2 or table.shape[1] < 3 or table.dtype.kind not in "fiu":
        raise ReadError(f"expected an (N, 3 or more) table of numbers, got {table.shape} {table.dtype}")
    columns = dict(zip("xyz", table.T, strict=False))
    rgb = table[:, 3:6]
    if rgb.shape[1] == 3 and rgb.size and rgb.min() >= 0 and 1 < rgb.max() <= 255 and (rgb == np.floor(rgb)).all():
        columns |= zip("rgb", rgb.T, strict=True)
        if table.shape[1] > 6:
            columns["label"] = table[:, 6]
    return _from_columns(columns, asked)


def _colors(rgb):
    """uint8 from 8-bit, 16-bit or 0..1 colours; None if all are black, as where a field was left blank."""
    if rgb.ndim != 2 or rgb.shape[1] < 3 or rgb.dtype.kind not in "fiu":
        raise ReadError(f"expected (N, 3) colours, got {rgb.shape} {rgb.dtype}")
    rgb = np.nan_to_num(rgb[:, :3])
    if not rgb.any():
        return None
    if rgb.dtype.kind == "f" and rgb.max() <= 1:
        rgb = np.round(rgb * 255)
    elif rgb.max() > 255:
        rgb = rgb // 256
    return rgb.clip(0, 255).astype(np.uint8)


def _labels(values, blank=False):
    """int32 from anything that holds whole numbers; None for what does not, or, unless `blank`, is 0 throughout (never
    classified)."""
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "fiub" or not (blank or values.any()):
        return None
    whole = (np.abs(values.astype(np.float64)) < 2**31) & (values == np.floor(values))
    return values.astype(np.int32) if whole.all() else None


def _ply(path, size, asked):
    plyfile = require("plyfile", "io")
    with path.open("rb") as file:
        header = file.read(1 << 16).partition(b"end_header")[0]
    for name, count in re.findall(rb"^element\s+(\w+)\s+(\d+)", header, re.MULTILINE):
        if int(count) > size:  # plyfile allocates first and looks later
            raise ReadError(f"truncated: promises {int(count)} {name.decode()} elements in {size} bytes")
    ply = plyfile.PlyData.read(path)
    if "vertex" not in ply:
        raise ReadError("has no vertex element")
    vertex = ply["vertex"].data
    return _from_columns({name: vertex[name] for name in vertex.dtype.names}, asked)


def _pcd(path, size, asked):
    # Not through pypcd4 1.5.1: it returns a cut ascii file as if it were whole, rejects two spaces between
    # numbers, files without COUNT and versions before 0.7.
    with path.open("rb") as file:
        header, num_lines = {}, 0
        while "DATA" not in header:
            line, num_lines = file.readline(4096), num_lines + 1
            if not line or len(header) > 100:
                raise ReadError("is not a PCD file, or its header is cut: it has no DATA line")
            key, *values = line.decode("latin-1").split() or ["#"]
            header[key] = values
        body = file.read()
    missing = [key for key in ("FIELDS", "SIZE", "TYPE", "WIDTH") if not header.get(key)]
    if missing or not header["DATA"]:
        raise ReadError(f"damaged: the header has no {' '.join(missing) or 'DATA'}")
    names, sizes, kinds = header["FIELDS"], header["SIZE"], header["TYPE"]
    counts = [int(count) for count in header.get("COUNT", ["1"] * len(names))]
    fields = [
        (f"{name}{i}" if name == "_" else name, f"<{kind.lower()}{size}", (count,) if count != 1 else ())
        for i, (name, kind, size, count) in enumerate(zip(names, kinds, sizes, counts, strict=True))
    ]
    record = np.dtype(fields)
    width, height = int(header["WIDTH"][0]), int(header.get("HEIGHT", ["1"])[0])
    num = int(header.get("POINTS", [width * height])[0])
    if num != width * height:
        raise ReadError(f"promises {num} points but {width} x {height}")
    if num == 0:
        raise ReadError("holds no points")

    encoding = header["DATA"][0]
    if encoding == "ascii":
        empty = np.empty((0, sum(counts)))
        table = _numbers(io.StringIO(body.decode()), before=num_lines) if body.strip() else empty
        if table.shape != (num, sum(counts)):
            raise ReadError(f"promises {num} points of {sum(counts)} numbers, holds a table of {table.shape}")
        starts = np.cumsum([0, *counts])
        columns = {name: table[:, at].astype(kind) for (name, kind, _), at in zip(fields, starts, strict=False)}
    elif encoding == "binary":
        if num * record.itemsize > len(body):
            raise ReadError(f"truncated: {num} points need {num * record.itemsize} bytes, {len(body)} are there")
        table = np.frombuffer(body, record, num)
        columns = {name: table[name] for name in record.names}
    elif encoding == "binary_compressed":
        packed, unpacked = struct.unpack_from("<II", body)
        if packed > len(body) - 8:
            raise ReadError(f"truncated: {packed} compressed bytes promised, {len(body) - 8} are there")
        if unpacked != num * record.itemsize:
            raise ReadError(f"promises {num} points of {record.itemsize} bytes but {unpacked} bytes")
        plain, at, columns = _lzf(body[8 : 8 + packed], unpacked), 0, {}
        for name in record.names:  # one field after the other, each for all points
            columns[name] = np.ndarray(num, record[name], plain, at)
            at += num * record[name].itemsize
    else:
        raise ReadError(f"unknown DATA {encoding}")

    points, colors, labels, more = _from_columns(columns, asked)
    camera = height > 1 and np.nanmin(points[:, 2]) > 0  # an image: x right, y down, z forward
    return points, colors, labels, more, (0, -1, 0) if camera else (0, 0, 1)


def _lzf(data, size):
    """LibLZF's format: a literal run below 32, else a copy from up to 8 KiB back. A Kinect frame's 5 MB take 0.15 s."""
    out, i, end = bytearray(), 0, len(data)
    data += bytes(2)  # so that a cut copy is found by its result
    while i < end and len(out) <= size:
        control, i = data[i], i + 1
        if control < 32:
            out += data[i : i + control + 1]
            i += control + 1
            continue
        length = control >> 5
        if length == 7:
            length, i = 7 + data[i], i + 1
        start, length, i = len(out) - ((control & 31) << 8) - data[i] - 1, length + 2, i + 1
        if start < 0:
            raise ReadError("damaged LZF data")
        while length > 0:  # source and copy may overlap
            part = out[start : start + length]
            out += part
            length -= len(part)
    if len(out) != size:
        raise ReadError("damaged LZF data")
    return bytes(out)


def _las(path, size, asked):
    _check_las(path, size)
    laspy = require("laspy", "io")
    points, colors, labels, more = [], [], [], {}
    # Not lazrs in parallel: it trusts the chunk table and aborts the process when that asks for 4 GB.
    with laspy.open(path, laz_backend=laspy.LazBackend.Lazrs, read_evlrs=False) as file:
        names = {name.lower(): name for name in file.header.point_format.dimension_names}
        has_color, more = "red" in names, {name: [] for name in asked if name in names}
        for chunk in file.chunk_iterator(1_000_000):
            points.append(np.column_stack([chunk.x, chunk.y, chunk.z]))
            labels.append(np.asarray(chunk.classification))
            if has_color:
                colors.append(np.column_stack([chunk.red, chunk.green, chunk.blue]))
            for name, values in more.items():
                # X, Y and Z are whole numbers there, of a scale; x, y and z are coordinates.
                values.append(np.asarray(getattr(chunk, name) if name in ("x", "y", "z") else chunk[names[name]]))
    rgb = _colors(np.concatenate(colors)) if has_color else None
    more = {name: np.concatenate(values) for name, values in more.items()}
    return np.concatenate(points), rgb, _labels(np.concatenate(labels)), more


def _check_las(path, size):
    """What laspy and lazrs take on trust: a header of 4 billion records keeps them busy for minutes."""
    with path.open("rb") as file:
        head = file.read(375)
        if len(head) < 227:
            raise ReadError("truncated: the header is cut")
        header_size, offset, num_vlrs, form, record, num = struct.unpack_from("<HIIBHI", head, 94)
        if head[25] >= 4:
            if len(head) < 375:
                raise ReadError("truncated: the header is cut")
            num = struct.unpack_from("<Q", head, 247)[0]
        if not 227 <= header_size <= offset <= size:
            raise ReadError(f"truncated: the points start at byte {offset} of {size}")
        if num == 0:
            raise ReadError("holds no points")
        vlrs, at, laszip = _at(file, 0, offset), header_size, b""
        for _ in range(num_vlrs):
            if at + 54 > offset:
                raise ReadError(f"damaged: {num_vlrs} variable-length records do not fit {offset - header_size} bytes")
            record_id, length = struct.unpack_from("<HH", vlrs, at + 18)
            if record_id == 22204 and vlrs.startswith(b"laszip encoded", at + 2):
                laszip = vlrs[at + 54 : at + 54 + length]
            at += 54 + length
        if not form & 0xC0:
            if offset + num * record > size:
                raise ReadError(f"truncated: {num} points of {record} bytes from byte {offset} exceed {size} bytes")
            return

        require("lazrs", "io")
        if len(laszip) < 34:
            raise ReadError("damaged: compressed, but without a LASzip record")
        chunk_size, num_items = struct.unpack_from("<I", laszip, 12)[0], struct.unpack_from("<H", laszip, 32)[0]
        items = struct.unpack_from(f"<{3 * num_items}H", laszip, 34)  # (type, size, version) each
        if sum(items[1::3]) != record:
            raise ReadError(f"damaged: LASzip items of {sum(items[1::3])} bytes for points of {record}")
        table = struct.unpack("<q", _at(file, offset, 8))[0]
        if table == -1:  # written to a pipe: the position stands at the end
            table = struct.unpack_from("<q", _at(file, size - 8, 8))[0]
        if not offset + 8 <= table <= size - 8:
            raise ReadError(f"truncated: the chunk table starts at byte {table} of {size}")
        num_chunks = struct.unpack_from("<I", _at(file, table, 8), 4)[0]
        # Every chunk starts with one whole point; the size 2**32 - 1 stands for chunks of varying size.
        if num_chunks * record > table - offset or num > num_chunks * chunk_size:
            raise ReadError(f"damaged: {num} points in {num_chunks} chunks do not fit {table - offset} bytes")
        if laszip[0] == 3:  # layered: a point, the chunk's number of points, the size of each layer, the layers
            layers = {10: 9, 11: 1, 12: 2, 13: 1}  # point, RGB, RGB and NIR, wave packet; extra bytes have one each
            words = 1 + sum(layers.get(kind, width) for kind, width in zip(items[::3], items[1::3], strict=True))
            at, found = offset + 8, 0
            while at < table:
                counts = struct.unpack(f"<{words}I", _at(file, at + record, 4 * words))
                found, at = found + counts[0], at + record + 4 * words + sum(counts[1:])
            if (found, at) != (num, table):
                raise ReadError(f"damaged: {num} points up to byte {table} promised, {found} up to byte {at} found")


def _at(file, position, count):
    file.seek(position)
    return file.read(count)


def _numpy(path, size, asked):
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a lying header meets the file's size
    if not array.dtype.names:
        return _from_table(array, asked)
    return _from_columns({name: array[name] for name in array.dtype.names}, asked)


def _npz(path, size, asked):
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
    points = find("points", "xyz", "pos", "position", "positions", "coord", "coords")
    if points is None and len(tables) == 1:
        points = tables[0]
    if points is None:
        raise ReadError(f"has no array named points, only {' '.join(arrays)[:120] or 'none'}")
    points, colors, labels, more = _from_table(points, asked)
    rgb, classes = find("colors", "color", "rgb"), find(*LABEL_ARRAYS)
    more |= {name: arrays[name] for name in asked if name in arrays}
    return points, colors if rgb is None else _colors(rgb), labels if classes is None else _labels(classes), more


def _text(path, size, asked):
    names, commented, skip = None, True, 0
    with path.open(encoding="utf-8-sig") as file:
        while line := file.readline(100_000):
            comment = line.startswith(("#", "//"))
            delimiter = next((mark for mark in ",;\t" if mark in line), None)
            words = [word.strip().strip('"').lower() for word in line.strip().lstrip("#/").split(delimiter)]
            if words and not comment and _is_number(words[0]):
                break
            if {"x", "y", "z"} <= set(words):
                names, commented = words, comment
            elif any(words) and not comment:
                raise ReadError(f"line {skip + 1}: expected numbers or the names x, y, z, got {line.strip()[:40]!r}")
            skip += 1
    if not line:
        raise ReadError("holds no points")
    table = _numbers(path, delimiter, skip)
    if names and len(names) == table.shape[1]:
        return _from_columns(dict(zip(names, table.T, strict=True)), asked)
    if not commented:
        raise ReadError(f"names {len(names)} columns, has {table.shape[1]}")
    return _from_table(table, asked)


def _numbers(source, delimiter=None, skip=0, before=0):
    """The table in a file, or in a StringIO of what follows `before` lines of one, without the first `skip` lines."""
    try:
        return np.loadtxt(source, delimiter=delimiter, skiprows=skip, ndmin=2, encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise
    except ValueError:  # NumPy counts other lines, and advises its own caller
        width = None
    if isinstance(source, io.StringIO):
        source.seek(0)
    with source if isinstance(source, io.StringIO) else source.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            words = [word.strip() for word in line.partition("#")[0].strip().split(delimiter)]
            if number <= skip or not any(words):
                continue
            width = width or len(words)
            if len(words) != width:
                raise ReadError(f"line {before + number}: expected {width} numbers, got {len(words)}")
            for word in words:
                if not _is_number(word):
                    raise ReadError(f"line {before + number}: expected numbers, got {word[:40]!r}")
    raise ReadError("holds no table of numbers")


def _is_number(word):
    try:
        float(word)
    except ValueError:
        return False
    return True


def _kitti(path, size, asked):
    if size % 16:
        raise ReadError(f"truncated or no KITTI scan: {size} bytes are not whole records of 4 float32")
    table = np.fromfile(path, np.float32).reshape(-1, 4)
    points = table[:, :3]
    if np.abs(points, where=np.isfinite(points), out=np.zeros_like(points)).max(initial=0) > 1e5:  # a lidar sees 200 m
        raise ReadError("is no KITTI scan: as float32 x, y, z, intensity its coordinates exceed 100 km")
    return points, None, None, {name: table[:, 3] for name in asked if name == "intensity"}


READERS = {
    ".ply": _ply, ".pcd": _pcd, ".las": _las, ".laz": _las, ".npy": _numpy, ".npz": _npz,
    ".xyz": _text, ".txt": _text, ".csv": _text, ".bin": _kitti,
}  # fmt: skip
SIGNATURES = [
    (b"ply", "PLY", {".ply"}),
    (b"LASF", "LAS", {".las", ".laz"}),
    (b"\x93NUMPY", "NPY", {".npy"}),
    (b"PK\x03\x04", "NPZ", {".npz"}),
]
