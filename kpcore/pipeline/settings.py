"""Settings of a training, as dataclasses and as a TOML file: data, network and training; all values are checked."""

from __future__ import annotations

import difflib
import math
import re
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from kpcore import nn
from kpcore.config import require
from kpcore.scenes import CATEGORIES, PART_LABELS

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

_UTF_16_MARKS, _MAX_BYTES = (b"\xff\xfe", b"\xfe\xff"), 2**24
_FOLDS, _MOST_NAME_BYTES = ("area", "file"), 200  # file systems take names of up to 255 bytes
LENGTHS = (1e-9, 1e9)  # in the unit of the points; squares of these, and of 2**15 times as much, fit float32
_LABEL_RANGE = (-(2**31), 2**31 - 1)
# Of the local surface around a point, see `kpcore.normals` and `kpcore.covariance_features`.
SURFACE_FEATURES = ("normals", "linearity", "planarity", "scattering", "verticality", "curvature")
COMPUTED_FEATURES = ("one", "color", "height", "local", "value", "height_above_ground", *SURFACE_FEATURES)
FLAGS = ("withheld", "overlap", "synthetic", "key_point")  # of points of LAS files, for `ignore`

Section = TypeVar("Section")  # one of the dataclasses below


class SettingsError(ValueError):
    """A setting is invalid or does not fit the data; the message is one line that names it."""


@dataclass(frozen=True)
class Part:
    """A scene: a file of points with labels, or the embedded indoor scene.

    file, min, max : the file, and a box in its coordinates: only points with min <= coordinate < max are used
    indoor, points, mirror : the seed of `kpcore.scenes.indoor`, the number of points, and whether x is negated
    area : the name of the area that the scene belongs to, for `folds` in [data]; by default the first folder of `file`:
        Area_1 of Area_1/hallway_1.ply
    """

    file: str | None = None
    min: list[float] | None = None
    max: list[float] | None = None
    indoor: int | None = None
    points: int = 300_000
    mirror: bool = False
    area: str | None = None

    def __str__(self) -> str:
        return self.file if self.indoor is None else f"indoor {self.indoor}"


@dataclass(frozen=True)
class Digits:
    """Images and labels in idx files; numbers `first` to `last` - 1 are used."""

    images: str
    labels: str
    first: int = 0
    last: int | None = None

    def __str__(self) -> str:
        return self.images


@dataclass(frozen=True)
class Objects:
    """Objects with a class or category each: files in folders, files of a list, or `kpcore.scenes.shapes`.

    folder, split : a folder with a sub-folder for each class, named as the class; and the sub-folder of these that is
        read, such as "train" in the folders of ModelNet40. Files are meshes (OFF, PLY with faces) or clouds.
    list : a text file with an object in each line: a file and its class; or a name such as night_stand_0007, which is
        night_stand/night_stand_0007.txt, as in the resampled ModelNet40. Files are relative to the folder of the list.
        Or one of the JSON files in train_test_split of ShapeNetPart.
    shapes, number : the first seed of `kpcore.scenes.shapes`, and the number of seeds, each of which is an object of
        every class
    points : the number of points sampled from a mesh or a generated object; of a cloud all points are used
    """

    folder: str | None = None
    split: str | None = None
    list: str | None = None
    shapes: int | None = None
    number: int = 100
    points: int = 10_000

    def __str__(self) -> str:
        return self.folder or self.list or f"shapes {self.shapes}"


@dataclass(frozen=True)
class Ground:
    """How the ground is estimated for the feature height_above_ground, see `kpcore.height_above_ground`.

    cell : side of a cell, in the unit of the points: where the ground has about one point
    window : more than the width of the widest building
    slope : rise over run of the steepest ground
    """

    cell: float = 1.0
    window: float = 20.0
    slope: float = 0.3


@dataclass(frozen=True)
class Surface:
    """The neighbourhood from which normals and the other features of the local surface are computed.

    neighbors : the number of nearest points, the point itself among them
    radius : instead, all points within this distance
    """

    neighbors: int = 20
    radius: float | None = None


