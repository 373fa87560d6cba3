"""Scenes of a training on disk, memory-mapped: memory does not grow with their points, and no file is read twice.

The folder has a subfolder for each entry, named by what it is and by a digest of all that determines its content:

- part: the points of a file, or of a box in it, with labels and values of the features before scaling;
- columns: the centers and scales of features, from the values of all parts to train on;
- scene: points, features and labels of a part after subsampling;
- places, nearest, truth: what potentials, votes and scores of a scene need besides.

An entry has arrays as .npy files and about.json, with the determining values in full and a checksum of each array. It
is made under another name and renamed when all of it is on disk, so that after a crash, or with two trainings at once,
an entry is whole or not there. It is read and compared with its checksums when a training opens it; one that is damaged
is made again.

A file is known by its path, size, time of modification and the bytes at its begin and end. A digest of all bytes would
take as long as reading the file, on each start; it would only notice a change in the middle of a file that keeps both
the size and the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import kpcore as kp
from kpcore.files import expanded
from kpcore.io import Cloud, ReadError
from kpcore.io.reference import Reference
from kpcore.pipeline import data, statistics
from kpcore.pipeline.boxes import Boxes, boxes_of
from kpcore.pipeline.data import Columns, Scene
from kpcore.pipeline.settings import COMPUTED_FEATURES, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kpcore.pipeline.settings import Part, Settings

_FORMAT = 1  # of the entries: those of another are not read
_ABOUT = "about.json"
_ENDS = 1 << 16  # bytes at the begin and at the end of a file that are part of its identity
_PIECE = 1 << 20  # bytes or rows that are read at once
_LEFT_OVER = 86_400  # seconds after which an entry that nobody has finished is removed
_OPEN_FILES = 1 << 16  # the most that are allowed at once: each array that is mapped keeps a file open


class Stored(NamedTuple):
    """What the cache holds of a scene besides its points, columns and labels."""

    cache: Cache
    entry: Entry
    num_points: int  #: before subsampling
    labels: dict[int, int]  #: the number of these by label in the file
    classes: np.ndarray  #: the number of these by class
    spacing: float  #: of these, see `statistics.spacing_of`
    reference: Reference | None  #: of the file
    middle: int  #: the point in the middle, see `statistics.middle_of`

    def places(self, size: float) -> np.ndarray:
        """A point for each voxel of this size."""

        def make() -> Made:
            return Made({"points": kp.grid_subsample(self.entry["points"], size).points})

        return self.cache.entry("places", {"scene": self.entry.name, "size": size}, make)["points"]

    def by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """(the points by class, in ascending order within each; where each class begins among them, and the end)"""
        return self.entry["by_class"], np.array(self.entry.about["classes_begin"])

    def nearest(self, full: np.ndarray) -> np.ndarray:
        """The nearest point of the scene to each of the points before subsampling."""

        def make() -> Made:
            tree = kp.KDTree(np.asarray(self.entry["points"]))
            return Made({"index": tree.knn_search(np.asarray(full), 1).index})

        return self.cache.entry("nearest", {"scene": self.entry.name}, make)["index"]


class Made(NamedTuple):
    """The content of an entry that is not on disk yet."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any] = {}  # noqa: RUF012, it is never changed


