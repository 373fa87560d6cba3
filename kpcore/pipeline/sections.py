"""The tables of a settings file as dataclasses, with all that docs/settings.md says about each key."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kpcore.kpconv import AGGREGATIONS, INFLUENCES

if TYPE_CHECKING:
    from collections.abc import Mapping

LENGTHS = (1e-9, 1e9)  # in the unit of the points; squares of these, and of 2**15 times as much, fit float32
# Of the local surface around a point, see `kpcore.normals` and `kpcore.covariance_features`.
SURFACE_FEATURES = ("normals", "linearity", "planarity", "scattering", "verticality", "curvature")
COMPUTED_FEATURES = ("one", "color", "height", "local", "value", "height_above_ground", *SURFACE_FEATURES)
FLAGS = ("withheld", "overlap", "synthetic", "key_point")  # of points of LAS files, for `ignore`
POINTS = "unit of the points"


class Key(NamedTuple):
    """What is known about a setting besides its name, type and default."""

    meaning: str  #: empty: that of the argument of this name, in the docstring of kpcore.nn
    when: str  #: when to change it
    example: str  #: a value, as TOML has it
    unit: str = ""
    bounds: tuple[float, float] | None = None  #: least and largest value
    choices: tuple[str, ...] = ()
    allowed: str = ""  #: the values in words, where neither bounds nor choices say it
    default: str = ""  #: the default in words, where it is not a value
    also: tuple[str, ...] = ()  #: names of the same thing in other code, for advice


def about(meaning: str, when: str, example: str, **more: Any) -> Mapping[str, Any]:
    """The metadata of a field, with a `Key`."""
    return {"key": Key(meaning, when, example, **more)}


def keys(section: type) -> dict[str, Key]:
    """The `Key` of each field of a dataclass below, by name."""
    return {one.name: one.metadata["key"] for one in fields(section)}


# fmt: off
@dataclass(frozen=True)
class Part:
    """A scene: a file of points with labels, or the part of it in a box; or the embedded indoor scene."""

    file: str | None = field(default=None, metadata=about(
        "the file, relative to the folder of the TOML or of --data. A folder (tiles/) stands for each of the scans in "
        "it, a pattern (tiles/*.laz) for each file that matches, in the order of their names",
        "for each scan", '"a.laz"', also=("path", "name"), allowed="a path; needed unless `indoor` is there",
    ))
    min: list[float] | None = field(default=None, metadata=about(
        "lowest corner of a box in the file's coordinates; points on it belong to the part",
        "to train and test on parts of one file", "[84000.0, 447000.0]", unit=POINTS, allowed="up to 3 coordinates",
    ))
    max: list[float] | None = field(default=None, metadata=about(
        "highest corner of the box; points on it do not belong to the part", "as `min`", "[84936.0]", unit=POINTS,
        allowed="up to 3 coordinates",
    ))
    indoor: int | None = field(default=None, metadata=about(
        "instead of a file, the seed of a furnished room of `kpcore.scenes.indoor`", "to try settings without any data",
        "7", bounds=(0, 2**31 - 1),
    ))
    points: int = field(default=300_000, metadata=about(
        "number of points of that room", "fewer for a quick trial", "50000", unit="points", bounds=(1, 10**8),
    ))
    mirror: bool = field(default=False, metadata=about(
        "whether x of that room is negated", "for twice as many rooms", "true",
    ))
    area: str | None = field(default=None, metadata=about(
        "the area that the scene belongs to, for `folds`", "where the first folder does not name it", '"Area_3"',
        default="the first folder of `file`: Area_1 of Area_1/hallway_1.ply",
    ))

    def __str__(self) -> str:
        return self.file if self.indoor is None else f"indoor {self.indoor}"

    @property
    def is_pattern(self) -> bool:
        """Whether `file` is written as a folder or a pattern."""
        return self.file is not None and (self.file.endswith("/") or glob.has_magic(self.file))


@dataclass(frozen=True)
class Digits:
    """Images and labels in idx files, as those of MNIST."""

    images: str = field(metadata=about(
        "the file of the images, relative to the folder of the TOML or of --data", "for each set of digits",
        '"t10k-images-idx3-ubyte.gz"', allowed="a path",
    ))
    labels: str = field(metadata=about(
        "the file of their labels", "for each set of digits", '"t10k-labels-idx1-ubyte.gz"', allowed="a path",
    ))
    first: int = field(default=0, metadata=about(
        "number of the first image that is used", "to train and test on parts of one file", "8000", unit="images",
        allowed="0 or more",
    ))
    last: int | None = field(default=None, metadata=about(
        "number after the last image that is used", "as `first`", "8000", unit="images", allowed="above `first`",
        default="all images",
    ))

    def __str__(self) -> str:
        return self.images


@dataclass(frozen=True)
class Objects:
    """Objects with a class or category each: files in folders, files of a list, or `kpcore.scenes.shapes`."""

    folder: str | None = field(default=None, metadata=about(
        "a folder with a sub-folder of meshes or clouds for each class, named as the class",
        "for ModelNet40 and the like", '"ModelNet40"', allowed="a path; exactly one of `folder`, `list` and `shapes`",
    ))
    split: str | None = field(default=None, metadata=about(
        "the sub-folder of each class that is read", "where classes have folders such as train and test", '"train"',
    ))
    list: str | None = field(default=None, metadata=about(
        "a text file with an object in each line, a file and its class, or a name such as night_stand_0007, which is "
        "night_stand/night_stand_0007.txt; or a JSON list of ShapeNetPart. Files are relative to its folder",
        "for the resampled ModelNet40, for ShapeNetPart", '"modelnet40_train.txt"', allowed="a path",
    ))
    shapes: int | None = field(default=None, metadata=about(
        "the first seed of objects that `kpcore.scenes.shapes` generates", "to try settings without any data", "0",
        bounds=(0, 2**31 - 1),
    ))
    number: int = field(default=100, metadata=about(
        "number of seeds, each of which is an object of every class", "with `shapes`", "60", bounds=(1, 10**6),
    ))
    points: int = field(default=10_000, metadata=about(
        "number of points sampled from a mesh or a generated object; of a cloud all points are used",
        "more where `voxel_size` is below 0.02, fewer for quick trials", "2000", unit="points", bounds=(1, 10**7),
    ))

    def __str__(self) -> str:
        return self.folder or self.list or f"shapes {self.shapes}"


@dataclass(frozen=True)
class Ground:
    """How the ground is estimated for the feature height_above_ground, see `kpcore.height_above_ground`."""

    cell: float = field(default=1.0, metadata=about(
        "side of a cell of the lattice of lowest points: where the ground has about one point",
        "larger where points are sparse or in feet; smaller for indoor scans", "2.0", unit=POINTS, bounds=LENGTHS,
    ))
    window: float = field(default=40.0, metadata=about(
        "more than the width of the widest building, which would be ground otherwise; and so is what is lower than "
        "`slope` times half of its width: 3 with 0.15 and a width of 40",
        "larger for halls and city blocks; smaller in steep terrain without large buildings", "60.0", unit=POINTS,
        bounds=LENGTHS,
    ))
    slope: float = field(default=0.15, metadata=about(
        "rise over run of the steepest ground",
        "larger in mountains, where ridges would be cut off; smaller for wide low halls in flat terrain", "1.0",
        bounds=(0, 100),
    ))


@dataclass(frozen=True)
class Surface:
    """The neighbourhood from which normals and the other features of the local surface are computed."""

    neighbors: int = field(default=20, metadata=about(
        "number of nearest points, the point itself among them",
        "larger for noisy scans, smaller where fine edges matter", "12", unit="points", bounds=(3, 1000),
        also=("k", "knn"),
    ))
    radius: float | None = field(default=None, metadata=about(
        "instead of `neighbors`: all points within this distance",
        "where the density varies much, as in terrestrial scans", "0.5", unit=POINTS, bounds=LENGTHS,
        default="the nearest `neighbors`",
    ))


@dataclass(frozen=True)
class Blocks:
    """Square cells in which a scan is labelled; they are stored with the model."""

    side: float | None = field(default=None, metadata=about(
        "side of a block", "smaller where memory is short when labelling", "60.0", unit=POINTS, bounds=LENGTHS,
        default="where a block of the training data has some 150,000 points after subsampling, at least four training "
                "radii",
    ))
    halo: float | None = field(default=None, metadata=about(
        "width of the margin around a block whose points are input but get their labels in other blocks",
        "larger where labels change at the edges of blocks", "15.0", unit=POINTS, bounds=LENGTHS,
        default="the training radius; features such as height_above_ground see their reach more",
    ))
    lattices: int = field(default=2, metadata=about(
        "lattices of blocks over which probabilities are averaged; the second is shifted and its voxels are turned",
        "1 for labels in half of the time, with a mean IoU that is lower by up to 0.02", "1", bounds=(1, 2),
    ))


Source: TypeAlias = "Part | Digits | Objects"
# The data that each kind has; digits and objects have a class each, points of scenes and parts have labels.
SOURCES = {"scenes": Part, "digits": Digits, "objects": Objects, "parts": Objects}


@dataclass(frozen=True)
class Data:
    """Where points and labels come from."""

    train: list[Source] = field(metadata=about(
        "the scenes, digits or objects to train on: names of files, or tables with the keys below", "always",
        '["a.laz", { file = "b.laz", max = [500.0] }]', allowed="a list, not empty",
    ))
    test: list[Source] = field(default_factory=list, metadata=about(
        "those that say how good the network is", "always, unless there are `folds`", '["c.laz"]', allowed="a list",
    ))
    classes: dict[str, list[int]] | list[str] = field(default_factory=dict, metadata=about(
        "the name of each class and its labels in the files, as the table [data.classes]; points with other labels are "
        "ignored. For objects the list of class names; for parts each category and the labels of its parts, which no "
        "other category has",
        "to merge classes, or to leave rare ones out", "{ ground = [2], building = [6] }",
        allowed="2 to 10,000 classes; labels of 32 bits, each in one class",
        default="digits: 0 to 9; generated objects: `kpcore.scenes.CATEGORIES`",
        also=("class", "class_names"),
    ))
    features: list[str] = field(default_factory=lambda: ["one"], metadata=about(
        'what the network knows of a point besides its place: "one" (constant 1), "color" (three columns, 0 to 1), '
        '"height" (the last coordinate in the file), "local" (coordinates relative to the centre of the input sphere), '
        '"height_above_ground" (above the lowest surface around, or the dimension HeightAboveGround of the file), '
        '"normals" (three columns), "linearity", "planarity", "scattering", "verticality", "curvature" (of the surface '
        'around), "value" (grey of a digit), or a field of the files. Heights and fields are shifted and scaled so '
        'that the middle nine tenths of the training data are -1 to 1, and clipped to -10 to 10',
        "add what tells the classes apart and is alike in all scans: intensities of another scanner and absolute "
        "heights of another place mislead",
        '["one", "height_above_ground", "intensity"]',
        allowed="names, each once; objects, parts and digits have one and local, digits also value",
        also=("feature", "inputs", "in_features"),
    ))
    label: str | None = field(default=None, metadata=about(
        "the field of the labels", "where it has no usual name, or is 0 throughout", '"sem_class"',
        default="the first usual name that the file has, see files.md", also=("label_field", "labels"),
    ))
    columns: list[str] | None = field(default=None, metadata=about(
        "names for the columns of files that have none", "for text, NPY and .bin without a header",
        '["x", "y", "z", "r", "g", "b", "label"]', allowed="x y z and others, each once",
    ))
    kind: str = field(default="scenes", metadata=about(
        '"scenes"; "digits"; "objects", which have a class each; or "parts", objects of a known category whose points '
        'have labels',
        "for objects and parts", '"objects"', choices=tuple(SOURCES),
        default='"digits" where there are images, else "scenes"',
    ))
    folds: str | None = field(default=None, metadata=about(
        "cross-validation in k folds, without `test`: the scenes of each area, or of each file, are tested by a "
        "network that is trained on all others in `train`",
        "for S3DIS, or where there are few scans", '"area"', choices=("area", "file"), default="none",
    ))
    validation: list[Source] | float = field(default_factory=list, metadata=about(
        "those by which the best network of a training is chosen, as in `test`; or the fraction of each scene in "
        "`train`, a strip across it with a share of each class, that is set aside for this. Without it the best is "
        "chosen by `test`, and "
        "its score there is too good",
        "always, if the score on `test` is to be published or relied on", "0.1",
        allowed="a list of scenes, or a fraction from 0.01 to 0.5; scenes only", also=("val", "valid", "val_files"),
    ))
    may_be_empty: list[str] = field(default_factory=list, metadata=about(
        "names of classes that may have no points in the training data; for others that is an error",
        "where one list of classes serves for several data sets", '["bridge"]', allowed="names of classes",
    ))
    colors: dict[str, str] = field(default_factory=dict, metadata=about(
        "the colour of each class in pictures, as the table [data.colors]", "to match the legend of other maps",
        '{ ground = "#a08060" }', allowed='"#rrggbb" by the name of a class',
        default="ASPRS colours where labels are ASPRS classes",
    ))
    ignore: list = field(default_factory=list, metadata=about(
        "labels and flags of LAS files of points that are not read, as if they were not in the file",
        "for noise, which also disturbs the points around it; where the scans to be labelled mark it too",
        '[7, 18, "withheld"]', allowed=f"labels, {', '.join(FLAGS)}", also=("ignored_labels", "ignore_label"),
    ))
    drop_zeros: bool | None = field(default=None, metadata=about(
        "whether points at (0, 0, 0), where a scanner had no return, are not read",
        "true for other files with such points; false for a sweep with a true point there", "true",
        default="true for sensor sweeps (.bin), else false",
    ))
    cache: str | None = field(default=None, metadata=about(
        "a folder on disk in which the training keeps the scenes, subsampled, and from which it reads only the spheres "
        "of each step; relative to the folder of the TOML or of --data. Its entries are made again when a file or a "
        "setting changes; it may be deleted when no training runs. Results are the same to the bit",
        "where the scenes to train on do not fit the memory, or take long to read; on a local disk",
        '"cache"', default="scenes are in memory", allowed="a path; scenes only", also=("cache_dir", "use_cache"),
    ))
    licence: str | None = field(default=None, metadata=about(
        "licence of the data or the model, as text that the model file holds", "before a model is passed on",
        '"CC BY 4.0"', also=("license",), allowed="text",
    ))
    ground: Ground = field(default_factory=Ground, metadata=about(
        "the table [data.ground]", "with the feature height_above_ground", "{ cell = 2.0 }",
    ))
    surface: Surface = field(default_factory=Surface, metadata=about(
        "the table [data.surface]", "with normals and the other features of the surface", "{ neighbors = 12 }",
    ))


@dataclass(frozen=True)
class Architecture:
    """A network of `kpcore.nn`."""

    voxel_size: float = field(metadata=about(
        "side of the voxels of level 0, in each of which the points become one; it doubles with each level",
        "first of all: once to twice the distance between points. Half of it shows more detail, for some four times "
        "the time; with it change `radius` of [training]",
        "0.5", unit=POINTS, bounds=LENGTHS,
        also=("first_subsampling_dl", "grid_size", "voxel", "dl", "subsampling", "in_dl"),
    ))
    kind: str = field(default="kpconv", metadata=about(
        '"kpconv", a KP-FCNN, for objects and digits a KP-CNN; or "kpnext", a KPNeXt, which has no `levels`, `convs`, '
        '`deformable`, `resampled` and `upsample`',
        "kpnext for its attention", '"kpnext"', choices=("kpconv", "kpnext"),
    ))
    levels: int = field(default=5, metadata=about(
        "number of levels, each with twice the voxel size",
        "more where classes are known by what is far around them; the radius of the coarsest convolutions, conv_radius "
        "* voxel_size * 2 ** (levels - 1), should be below `radius` of [training]",
        "4", allowed="1 to 16", also=("num_layers", "num_levels", "depth"),
    ))
    convs: int = field(default=2, metadata=about(
        "", "3 for large data sets", "3", allowed="2 to 64",
    ))
    deformable: int = field(default=0, metadata=about(
        "", "for large data sets; costs some 20 % of time", "5", allowed="0 to all",
    ))
    resampled: int = field(default=0, metadata=about(
        "", "for deformable kernels in experiments", "2", allowed="0 to all",
    ))
    upsample: str = field(default="nearest", metadata=about(
        "", "in experiments", '"kpconv"', choices=("nearest", "kpconv"),
    ))
    width: int = field(default=64, metadata=about(
        "channels of the first residual block, which double with each level; of kpnext those of the first stage",
        "32 for up to some 10 million points and few classes, 64 as in the paper, 128 as in the published code", "32",
        unit="channels", allowed="a multiple of 4; at most 16384 on any level", also=("first_features_dim", "channels"),
    ))
    options: dict[str, Any] = field(default_factory=dict, metadata=about(
        "a table of the options below, which may also stand in [network] itself", "as you like", "{ slope = 0.2 }",
        allowed="options of the network",
    ))


_IN_VOXELS = "voxels of the level"
# What docs/settings.md says about the options of networks in [network]; their meaning is in the docstrings of these.
OPTIONS: dict[str, dict[str, Key]] = {
    "kpconv": {
        "decoder_width": Key("", "half of `width` for the networks of the paper", "32", default="`width`"),
        "head_width": Key("", "smaller for few classes of objects", "128", default="1024 for objects, else `width`"),
        "head_norm": Key("", "true for objects and digits", "true"),
        "kernel_size": Key("number of kernel points", "smaller for speed; 13, 15, 17 in the paper", "13",
                           allowed="1 to 100", also=("num_kernel_points",)),
        "conv_radius": Key("radius of the neighbourhoods", "larger where voxels have few neighbours", "3.0",
                           _IN_VOXELS, (1e-6, 100)),
        "deform_radius": Key("the same on levels with a deformable block", "with `deformable`", "6.0",
                             _IN_VOXELS, (1e-6, 100)),
        "extent": Key("distance at which the influence of a kernel point ends", "larger for smoother kernels", "1.0",
                      _IN_VOXELS, (1e-6, 100), also=("kp_extent",)),
        "kernel_radius": Key("", "in experiments", "0.6", "`conv_radius`", (1e-6, 100)),
        "influence": Key("how the influence of a kernel point falls with distance: to 0 at `extent`, Gaussian, or not",
                         "in experiments", '"gaussian"', choices=INFLUENCES, also=("kp_influence",)),
        "aggregation": Key("", "closest is faster and somewhat less accurate", '"closest"', choices=AGGREGATIONS,
                           also=("aggregation_mode",)),
        "normalization": Key("", "count where the density varies much", '"count"', choices=("count", "positive"),
                             default="none"),
        "modulated": Key("", "with `deformable`", "true"),
        "norm": Key("over what features are normalised: the points of the batch, groups of channels, or each cloud",
                    "group where batches have one or two spheres", '"group"',
                    choices=("batch", "group", "instance")),
        "norm_groups": Key("", 'with norm = "group"', "16"),
        "momentum": Key("", "larger for trainings of a few hundred steps", "0.1", bounds=(0, 1)),
        "slope": Key("", "in experiments", "0.2", bounds=(-1, 1)),
        "always_narrow": Key("", "for the networks of the paper", "true"),
        "pool_pad_value": Key("", "0 to continue checkpoints of the published code", "0.0", default="none"),
        "fitting_power": Key("", "smaller where deformable kernels stay rigid", "0.5", bounds=(0, 10**6)),
        "repulse_extent": Key("", "with `deformable`", "1.0", "extents", (1e-6, 100)),
        "dropout": Key("", "0.5 where the training loss falls and the score on new scans does not rise", "0.5",
                       bounds=(0, 1)),
        "origin": Key("", "for checkpoints of the published code", '"published"', allowed='0 or "published"'),
        "learn_kernel_points": Key("", "in experiments, with `kernel_points_lr` of [training]", "true"),
        "bias": Key("", "for checkpoints of GeoTransformer", "true", also=("use_bias",)),
        "norm_affine": Key("", "for checkpoints of Predator", "false"),
        "norm_together": Key("", "for checkpoints of GeoTransformer and Predator", "true"),
        "logits_slope": Key("", "0.1 for checkpoints of Open3D-ML", "0.1", bounds=(-1, 1), default="none"),
    },
    "kpnext": {
        "size": Key("the published size, which sets `depths`", "S for speed", '"S"', choices=("S", "L")),
        "attention": Key("whether there is attention (KPConvX) or none (KPConvD); it sets `attention_groups`",
                         "false for speed", "false"),
        "depths": Key("", "for other sizes", "[2, 2, 4]", unit="blocks", default="those of `size`"),
        "attention_groups": Key("", "in experiments", "8", unit="channels", allowed="a divisor of all widths"),
        "num_neighbors": Key("", "fewer for speed", "[12, 16, 16, 16, 16]", allowed="one for each level or more"),
        "shells": Key("", "in experiments", "[1, 14]", unit="kernel points", allowed="the first 1"),
        "radius": Key("", "larger where voxels have few neighbours", "2.5", _IN_VOXELS, (1e-6, 100)),
        "grid_factor": Key("", "2 for more levels of the same reach", "2.0", allowed="above 1, at most 100"),
        "norm": Key("over what features are normalised: the points of the batch, groups of channels, or each cloud",
                    "group where batches have one or two spheres", '"group"',
                    choices=("batch", "group", "instance")),
        "norm_groups": Key("", 'with norm = "group"', "16"),
        "momentum": Key("", "larger for trainings of a few hundred steps", "0.2", bounds=(0, 1)),
        "slope": Key("", "in experiments", "0.2", bounds=(-1, 1)),
        "dropout": Key("", "0.5 where the training loss falls and the score on new scans does not rise", "0.5",
                       bounds=(0, 1)),
        "attention_norm": Key("", "false where a result must not depend on other clouds of a batch", "false"),
        "origin": Key("", "for checkpoints of the published code", '"published"', allowed='0 or "published"'),
        "extent": Key("", "larger for smoother kernels", "2.0", _IN_VOXELS, (1e-6, 100), default="`radius`"),
        "head_width": Key("", "smaller for few classes", "64", unit="channels",
                          default="that of the features that the layer gets"),
        "head_norm": Key("", "false for checkpoints without it", "false"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """Batches, optimizer, augmentation and voting."""

    radius: float = field(default=2.0, metadata=about(
        "radius of the input spheres",
        "25 to 50 times `voxel_size` of [network]: larger for classes that are known by what is around them, smaller "
        "for memory and speed",
        "15.0", unit=POINTS, bounds=LENGTHS, also=("in_radius", "sphere_radius", "input_radius"),
    ))
    sampling: str = field(default="regular", metadata=about(
        '"regular": the next sphere is where earlier ones cover the scenes least; "balanced": spheres around points of '
        'classes that are drawn with equal probability',
        "balanced where a class has less than some 1 % of the points", '"balanced"', choices=("regular", "balanced"),
    ))
    batch_points: int = field(default=20_000, metadata=about(
        "largest number of points in a batch, which takes spheres up to it",
        "larger for steadier steps, if memory allows", "40000", unit="points", bounds=(1, 10**7),
        also=("batch_limit", "max_points"),
    ))
    batch_clouds: int = field(default=32, metadata=about(
        "largest number of spheres or objects in a batch", "16 for objects, as in the paper", "8", bounds=(1, 10**4),
        also=("batch_size", "batch_num", "batch"),
    ))
    epochs: int = field(default=20, metadata=about(
        "number of epochs", "larger while the score on the validation data still rises", "50", bounds=(1, 10**4),
        also=("max_epoch", "num_epochs", "n_epochs"),
    ))
    steps: int = field(default=100, metadata=about(
        "number of batches in an epoch", "larger for more data: each point should be in some sphere of most epochs",
        "500", unit="batches", bounds=(1, 10**5), also=("epoch_steps", "iterations", "steps_per_epoch"),
    ))
    optimizer: str = field(default="sgd", metadata=about(
        '"sgd", as in the paper, or "adamw"',
        'adamw with lr = 0.004, weight_decay = 0.01 and schedule = "one_cycle" for trainings of minutes', '"adamw"',
        choices=("sgd", "adamw"), also=("optim",),
    ))
    lr: float = field(default=0.01, metadata=about(
        "learning rate; with one_cycle its largest", "smaller if the loss jumps or is not finite", "0.004",
        bounds=(1e-12, 1e6), also=("learning_rate", "base_lr"),
    ))
    momentum: float = field(default=0.98, metadata=about(
        "momentum of sgd", "0.9 for trainings of less than some 1,000 steps", "0.9", bounds=(0, 0.99999),
    ))
    weight_decay: float = field(default=1e-3, metadata=about(
        "share of a parameter that is subtracted at each step, times the learning rate", "0.01 with adamw", "0.01",
        bounds=(0, 1e3), also=("wd", "decay"),
    ))
    schedule: str = field(default="exponential", metadata=about(
        'of the learning rate: "exponential" (falls by the factor `lr_decay` in `lr_decay_epochs`) or "one_cycle" '
        '(rises, then falls to nearly 0 at the last step)',
        "one_cycle where the number of epochs is fixed", '"one_cycle"', choices=("exponential", "one_cycle"),
        also=("scheduler", "lr_schedule"),
    ))
    lr_decay: float = field(default=0.1, metadata=about(
        "factor of the exponential schedule", "with `lr_decay_epochs`", "0.5", bounds=(1e-6, 1), also=("gamma",),
    ))
    lr_decay_epochs: float = field(default=150.0, metadata=about(
        "epochs in which the learning rate falls by that factor", "a third of `epochs`, with the exponential schedule",
        "30.0", unit="epochs", bounds=(1e-3, 1e6), also=("step_size",),
    ))
    offset_lr: float = field(default=0.1, metadata=about(
        'factor of the learning rate for parameters with "offset" in their names', "with deformable convolutions",
        "0.05", bounds=(0, 1e3), also=("deform_lr_factor",),
    ))
    kernel_points_lr: float = field(default=0.1, metadata=about(
        "the same for learned kernel points", "with `learn_kernel_points` of [network]", "0.05", bounds=(0, 1e3),
    ))
    clip_value: float = field(default=100.0, metadata=about(
        "limit of each number of the gradient; 0 for none", "smaller if the loss jumps", "1.0", bounds=(0, 1e9),
        also=("grad_clip_norm", "grad_clip"),
    ))
    clip_norm: float = field(default=0.0, metadata=about(
        "limit of the norm of the gradient; 0 for none", "as `clip_value`", "10.0", bounds=(0, 1e9), also=("max_norm",),
    ))
    class_weights: str = field(default="none", metadata=about(
        'weights of the classes in the loss: "none", "inverse" (of the class frequency in the training data) or "root" '
        '(square root of these)',
        "root where rare classes are missed", '"root"', choices=("none", "root", "inverse"),
        also=("class_weight", "class_w", "weights"),
    ))
    rotate: str | float = field(default="vertical", metadata=about(
        'rotation of each sphere or object: "vertical", "all", "none", or the largest angle about the vertical',
        "none where directions tell classes apart, as for objects that all stand alike; all where there is no vertical",
        "15", unit="degrees", allowed="vertical, all, none, or 0 to 180", also=("augment_rotation", "rotation"),
    ))
    scale: list[float] = field(default_factory=lambda: [0.9, 1.1], metadata=about(
        "smallest and largest factor of each axis", "[1.0, 1.0] where the true size tells classes apart", "[0.8, 1.2]",
        allowed="two factors from 0.01 to 100", also=("augment_scale", "scaling"),
    ))
    flip: list[bool] = field(default_factory=list, metadata=about(
        "for each axis whether it may be mirrored", "where mirrored objects are of the same class",
        "[true, false, false]", allowed="up to 3 axes", also=("augment_symmetries", "mirror"),
    ))
    noise: float = field(default=0.001, metadata=about(
        "standard deviation of the noise that is added to coordinates",
        "about 2 % of `voxel_size`, or the noise of the scanner", "0.01", unit=POINTS, bounds=(0, LENGTHS[1]),
        also=("augment_noise", "jitter"),
    ))
    keep_color: float = field(default=0.8, metadata=about(
        "probability that the colours of a sphere are not set to 0", "1 where colours are as reliable as the geometry",
        "1.0", bounds=(0, 1), also=("augment_color", "keep_colour"),
    ))
    turn_grid: bool = field(default=True, metadata=about(
        "whether the axes of the voxels are rotated at random", "false to compare with published trainings", "false",
    ))
    # At 0.2 a scene needs hundreds of times the spheres that it needs at 0.7.
    vote_radius: float = field(default=0.7, metadata=about(
        "points within this fraction of a sphere's radius vote", "smaller where labels near edges of spheres are wrong",
        "0.5", unit="`radius`", bounds=(0.2, 1),
    ))
    votes: int = field(default=1, metadata=about(
        "votes for each place of a scene, or for each object, also in validation",
        "5 to 10 for the last tenths of a percent, for as many times the time", "5", bounds=(1, 1000),
        also=("num_votes",),
    ))
    validate: int = field(default=5, metadata=about(
        "validate after every so many epochs, and after the last", "larger where validation takes longer than training",
        "1", unit="epochs", bounds=(1, 10**4), also=("val_every", "validation_epochs"),
    ))
    workers: int = field(default=2, metadata=about(
        "threads that prepare batches in advance; the result does not depend on it", "1 where memory is short", "4",
        bounds=(0, 256), also=("num_workers", "input_threads", "threads"),
    ))
