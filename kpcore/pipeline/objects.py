"""Objects with a class each: which files there are in folders and lists, and their points in the unit sphere."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.files import expanded
from kpcore.io import ReadError, sample_mesh
from kpcore.io.cloud import list_names
from kpcore.io.formats import READERS, read_columns
from kpcore.io.mesh import READERS as MESHES
from kpcore.io.mesh import NoFaces
from kpcore.scenes import shapes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from kpcore.pipeline.settings import Objects

_SUFFIXES = {*MESHES, *READERS}


class Listed(NamedTuple):
    """An object of a folder or list."""

    name: str
    label: int  #: its class number
    path: Path | None  #: None: generated
    seed: int = 0  #: of a generated object


def listed(part: Objects, classes: Sequence[str], folder: str | os.PathLike[str]) -> list[Listed]:
    """The objects of a part, in the order of the list, or by class and name. Warns in one line of what is left out."""
    if part.shapes is not None:
        return [
            Listed(f"{name} {seed}", label, None, seed)
            for label, name in enumerate(classes)
            for seed in range(part.shapes, part.shapes + part.number)
        ]
    left_out: Counter[str] = Counter()
    path = Path(folder, expanded(part.folder or part.list))
    find = _in_folder if part.folder else _in_split if path.suffix == ".json" else _in_list
    try:
        all_objects = [*find(path, part, classes, left_out)]
    except OSError as error:
        raise ReadError(f"{error.filename or path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ReadError(f"{path}: expected text in UTF-8, got byte {error.object[error.start]:#x}") from None
    if left_out:
        reasons = ", ".join(f"{reason} ({number})" for reason, number in left_out.items())
        warnings.warn(f"{path}: {len(all_objects)} objects; left out: {reasons}", stacklevel=2)
    return all_objects


def _in_folder(path: Path, part: Objects, classes: Sequence[str], left_out: Counter[str]) -> Iterable[Listed]:
    for entry in sorted(path.iterdir()):
        if entry.name not in classes:
            left_out["folders of no class" if entry.is_dir() else "files beside the folders"] += 1
    for label, name in enumerate(classes):
        entries = sorted((path / name / (part.split or "")).iterdir())
        hidden = [entry for entry in entries if entry.name.startswith(".")]  # such as the ._ files of macOS
        if hidden:
            left_out["hidden files"] += len(hidden)
            entries = [entry for entry in entries if entry not in hidden]
        files = [entry for entry in entries if entry.suffix.lower() in _SUFFIXES and not entry.is_dir()]
        if not files:
            folders = [entry.name for entry in entries if entry.is_dir()]
            advice = f", but the folders {list_names(folders)}: choose one with split" if folders else ""
            raise ReadError(f"{path / name / (part.split or '')}: expected files of objects, got none{advice}")
        if others := len(entries) - len(files):
            left_out["files of another extension"] += others
        for entry in files:
            yield Listed(entry.relative_to(path).as_posix(), label, entry)


def _in_list(path: Path, part: Objects, classes: Sequence[str], left_out: Counter[str]) -> Iterable[Listed]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        match line.replace(",", " ").split():
            case []:
                continue
            case [name]:
                category = name.rpartition("_")[0]
                file = f"{category}/{name}.txt"
            case [file, category]:
                pass
            case words:
                raise ReadError(
                    f"{path}: line {number}: expected a file and its class, or a name, got {len(words)} words"
                )
        if category in classes:
            yield Listed(file, classes.index(category), path.parent / file)
        else:
            left_out["lines of no class"] += 1


def _in_split(path: Path, part: Objects, classes: Sequence[str], left_out: Counter[str]) -> Iterable[Listed]:
    """The objects of a JSON list of ShapeNetPart: names such as shape_data/03001627/1007e2, of 03001627/1007e2.txt."""
    root, categories = path.parent.parent, {}
    for line in (root / "synsetoffset2category.txt").read_text(encoding="utf-8").splitlines():
        if len(words := line.split()) == 2:
            categories[words[1]] = words[0]
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReadError(f"{path}: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.count("/") >= 1 for name in names):
        raise ReadError(f"{path}: expected a list of names such as shape_data/03001627/1007e2")
    for name in names:
        synset, number = name.split("/")[-2:]
        if synset not in categories:
            raise ReadError(f"{path}: {name}: expected a category of synsetoffset2category.txt, got {synset}")
        if categories[synset] in classes:
            file = f"{synset}/{number}.txt"
            yield Listed(file, classes.index(categories[synset]), root / file)
        else:
            left_out["objects of no class"] += 1


def points_of(one: Listed, classes: Sequence[str], part: Objects, columns: Sequence[str] | None) -> np.ndarray:
    """(n, 3) float32 points of an object in the unit sphere."""
    if one.path is None:
        return in_unit_sphere(one.name, shapes(classes[one.label], one.seed, part.points).points)
    return points_of_file(one.path, part.points, columns, strict=True)


def points_of_file(path: Path, num_points: int, columns: Sequence[str] | None, *, strict: bool) -> np.ndarray:
    """(n, 3) float32 points of a mesh or cloud in the unit sphere; for `columns` and `strict` see `read_columns`."""
    suffix = path.suffix.lower()
    if suffix in MESHES:
        try:
            return in_unit_sphere(path, sample_mesh(path, num_points, dtype=np.float64))
        except NoFaces:
            if suffix not in READERS:
                raise
    cloud = read_columns(path, columns, strict)
    if cloud.left_out:
        warnings.warn(f"{path}: left out: points that are not finite ({cloud.left_out})", stacklevel=2)
    return in_unit_sphere(path, cloud.points)


def in_unit_sphere(name: object, points: np.ndarray) -> np.ndarray:
    """Points moved and scaled so that their mean is 0 and the largest norm 1."""
    with np.errstate(over="ignore", invalid="ignore"):
        centered = points - points.mean(axis=0, dtype=np.float64)
        size = float(np.abs(centered).max())
    if not size:
        raise ReadError(f"{name}: expected an object of a size above 0, got {len(points)} points at one place")
    if not np.isfinite(size):
        raise ReadError(f"{name}: expected coordinates whose sum float64 can hold, got {np.abs(points).max():g}")
    centered /= size  # before they are squared
    return (centered / np.sqrt((centered**2).sum(axis=1).max())).astype(np.float32)