class Entry:
    """An entry on disk whose arrays have the checksums that they were written with."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.name, self.about = path, path.name, about
        self._mapped: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """An array, mapped."""
        if name not in self._mapped:
            self._mapped[name] = _mapped(self.path / f"{name}.npy")
        return self._mapped[name]


class Cache:
    """The cache in a folder; several trainings may use one at once.

    Parameters
    ----------
    folder : str or Path
        It is made if it is not there.
    say : callable, optional
        Called with a line before each file is read.
    """

    def __init__(self, folder: str | os.PathLike[str], say: Callable[[str], object] = lambda line: None) -> None:
        self.folder, self._say = Path(folder), say
        self._entries: dict[str, Entry] = {}
        self._identities: dict[str, dict[str, Any]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"[data] cache: expected a folder, got {self.folder}: {error.strerror}") from None
        _remove_left_overs(self.folder)
        _allow_files()

    # ---- scenes

    def scenes(self, settings: Settings, parts: Sequence[Part], folder: str | os.PathLike[str],
               columns: Columns | None = None, *, labelled: bool = True) -> tuple[list[Scene], Columns]:  # fmt: skip
        """([Scene], Columns) of parts, as `data.load_scenes` makes them in memory.

        Scenes that are `labelled`, for scores, have `full`, `full_labels`, `cloud` and `rows`; without it these are
        None, as a training does not need them.
        """
        sources = [_Source(part, str(part)) for part in parts]
        return self._scenes(settings, sources, folder, columns, labelled)

    def split(self, settings: Settings, parts: Sequence[Part], folder: str | os.PathLike[str], fraction: float,
              columns: Columns | None = None) -> tuple[list[Scene], list[Scene], Columns]:  # fmt: skip
        """(scenes to train on, those that are set aside, Columns) of parts, see `data.load_training`."""
        train, aside = ([_Source(part, "", fraction, is_aside) for part in parts] for is_aside in (False, True))
        scenes, columns = self._scenes(settings, train, folder, columns, False)
        return scenes, self._scenes(settings, aside, folder, columns, True)[0], columns

    def _scenes(self, settings: Settings, sources: Sequence[_Source], folder: str | os.PathLike[str],
                columns: Columns | None, labelled: bool) -> tuple[list[Scene], Columns]:  # fmt: skip
        keys = [self._part_key(settings, source, folder) for source in sources]

        def part(number: int) -> Entry:
            return self._part(settings, sources[number], folder, keys[number])

        if columns is None:

            def make_columns() -> Made:
                values = [_values(part(number)) for number in range(len(sources))]
                return Made({}, asdict(data.columns_from(settings, values, self.quantiles)))

            names = [_name("part", key) for key in keys]
            described = self.entry("columns", {"parts": names, "widths": settings.widths}, make_columns).about
            columns = Columns(settings.widths, described["center"], described["scale"])
        return [self._scene(settings, columns, source, _name("part", key), lambda number=number: part(number), labelled)
                for number, (source, key) in enumerate(zip(sources, keys, strict=True))], columns  # fmt: skip

    def _scene(self, settings: Settings, columns: Columns, source: _Source, name: str, part: Callable[[], Entry],
               labelled: bool) -> Scene:  # fmt: skip
        classes = {name: [*labels] for name, labels in settings.data.classes.items()}
        key = {"part": name, "columns": asdict(columns), "voxel_size": settings.network.voxel_size,
               "origin": settings.net().origin, "classes": [*classes.values()]}  # fmt: skip
        entry = self.entry("scene", key, lambda: _subsampled(settings, columns, part()))
        about = entry.about
        stored = Stored(
            self, entry, about["num_points"], {int(label): number for label, number in about["labels"]},
            np.array(about["classes"], np.int64), about["spacing"], _reference(about["reference"]), about["middle"],
        )  # fmt: skip
        for message in about["warnings"] if not source.aside else ():  # once for a file, as when it is read
            warnings.warn(message, stacklevel=3)
        points = entry["points"]
        full = full_labels = cloud = rows = None
        if labelled:
            of_part = part()
            cloud, full = _cloud(of_part), of_part["points"]
            truth = {"part": name, "classes": [*classes.values()]}
            full_labels = self.entry("truth", truth, lambda: Made(
                {"labels": data.class_numbers(settings, of_part["labels"]).astype(np.int32)}))["labels"]  # fmt: skip
            rows = of_part["rows"]
        return Scene(points, entry["columns"], entry["labels"], Boxes(points, entry["boxes"]), full, full_labels, cloud,
                     rows, source.name, stored=stored)  # fmt: skip

    # ---- files

    def _part_key(self, settings: Settings, source: _Source, folder: str | os.PathLike[str]) -> dict[str, Any]:
        one = settings.data
        key = {
            "file": self._identity(source.part, folder), "part": asdict(source.part), "version": kp.__version__,
            "features": one.features, "label": one.label, "columns": one.columns, "ignore": one.ignore,
            "drop_zeros": one.drop_zeros, "ground": asdict(one.ground), "surface": asdict(one.surface),
        }  # fmt: skip
        key["part"].pop("area")
        if source.fraction is not None:
            key["split"] = {"fraction": source.fraction, "aside": source.aside, "classes": [*one.classes.values()]}
        return key

    def _identity(self, part: Part, folder: str | os.PathLike[str]) -> dict[str, Any] | None:
        """What says that a file is the same; it is the same in a run."""
        if part.indoor is not None:
            return None
        path = Path(folder, expanded(part.file))
        if str(path) not in self._identities:
            self._identities[str(path)] = _identity(path)
        return self._identities[str(path)]

    def _part(self, settings: Settings, source: _Source, folder: str | os.PathLike[str],
              key: Mapping[str, Any]) -> Entry:  # fmt: skip
        """The entry of a part; a file that is split is read once for both sides."""
        read: list[tuple[data.Cloud, np.ndarray, list[str]]] = []

        def make(aside: bool) -> Made:
            if not read:
                read.append(self._read(settings, source, folder))
            cloud, rows, messages = read[0]
            if source.fraction is not None:
                rows = data.split(settings, cloud, rows, source.fraction)[1 + aside]
            return _of_cloud(settings, cloud, rows, messages)

        entry = self.entry("part", key, lambda: make(source.aside))
        if read and source.fraction is not None:
            other = source._replace(aside=not source.aside)
            self.entry("part", self._part_key(settings, other, folder), lambda: make(other.aside))
        return entry

    def _read(self, settings: Settings, source: _Source, folder: str | os.PathLike[str]
              ) -> tuple[data.Cloud, np.ndarray, list[str]]:  # fmt: skip
        """(cloud, rows of the part, what was warned of) of a file."""
        self._say(f"reading {source.part} into the cache {self.folder}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cloud, rows = data.load_part(settings, source.part, folder)
        if source.part.indoor is None:
            path = Path(folder, expanded(source.part.file))
            if _identity(path) != self._identity(source.part, folder):
                raise ReadError(f"{path}: expected a file that stays as it is, got one that changed while it was read")
        return cloud, rows, [str(one.message) for one in caught]

    # ---- entries

    def entry(self, kind: str, key: Mapping[str, Any], make: Callable[[], Made]) -> Entry:
        """The entry of what `key` determines; `make` is called if it is not there, or is damaged."""
        name, full_key = _name(kind, key), json.loads(json.dumps(_full(kind, key)))
        if name not in self._entries:
            opened = _opened(self.folder / name, full_key)
            if opened is None:
                made = make()
                with _errors_name(self.folder):
                    opened = self._written(name, full_key, made)
            self._entries[name] = opened
        return self._entries[name]

    def _written(self, name: str, key: dict[str, Any], made: Made) -> Entry:
        path, part = self.folder / name, self._part_name(name)
        part.mkdir()
        try:
            arrays = {of: _write(part / f"{of}.npy", array) for of, array in made.arrays.items()}
            content = {"key": key, "arrays": arrays, "about": made.about}
            text = json.dumps({**content, "digest": _digest(content)})
            with (part / _ABOUT).open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            for last in (False, False, True):
                try:
                    part.rename(path)
                    break
                except OSError:  # one that is damaged, or that another training has finished in the meantime
                    if (other := _opened(path, key)) is not None:
                        return other
                    if last:
                        raise
                    self._remove(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return Entry(path, json.loads(text)["about"])

    def _remove(self, path: Path) -> None:
        """Remove what is there; under another name, as it is neither whole nor gone while files are removed."""
        with suppress(FileNotFoundError):
            path.rename(removed := self._part_name(path.name))
            shutil.rmtree(removed) if removed.is_dir() else removed.unlink()

    def _part_name(self, name: str) -> Path:
        return self.folder / f".{name}.{secrets.token_hex(8)}.part"

    def quantiles(self, arrays: Sequence[np.ndarray], q: Sequence[float], dtype: type) -> np.ndarray:
        """np.quantile of all values of arrays, as this dtype, partitioned on disk and not in memory."""
        with _errors_name(self.folder), tempfile.TemporaryFile(dir=self.folder) as file:
            for array in arrays:
                for piece in data.pieces(array):
                    file.write(np.ascontiguousarray(piece, dtype))
            file.flush()
            size = sum(map(len, arrays))
            values = np.memmap(file, dtype, "r+", shape=(size,)) if size else np.zeros(0, dtype)
            return np.array(np.quantile(values, q, overwrite_input=True))


class _Source(NamedTuple):
    """A scene in the settings, or one of the two sides of one that is split."""

    part: Part
    name: str  #: of the Scene
    fraction: float | None = None  #: of the points that are set aside
    aside: bool = False  #: whether it is those


def _identity(path: Path) -> dict[str, Any]:
    """The path, size, time of modification and a digest of both ends of a file."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            ends = hashlib.blake2b(file.read(_ENDS), digest_size=16)
            file.seek(max(0, status.st_size - _ENDS))
            ends.update(file.read(_ENDS))
    except OSError:  # the reader says what is wrong
        return {"path": str(path.resolve())}
    return {"path": str(path.resolve()), "size": status.st_size, "modified": status.st_mtime_ns,
            "ends": ends.hexdigest()}  # fmt: skip


