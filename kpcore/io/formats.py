"""Which format reads which file, and writes labels into it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kpcore.files import check_writable, whole
from kpcore.io import las, npz, pcd, ply, sweeps, text
from kpcore.io.cloud import Asked, Cloud, Content, LabelField, ReadError, cloud_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike

Result = TypeVar("Result")

READERS = {
    ".ply": ply.read, ".pcd": pcd.read, ".las": las.read, ".laz": las.read, ".npy": npz.read_npy, ".npz": npz.read,
    ".xyz": text.read, ".txt": text.read, ".csv": text.read, ".pts": text.read, ".bin": sweeps.read,
}  # fmt: skip
SIGNATURES = [
    (b"ply", "PLY", {".ply"}),
    (b"LASF", "LAS", {".las", ".laz"}),
    (b"\x93NUMPY", "NPY", {".npy"}),
    (b"PK\x03\x04", "NPZ", {".npz"}),
]
TABLES = {".npy", ".npz", ".xyz", ".txt", ".csv", ".pts", ".bin"}  # whose columns may have no names
LABELED = {".las": las, ".laz": las, ".ply": ply, ".npz": npz}  # those that labels are written to


def read(path: str | os.PathLike[str], *, fields: Sequence[str] = (), label: str | None = None,
         columns: Sequence[str] | None = None) -> Cloud:  # fmt: skip
    """Read a point cloud from a file; its extension names the format.

    PLY, PCD (ascii, binary, binary_compressed), LAS, LAZ and COPC, NPY (a table or a structured array), NPZ (points,
    colors, labels), XYZ / TXT / CSV (comma, semicolon, tab or space; with a header line or without; decimal commas
    where their meaning is clear; empty cells, NA, N/A, null and none are NaN), PTS, KITTI and nuScenes .bin.

    Parameters
    ----------
    path : str or Path
    fields : sequence of str
        Names of what else to read, such as intensity; an error unless they are there. A name is meant as it is written
        in the file, else in any case, else after "scalar_", which CloudCompare puts in front.
    label : str, optional
        The field of the labels. Otherwise it is classification in a LAS or LAZ, the first there is of labels, label,
        classes and y in an NPZ, and elsewhere of label, labels, class, classification, semantic, semantic_label and
        class_id; unless that is 0 throughout, as what was never classified.
    columns : sequence of str, optional
        Names for the columns of a table that has none (text, NPY, NPZ, .bin), such as ``"x y z intensity".split()``.
        Without them a table holds x y z, then r g b if there are three more columns of whole numbers to 255, each with
        some above 31, and no labels: x y z r g b label and x y z intensity r g b look alike. An error for columns that
        have names.

    Returns
    -------
    Cloud

    Raises
    ------
    ReadError
        The file is not whole and valid, or lacks what was asked for.
    ModuleNotFoundError
        The format needs a package that is not installed.

    Warns
    -----
    UserWarning
        Something may be another thing than it was read as, or was not read: colours of no usual range, columns without
        names, labels where another field holds others.
    """
    path = Path(path)
    fields, columns = _names("fields", fields), None if columns is None else _names("columns", columns)
    _check_name("label", label)
    if columns == ():
        raise ValueError("columns: expected names, got none")
    if len({name.lower() for name in fields}) < len(fields):
        raise ValueError(f"fields: expected no name twice, in whatever case, got {list(fields)}")
    asked = Asked(fields, label, columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the readers' grumbles: each is an error here, or of no consequence
        content = told(path, lambda: _content(path, asked))
        cloud = told(path, lambda: cloud_of(content))
    if content.doubt:
        warnings.warn(f"{path}: {content.doubt}", stacklevel=2)
    return cloud


def _check_name(argument: str, name: str | None) -> None:
    if name is not None and not (isinstance(name, str) and name):
        raise TypeError(f"{argument}: expected the name of a field, got {name!r}")


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: expected a sequence of names, got {names!r}")
    return tuple(names)


def told(path: str | os.PathLike[str], work: Callable[[], Result]) -> Result:
    """What the work returns; what is wrong with a file is a ReadError of one line that names it."""
    try:
        return work()
    except (ImportError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except ReadError as error:
        raise type(error)(f"{path}: {error}") from None
    except OSError as error:
        raise ReadError(f"{error.filename or path}: {error.strerror or error}") from None
    except BaseException as error:  # lazrs is Rust: its panics arrive as bare BaseExceptions
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise ReadError(f"{path}: damaged, or not what its extension says: {said}") from error


def _content(path: Path, asked: Asked) -> Content:
    size = _checked_size(path)
    return READERS[path.suffix.lower()](path, size, asked)


def _checked_size(path: Path) -> int:
    """Of a file that is one, and begins as its extension says."""
    if path.is_dir():
        raise ReadError("is a directory")
    if path.exists() and not path.is_file():
        raise ReadError("is not a regular file")
    size = path.stat().st_size
    if path.suffix.lower() not in READERS:
        raise ReadError(f"unknown extension {path.suffix!r}; kpcore reads {' '.join(READERS)}")
    if size == 0:
        raise ReadError("is empty")
    with path.open("rb") as file:
        start = file.read(11)
    actual = next((kind for signature, kind, _ in SIGNATURES if start.startswith(signature)), None)
    expected = next((kind for _, kind, suffixes in SIGNATURES if path.suffix.lower() in suffixes), None)
    if actual != expected:
        raise ReadError(f"is a {actual} file" if actual else f"is not a {expected} file")
    return size


def check_out(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """An error unless labels of that file can be written to this one."""
    source, out = Path(source), Path(out)
    kind = LABELED.get(source.suffix.lower())
    if kind is None:
        raise ReadError(f"{source}: labels are written to PLY, LAS, LAZ and NPZ files, not to {source.suffix or 'it'}")
    if kind is not LABELED.get(out.suffix.lower()):
        same = " or ".join(suffix for suffix, one in LABELED.items() if one is kind)
        raise ReadError(
            f"{out}: labels are written to PLY, LAS, LAZ and NPZ files: expected {same}, as {source.name} is"
        )
    if out.exists() and source.exists() and out.samefile(source):
        raise ReadError(f"{out}: expected another file than the one that is read")
    try:
        check_writable(out)
    except OSError as error:
        raise ReadError(f"{out}: {error.strerror}") from None


def label_field(source: str | os.PathLike[str], out: str | os.PathLike[str], num: int, *, label: str | None = None,
                into: str | None = None, values: np.ndarray | tuple[()] = ()) -> LabelField:  # fmt: skip
    """The LabelField of a file in which the labels of that many points go; an error unless it holds these values."""
    source, out = Path(source), Path(out)
    _check_name("label", label)
    _check_name("into", into)
    check_out(source, out)
    told(source, lambda: _checked_size(source))
    field = told(source, lambda: LABELED[source.suffix.lower()].label_field(source, label, into))
    told(source, lambda: field.check(out))
    if field.name.lower() in ("x", "y", "z"):
        raise ReadError(f"{source}: {field.name} is a coordinate, expected another field for labels")
    if field.num != num:
        raise ReadError(f"{source}: holds {field.num} points, got labels of {num}")
    if len(values) and not (field.least <= np.min(values) and np.max(values) <= field.most):
        low, high = np.min(values), np.max(values)
        raise ReadError(f"{source}: {field.name} holds {field.least} to {field.most}, got labels {low} to {high}; "
                        "into= names another field, or a new one")  # fmt: skip
    return field


def write_labels(source: str | os.PathLike[str], out: str | os.PathLike[str], labels: ArrayLike, *,
                 kept: ArrayLike | None = None, label: str | None = None, into: str | None = None) -> None:  # fmt: skip
    """Write a file again with other labels, whole or not at all; all else stays as it is.

    Which field they go into, the first line that applies:

    =================  =======================  =====================================================
    passed             LAS, LAZ                 PLY, NPZ
    =================  =======================  =====================================================
    ``into=name``      that field, or a new extra dimension / property / array of that name (int32)
    ``label=name``     that field if there is   that field, or a new one of that name (int32)
    neither            classification           the first of a usual name, or a new ``label`` / ``labels``
    =================  =======================  =====================================================

    With ``label=name`` a LAS without that field has its classification written. Values that were in the field are lost.
    Of a LAS or LAZ every byte but those of the labels is kept, the points of a LAZ being compressed again. A COPC
    becomes a plain LAZ, as its octree says where in the file its points are.

    Parameters
    ----------
    source, out : path
        Of one kind: LAS or LAZ, PLY, NPZ. A file that is there is replaced, but never the source itself.
    labels : (N,) integers
    kept : (n,) bool, optional
        Which of the file's points they are of, such as `Cloud.kept`; all if not given. The others keep the label they
        have, or 0.
    label, into : str, optional
        Names of fields.

    Raises
    ------
    ReadError
        The source is not whole and valid, the field cannot hold the labels, or the file cannot be written. Nothing is
        left of it then.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise ValueError(f"labels: expected (N,) integers, got {labels.shape} {labels.dtype}")
    kept = np.ones(len(labels), bool) if kept is None else np.asarray(kept)
    if kept.dtype != bool or kept.ndim != 1 or int(kept.sum()) != len(labels):
        raise ValueError(f"kept: expected (n,) bool, {len(labels)} of them true, got {kept.shape} {kept.dtype}")
    write_to(label_field(source, out, len(kept), label=label, into=into, values=labels), source, out, labels, kept)


def write_to(field: LabelField, source: str | os.PathLike[str], out: str | os.PathLike[str], labels: np.ndarray,
             kept: np.ndarray) -> None:  # fmt: skip
    """Write the file again with labels in a `LabelField` of it."""
    if field.doubt:
        warnings.warn(f"{source}: {field.doubt}", stacklevel=3)

    def write():
        with whole(out) as part:
            field.write(part, labels, kept)

    told(source, write)
