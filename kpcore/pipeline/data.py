"""Scenes in memory: clouds subsampled to a point per voxel, with features and class numbers."""

from __future__ import annotations

import gzip
import math
import struct
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

import kpcore as kp
from kpcore.files import expanded
from kpcore.io import ReadError, faults
from kpcore.io.cloud import UNLABELED, MissingField, list_names, name_index
from kpcore.io.formats import field_names, read_columns
from kpcore.pipeline import filenames, objects
from kpcore.pipeline.settings import COMPUTED_FEATURES, SURFACE_FEATURES, SettingsError, near
from kpcore.scenes import PART_LABELS, indoor, shapes
from kpcore.terrain import heights_above_ground_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from kpcore.io import Cloud, Reference
    from kpcore.pipeline.boxes import Boxes
    from kpcore.pipeline.cache import Cache, Stored
    from kpcore.pipeline.settings import Digits, Objects, Part, Settings, Source

MAX_FEATURE = 10.0  # features are clipped to -10 to 10
_STRIPS = 41  # places of the strip that is set aside for validation
_MAX_SCALE = 1e300  # of |center| and scale, and 1 / it the least scale: (value - center) / scale is finite in float64
HEIGHT, HEIGHT_FIELD = "height_above_ground", "heightaboveground"  # the feature, and PDAL's dimension in lower case
IGNORED = -1  # the class number of points without a class

_ROWS_AT_ONCE = 1 << 20

Quantiles: TypeAlias = "Callable[[Sequence[np.ndarray], Sequence[float], type], np.ndarray]"
PartClouds: TypeAlias = "dict[str, tuple[Cloud, np.ndarray]]"  # (cloud, rows of the part) by the part's repr