def _of_cloud(settings: Settings, cloud: Cloud, rows: np.ndarray, messages: Sequence[str]) -> Made:
    """The content of a part: some points of a cloud."""
    values = data.all_values(settings, cloud, rows)
    arrays = {"points": cloud.points[rows], "labels": cloud.labels[rows], "rows": np.arange(len(rows), dtype=np.int32)}
    for number, (name, column) in enumerate(values.items()):
        arrays[f"value_{number}"] = cloud.colors[rows] if name == "color" else column
    reference = None if cloud.reference is None else cloud.reference._asdict()
    about = {
        "values": [*values], "has_height": data.HEIGHT_FIELD in cloud.fields, "shift": cloud.shift.tolist(),
        "left_out": cloud.left_out, "names": cloud.names, "up": cloud.up, "rounding": cloud.rounding,
        "dropped": cloud.dropped, "reference": reference, "warnings": [*messages],
    }  # fmt: skip
    return Made(arrays, about)


def _values(part: Entry) -> dict[str, np.ndarray]:
    """The values of the features of a part, before scaling, by name; colours are uint8."""
    return {name: part[f"value_{number}"] for number, name in enumerate(part.about["values"])}


def _cloud(part: Entry) -> Cloud:
    """The Cloud of a part's points, with what labelling them needs."""
    about, values = part.about, _values(part)
    fields = {name.lower(): column for name, column in values.items() if name not in COMPUTED_FEATURES}
    if about["has_height"] and data.HEIGHT in values:
        fields[data.HEIGHT_FIELD] = values[data.HEIGHT]
    names = None if about["names"] is None else tuple(about["names"])
    return Cloud(
        part["points"], values.get("color"), part["labels"], np.array(about["shift"], np.float64), about["left_out"],
        names, tuple(about["up"]), fields, None, about["rounding"], None, None, _reference(about["reference"]),
        about["dropped"],
    )  # fmt: skip


