"""Reading and labelling files: the format is chosen by the file's extension."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpcore.backends import checks
from kpcore.config import require
from kpcore.files import check_writable, replacing
from kpcore.io import convert, las, npz, pcd, ply, sweeps, text
from kpcore.io.cloud import FLAGS, Cloud, LabelField, OtherColumns, ReadError, Request, cloud_of, name_index
from kpcore.io.convert import CREATORS as WRITERS

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, DTypeLike

    from kpcore.io.cloud import Pieces

READERS = {
    ".ply": ply.read, ".pcd": pcd.read, ".las": las.read, ".laz": las.read, ".npy": npz.read_npy, ".npz": npz.read,
    ".xyz": text.read, ".txt": text.read, ".csv": text.read, ".pts": text.read, ".bin": sweeps.read,
}  # fmt: skip
FIELD_NAMES = {
    ".ply": ply.field_names, ".pcd": pcd.field_names, ".las": las.field_names, ".laz": las.field_names,
    ".npy": npz.npy_field_names, ".npz": npz.field_names, ".bin": sweeps.field_names,
    **dict.fromkeys((".xyz", ".txt", ".csv", ".pts"), text.field_names),
}  # fmt: skip
SIGNATURES = [
    (b"ply", "PLY", {".ply"}),
    (b"LASF", "LAS", {".las", ".laz"}),
    (b"\x93NUMPY", "NPY", {".npy"}),
    (b"PK\x03\x04", "NPZ", {".npz"}),
]
TABLES = {".npy", ".npz", ".xyz", ".txt", ".csv", ".pts", ".bin"}  # formats whose columns may have no names


def read(path: str | os.PathLike[str], *, fields: Sequence[str] = (), label: str | None = None,
         columns: Sequence[str] | None = None, exact: bool = False, ignore: Sequence[int | str] = (),
         drop_zeros: bool | None = None) -> Cloud:  # fmt: skip
    """Read a point cloud from a file; its extension names the format.

    Formats: PLY; PCD (ascii, binary, binary_compressed); LAS, LAZ and COPC; NPY (a table or a structured array); NPZ
    (points, colors, labels); XYZ / TXT / CSV (comma, semicolon, tab or space; with or without a header line; decimal
    commas where they cannot be anything else; empty cells, NA, N/A, null and none are NaN); PTS; KITTI and nuScenes
    .bin.

    Parameters
    ----------
    path : str or Path
    fields : sequence of str
        Names of more fields to read, such as intensity; a missing one is an error. A name that is spelled exactly so
        comes first, then one in other case, then one after the prefix "scalar_", which CloudCompare adds. PDAL's
        HeightAboveGround and height_above_ground are the same field.
    label : str, optional
        The field of the labels. By default it is classification in a LAS or LAZ; in an NPZ the first of labels, label,
        classes and y that the file has; elsewhere the first of label, labels, class, classification, semantic,
        semantic_label and class_id. A default field of zeros only (never classified) counts as no labels.
    columns : sequence of str, optional
        Names for the columns of a table that has none (text, NPY, NPZ, .bin), such as ``"x y z intensity".split()``.
        Without them the columns are x y z, and r g b if there are exactly three more of whole numbers up to 255, each
        with some above 31. They are never labels, as x y z r g b label and x y z intensity r g b cannot be told apart.
        Passing them for columns that have names is an error.
    exact : bool
        Whether the result has the file's coordinates in float64 too, besides those in float32 near the origin.
    ignore : sequence of int and str
        Labels, such as 7 (noise), and flags, of "withheld", "overlap", "synthetic" and "key_point": points with one of
        them are left out. ``Cloud.kept`` says which are there, so that `write_labels` leaves the others as they are.
        Labels are those of ``Cloud.labels``. Flags are bits of a LAS, and elsewhere fields of that name, set where not
        0; point formats 0 to 5, which have no bit for overlap, mark it by class 12. No point is left out for a flag or
        label that the file does not have.
    drop_zeros : bool, optional
        Whether points at exactly (0, 0, 0) in the file's coordinates, such as pixels without a return, are left out. By
        default they are from sensor sweeps (.bin) and from no other file.

    Returns
    -------
    Cloud

    Raises
    ------
    ReadError
        The file is damaged or truncated, has no field of a requested name, or no points but ignored ones.
    ValueError, TypeError
        For an argument that is none of the above.
    ModuleNotFoundError
        The format needs a package that is not installed.

    Warns
    -----
    UserWarning
        The file may have been read wrongly or in part: colours in no usual range, columns without names, two fields
        with different labels, a damaged coordinate reference system or two with different units.
    """
    path = Path(path)
    fields, columns = _names("fields", fields), _column_names(columns)
    _check_name("label", label)
    if len({name.lower() for name in fields}) < len(fields):
        raise ValueError(f"fields: expected names that differ in more than case, got {list(fields)}")
    suffix = path.suffix.lower()
    drop_zeros = suffix == ".bin" if drop_zeros is None else checks.boolean("drop_zeros", drop_zeros)
    exact = checks.boolean("exact", exact)
    request = Request(fields, label, columns, _labels_and_flags(ignore), drop_zeros, exact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the libraries below: each is an error here, or does not matter
        with errors_name(path):
            size = checked_size(path, READERS)
            cloud = cloud_of(content := READERS[suffix](path, size, request), request)
    if content.warning:
        warnings.warn(f"{path}: {content.warning}", stacklevel=2)
    return cloud


def field_names(path: str | os.PathLike[str], *, columns: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names of the fields of a file, without its points: headers, or the lines of a text up to the first row.

    A .bin, which has no header, is read whole.

    Parameters
    ----------
    path : str or Path
    columns : sequence of str, optional
        Names for the columns of a table that has none, as for `read`. Without them its fields are x, y and z.

    Returns
    -------
    tuple of str
        In the file's order and spelling. A LAS has its standard dimensions first, in lower case with underscores; an
        NPZ its arrays and then the columns of the points.

    Raises
    ------
    ReadError
        The header is damaged.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import kpcore as kp
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "plot.csv"
    >>> _ = path.write_text("x,y,z,HeightAboveGround\\n1,2,3,0.5")
    >>> kp.io.field_names(path)
    ('x', 'y', 'z', 'HeightAboveGround')
    >>> kp.io.read(path, fields=["height_above_ground"]).fields
    {'height_above_ground': array([0.5])}
    """
    path = Path(path)
    request = Request(columns=_column_names(columns))
    with warnings.catch_warnings(), errors_name(path):
        warnings.simplefilter("ignore")
        size = checked_size(path, FIELD_NAMES)
        return FIELD_NAMES[path.suffix.lower()](path, size, request)


