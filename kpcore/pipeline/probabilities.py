"""Probabilities of all classes at all points of a survey, in a Zarr: an array for each file, written block by block."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import unicodedata
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import kpcore
from kpcore.config import require
from kpcore.files import to_disk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

__all__ = ["ProbabilityStore", "Writer", "array_names", "create_store"]

_LAYOUT = 1  # of attributes and arrays
_CHUNK_ROWS = 1 << 18
_CHUNK_VALUES = 1 << 24  # 64 MB, which a writer holds, and a program that reads a single row
_LONGEST_NAME = 180  # bytes; file systems allow 255


class ProbabilityStore(NamedTuple):
    """A Zarr with the probabilities of a survey; `create_store` makes one.

    It holds no open file, and can be sent to other processes, each of which may write other arrays.
    """

    path: Path
    classes: tuple[str, ...]
    names: dict[str, str]  #: the name of the array of each file, by its path

    def is_complete(self, file: str | os.PathLike[str]) -> bool:
        """Whether the array of a file is there, all of it: it appears under its name after its last row."""
        return (self.path / self._name(file) / ".zarray").is_file()

    @contextmanager
    def writer(self, file: str | os.PathLike[str], num_points: int) -> Iterator[Writer]:
        """A writer of the rows of a file, in the order of its points.

        After the block the array appears in the place of an earlier one of this file, and is on disk. After an
        exception nothing of it is left, and an earlier one stays. An OSError, such as that of a full disk, names it.

        Raises
        ------
        ValueError
            If the file is none of the store's, or after the block, if it has not appended `num_points` rows.
        """
        zarr, name = require("zarr", "zarr"), self._name(file)
        part = _parts(self.path) / f"{name}.{secrets.token_hex(8)}"
        part.parent.mkdir(exist_ok=True)
        try:
            with _errors_name(self.path / name):
                array = _new_array(zarr, part, num_points, len(self.classes))
            writer = Writer(array, self.path / name)
            yield writer
            writer._end()
            with _errors_name(self.path / name):
                array.attrs.update({"file": _text(os.fspath(file)), "classes": [*self.classes]})
                _to_disk(part)
                shutil.rmtree(self.path / name, ignore_errors=True)
                os.replace(part, self.path / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            with suppress(OSError):  # other processes write there
                part.parent.rmdir()

    def _name(self, file: str | os.PathLike[str]) -> str:
        if (name := self.names.get(os.fspath(file))) is None:
            raise ValueError(f"file: expected one of those of the store, got {file}")
        return name


class Writer:
    """Appends rows to the array of a file; holds at most a chunk of them."""

    def __init__(self, array: Any, path: Path) -> None:
        self._array, self._path = array, path
        self._buffer = np.empty(array.chunks, np.float32)
        self._written, self._held = 0, 0

    def append(self, probabilities: np.ndarray) -> None:
        """Append rows.

        probabilities : (n, classes) float32, of the next n points of the file; NaN for those that are not labelled
        """
        num_points, num_classes = self._array.shape
        values = np.asarray(probabilities)
        if values.ndim != 2 or values.shape[1] != num_classes or values.dtype != np.float32:
            raise ValueError(f"probabilities: expected (n, {num_classes}) float32, got {values.shape} {values.dtype}")
        if (number := self._written + self._held + len(values)) > num_points:
            raise ValueError(f"probabilities: expected {num_points} rows, got {number} or more")
        while len(values):
            some = values[: len(self._buffer) - self._held]
            self._buffer[self._held : self._held + len(some)] = some
            self._held += len(some)
            values = values[len(some) :]
            if self._held == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        with _errors_name(self._path):
            self._array[self._written : self._written + self._held] = self._buffer[: self._held]
        self._written, self._held = self._written + self._held, 0

    def _end(self) -> None:
        num_points = self._array.shape[0]
        if self._held:
            self._flush()
        if self._written != num_points:
            raise ValueError(f"probabilities: expected {num_points} rows, got {self._written}")


def create_store(path: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]], classes: Sequence[str],
                 labels: Sequence[int], *, model: str = "", resume: bool = False) -> ProbabilityStore:  # fmt: skip
    """Make a Zarr for the probabilities of a survey.

    It has an array for each file, (points, classes) float32, in chunks of 262,144 rows, or fewer with more than 64
    classes; rows of points that were not labelled are NaN. Attributes of the group: ``classes``, ``labels`` (of the
    classes, in the files), ``model``, ``kpcore`` (the version), ``layout`` (1); of an array: ``file``, ``classes``. It
    is in version 2 of the format, which zarr 2 and 3 and other programs read; written with zarr 2.16, 2.18 and 3.1.

    Parameters
    ----------
    path : str or Path
        The folder. One that is there is replaced if it is such a Zarr, and is an error if it is anything else.
    files : sequence of str or Path
        All files of the survey; see `array_names`.
    classes, labels : sequences of the same length
        Names of the classes, and the label that each has in the files.
    model : str
        The name of the model.
    resume : bool
        Keep the arrays of an earlier run. An error if it had other classes, labels, model or files.

    Returns
    -------
    ProbabilityStore

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import zarr
    >>> from kpcore.pipeline import probabilities
    >>> path = tempfile.mkdtemp() + "/probabilities.zarr"
    >>> store = probabilities.create_store(path, ["tiles/a.laz", "tiles/b.laz"], ["ground", "building"], [2, 6])
    >>> with store.writer("tiles/a.laz", num_points=3) as writer:
    ...     writer.append(np.array([[0.75, 0.25], [0.5, 0.5]], np.float32))
    ...     writer.append(np.array([[np.nan, np.nan]], np.float32))
    >>> zarr.open(path, mode="r")["a.laz"][:2]
    array([[0.75, 0.25],
           [0.5 , 0.5 ]], dtype=float32)
    >>> store.is_complete("tiles/a.laz"), store.is_complete("tiles/b.laz")
    (True, False)
    """
    zarr, path = require("zarr", "zarr"), Path(path)
    if len(classes) != len(labels) or not len(classes):
        raise ValueError(f"labels: expected one for each of the {len(classes)} classes, got {len(labels)}")
    if path.suffix.lower() in (".zip", ".n5"):  # which zarr takes for other kinds of stores
        raise ValueError(f"path: expected the name of a folder such as probabilities.zarr, got {path}")
    paths = [os.fspath(file) for file in files]
    names = dict(zip(paths, array_names(paths), strict=True))
    attributes = {
        "classes": [*map(str, classes)], "labels": [*map(int, labels)], "model": _text(model), "layout": _LAYOUT,
        "arrays": {name: _text(file) for file, name in names.items()},
    }  # fmt: skip
    store = ProbabilityStore(path, tuple(attributes["classes"]), names)
    shutil.rmtree(_parts(path), ignore_errors=True)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        earlier = _attributes(zarr, path)
        if earlier.get("layout") is None or "kpcore" not in earlier:
            raise ValueError(f"path: expected a new folder, or a Zarr with probabilities, got {path}")
        if resume:
            for name, value in attributes.items():
                if earlier.get(name) != value:
                    raise ValueError(
                        f"path: expected {path} with the same {name} to resume, got {_brief(earlier, name)}"
                    )
            return store
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.open_group(str(path), mode="w", **_format(zarr))
    group.attrs.update(attributes | {"kpcore": kpcore.__version__})
    _to_disk(path)
    return store


def array_names(files: Sequence[str]) -> list[str]:
    """Names of arrays for files: that of the file, with as many of its folders before as make it unique.

    Capitals do not make a name unique, as some file systems ignore them. Characters other than letters, digits and
    ``.-+() `` become ``_``, and so does a point or ``_`` at the beginning. A name that is equal to another even so, or
    too long, ends with a part of the SHA-256 of the path. So the names depend on the set of paths alone.

    Examples
    --------
    >>> from kpcore.pipeline.probabilities import array_names
    >>> array_names(["2020/a.laz", "2024/a.laz", "2024/b.laz"])
    ['2020_a.laz', '2024_a.laz', 'b.laz']
    """
    if len({*files}) != len(files):
        raise ValueError("files: expected each file once, got one twice")
    names: dict[str, str] = {}
    left, parts = [*files], 1
    while left:
        tails = {file: _plain("/".join(Path(file).parts[-parts:])) for file in left}
        taken = _numbers([*tails.values(), *names.values()])
        whole = parts >= max(len(Path(file).parts) for file in left)
        for file, name in tails.items():
            if taken[name.casefold()] > 1 and whole:
                digest = hashlib.sha256(_text(file).encode()).hexdigest()[:16]
                names[file] = f"{name[:60]}-{digest}"
            elif taken[name.casefold()] == 1:
                names[file] = name
        left, parts = [file for file in left if file not in names], parts + 1
    return [names[file] for file in files]


def _numbers(names: list[str]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for name in names:
        numbers[name.casefold()] = numbers.get(name.casefold(), 0) + 1
    return numbers


def _plain(name: str) -> str:
    plain = re.sub(r"[^\w.\-+() ]", "_", unicodedata.normalize("NFC", _text(name).strip("/")))
    plain = re.sub(r"^[._]+|[. ]+$", "_", plain) or "_"
    if len(plain.encode()) > _LONGEST_NAME:
        plain = f"{plain[:30]}-{hashlib.sha256(_text(name).encode()).hexdigest()[:16]}-{plain[-10:]}"
    return plain


def _text(path: str) -> str:
    """A path without what is no UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()


