"""Reading and labelling files: the format is chosen by the file's extension."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpcore.backends import checks
from kpcore.files import check_writable, replacing
from kpcore.io import las, npz, pcd, ply, sweeps, text
from kpcore.io.cloud import FLAGS, Cloud, LabelField, OtherColumns, ReadError, Request, cloud_of

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterator, Sequence

    from numpy.typing import ArrayLike

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
WRITERS = {".las": las, ".laz": las, ".ply": ply, ".npz": npz}  # formats that labels can be written to


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
    except (ImportError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except ReadError as error:
        raise type(error)(f"{path}: {error}") from None
    except OSError as error:
        raise ReadError(f"{error.filename or path}: {error.strerror or error}") from None
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
    source_format = WRITERS.get(source.suffix.lower())
    if source_format is None:
        extension = source.suffix or "a file without extension"
        raise ReadError(f"{source}: labels can be written to PLY, LAS, LAZ and NPZ files, not to {extension}")
    if source_format is not WRITERS.get(out.suffix.lower()):
        expected = " or ".join(suffix for suffix, writer in WRITERS.items() if writer is source_format)
        raise ReadError(f"{out}: expected the extension {expected}, the format of {source.name}, got {out.suffix!r}")
    if out.exists() and source.exists() and out.samefile(source):
        raise ReadError(f"{out}: expected a file other than the source, which is never overwritten")
    try:
        check_writable(out)
    except OSError as error:
        raise ReadError(f"{out}: {error.strerror}") from None


def label_field(source: str | os.PathLike[str], out: str | os.PathLike[str], num: int, *, label: str | None = None,
                into: str | None = None, values: np.ndarray | tuple[()] = ()) -> LabelField:  # fmt: skip
    """The LabelField of a file of `num` points; an error unless it can hold `values` and `out` can be written."""
    source, out = Path(source), Path(out)
    _check_name("label", label)
    _check_name("into", into)
    check_out(source, out)
    with errors_name(source):
        checked_size(source, READERS)
        field = WRITERS[source.suffix.lower()].label_field(source, label, into)
        field.check(out)
    if field.name.lower() in ("x", "y", "z"):
        raise ReadError(f"{source}: expected a field for the labels, got {field.name}, which is a coordinate")
    if field.num_points != num:
        raise ReadError(f"{source}: has {field.num_points} points, got labels for {num}")
    if len(values) and not (field.smallest <= np.min(values) and np.max(values) <= field.largest):
        low, high = np.min(values), np.max(values)
        limits = f"{field.name} holds {field.smallest} to {field.largest}"
        advice = "name another or a new field with into="
        raise ReadError(f"{source}: {limits}, got labels {low} to {high}; {advice}")
    return field


def write_labels(source: str | os.PathLike[str], out: str | os.PathLike[str], labels: ArrayLike, *,
                 kept: ArrayLike | None = None, label: str | None = None, into: str | None = None) -> None:  # fmt: skip
    """Write a copy of a file with other labels; everything else in it stays the same.

    `out` appears complete or not at all. The labels go into the field of the first line that applies:

    =================  =======================  =====================================================
    passed             LAS, LAZ                 PLY, NPZ
    =================  =======================  =====================================================
    ``into=name``      that field, or a new extra dimension / property / array of that name (int32)
    ``label=name``     that field if present    that field, or a new one of that name (int32)
    neither            classification           the first of a usual name, or a new ``label`` / ``labels``
    =================  =======================  =====================================================

    With ``label=name`` and a LAS that has no such field the labels go into classification. Earlier values of the field
    are lost. In a LAS every byte except those of the labels is kept; the points of a LAZ are compressed again. A COPC
    becomes a plain LAZ, because its octree stores the positions of points in the file.

    Parameters
    ----------
    source, out : path
        Both LAS or LAZ, both PLY or both NPZ. An existing `out` is replaced, unless it is the source.
    labels : (N,) integers
    kept : (n,) bool, optional
        True for the file's points that `labels` belong to, such as `Cloud.kept`; by default all. Other points keep
        their label, or get 0 in a new field.
    label, into : str, optional
        Names of fields, see the table.

    Raises
    ------
    ReadError
        The source is damaged or truncated, the field cannot hold the labels, or `out` cannot be written. No partial
        file is left behind.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise ValueError(f"labels: expected (N,) integers, got {labels.shape} {labels.dtype}")
    kept = np.ones(len(labels), bool) if kept is None else np.asarray(kept)
    if kept.dtype != bool or kept.ndim != 1 or int(kept.sum()) != len(labels):
        got = f"{kept.shape} {kept.dtype} with {np.count_nonzero(kept)}"
        raise ValueError(f"kept: expected (n,) bool with {len(labels)} True, got {got}")
    write_to(label_field(source, out, len(kept), label=label, into=into, values=labels), source, out, labels, kept)


def write_to(field: LabelField, source: str | os.PathLike[str], out: str | os.PathLike[str], labels: np.ndarray,
             kept: np.ndarray) -> None:  # fmt: skip
    """Write a copy of the file with labels in `field`, complete or not at all."""
    if field.warning:
        warnings.warn(f"{source}: {field.warning}", stacklevel=3)
    with errors_name(source), replacing(out) as part:
        field.write(part, labels, kept)