def read_columns(path: str | os.PathLike[str], columns: Sequence[str] | None, strict: bool, **request: Any) -> Cloud:
    """Read a file with names for its columns, where its format may have none.

    Unless `strict`, a file with other columns is read by the usual rules of `read`: columns of a training file hold
    labels, which a file that is to be labelled has not.
    """
    try:
        return read(path, columns=columns if Path(path).suffix.lower() in TABLES else None, **request)
    except OtherColumns:
        if strict:
            raise
        return read(path, **request)


def _check_name(argument: str, name: str | None) -> None:
    if name is not None and not (isinstance(name, str) and name):
        raise TypeError(f"{argument}: expected the name of a field, got {name!r}")


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: expected a sequence of names, got {names!r}")
    return tuple(names)


def _labels_and_flags(ignore: Sequence[int | str]) -> tuple[int | str, ...]:
    expected = f"expected a sequence of labels (integers) and flags ({', '.join(FLAGS)})"
    if isinstance(ignore, str) or not hasattr(ignore, "__iter__"):
        raise TypeError(f"ignore: {expected}, got {ignore!r}")
    for one in ignore:
        is_label = isinstance(one, (int, np.integer)) and not isinstance(one, bool)
        if not is_label and not (isinstance(one, str) and one in FLAGS):
            raise ValueError(f"ignore: {expected}, got {one!r}")
    return tuple(one if isinstance(one, str) else int(one) for one in ignore)