def _brief(attributes: dict[str, Any], name: str) -> str:
    return f"other ones ({len(attributes.get(name, ()))})" if name == "arrays" else str(attributes.get(name))[:200]


def _parts(path: Path) -> Path:
    """The folder of arrays that are not finished: beside the store, where programs that list its arrays do not look."""
    return path.with_name(f".{path.name}.parts")


def _attributes(zarr: ModuleType, path: Path) -> dict[str, Any]:
    """Those of a group; empty if the path is none."""
    if not (path / ".zgroup").is_file():
        return {}
    try:
        return dict(zarr.open_group(str(path), mode="r", **_format(zarr)).attrs)
    except Exception:  # zarr raises several kinds for damaged files
        return {}


def _format(zarr: ModuleType) -> dict[str, int]:
    return {"zarr_format": 2} if int(zarr.__version__.partition(".")[0]) >= 3 else {}


def _new_array(zarr: ModuleType, folder: Path, num_points: int, num_classes: int) -> Any:
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_VALUES // num_classes, num_points))
    codec = require("numcodecs", "zarr").Blosc(
        cname="zstd", clevel=1, shuffle=2
    )  # of bits: a quarter less than of bytes
    return zarr.create(
        (num_points, num_classes), chunks=(rows, num_classes), dtype="float32", fill_value=np.nan, compressor=codec,
        store=str(folder), **_format(zarr),
    )  # fmt: skip


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _to_disk(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            to_disk(Path(root, name))