def _subsampled(settings: Settings, columns: Columns, part: Entry) -> Made:
    """The content of a scene, from a part."""
    values = {name: column.astype(np.float32) if name == "color" else column for name, column in _values(part).items()}
    scene = data.scene_of_values(settings, columns, part["points"], part["labels"], values)
    order = np.argsort(scene.labels, kind="stable").astype(np.int32)
    classes = len(settings.names)
    labels, numbers = np.unique(part["labels"], return_counts=True)
    about = {
        "num_points": len(part["points"]), "labels": [*zip(labels.tolist(), numbers.tolist(), strict=True)],
        "classes": data.class_counts(scene.full_labels, classes).tolist(),
        "classes_begin": np.searchsorted(scene.labels[order], np.arange(classes + 1)).tolist(),
        "spacing": statistics.spacing_of(np.asarray(part["points"])), "reference": part.about["reference"],
        "middle": statistics.middle_of(scene.points), "warnings": part.about["warnings"],
    }  # fmt: skip
    return Made({"points": scene.points, "columns": scene.columns, "labels": scene.labels, "by_class": order,
                 "boxes": boxes_of(scene.points)}, about)  # fmt: skip


def _reference(described: dict[str, Any] | None) -> Reference | None:
    return None if described is None else Reference(**described)


# ---- files of entries


@contextmanager
def _errors_name(folder: Path) -> Iterator[None]:
    """Let an OSError name the setting and the folder."""
    try:
        yield
    except OSError as error:
        got = error.strerror or str(error)
        raise OSError(error.errno, f"[data] cache: {got}", str(error.filename or folder)) from None


def _full(kind: str, key: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "format": _FORMAT, **key}


def _name(kind: str, key: Mapping[str, Any]) -> str:
    return f"{kind}-{_digest(_full(kind, key))}"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(path: Path, array: np.ndarray) -> dict[str, int]:
    """Write an array to disk; returns the size and the checksum of the file."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)  # np.save does not say that the disk is full, only how much was written
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "checksum": _checksum(path)}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _opened(path: Path, key: dict[str, Any]) -> Entry | None:
    """The entry in a folder; None if there is none that is whole and has this key."""
    try:
        content = json.loads((path / _ABOUT).read_bytes())
        digest = content.pop("digest")
        if digest != _digest(content) or content["key"] != key:
            return None
        for name, of in content["arrays"].items():
            file = path / f"{name}.npy"
            if file.stat().st_size != of["bytes"] or _checksum(file) != of["checksum"]:
                return None
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return Entry(path, content["about"])


def _mapped(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.view(np.ndarray)  # not np.memmap, a subclass whose small results are slow


def _remove_left_overs(folder: Path) -> None:
    """Remove what trainings that were killed had begun to write."""
    for one in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - max(file.stat().st_mtime for file in (one, *one.iterdir())) > _LEFT_OVER:
                shutil.rmtree(one)


def _allow_files() -> None:
    """Allow more files at once, as far as the system lets us: often it is 1024, which 200 scenes exceed."""
    try:
        import resource
    except ImportError:  # Windows, where files that are mapped are not counted
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