def _column_names(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    if columns is None:
        return None
    if not (names := _names("columns", columns)):
        raise ValueError("columns: expected names, got none")
    return names


@contextmanager
def errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors in the block into a ReadError of one line that names the file."""
    try:
        yield
    except (ImportError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ReadError as error:
        raise type(error)(f"{path}: {error}") from None
    except OSError as error:
        refused = ReadError(f"{error.filename or path}: {error.strerror or error}")
        refused.errno = error.errno
        raise refused from None
    except BaseException as error:  # lazrs is Rust: its panics arrive as bare BaseExceptions
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ReadError(f"{path}: damaged, or not of the format that its extension names: {reason}") from error


def checked_size(path: Path, readers: Collection[str]) -> int:
    """The size of a regular file that is not empty, has an extension of `readers`, and starts with its signature."""
    if path.is_dir():
        raise ReadError("is a directory")
    if path.exists() and not path.is_file():
        raise ReadError("is not a regular file")
    size = path.stat().st_size
    if path.suffix.lower() not in readers:
        raise ReadError(f"unknown extension {path.suffix!r}; expected one of {' '.join(readers)}")
    if size == 0:
        raise ReadError("is empty")
    with path.open("rb") as file:
        start = file.read(11)
    actual = next((name for signature, name, _ in SIGNATURES if start.startswith(signature)), None)
    expected = next((name for _, name, suffixes in SIGNATURES if path.suffix.lower() in suffixes), None)
    if actual != expected:
        raise ReadError(f"is a {actual} file" if actual else f"is not a {expected} file")
    return size


def check_out(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Raise an error unless a copy of `source` with labels can be written to `out`."""
    source, out = Path(source), Path(out)
    for path, suffixes, what in ((source, READERS, "read"), (out, WRITERS, "written")):
        if path.suffix.lower() not in suffixes:
            got = repr(path.suffix) if path.suffix else "no extension"
            raise ReadError(
                f"{path}: expected an extension of files that can be {what}, {' '.join(suffixes)}, got {got}"
            )
    if out.exists() and source.exists() and out.samefile(source):
        raise ReadError(f"{out}: expected a file other than the source, which is never overwritten")
    if out.suffix.lower() == ".laz":
        with errors_name(out):
            las.check_plain(out)
            require("lazrs", "io")
    try:
        check_writable(out)
    except OSError as error:
        raise ReadError(f"{out}: {error.strerror}") from None


def label_field(source: str | os.PathLike[str], out: str | os.PathLike[str], num: int, *, label: str | None = None,
                into: str | None = None, values: np.ndarray | tuple[()] = (),
                extra: Mapping[str, DTypeLike] | None = None,
                columns: Sequence[str] | None = None) -> LabelField:  # fmt: skip
    """The LabelField of a file of `num` points; an error unless it can hold `values` and `out` can be written.

    `extra` is {name: type} of further fields. Of `columns`, those that do not fit are not used, as in `read_columns`.
    """
    source, out = Path(source), Path(out)
    _check_name("label", label)
    _check_name("into", into)
    kinds = {} if extra is None else _extra_types(extra)
    if into is not None and name_index([*kinds], into) is not None:
        raise ValueError(f"extra: expected names other than that of the labels, got {into!r}")
    if coordinates := [name for name in kinds if name.lower() in ("x", "y", "z")]:
        raise ValueError(f"extra: expected names of fields, got {coordinates[0]!r}, which is a coordinate")
    check_out(source, out)
    columns = columns if source.suffix.lower() in TABLES else None
    with errors_name(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the libraries below, as in `read`
        checked_size(source, READERS)
        try:
            field = _field(source, out, label, into, kinds, values, columns)
        except OtherColumns:
            field = _field(source, out, label, into, kinds, values, None)
        field.check(out)
    if field.name.lower() in ("x", "y", "z"):
        raise ReadError(f"{source}: expected a field for the labels, got {field.name}, which is a coordinate")
    if name_index([*kinds], field.name) is not None:
        raise ReadError(f"{source}: extra: expected names other than that of the labels, got {field.name}")
    if field.num_points != num:
        raise ReadError(f"{source}: has {field.num_points} points, got labels for {num}")
    if len(values) and not (field.smallest <= np.min(values) and np.max(values) <= field.largest):
        low, high = np.min(values), np.max(values)
        limits = f"{field.name} holds {field.smallest} to {field.largest}"
        advice = "name another or a new field (into=, --into)"
        raise ReadError(f"{source}: {limits}, got labels {low} to {high}; {advice}")
    return field._replace(extra=kinds)


def _field(source: Path, out: Path, label: str | None, into: str | None, extra: Mapping[str, np.dtype],
           values: np.ndarray | tuple[()], columns: Sequence[str] | None) -> LabelField:  # fmt: skip
    writer, suffix = WRITERS[out.suffix.lower()], source.suffix.lower()
    is_copy = WRITERS.get(suffix) is writer
    if writer is text and out.suffix.lower() != suffix:
        is_copy = {out.suffix.lower(), suffix} == {".txt", ".xyz"}  # a CSV has commas
    if not is_copy:
        return convert.label_field(source, out, label, into, extra, values, columns)
    return writer.label_field(source, label, into, extra, *[columns] * (writer is text))


def _extra_types(extra: Mapping[str, DTypeLike]) -> dict[str, np.dtype]:
    """The types of further fields, by name; bool is written as uint8."""
    kinds = {}
    for name, kind in extra.items():
        _check_name("extra", name)
        dtype = np.dtype(kind).newbyteorder("=")
        if dtype.kind not in "fiub" or dtype.itemsize > 8 or (dtype.kind, dtype.itemsize) == ("f", 2):
            raise TypeError(f"extra: expected numbers of up to 64 bits, and no float16, for {name}, got {dtype.name}")
        kinds[name] = np.dtype(np.uint8) if dtype.kind == "b" else dtype
    if len({name.lower() for name in kinds}) < len(kinds):
        raise ValueError(f"extra: expected names that differ in more than case, got {[*kinds]}")
    return kinds


def write_labels(source: str | os.PathLike[str], out: str | os.PathLike[str], labels: ArrayLike, *,
                 kept: ArrayLike | None = None, label: str | None = None, into: str | None = None,
                 extra: Mapping[str, ArrayLike] | None = None,
                 columns: Sequence[str] | None = None) -> None:  # fmt: skip
    """Write the points of a file with labels, into a copy or into a new file of another format.

    `out` appears complete or not at all. The number and order of the points stay the same. The labels go into the field
    of the first line that applies:

    =================  ==============================  ============================================================
    passed             `out` is LAS, LAZ               `out` is PLY, PCD, CSV, TXT, XYZ, NPZ
    =================  ==============================  ============================================================
    ``into=name``      that field, or a new extra      that field, or a new property / field / column / array of
                       dimension of that name (int32)  that name (int32)
    ``label=name``     that field if the source is     that field, or a new one of that name (int32)
                       LAS or LAZ and has it
    neither            classification                  the source's labels by a usual name, or a new ``label``
                                                       (``labels`` in an NPZ)
    =================  ==============================  ============================================================

    With ``label=name`` and a LAS that has no such field the labels go into classification. Earlier values of the field
    are lost.

    In a copy of the same format (LAS and LAZ are one, and TXT and XYZ) everything else stays the same: in a LAS
    every byte except those of the labels; the points of a LAZ are compressed again, and a COPC becomes a plain LAZ,
    because its octree stores the positions of points in the file. A compressed PCD becomes a binary one. Text of other
    columns stays as it is.

    In another format coordinates and colours go to their standard places, and other fields keep their names and types;
    dimensions of LAS point formats 6 to 8 are recognised by their names (``GpsTime`` is gps_time). Coordinates stay
    exact, except in a LAS, where they are whole numbers of 0.001 or the first smaller power of ten in which all are
    exact; if there is none, of the largest that divides the extent into a million parts. A warning says by how much
    they are rounded, which fields are renamed, and what is not carried over.

    Parameters
    ----------
    source : path
        A file that `read` reads.
    out : path
        LAS, LAZ, PLY, PCD, NPZ, CSV, TXT or XYZ. An existing file is replaced, unless it is the source.
    labels : (N,) integers
    kept : (n,) bool, optional
        True for the file's points that `labels` belong to, such as `Cloud.kept`; by default all. Other points keep
        their label, or get 0 in a new field.
    label, into : str, optional
        Names of fields, see the table.
    extra : dict of (N,) arrays, optional
        Further fields by name, such as ``{"confidence": uint8 array}``, of integers or floats of up to 64 bits (in a
        PLY integers have up to 32). A field that the file has is replaced, if it holds every value of this type. Points
        where `kept` is False keep their value, or get 0 in a new field.
    columns : sequence of str, optional
        Names for the columns of a source without names, as in `read`.

    Raises
    ------
    ReadError
        The source is damaged or truncated, the field cannot hold the labels, a coordinate is NaN or infinite and `out`
        is a LAS, or `out` cannot be written. No partial file is left behind.
    ValueError, TypeError
        Shapes or types of arrays do not fit.

    Warns
    -----
    UserWarning
        One line that names `out` and says what differs from the source there.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> import numpy as np
    >>> from kpcore import io
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.csv").write_text("x,y,z,ring\\n1.5,2,3,0\\n4,5,6.25,1\\n")
    >>> percent = np.array([97, 60], np.uint8)
    >>> io.write_labels(folder / "a.csv", folder / "a.las", [2, 6], extra={"confidence": percent})
    >>> cloud = io.read(folder / "a.las", fields=["ring", "confidence"])
    >>> cloud.labels, cloud.fields["confidence"]
    (array([2, 6], dtype=int32), array([97., 60.], dtype=float32))
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise ValueError(f"labels: expected (N,) integers, got {labels.shape} {labels.dtype}")
    kept = np.ones(len(labels), bool) if kept is None else np.asarray(kept)
    if kept.dtype != bool or kept.ndim != 1 or int(kept.sum()) != len(labels):
        got = f"{kept.shape} {kept.dtype} with {np.count_nonzero(kept)}"
        raise ValueError(f"kept: expected (n,) bool with {len(labels)} True, got {got}")
    more = {name: np.asarray(values) for name, values in (extra or {}).items()}
    kinds = {name: values.dtype for name, values in more.items()}
    field = label_field(source, out, len(kept), label=label, into=into, values=labels, extra=kinds, columns=columns)
    write_to(field, source, out, labels, kept, more)


def write_to(field: LabelField, source: str | os.PathLike[str], out: str | os.PathLike[str], labels: np.ndarray,
             kept: np.ndarray, extra: Mapping[str, np.ndarray] | None = None) -> None:  # fmt: skip
    """Write the file with labels in `field` and further fields, complete or not at all; warn of what differs in it."""
    arrays = {}
    for name, values in (extra or {}).items():
        if values.shape != labels.shape:
            raise ValueError(f"extra: expected {labels.shape} values of {name}, as labels, got {values.shape}")
        arrays[name] = values.astype(_extra_types({name: values.dtype})[name], copy=False)
    with errors_name(source), replacing(out) as part:
        notes = field.write(part, labels, kept, arrays)
    if notes:
        warnings.warn(f"{out}: {'; '.join(notes)}", stacklevel=3)


def why_no_pieces(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> str | None:
    """Why a file of these formats cannot be labelled piece by piece; None if it can.

    A LAS or LAZ is written to a LAS or LAZ, a PLY and an NPZ to a file of their format, and a PLY and an NPY to one of
    another format than NPZ.
    """
    source, out = Path(source), Path(out)
    before, after = source.suffix.lower(), out.suffix.lower()
    is_read = WRITERS.get(before) is las or before in convert.LAYOUTS
    is_copy = before in WRITERS and WRITERS[before] is WRITERS.get(after)
    if is_read and (is_copy or convert.is_bounded(before, after)):
        return None
    name = before[1:].upper()
    if is_read:
        copy, other = name if before in WRITERS else "PLY", after[1:].upper()
        return f"a {name} is not labelled in parts as a {other}: write a {copy}"
    return f"a {name} is not labelled in parts: write it as a LAZ or a PLY first"


def write_pieces(field: LabelField, source: str | os.PathLike[str], out: str | os.PathLike[str],
                 pieces: Pieces) -> list[str]:  # fmt: skip
    """As `write_to`, with labels that are made block by block, see `Pieces`; returns what differs in the copy.

    Nothing is warned of, as this may run in a thread. `why_no_pieces` says for which formats. Errors that `pieces`
    raises are those of this function, and no file is left behind.
    """
    if field.write_pieces is None:
        raise ReadError(f"{source}: {why_no_pieces(source, out)}")
    raised = []

    def checked(first_row: int, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        try:
            piece = pieces(first_row, records)
            _check_piece(field, len(records), *piece)
        except BaseException as error:
            raised.append(error)
            raise
        return piece

    try:
        with errors_name(source), replacing(out) as part:
            return field.write_pieces(part, checked)
    except BaseException:
        if raised:
            raise raised[0] from None
        raise


def _check_piece(field: LabelField, num: int, chosen: np.ndarray, labels: np.ndarray,
                 extra: Mapping[str, np.ndarray]) -> None:  # fmt: skip
    if chosen.dtype != bool or chosen.shape != (num,):
        raise ValueError(f"pieces: expected ({num},) bool for the points of a block, got {chosen.shape} {chosen.dtype}")
    count = np.count_nonzero(chosen)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"pieces: expected ({count},) integers as labels, got {labels.shape} {labels.dtype}")
    if count and not (field.smallest <= labels.min() and labels.max() <= field.largest):
        limits = f"{field.smallest} to {field.largest} in {field.name}"
        raise ValueError(f"pieces: expected labels from {limits}, got {labels.min()} to {labels.max()}")
    if {*extra} != {*field.extra}:
        raise ValueError(f"pieces: expected the further fields {[*field.extra]}, got {[*extra]}")
    for name, values in extra.items():
        if values.shape != (count,) or not np.can_cast(values.dtype, field.extra[name], "safe"):
            raise ValueError(
                f"pieces: expected ({count},) {field.extra[name]} as {name}, got {values.shape} {values.dtype}"
            )