@dataclass(frozen=True, eq=False)
class Scene:
    """A cloud subsampled to one point per voxel.

    points : (N, D) float32
    columns : (N, C) float32, the features, see `Columns`; zeros for "local", which depends on the input sphere
    labels : (N,) int64, class numbers, or IGNORED
    tree : search structure over the points; None for digits and objects
    full : (n, D) float32, the points before subsampling; for objects those after it; None, as full_labels, cloud and
        rows, for a scene of a cache that is only trained on
    full_labels : (n,) class numbers of those, or None
    cloud : the Cloud that was read, or None for digits and objects
    rows : (n,) the cloud's points that are in the scene, or None for digits and objects
    name : of an object, or of a file
    category : the number of the category of an object with parts, or None
    stored : what a cache holds of the scene besides, or None for a scene in memory
    """

    points: np.ndarray
    columns: np.ndarray
    labels: np.ndarray
    tree: kp.KDTree | Boxes | None
    full: np.ndarray | None
    full_labels: np.ndarray | None
    cloud: Cloud | None = None
    rows: np.ndarray | None = None
    name: str = ""
    category: int | None = None
    stored: Stored | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of a scene's features, and how their values are scaled.

    widths : the number of columns of each feature by its name, in their order
    center, scale : by name, for all features but "one" and "local": a value v becomes (v - center) / scale; a number,
        or one for each column
    """

    widths: dict[str, int]
    center: dict[str, float | list[float]]
    scale: dict[str, float | list[float]]

    def features(self, points: np.ndarray, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The (n, C) float32 features of points.

        `values` has the (n,) or (n, width) values of each feature but "one" and "local". "local" is zero here, as it
        depends on the input sphere.
        """
        parts = []
        for name, width in self.widths.items():
            if name in ("one", "local"):
                parts.append(np.full((len(points), width), name == "one", np.float32))
            else:
                parts.append((values[name].reshape(len(points), width) - self.center[name]) / self.scale[name])
        return np.ascontiguousarray(np.concatenate(parts, axis=1), np.float32)

    def clipped(self, points: np.ndarray, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The features, from -10 to 10."""
        return np.clip(self.features(points, values), -MAX_FEATURE, MAX_FEATURE)

    def span(self, name: str) -> slice | None:
        """The columns of a feature; None if it is not used."""
        begin = 0
        for feature, width in self.widths.items():
            if feature == name:
                return slice(begin, begin + width)
            begin += width
        return None


def columns_of(settings: Settings, described: Mapping[str, Any]) -> Columns:
    """Make Columns from their description in JSON; an error unless they fit the features of the settings."""
    columns = Columns(**described)
    if not isinstance(columns.widths, dict) or [*columns.widths.items()] != [*settings.widths.items()]:
        raise SettingsError(f"columns: expected widths {settings.widths}, as of the features, got {columns.widths!r}")
    if any(type(width) is not int for width in columns.widths.values()):
        raise SettingsError(f"columns: expected widths that are integers, got {columns.widths!r}")
    for name in settings.widths.keys() - {"one", "local"}:
        for kind, numbers, fits in (
            ("center", columns.center, lambda number: abs(number) < _MAX_SCALE),
            ("scale", columns.scale, lambda number: 1 / _MAX_SCALE < number < _MAX_SCALE),
        ):
            number = numbers.get(name) if isinstance(numbers, dict) else None
            of_columns = number if isinstance(number, list) else [number] * settings.widths[name]
            if len(of_columns) != settings.widths[name] or not all(
                type(one) in (int, float) and fits(one) for one in of_columns
            ):
                raise SettingsError(f"columns: expected a finite number as {kind} of {name}, got {number!r}")
    return columns


def load_scenes(settings: Settings, parts: Sequence[Part], folder: str | os.PathLike[str],
                columns: Columns | None = None, read_parts: PartClouds | None = None, cache: Cache | None = None, *,
                labelled: bool = True) -> tuple[list[Scene], Columns]:  # fmt: skip
    """([Scene], Columns) of files; without `columns` their centers and scales are computed from these scenes.

    Parts in `read_parts` are not read again; others are added to it. With a cache all is read from there, and only
    scenes that are `labelled` have their points before subsampling.
    """
    if cache is not None:
        return cache.scenes(settings, parts, folder, columns, labelled=labelled)
    read_parts = {} if read_parts is None else read_parts
    _read_parts(settings, parts, folder, read_parts)
    scenes, columns = _scenes(settings, [read_parts[repr(part)] for part in parts], columns)
    return [replace(scene, name=str(part)) for scene, part in zip(scenes, parts, strict=True)], columns


def _read_parts(settings: Settings, parts: Sequence[Part], folder: str | os.PathLike[str],
                read_parts: PartClouds) -> None:  # fmt: skip
    for part in parts:
        if repr(part) not in read_parts:
            read_parts[repr(part)] = load_part(settings, part, folder)


def load_training(settings: Settings, folder: str | os.PathLike[str], read_parts: PartClouds | None = None,
                  columns: Columns | None = None,
                  cache: Cache | None = None) -> tuple[list[Scene], list[Scene], Columns]:  # fmt: skip
    """(scenes to train on, scenes for validation, Columns) of settings; `columns` and `cache` as in `load`."""
    train, validation = settings.data.train, settings.data.validation
    if isinstance(validation, list):
        scenes, columns = load(settings, train, folder, columns, read_parts, cache, labelled=False)
        aside = load(settings, validation, folder, columns, read_parts, cache)[0] if validation else []
        return scenes, aside, columns
    train = filenames.single(train, folder)
    if cache is not None:
        scenes, aside, columns = cache.split(settings, train, folder, validation, columns)
    else:
        read_parts = {} if read_parts is None else read_parts
        _read_parts(settings, train, folder, read_parts)
        sides = [split(settings, *read_parts[repr(part)], validation) for part in train]
        scenes, columns = _scenes(settings, [(cloud, rows) for cloud, rows, _ in sides], columns)
        aside = [cloud_scene(settings, columns, cloud, rows) for cloud, _, rows in sides]
    for name, of_scenes in (("train", scenes), ("validation", aside)):
        if not _any_labelled(settings, of_scenes):
            raise SettingsError(f"[data] {name}: expected points with labels of the classes, got none in this part of "
                                f"{', '.join(map(str, train))}")  # fmt: skip
    return scenes, aside, columns


def split(settings: Settings, cloud: Cloud, rows: np.ndarray,
          fraction: float) -> tuple[Cloud, np.ndarray, np.ndarray]:  # fmt: skip
    """(cloud, rows to train on, rows that are set aside): a strip with this fraction of the points.

    It is across the longer axis of x and y, where the share of each class that is in it is the nearest to the fraction.
    """
    points = cloud.points[rows, :2]
    along = points[:, np.ptp(points, axis=0).argmax()]
    order = np.argsort(along, kind="stable")
    number = round(fraction * len(rows))
    if not 0 < number < len(rows):
        raise SettingsError(f"[data] validation: expected scenes that can be split, got one of {len(rows)} points")
    labels = class_numbers(settings, cloud.labels[rows])[order]
    begins = np.unique(np.linspace(0, len(rows) - number, _STRIPS).round().astype(np.int64))
    off = np.zeros(len(begins))
    for label in np.unique(labels[labels != IGNORED]):
        before = np.cumsum(np.append(0, labels == label))
        off += np.abs((before[begins + number] - before[begins]) / before[-1] - fraction)
    begin = int(begins[off.argmin()])
    aside = np.zeros(len(rows), bool)
    aside[order[begin : begin + number]] = True
    return cloud, rows[~aside], rows[aside]


def scene_of(settings: Settings, columns: Columns, cloud: Cloud) -> Scene:
    """A Scene with all points of a cloud, labelled or not."""
    return cloud_scene(settings, columns, cloud, np.arange(len(cloud.points)))


def read_cloud(settings: Settings, path: str | os.PathLike[str], labelled: bool = True, exact: bool = False,
               ignore: Sequence[int | str] = ()) -> Cloud:  # fmt: skip
    """Read a file with the fields of the features, and the labels; unless `labelled`, the labels may be missing.

    A file to be labelled need not have the columns of the training files, which have labels besides. Points with labels
    or flags of `ignore`, or of the same setting, are left out.
    """
    data = settings.data
    computes = any(name in data.features for name in (HEIGHT, *SURFACE_FEATURES))
    fields, unused = fields_of(settings, field_names(path) if computes else ())
    for name in unused:
        warnings.warn(f"{path}: its field {name} is not used, since the feature {name} is computed", stacklevel=2)
    request = {"fields": fields, "exact": exact, "ignore": (*data.ignore, *ignore), "drop_zeros": data.drop_zeros}
    try:
        cloud = read_columns(path, data.columns, labelled, label=data.label, **request)
    except MissingField as error:
        if labelled or data.label is None:
            advice = next(filter(None, (near(name, COMPUTED_FEATURES, 0.75) for name in fields)), "")
            raise MissingField(f"{error}{advice if 'did you mean' not in str(error) else ''}") from None
        cloud = read_columns(path, data.columns, labelled, **request)
    check_projected(path, cloud.reference)
    if bad := not_finite(cloud.fields):
        raise ReadError(f"{path}: {bad}")
    if "color" in data.features and cloud.colors is None:
        raise ReadError(f"{path}: has no colours, but color is one of the features")
    for sentence in faults(cloud) if data.kind == "scenes" else ():
        warnings.warn(f"{path}: {sentence}", stacklevel=2)
    return cloud


def fields_of(settings: Settings, in_file: Sequence[str]) -> tuple[list[str], list[str]]:
    """(fields that the features are read from, fields that have the name of a feature that is computed) of a file."""
    features = settings.data.features
    fields = [name for name in features if name not in COMPUTED_FEATURES]
    if HEIGHT in features and name_index(in_file, HEIGHT_FIELD) is not None:
        fields.append(HEIGHT_FIELD)
    return fields, [name for name in SURFACE_FEATURES if name in features and name_index(in_file, name) is not None]


def check_projected(path: str | os.PathLike[str], reference: Reference | None) -> None:
    """Raise an error for a file that states that its coordinates are angles."""
    if reference is not None and reference.kind in ("geographic", "geocentric"):
        raise ReadError(f"{path}: expected coordinates in a length such as metres, got {reference.kind} ones "
                        f"({reference.name}): project the file first")  # fmt: skip


def not_finite(fields: Mapping[str, np.ndarray]) -> str | None:
    """Which field is NaN or infinite for how many points, or None."""
    for name, values in fields.items():
        if bad := len(values) - int(np.isfinite(values).sum()):
            return f"field {name}, a feature, is NaN or infinite for {bad} points"
    return None


def scaled(cloud: Cloud, horizontal: float, vertical: float) -> Cloud:
    """The cloud in another unit: x and y, and z, times these factors."""
    factors = np.array([horizontal, horizontal, vertical])
    exact, shift = coordinates(cloud) * factors, np.floor(cloud.shift * factors)
    fields, reference = dict(cloud.fields), cloud.reference
    if HEIGHT_FIELD in fields:
        fields[HEIGHT_FIELD] = fields[HEIGHT_FIELD] * vertical
    if reference is not None:
        units = (None if unit is None else unit / factor
                 for unit, factor in ((reference.horizontal, horizontal), (reference.vertical, vertical)))  # fmt: skip
        reference = reference._replace(**dict(zip(("horizontal", "vertical"), units, strict=True)))
    points = (exact - shift).astype(np.float32)
    return replace(cloud, points=points, exact=exact, shift=shift, fields=fields, reference=reference)


def pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """A million rows at once: of a mapped array no more is in memory."""
    return (array[begin : begin + _ROWS_AT_ONCE] for begin in range(0, len(array), _ROWS_AT_ONCE))


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """(classes,) the number of labels of each class, without those that are IGNORED."""
    counts = np.zeros(classes, np.int64)
    for piece in pieces(labels):
        counts += np.bincount(piece[piece != IGNORED], minlength=classes)
    return counts


def counts_of(settings: Settings, scene: Scene) -> np.ndarray:
    """(classes,) the number of points of each class before subsampling, or of objects of each class."""
    if scene.stored:
        return scene.stored.classes
    return class_counts(scene.labels if scene.full_labels is None else scene.full_labels, len(settings.names))


def _any_labelled(settings: Settings, scenes: Sequence[Scene]) -> bool:
    return any(class_counts(scene.labels, len(settings.names)).any() for scene in scenes)


def class_numbers(settings: Settings, labels: np.ndarray) -> np.ndarray:
    """The class number of each label, IGNORED for labels of no class."""
    out = np.full(len(labels), IGNORED, np.int64)
    for number, values in enumerate(settings.data.classes.values()):
        out[np.isin(labels, values)] = number
    return out


def load_part(settings: Settings, part: Part, folder: str | os.PathLike[str]) -> tuple[Cloud, np.ndarray]:
    """(cloud, rows of its points that belong to the part)."""
    if part.indoor is not None:
        if missing := [name for name in settings.data.features if name not in COMPUTED_FEATURES]:
            raise SettingsError(f"[data] features: the embedded scenes have no {', '.join(missing)}")
        cloud = indoor(part.points, part.indoor)
        if part.mirror:
            cloud.points[:, 0] *= -1
    else:
        path = Path(folder, expanded(part.file))
        cloud = read_cloud(settings, path)
        if cloud.labels is None:
            raise ReadError(f"{path}: has no labels: {cloud.unlabeled}; name their field as label in [data]")
    keep = np.ones(len(cloud.points), bool)
    for corner, sign in ((part.min, 1), (part.max, -1)):
        for axis, limit in enumerate(corner or ()):
            # Points on the limit belong to one side only, so that two parts of a file have no point in common.
            coordinate = cloud.points[:, axis] + cloud.shift[axis]
            keep &= coordinate >= limit if sign > 0 else coordinate < limit
    if not keep.any():
        raise SettingsError(f"[data] {part} min, max: expected points between the corners, got none")
    return cloud, np.flatnonzero(keep)


def values_of(settings: Settings, cloud: Cloud, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Values of the features of some points that the cloud holds, before scaling: (n,) or (n, 3) float32 by name."""
    values = {}
    for name in settings.data.features:
        if name == "color":
            values[name] = cloud.colors[rows].astype(np.float32)
        elif name == "height":
            values[name] = coordinates(cloud, rows)[:, -1].astype(np.float32)
        elif name == HEIGHT and HEIGHT_FIELD in cloud.fields:
            values[name] = cloud.fields[HEIGHT_FIELD][rows]
        elif name not in COMPUTED_FEATURES:
            values[name] = cloud.fields[name.lower()][rows]
    return values


def computed_values(settings: Settings, points: np.ndarray, known: Collection[str],
                    around: np.ndarray | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    """Values of the features that are computed from all points around, by name, but for those that are `known`.

    The ground is that of the points and of those `around`.
    """
    values, ground = {}, settings.data.ground
    if HEIGHT in settings.data.features and HEIGHT not in known:
        lengths = {"cell": ground.cell, "window": ground.window, "slope": ground.slope}
        values[HEIGHT] = heights_above_ground_of(points, around, **lengths).astype(np.float32)
    return values | _surface_values(settings, points, known)


def _surface_values(settings: Settings, points: np.ndarray, known: Collection[str]) -> dict[str, np.ndarray]:
    """Values of the features of the local surface, but for those that are `known`; normals point upwards."""
    names = [name for name in settings.data.features if name in SURFACE_FEATURES and name not in known]
    if not names:
        return {}
    surface = settings.data.surface
    neighborhood = {"radius": surface.radius} if surface.radius else {"k": surface.neighbors}
    try:
        features = kp.covariance_features(points, **neighborhood)
    except ValueError as error:
        raise SettingsError(f"[data] features: {names[0]} cannot be computed: {error}") from None
    return {name: getattr(features, name).astype(np.float32) for name in names}


class Reach(NamedTuple):
    """The distances up to which other points have an effect on the computed features of a point."""

    surface: float  #: on the features of the local surface
    ground: float  #: on the height above ground


def reach_of(settings: Settings) -> Reach:
    """How far the computed features reach."""
    surface, ground = 0.0, 1.5 * settings.data.ground.window if HEIGHT in settings.data.features else 0.0
    if any(name in SURFACE_FEATURES for name in settings.data.features):
        # Where a surface has one point in each voxel, its k nearest are within sqrt(k / pi) voxels; almost twice that.
        about = settings.data.surface
        surface = about.radius or settings.network.voxel_size * math.sqrt(about.neighbors)
    return Reach(surface, ground)


def coordinates(cloud: Cloud, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """(n, 3) float64 coordinates in the file of some points, exact if they were read so."""
    return cloud.points[rows] + cloud.shift if cloud.exact is None else cloud.exact[rows]


def all_values(settings: Settings, cloud: Cloud, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Values of all features of some points, before scaling."""
    values = values_of(settings, cloud, rows)
    computed = computed_values(settings, coordinates(cloud), values)
    return values | {name: column[rows] for name, column in computed.items()}


def _scenes(settings: Settings, clouds: Sequence[tuple[Cloud, np.ndarray]],
            columns: Columns | None) -> tuple[list[Scene], Columns]:  # fmt: skip
    """([Scene], Columns) of clouds and rows; without `columns` their centers and scales are computed from these."""
    if columns:
        return [cloud_scene(settings, columns, cloud, rows) for cloud, rows in clouds], columns
    values = [all_values(settings, cloud, rows) for cloud, rows in clouds]
    columns = columns_from(settings, values)
    pairs = zip(clouds, values, strict=True)
    return [cloud_scene(settings, columns, cloud, rows, of_scene) for (cloud, rows), of_scene in pairs], columns


def quantiles_in_memory(arrays: Sequence[np.ndarray], q: Sequence[float], dtype: type) -> np.ndarray:
    """np.quantile of all values of arrays, as this dtype."""
    return np.quantile(np.concatenate(arrays).astype(dtype), q)


def columns_from(settings: Settings, clouds_values: Sequence[Mapping[str, np.ndarray]],
                 quantiles: Quantiles = quantiles_in_memory) -> Columns:  # fmt: skip
    """Columns with the centers and scales of values of clouds."""
    center, scale = {"color": 0.0}, {"color": 255.0}
    for name in clouds_values[0]:
        if name == "color":
            continue
        if name in SURFACE_FEATURES:  # from -1 to 1 already; a center would turn normals
            center[name], scale[name] = 0.0, 1.0
            continue
        # Quantiles 0.05 and 0.95 become -1 and 1, not the extremes: intensities have outliers 100 times as large.
        values = [cloud_values[name] for cloud_values in clouds_values]
        low, middle, high = quantiles(values, (0.05, 0.5, 0.95), np.float64)
        center[name], scale[name] = float(middle), float(max((high - low) / 2, 1e-6 * abs(middle), 1e-12))
    return Columns(settings.widths, center, scale)


def cloud_scene(settings: Settings, columns: Columns, cloud: Cloud, rows: np.ndarray,
                values: dict[str, np.ndarray] | None = None) -> Scene:  # fmt: skip
    """A Scene with some points of a cloud, labelled or not; with the values of its features if they are known."""
    labels = None if cloud.labels is None else cloud.labels[rows]
    values = values or all_values(settings, cloud, rows)
    scene = scene_of_values(settings, columns, cloud.points[rows], labels, values)
    return replace(scene, tree=kp.KDTree(scene.points), cloud=cloud, rows=rows)


def scene_of_values(settings: Settings, columns: Columns, full: np.ndarray, labels: np.ndarray | None,
                    values: Mapping[str, np.ndarray]) -> Scene:  # fmt: skip
    """A Scene without a tree of points with labels, as in the file, and values of their features."""
    labels = None if labels is None else class_numbers(settings, labels)
    features = columns.clipped(full, values)
    sub = subsampled(settings, full, features=features, labels=labels,
                     ignore_label=None if labels is None else IGNORED)  # fmt: skip
    sub_labels = np.full(len(sub.points), IGNORED, np.int64) if labels is None else sub.labels
    return Scene(sub.points, sub.features, sub_labels, None, full, labels)


def subsampled(settings: Settings, points: np.ndarray, **more: Any) -> kp.subsampling.Subsampled:
    """Points with one for each voxel of level 0 of the network."""
    try:
        return kp.grid_subsample(points, settings.network.voxel_size, origin=settings.net().origin, **more)
    except ValueError as error:
        raise SettingsError(f"[network] voxel_size: {error}") from None


def load_objects(settings: Settings, parts: Sequence[Objects],
                 folder: str | os.PathLike[str]) -> tuple[list[Scene], Columns]:  # fmt: skip
    """([Scene], Columns) of objects, with a scene for each."""
    scenes, columns, classes = [], Columns(settings.widths, {}, {}), settings.names
    for part in parts:
        for one in objects.listed(part, classes, folder):
            points = objects.points_of(one, classes, part, settings.data.columns)
            scenes.append(object_scene(settings, columns, one.name, points, one.label))
    return scenes, columns


def object_scene(settings: Settings, columns: Columns, name: str, points: np.ndarray, label: int = IGNORED) -> Scene:
    """A Scene of the points of an object in the unit sphere."""
    points = subsampled(settings, points).points
    return Scene(points, columns.features(points, {}), np.array([label], np.int64), None, points, None, name=name)


def load_parts(settings: Settings, parts: Sequence[Objects],
               folder: str | os.PathLike[str]) -> tuple[list[Scene], Columns]:  # fmt: skip
    """([Scene], Columns) of objects whose points have labels, with a scene for each."""
    scenes, columns, categories = [], Columns(settings.widths, {}, {}), list(settings.data.classes)
    for part in parts:
        for one in objects.listed(part, categories, folder):
            if one.path is None:
                cloud = shapes(categories[one.label], one.seed, part.points)
                labels = cloud.labels + PART_LABELS[categories[one.label]][0]
            else:
                cloud = read_cloud(settings, one.path)
                if cloud.labels is None:
                    raise ReadError(
                        f"{one.path}: has no labels: {cloud.unlabeled}; name their field as label in [data]"
                    )
                labels = cloud.labels
            scenes.append(part_scene(settings, columns, one.path or one.name, cloud.points, labels, one.label))
    return scenes, columns


def part_scene(settings: Settings, columns: Columns, name: object, points: np.ndarray, labels: np.ndarray | None,
               category: int) -> Scene:  # fmt: skip
    """A Scene of an object of a category in the unit sphere, whose labels, if any, are those of its parts."""
    full, full_labels = objects.in_unit_sphere(name, points), None
    if labels is not None:
        full_labels = part_numbers(settings, name, labels, category)
    sub = subsampled(settings, full, labels=full_labels, ignore_label=None if full_labels is None else IGNORED)
    sub_labels = np.full(len(sub.points), IGNORED, np.int64) if full_labels is None else sub.labels
    return Scene(sub.points, columns.features(sub.points, {}), sub_labels, None, full, full_labels, name=str(name),
                 category=category)  # fmt: skip


def part_numbers(settings: Settings, name: object, labels: np.ndarray, category: int) -> np.ndarray:
    """The class number of each label; an error for one of another category."""
    parts = [*settings.data.classes.values()]
    first, out = sum(map(len, parts[:category])), np.full(len(labels), IGNORED, np.int64)
    for number, label in enumerate(parts[category], first):
        out[labels == label] = number
    if (other := (out == IGNORED) & (labels != UNLABELED)).any():
        expected = f"the part labels {list_names(map(str, parts[category]))} of {[*settings.data.classes][category]}"
        raise ReadError(f"{name}: expected {expected}, got {labels[other][0]} for point {int(other.argmax())}")
    return out


def load_digits(settings: Settings, parts: Sequence[Digits],
                folder: str | os.PathLike[str]) -> tuple[list[Scene], Columns]:  # fmt: skip
    """([Scene], Columns) of idx files, with a scene for each image.

    Each pixel that is not black is a point; coordinates are in pixels from the middle of the image.
    """
    scenes, columns = [], Columns(settings.widths, {"value": 0.0}, {"value": 255.0})
    for part in parts:
        images, labels = (read_idx(Path(folder, expanded(name))) for name in (part.images, part.labels))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise SettingsError(
                f"[data] {part.images}: expected images and a label for each, got {images.shape} and {labels.shape}"
            )
        if labels.max(initial=0) > 9:
            raise SettingsError(f"[data] {part.labels}: expected labels from 0 to 9, got {labels.max()}")
        for image, label in zip(images[part.first : part.last], labels[part.first : part.last], strict=True):
            scenes.append(digit_scene(columns, image, int(label)))
    return scenes, columns


def digit_scene(columns: Columns, image: np.ndarray, label: int = IGNORED) -> Scene:
    """A Scene of an image: a point for each pixel that is not black, in pixels from the middle."""
    rows, across = np.nonzero(image)
    middle = (np.array(image.shape[::-1], np.float32) - 1) / 2
    points = np.stack([across, len(image) - 1 - rows], 1).astype(np.float32) - middle
    features = columns.features(points, {"value": image[rows, across].astype(np.float32)})
    return Scene(points, features, np.array([label], np.int64), None, points, None)


def read_idx(path: Path) -> np.ndarray:
    """The array of an idx file, gzipped or not (format: yann.lecun.com/exdb/mnist)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ReadError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8 or len(data) < 4 + 4 * data[3]:
        raise ReadError(f"{path}: is not an idx file of bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    if len(data) != 4 + 4 * data[3] + math.prod(shape):
        raise ReadError(f"{path}: truncated: expected an array of shape {shape}, got {len(data)} bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def load(settings: Settings, parts: Sequence[Source], folder: str | os.PathLike[str], columns: Columns | None = None,
         read_parts: PartClouds | None = None, cache: Cache | None = None, *,
         labelled: bool = True) -> tuple[list[Scene], Columns]:  # fmt: skip
    """([Scene], Columns) of parts of settings; without `columns` these are computed from the scenes.

    Scenes of a folder or a pattern are those of its files. `read_parts`, `cache` and `labelled` are for scenes alone,
    see `load_scenes`.
    """
    if settings.digits:
        scenes, columns = load_digits(settings, parts, folder)
    elif settings.data.kind == "objects":
        scenes, columns = load_objects(settings, parts, folder)
    elif settings.data.kind == "parts":
        scenes, columns = load_parts(settings, parts, folder)
    else:
        parts = filenames.single(parts, folder)
        scenes, columns = load_scenes(settings, parts, folder, columns, read_parts, cache, labelled=labelled)
    if not _any_labelled(settings, scenes):
        raise SettingsError(
            f"[data] {', '.join(map(str, parts))}: expected points with labels of the classes, got none"
        )
    return scenes, columns