@dataclass(frozen=True)
class Blocks:
    """Blocks, the square cells of a lattice in which a scan is labelled, see `kpcore.pipeline.blocks`.

    side : of a block; by default where a block of the training data has some 150,000 points after subsampling, at least
        four radii of input spheres
    halo : width of the margin around a block whose points are in its input but get their labels in other blocks; by
        default the radius of input spheres and the reach of the features
    """

    side: float | None = None
    halo: float | None = None


Source: TypeAlias = "Part | Digits | Objects"
_SOURCES = {"scenes": Part, "digits": Digits, "objects": Objects, "parts": Objects}


@dataclass(frozen=True)
class Data:
    """Where points and labels come from.

    train, test : scenes, digits or objects
    validation : those by which the best network of a training is chosen, as in `test`; or the fraction of each scene in
        `train`, a strip at one end of it, that is set aside for this. Without it the best is chosen by `test`, so that
        its score there is too good.
    classes : the name of each class and its labels in the files; points with other labels are ignored. Digits have the
        classes 0 to 9. For objects, which are rescaled into the unit sphere, the list of names; by default those of
        `kpcore.scenes.CATEGORIES` if all objects are generated. For parts the name of each category and the labels of
        its parts, each of which no other category has.
    features : "one" (constant 1), "color" (three columns, 0 to 1), "height" (the last coordinate in the file), "local"
        (coordinates relative to the centre of the input sphere, after augmentation), "height_above_ground" (above the
        lowest surface around; the dimension HeightAboveGround of files that have it), "normals" (three columns),
        "linearity", "planarity", "scattering", "verticality", "curvature" (of the surface around), "value" (grey of a
        digit, 0 to 1), or the name of a field of the files. Heights and fields are shifted and scaled so that the
        middle nine tenths of the training data are -1 to 1, and clipped to -10 to 10.
    label : the field of the labels; needed if it has no usual name
    columns : names for the columns of files that have none, see `kpcore.io.read`
    kind : "scenes", "digits", "objects", which have a class each, or "parts", objects of a known category whose points
        have labels; by default digits where there are images, else scenes
    may_be_empty : names of classes that may have no points in the training data; for others that is an error
    colors : "#rrggbb" by the name of a class, for pictures; by default ASPRS colours where labels are ASPRS classes
    ignore : labels, and the flags withheld, overlap, synthetic and key_point of LAS files, whose points are not read
    drop_zeros : whether points at (0, 0, 0), where a scanner had no return, are not read; by default in sensor sweeps
    ground, surface : how height_above_ground, and normals and the like, are computed
    folds : "area" or "file" for a k-fold cross-validation, without `test`: the scenes of each area, or of each file,
        are tested by a network that is trained on all others in `train`
    """

    train: list[Source]
    test: list[Source] = field(default_factory=list)
    classes: dict[str, list[int]] | list[str] = field(default_factory=dict)
    features: list[str] = field(default_factory=lambda: ["one"])
    label: str | None = None
    columns: list[str] | None = None
    kind: str = "scenes"
    folds: str | None = None
    validation: list[Source] | float = field(default_factory=list)
    may_be_empty: list[str] = field(default_factory=list)
    colors: dict[str, str] = field(default_factory=dict)
    ignore: list = field(default_factory=list)
    drop_zeros: bool | None = None
    ground: Ground = field(default_factory=Ground)
    surface: Surface = field(default_factory=Surface)


@dataclass(frozen=True)
class Architecture:
    """A network of `kpcore.nn`.

    kind : "kpconv", a `Network` whose blocks `kpcore.nn.architecture` makes from `levels`, `convs`, `deformable`,
        `resampled` and `upsample`; or "kpnext", a `KPNeXt`, for which these five are not allowed
    options : further arguments of `Network`, or of `kpcore.nn.kpnext`
    """

    voxel_size: float
    kind: str = "kpconv"
    levels: int = 5
    convs: int = 2
    deformable: int = 0
    resampled: int = 0
    upsample: str = "nearest"
    width: int = 64
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """Batches, optimizer, augmentation and voting; lengths are in the unit of the points.

    radius : of input spheres
    sampling : "regular", the next sphere is where earlier ones cover the scenes least; or "balanced", spheres around
        points whose class is drawn with equal probability
    batch_points, batch_clouds : the largest number of points and of spheres in a batch
    epochs, steps : the number of epochs, and of batches in each
    optimizer : "sgd" or "adamw"
    schedule : "exponential" (falls by the factor lr_decay in lr_decay_epochs) or "one_cycle"
    offset_lr : factor of the learning rate for parameters with "offset" in their names
    kernel_points_lr : the same for learned kernel points (`learn_kernel_points` in [network])
    clip_value, clip_norm : limits of the gradients; 0 for none
    class_weights : "none", "inverse" (of the class frequency in the training data) or "root" (square root of these)
    rotate : "vertical", "all" or "none"; or a number, the largest angle about the vertical in degrees
    scale : smallest and largest factor of each axis
    flip : for each axis whether it may be mirrored
    noise : standard deviation of the noise that is added to coordinates
    keep_color : the probability that the colours of a sphere are not set to 0
    turn_grid : whether the axes of the voxels are rotated at random
    vote_radius : points within this fraction of a sphere's radius vote
    votes : votes for each place of a scene, also in validation
    validate : validate after every so many epochs, and after the last
    workers : threads that prepare batches in advance
    """

    radius: float = 2.0
    sampling: str = "regular"
    batch_points: int = 20_000
    batch_clouds: int = 32
    epochs: int = 20
    steps: int = 100
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.98
    weight_decay: float = 1e-3
    schedule: str = "exponential"
    lr_decay: float = 0.1
    lr_decay_epochs: float = 150.0
    offset_lr: float = 0.1
    kernel_points_lr: float = 0.1
    clip_value: float = 100.0
    clip_norm: float = 0.0
    class_weights: str = "none"
    rotate: str | float = "vertical"
    scale: list[float] = field(default_factory=lambda: [0.9, 1.1])
    flip: list[bool] = field(default_factory=list)
    noise: float = 0.001
    keep_color: float = 0.8
    turn_grid: bool = True
    vote_radius: float = 0.7
    votes: int = 1
    validate: int = 5
    workers: int = 2


_BOUNDS = {
    "radius": LENGTHS, "batch_points": (1, 10**7), "batch_clouds": (1, 10**4), "epochs": (1, 10**4),
    "steps": (1, 10**5), "lr": (1e-12, 1e6), "momentum": (0, 0.99999), "weight_decay": (0, 1e3), "lr_decay": (1e-6, 1),
    "lr_decay_epochs": (1e-3, 1e6), "offset_lr": (0, 1e3), "kernel_points_lr": (0, 1e3),
    "clip_value": (0, 1e9), "clip_norm": (0, 1e9),
    "noise": (0, LENGTHS[1]), "keep_color": (0, 1), "votes": (1, 1000), "validate": (1, 10**4), "workers": (0, 256),
    "vote_radius": (0.2, 1),  # at 0.2 a scene needs hundreds of times the spheres that it needs at 0.7
}  # fmt: skip
_CHOICES = {
    "sampling": ("regular", "balanced"), "optimizer": ("sgd", "adamw"), "schedule": ("exponential", "one_cycle"),
    "class_weights": ("none", "root", "inverse"),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """All settings of a training."""

    data: Data
    network: Architecture
    training: Training
    blocks: Blocks = field(default_factory=Blocks)

    @property
    def digits(self) -> bool:
        return self.data.kind == "digits"

    @property
    def classifies(self) -> bool:
        """Whether a whole cloud has a class, rather than each of its points."""
        return self.data.kind in ("digits", "objects")

    @property
    def whole(self) -> bool:
        """Whether an input is a whole cloud, rather than a sphere."""
        return self.data.kind != "scenes"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; for parts those of the category with the label."""
        if self.data.kind == "parts":
            return tuple(f"{name} {label}" for name, labels in self.data.classes.items() for label in labels)
        return tuple(map(str, range(10))) if self.digits else tuple(self.data.classes)

    @property
    def heads(self) -> dict[str, int] | None:
        """The number of parts of each category; None unless the data are parts."""
        return {name: len(labels) for name, labels in self.data.classes.items()} if self.data.kind == "parts" else None

    @property
    def dimension(self) -> int:
        return 2 if self.digits else 3

    @property
    def widths(self) -> dict[str, int]:
        """The number of columns of each feature by its name."""
        return {name: {"local": self.dimension, "color": 3, "normals": 3}.get(name, 1) for name in self.data.features}

    def net(self) -> nn.Network | nn.KPNeXt:
        """The network for the features and classes of the data."""
        network = self.network
        sizes = sum(self.widths.values()), len(self.names), network.voxel_size
        options: dict[str, Any] = {"width": network.width, "dimension": self.dimension} | network.options
        try:
            if network.kind == "kpnext":
                return nn.kpnext(*sizes, segment=not self.classifies, **options)
            blocks = nn.architecture(
                network.levels, network.convs, deformable=network.deformable, resampled=network.resampled,
                segment=not self.classifies, upsample=network.upsample
            )  # fmt: skip
            return nn.Network(blocks, *sizes, heads=self.heads, **options)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"[network] {error}") from None

    def by_fold(self) -> dict[str, Settings]:
        """The settings of the training of each fold by its name, which a folder can have; empty without folds."""
        data = self.data
        if data.folds is None:
            return {}
        return {
            name: replace(self, data=replace(
                data, folds=None, train=[part for part in data.train if part not in test], test=test
            ))
            for name, test in _parts_by_fold(data).items()
        }  # fmt: skip

    def asdict(self) -> dict[str, Any]:
        """Nested dicts, from which `from_dict` makes these settings."""
        return asdict(self)


def read_settings(path: str | os.PathLike[str]) -> Settings:
    """Read settings from a TOML file; errors name the setting."""
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "io")
    try:
        return from_dict(toml.loads(_text(path)))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#x} at {error.start}"
        raise SettingsError(f"{path}: expected text in UTF-8, got {got}") from None
    except RecursionError:
        raise SettingsError(f"{path}: its lists or tables are nested too deep") from None
    except ValueError as error:  # raised by the TOML parser, also for integers of more than 4300 digits
        raise SettingsError(f"{path}: {error}") from None


def _text(path: str | os.PathLike[str]) -> str:
    path = Path(path)
    if path.exists() and not path.is_file():
        raise SettingsError("is not a regular file")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise SettingsError(f"expected a TOML file of at most {_MAX_BYTES:,} bytes, got {size:,}")
    data = path.read_bytes()
    if data.startswith(_UTF_16_MARKS) or b"\0" in data[:4]:
        raise SettingsError("expected UTF-8, as of any TOML file, got UTF-16: save it as UTF-8")
    return data.decode("utf-8-sig")  # "-sig", as Notepad writes a byte order mark


def from_dict(values: dict[str, Any]) -> Settings:
    """Make settings from nested dicts, as a TOML parser returns them."""
    if not isinstance(values, dict):
        raise SettingsError(f"expected the sections data, network and training, got {_shown(values)}")
    values = dict(values)
    settings = Settings(
        _data(values.pop("data", {})),
        _network(values.pop("network", {})),
        _section(Training, values.pop("training", {}), "[training]"),
        _section(Blocks, values.pop("blocks", {}), "[blocks]"),
    )
    if values:
        raise SettingsError(f"expected the sections data, network, training and blocks, got {', '.join(values)} too")
    _check_training(settings.training, settings.dimension)
    _check_lengths(settings.blocks, "[blocks]", ("side", "halo"))
    settings.net()
    return settings


def _data(values: Any) -> Data:
    if not isinstance(values, dict):
        raise SettingsError(f"[data]: expected a table of settings, got {_shown(values)}")
    data = dict(values)
    if "kind" in data and data["kind"] not in _SOURCES:
        raise SettingsError(f"[data] kind: expected {', '.join(_SOURCES)}, got {_shown(data['kind'])}")
    for name in ("train", "test"):
        parts = data.get(name, [])
        if not isinstance(parts, list) or (name == "train" and not parts):
            raise SettingsError(f"[data] {name}: expected a list of files, got {_shown(parts)}")
        data[name] = [_part(part, f"[data] {name}[{i}]", data.get("kind")) for i, part in enumerate(parts)]
    validation = data.get("validation", [])
    if isinstance(validation, list):
        data["validation"] = [_part(part, f"[data] validation[{i}]", data.get("kind"))
                              for i, part in enumerate(validation)]  # fmt: skip
    elif type(validation) is not float or not 0.01 <= validation <= 0.5:
        raise SettingsError(f"[data] validation: expected a list of files, or a fraction from 0.01 to 0.5, got "
                            f"{_shown(validation)}")  # fmt: skip
    data["ground"] = _section(Ground, data.get("ground", {}), "[data.ground]")
    data["surface"] = _section(Surface, data.get("surface", {}), "[data.surface]")
    data["kind"] = kind = _kind(data)
    data = _section(Data, data, "[data]")
    _check_reading(data)
    names = data.features
    if not names or len({name.lower() for name in names}) < len(names):
        raise SettingsError(f"[data] features: expected at least one, each once, got {names}")
    if data.folds is not None:
        _parts_by_fold(data)
    if kind in ("objects", "parts"):
        data = _objects(data)
    if kind == "objects":
        return data
    if kind == "digits":
        if unknown := {*names} - {"one", "value", "local"}:
            raise SettingsError(f"[data] features: expected one, value or local for digits, got {', '.join(unknown)}")
        if data.classes or data.label or data.columns:
            raise SettingsError(
                "[data]: classes, label and columns are not allowed for digits, whose classes are 0 to 9"
            )
        return data
    if "value" in names:
        raise SettingsError("[data] features: value is only valid for digits")
    if data.columns is not None and len({*data.columns}) < max(3, len(data.columns)):
        raise SettingsError(f"[data] columns: expected at least x y z, each name once, got {_shown(data.columns)}")
    if not isinstance(data.classes, dict) or not (1 if kind == "parts" else 2) <= len(data.classes) <= 10_000:
        raise SettingsError(f"[data.classes]: expected 2 to 10,000 classes, got {len(data.classes)}")
    seen = set()
    for name, labels in data.classes.items():
        if not isinstance(labels, list) or not labels or not all(type(v) is int for v in labels):
            raise SettingsError(f"[data.classes] {name}: expected a list of integers, got {_shown(labels)}")
        if not _LABEL_RANGE[0] <= min(labels) <= max(labels) <= _LABEL_RANGE[1]:
            raise SettingsError(f"[data.classes] {name}: expected 32-bit integers, got {_shown(labels)}")
        if seen & {*labels}:
            raise SettingsError(f"[data.classes] {name}: expected labels that no other class has, got {_shown(labels)}")
        seen |= {*labels}
    return data


def _check_reading(data: Data) -> None:
    """Check the settings of classes, of what is not read, and of computed features."""
    for name, values in (("may_be_empty", data.may_be_empty), ("colors", data.colors)):
        if unknown := [one for one in values if one not in (*data.classes, *map(str, range(10)))]:
            raise SettingsError(f"[data] {name}: expected names of classes, got {_shown(unknown[0])}; there are "
                                f"{', '.join(data.classes)}")  # fmt: skip
    for name, color in data.colors.items():
        if not isinstance(color, str) or not re.fullmatch("#[0-9a-fA-F]{6}", color):
            raise SettingsError(f'[data.colors] {name}: expected a colour such as "#ff8000", got {_shown(color)}')
    for one in data.ignore:
        if one not in FLAGS and type(one) is not int:
            raise SettingsError(f"[data] ignore: expected labels or {', '.join(FLAGS)}, got {_shown(one)}")
    _check_lengths(data.ground, "[data.ground]", ("cell", "window"))
    _check_bounds(data.ground, "[data.ground]", {"slope": (0, 100)})
    _check_bounds(data.surface, "[data.surface]", {"neighbors": (3, 1000)})
    _check_lengths(data.surface, "[data.surface]", ("radius",))
    if data.kind != "scenes":
        for name in ("validation", "ignore", "drop_zeros"):
            if getattr(data, name) not in (None, []):
                raise SettingsError(f"[data] {name}: only valid for scenes, got {data.kind}")
    elif isinstance(data.validation, list):
        for number, part in enumerate(data.validation):
            if any(_overlap(part, another) for another in data.train):
                raise SettingsError(f"[data] validation[{number}]: expected points that are not in train, got {part}")
    elif data.folds is not None:
        raise SettingsError("[data] validation: not allowed together with folds")


def _check_lengths(section: object, where: str, names: Sequence[str]) -> None:
    """Check that lengths which may be None are in the range of lengths."""
    _check_bounds(section, where, {name: LENGTHS for name in names if getattr(section, name) is not None})


def _kind(data: Mapping[str, Any]) -> str:
    """The kind of the data; an error if it is unknown or another than that of the parts."""
    validation = data["validation"] if isinstance(data.get("validation"), list) else []
    sources = {type(part) for part in (*data["train"], *data["test"], *validation)}
    if len(sources) > 1:
        raise SettingsError("[data] train, test, validation: expected either scenes or digits, got both")
    kinds = [name for name, source in _SOURCES.items() if source in sources]
    kind = data.get("kind", kinds[0])
    if kind not in kinds:
        raise SettingsError(f"[data] kind: expected {kinds[0]}, as train and test are, got {kind}")
    return kind


def _parts_by_fold(data: Data) -> dict[str, list[Source]]:
    """The scenes of each fold by the name of the fold; an error unless they are two or more with no point in common."""
    if data.kind != "scenes":
        raise SettingsError(f"[data] folds: only valid for scenes, got {data.kind}")
    if data.folds not in _FOLDS:
        raise SettingsError(f"[data] folds: expected {' or '.join(_FOLDS)}, got {_shown(data.folds)}")
    if data.test:
        raise SettingsError("[data] test: not allowed together with folds, which test each scene in train")
    folds: dict[str, list[Source]] = {}
    keys: dict[str, str] = {}
    for number, part in enumerate(data.train):
        where = f"[data] train[{number}]"
        key = str(part) if data.folds == "file" else _area(part, where)
        name = re.sub(r"[^\w.-]+", "-", key).strip("-.")
        if not name or len(name.encode()) > _MOST_NAME_BYTES:
            expected = f"a fold with a name of letters or digits, at most {_MOST_NAME_BYTES} bytes"
            raise SettingsError(f"{where} {data.folds}: expected {expected}, got {_shown(key)}")
        if (other := keys.setdefault(name.casefold(), key)) != key:
            raise SettingsError(f"{where} {data.folds}: the folders of the folds {other} and {key} have the same name")
        for fold, parts in folds.items():
            if fold != name and any(_overlap(part, another) for another in parts):
                raise SettingsError(f"{where}: expected points that are in one fold only, got {part}, also in {fold}")
        folds.setdefault(name, []).append(part)
    if len(folds) == 1:
        raise SettingsError(f"[data] folds: expected scenes of two {data.folds}s or more, got those of {key} only")
    return folds


def _area(part: Part, where: str) -> str:
    if part.area is not None:
        return part.area
    path = Path(part.file or "")
    if len(path.parts) < 2 or path.is_absolute() or path.parts[0].startswith(("..", "~")):
        raise SettingsError(f"{where} area: expected a name, which {part} has no folder to take from")
    return path.parts[0]


def _overlap(part: Part, other: Part) -> bool:
    """Whether two scenes can have points in common: the same file or indoor seed, and boxes that overlap."""
    return str(part) == str(other) and all(
        low < high
        for one, another in ((part, other), (other, part))
        for low, high in zip(one.min or (), another.max or (), strict=False)
    )


def _objects(data: Data) -> Data:
    """The data of objects or parts with their classes; an error for settings that do not apply."""
    if unknown := {*data.features} - {"one", "local"}:
        raise SettingsError(f"[data] features: expected one or local for objects, got {', '.join(unknown)}")
    classes, generated = data.classes, [part for part in (*data.train, *data.test) if part.shapes is not None]
    if not classes and len(generated) == len(data.train) + len(data.test):
        classes = [*CATEGORIES] if data.kind == "objects" else PART_LABELS
    if generated and (unknown := [name for name in classes if name not in CATEGORIES]):
        raise SettingsError(f"[data] classes: expected those of shapes, {', '.join(CATEGORIES)}, got {unknown[0]} too")
    if data.kind == "parts":
        if generated and any(PART_LABELS[name] != labels for name, labels in dict(classes).items()):
            raise SettingsError(
                "[data.classes]: expected the part labels of generated shapes, kpcore.scenes.PART_LABELS"
            )
        return replace(data, classes=classes)
    if data.label:
        raise SettingsError("[data] label: not allowed for objects, whose folder or list says their class")
    if not isinstance(classes, list) or not 2 <= len({*classes}) == len(classes) <= 10_000:
        raise SettingsError(f"[data] classes: expected a list of 2 to 10,000 names, each once, got {_shown(classes)}")
    return replace(data, classes=classes)


def _part(values: Any, where: str, kind: object) -> Source:
    if kind in ("objects", "parts"):
        part = _section(Objects, values, where)
        sources = [name for name in ("folder", "list", "shapes") if getattr(part, name) is not None]
        if len(sources) != 1:
            raise SettingsError(f"{where}: expected one of folder, list and shapes, got {_shown(values)}")
        if part.split is not None and part.folder is None:
            raise SettingsError(f"{where} split: only valid together with folder, got {sources[0]}")
        seeds = {} if part.shapes is None else {"shapes": (0, 2**31 - 1)}
        _check_bounds(part, where, {"points": (1, 10**7), "number": (1, 10**6)} | seeds)
        return part
    if isinstance(values, dict) and "images" in values:
        part = _section(Digits, values, where)
        if part.first < 0 or (part.last is not None and part.last <= part.first):
            raise SettingsError(f"{where} first, last: expected 0 <= first < last, got {_shown(values)}")
        return part
    part = _section(Part, {"file": values} if isinstance(values, str) else values, where)
    if (part.file is None) == (part.indoor is None):
        raise SettingsError(
            f"{where}: expected either file or indoor, got {'neither' if part.file is None else 'both'}"
        )
    _check_bounds(part, where, {"points": (1, 10**8)} | ({} if part.indoor is None else {"indoor": (0, 2**31 - 1)}))
    if part.file is not None and (part.mirror, part.points) != (Part.mirror, Part.points):
        raise SettingsError(f"{where} points, mirror: only valid together with indoor, got a file")
    for name in ("min", "max"):
        corner = getattr(part, name) or ()
        if len(corner) > 3 or any(map(math.isnan, corner)):
            raise SettingsError(f"{where} {name}: expected up to 3 coordinates, got {_shown(corner)}")
    return part


def _network(values: Any) -> Architecture:
    known = {f.name for f in fields(Architecture)}
    if isinstance(values, dict):
        if not isinstance(values.get("options", {}), dict):
            raise SettingsError(f"[network] options: expected a table of settings, got {_shown(values['options'])}")
        options = {name: value for name, value in values.items() if name not in known}
        values = {name: value for name, value in values.items() if name in known}
        values["options"] = options | values.get("options", {})
    network = _section(Architecture, values, "[network]")
    _check_bounds(network, "[network]", {"voxel_size": LENGTHS})
    if "dimension" in network.options:
        raise SettingsError("[network] dimension: cannot be set, as it follows from the data: 2 for digits, else 3")
    if "heads" in network.options:
        raise SettingsError('[network] heads: cannot be set, as they follow from the data: kind = "parts"')
    if network.kind not in ("kpconv", "kpnext"):
        raise SettingsError(f"[network] kind: expected kpconv or kpnext, got {_shown(network.kind)}")
    if network.kind == "kpnext":
        for name in ("levels", "convs", "deformable", "resampled", "upsample"):
            if getattr(network, name) != getattr(Architecture, name):
                raise SettingsError(f"[network] {name}: not valid for kpnext, whose setting is depths")
    return network


def _section(kind: type[Section], values: Any, where: str) -> Section:
    """A dataclass made from a dict; an error for unknown names, missing values and values of the wrong type."""
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: expected a table of settings, got {_shown(values)}")
    known = {f.name: f for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {nearest[0]}? " if nearest else ""
            raise SettingsError(f"{where} {name}: unknown setting; {advice}known are {', '.join(known)}")
        types = str(known[name].type)
        if types == "float" and type(value) is int and abs(value) < 2**63:
            values = {**values, name: float(value)}
        elif not _has_type(value, types):
            raise SettingsError(f"{where} {name}: expected {types}, got {_shown(value)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise SettingsError(f"{where} {name}: expected a value, got none")
    return kind(**values)


def _shown(value: object) -> str:
    """A value for a message, at most 80 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # 0xfff...: Python writes no decimal numbers of more than 4300 digits
        text = "an integer of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _has_type(value: object, types: str) -> bool:
    """Whether a value has a type that is written as an annotation of a dataclass above."""
    for kind in types.split(" | "):
        outer, _, inner = kind.partition("[")
        if kind == "None":
            fits = value is None
        elif outer == "list":
            fits = isinstance(value, list) and all(_has_type(v, inner.rstrip("]")) for v in value if inner)
        elif kind == "float":
            fits = type(value) is float or (type(value) is int and abs(value) < 2**63)
        elif kind == "Source":  # made by `_part`
            fits = isinstance(value, tuple(_SOURCES.values()))
        else:
            types_of = {"int": int, "str": str, "bool": bool, "dict": dict, "Ground": Ground, "Surface": Surface}
            fits = type(value) is types_of[outer]
        if fits:
            return True
    return False


def _check_bounds(section: object, where: str, limits: Mapping[str, tuple[float, float]]) -> None:
    for name, (smallest, largest) in limits.items():
        value = getattr(section, name)
        if not smallest <= value <= largest:
            bounds = " to ".join(f"{bound:,}" if type(bound) is int else f"{bound:g}" for bound in (smallest, largest))
            raise SettingsError(f"{where} {name}: expected {bounds}, got {_shown(value)}")


def _check_training(training: Training, dimension: int) -> None:
    def check(name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise SettingsError(f"[training] {name}: expected {expected}, got {_shown(getattr(training, name))}")

    for name, choices in _CHOICES.items():
        check(name, getattr(training, name) in choices, " or ".join(choices))
    _check_bounds(training, "[training]", _BOUNDS)
    rotate = training.rotate
    is_valid = rotate in ("vertical", "all", "none") if isinstance(rotate, str) else 0 <= rotate <= 180
    check("rotate", is_valid, "vertical, all, none, or degrees from 0 to 180")
    scale = training.scale
    check(
        "scale",
        len(scale) == 2 and 0.01 <= scale[0] <= scale[1] <= 100,
        "the smallest and largest factor, from 0.01 to 100",
    )
    check("flip", len(training.flip) <= dimension, f"up to {dimension} axes")
