"""Settings to start from, written from what labelled files hold: the text that `kpcore init` prints."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import kpcore as kp
from kpcore.config import KpcoreWarning
from kpcore.io import ReadError, field_names, read
from kpcore.io.cloud import COLORS, LABELS, UNLABELED, list_names
from kpcore.io.formats import READERS, TABLES
from kpcore.io.mesh import READERS as MESHES
from kpcore.pipeline import filenames
from kpcore.pipeline.sections import COMPUTED_FEATURES, Ground
from kpcore.pipeline.settings import SettingsError, from_dict, toml_parser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kpcore.io import Cloud, Reference

MOST_POINTS = 20_000_000  # files are read until these are reached; others are listed only
_MOST_LABELS = 256  # different ones in a field of classes: object numbers are more
_SHARES = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)  # of a cloud that may be its part to test
_FEW, _FEW_SHARE = 200, 0.002  # classes with fewer points to train on, or a smaller share of them, are comments
_RARE_SHARE = 0.02  # with such a class, the classes have weights
_VOXEL = 1.5  # spacings, and the quantile of these over places: at edges of a scan points are sparse
_QUANTILE = 0.25
_OF_RADIUS = 30  # voxels
_NEIGHBORS = 8  # from whose distance the spacing is computed
_SAMPLE = 100_000  # values of a field in a file, for its quantiles
_LARGE = 50.0  # metres from which on a scan is terrain rather than rooms

# Names by ASPRS LAS 1.4 R15, table 17; None: points that are no surface, or that nobody has classified.
ASPRS: dict[int, str | None] = {
    0: None, 1: "unclassified", 2: "ground", 3: "low_vegetation", 4: "medium_vegetation", 5: "high_vegetation",
    6: "building", 7: None, 8: "model_key_point", 9: "water", 10: "rail", 11: "road", 12: None, 13: "wire_guard",
    14: "wire_conductor", 15: "transmission_tower", 16: "wire_connector", 17: "bridge", 18: None,
    19: "overhead_structure", 20: None, 21: "snow", 22: None,
}  # fmt: skip
_IGNORED = {0: "never classified", 7: "low noise", 12: "overlap", 18: "high noise", 20: "ignored ground",
            22: "temporal exclusion", UNLABELED: "without a label"}  # fmt: skip
# Fields that are features by themselves, and why others are not.
_MEASURED = ("intensity", "reflectance", "amplitude", "return_number", "number_of_returns", "num_returns", "nir",
             "infrared", "near_infrared", "echo_width", "pulse_width")  # fmt: skip
_NOT_OF_SURFACE = {
    **dict.fromkeys(("scan_angle", "scan_angle_rank", "scan_direction_flag", "edge_of_flight_line", "scanner_channel",
                     "point_source_id", "user_data", "gps_time", "time", "timestamp", "synthetic", "key_point",
                     "withheld", "overlap"), "of the flight, not of the surface"),
    **dict.fromkeys(("nx", "ny", "nz", "normal_x", "normal_y", "normal_z", "normalx", "normaly", "normalz"),
                    "a direction, which is not rotated in training as points are; the feature normals is"),
    **dict.fromkeys(("index", "id", "point_id", "original_cloud_index", "instance", "instance_id", "object",
                     "object_id", "segment", "segment_id"), "a number, not a measurement"),
}  # fmt: skip
_PLACES = {"x", "y", "z", "rgb", "rgba", "alpha", *LABELS, *(name for names in COLORS for name in names)}


class Values(NamedTuple):
    """What is known of a field in a file."""

    low: float
    high: float
    sample: np.ndarray  #: some of the values
    bad: int  #: values that are NaN or infinite


class Scan(NamedTuple):
    """What is known of a file."""

    path: Path
    num: int
    labels: Counter[int]
    fields: dict[str, Values | None]  #: None: not read
    has_colors: bool
    size: np.ndarray  #: (3,) extents of the middle 99 %
    spacing: np.ndarray  #: distances between points at some places
    reference: Reference | None


def draft(
    paths: Sequence[Path], folder: Path, *, label: str | None = None, columns: Sequence[str] | None = None
) -> str:
    """The text of a settings file for labelled scans, or for a folder of objects with a sub-folder for each class.

    Parameters
    ----------
    paths : sequence of Path
        Files; and folders, of which all files of the most frequent format are taken.
    folder : Path
        Where the text is to be saved: file names in it are relative to this folder.
    label, columns
        As in [data].

    Raises
    ------
    ReadError
        A file cannot be read or has no labels.
    SettingsError
        No settings fit the files: their labels are all the same, or their names cannot be written in TOML.
    """
    if len(paths) == 1 and (classes := _folders_of_objects(paths[0])):
        text = _text_of_objects(paths[0], classes, folder)
    else:
        text = _text_of_scans(_files(paths), folder, label, columns)
    from_dict(toml_parser().loads(text))  # never text that `kpcore train` refuses
    return text


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files of all paths, each once, those of a folder by name."""
    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            files |= dict.fromkeys(_in_folder(path))
        else:
            files |= dict.fromkeys(map(Path, filenames.matching(path)))
    return [*files]


def _in_folder(path: Path) -> list[Path]:
    """The files of the most frequent format in a folder and those below; others may be notes, or weights in a .bin."""
    by_format: dict[str, list[Path]] = {}
    for one in sorted(path.rglob("*")):
        suffix = one.suffix.lower().replace(".laz", ".las")
        if suffix in READERS and one.is_file() and not one.name.startswith("."):  # "._" files are of macOS
            by_format.setdefault(suffix, []).append(one)
    if not by_format:
        raise ReadError(f"{path}: expected a folder with files in {' '.join(READERS)}, got none in it")
    chosen = max(by_format.values(), key=len)
    if others := [f"{len(some)} {suffix}" for suffix, some in by_format.items() if some is not chosen]:
        warnings.warn(f"{path}: {len(chosen)} {chosen[0].suffix} files; left out: {', '.join(others)}", KpcoreWarning,
                      stacklevel=2)  # fmt: skip
    return chosen


# ---- reading


def _scan(path: Path, label: str | None, columns: Sequence[str] | None) -> tuple[Scan, Cloud]:
    """What is known of a file, and its points and labels."""
    columns = columns if path.suffix.lower() in TABLES else None
    names = field_names(path, columns=columns)
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(_plain(name), name)
    places = _PLACES | {_plain(label or "")}
    wanted = [name for name in plain if name not in places and not _reason(name)]
    cloud = _with_fields(path, [plain[name] for name in wanted], label, columns)
    if cloud.labels is None:
        raise ReadError(f"{path}: expected labels, got none: {cloud.unlabeled}; its fields are {list_names(names)}; "
                        "name the one that holds classes with --label")  # fmt: skip
    reference = cloud.reference
    if reference is not None and reference.kind in ("geographic", "geocentric"):
        raise ReadError(f"{path}: expected coordinates in a length such as metres, got {reference.kind} ones "
                        f"({printable(reference.name or 'no name')}): project the file first")  # fmt: skip
    labels = _counts(cloud.labels)
    if len(labels) > _MOST_LABELS:
        advice = "are they object numbers? Name the field of classes with --label"
        raise ReadError(f"{path}: expected at most {_MOST_LABELS} different labels, got {len(labels):,}: {advice}")
    fields: dict[str, Values | None] = {}
    for name in plain:
        if name in wanted and (values := cloud.fields.get(plain[name].lower())) is not None:
            finite = values[np.isfinite(values)]
            sample = finite[:: 1 + len(finite) // _SAMPLE]
            low, high = (float(finite.min()), float(finite.max())) if len(finite) else (math.nan, math.nan)
            fields[name] = Values(low, high, sample, len(values) - len(finite))
        elif name not in places:
            fields[name] = None
    sample = cloud.points[:: 1 + len(cloud.points) // _SAMPLE]
    low, high = np.quantile(sample, (0.005, 0.995), axis=0)
    has_colors = cloud.colors is not None and bool(np.ptp(cloud.colors, axis=0).any())
    return Scan(path, len(cloud.points), labels, fields, has_colors, high - low,
                _spacings(path, cloud.points, low, high), reference), cloud  # fmt: skip


def _with_fields(path: Path, names: list[str], label: str | None, columns: Sequence[str] | None) -> Cloud:
    """Read a file with all fields that have a number for each point."""
    try:
        return read(path, fields=names, label=label, columns=columns)
    except ReadError:
        cloud = read(path, label=label, columns=columns)  # an error here is one of the file
    readable = {}
    for name in names:  # one of them is text, has two columns, or holds integers beyond float64
        try:
            readable |= read(path, fields=[name], label=label, columns=columns).fields
        except ReadError:
            continue
    cloud.fields.update(readable)
    return cloud


def _plain(name: str) -> str:
    return name.lower().removeprefix("scalar_")


def _counts(labels: np.ndarray) -> Counter[int]:
    return Counter({int(label): int(num) for label, num in zip(*np.unique(labels, return_counts=True), strict=True)})


def _reason(name: str) -> str:
    """Why a field is not read; empty if it is."""
    if name in COMPUTED_FEATURES:
        return "kpcore computes the feature of this name"
    return _NOT_OF_SURFACE.get(name, "of the flight, not of the surface" if "time" in name else "")


def _spacings(path: Path, points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Distances between neighbouring points at places spread over a cloud evenly, however dense it is there.

    A surface with n points in a disc of radius r has the spacing r sqrt(pi / n).
    """
    extent = float((high - low).max())
    near = points[((points >= low - extent) & (points <= high + extent)).all(axis=1)]
    if not extent or len(near) <= _NEIGHBORS:
        raise ReadError(f"{path}: expected points at more than {_NEIGHBORS} places, got {len(points):,} points")
    places = kp.grid_subsample(near, extent / 64, position="nearest").points
    places = places[:: 1 + len(places) // 5000]
    nb = kp.knn_search(near, places, _NEIGHBORS + 1, return_distances=True)
    farthest = nb.distance[np.asarray(nb.row_splits[1:]) - 1]
    if not farthest.any():  # each point is there many times
        return _spacings(path, np.unique(points, axis=0), low, high)
    return farthest[farthest > 0] * math.sqrt(math.pi / _NEIGHBORS)


# ---- scans


def _text_of_scans(files: Sequence[Path], folder: Path, label: str | None, columns: Sequence[str] | None) -> str:
    largest = None
    # A part of the files is read evenly from the first to the last: by the fractional parts of the golden ratio.
    read_scans: dict[int, Scan] = {}
    for number in sorted(range(len(files)), key=lambda number: number * 0.6180339887 % 1):
        if sum(scan.num for scan in read_scans.values()) < MOST_POINTS:
            read_scans[number], cloud = _scan(files[number], label, columns)
            if largest is None or len(cloud.points) > len(largest.points):
                largest = cloud
    scans = [scan for _, scan in sorted(read_scans.items())]
    assert largest is not None
    spacing = float(np.quantile(np.concatenate([scan.spacing for scan in scans]), _QUANTILE))
    voxel = nice(_VOXEL * spacing)
    size = np.max([scan.size for scan in scans], axis=0)
    radius = nice(min(_OF_RADIUS * voxel, max(4 * voxel, 0.4 * float(size.max()))))
    levels = min(5, max(2, 1 + math.floor(math.log2(radius / (2.5 * voxel)))))
    counts = sum((scan.labels for scan in scans), Counter())
    parts, of_test = _split(files, scans, largest, folder)
    classes, shares = _classes(scans, counts, of_test)
    features, of_features = _features(scans, size, voxel)
    in_sphere = _points_in_spheres(largest.points, voxel, radius)
    batch_points = max(20_000, round(int(1.2 * in_sphere), -3))

    unread = len(files) - len(scans)
    of = f"{len(scans)} of {len(files)} files" if unread else f"{len(files)} file{'s' * (len(files) > 1)}"
    lines = [f"# Settings of a training, written by kpcore init from {of} with {counts.total():,} points.",
             "# kpcore train FILE.toml --out runs/first     trains for some minutes; docs/settings.md has every key.",
             _unit(scans)]  # fmt: skip
    if unread:
        lines.append(f"# {unread} files were not read, as the others have {MOST_POINTS:,} points or more; they may "
                     "hold other labels.")  # fmt: skip
    lines += ["", "[data]", *parts]
    if label:
        lines.append(f"label = {toml_text(label)}")
    if columns:
        lines.append(f"columns = {_list(columns)}")
    lines += ["validation = 0.1     # of the training data, a strip across each scan: chooses the best network", ""]
    lines += [f"features = {_list(features)}", *of_features]
    lines += ["", "[data.classes]       # labels in the files; points with others are ignored", *classes]
    lines += [
        "", "[network]",
        f"voxel_size = {voxel!r}     # 1.5 times the distance between points, {spacing:.2g}; with half of it a "
        "training takes four times as long",
        f"levels = {levels}           # with voxels of {voxel:g} to {voxel * 2 ** (levels - 1):g}",
        "width = 32           # channels; 64 for many classes and days of training",
        "", "[training]",
        f"radius = {radius!r}     # of input spheres, {radius / voxel:.3g} voxels; 25 to 50 are usual",
        f"batch_points = {batch_points}     # a sphere has up to some {in_sphere:,}",
        "batch_clouds = 8", "epochs = 20          # more while the score still rises", "steps = 75",
        'optimizer = "adamw"', "lr = 0.004", 'schedule = "one_cycle"', "weight_decay = 0.01",
        f"noise = {nice(0.02 * voxel)!r}         # of coordinates",
    ]  # fmt: skip
    if shares and min(shares) < _RARE_SHARE:
        lines.append(f'class_weights = "root"     # as a class has {100 * min(shares):.2g} % of the points')
    return "\n".join(lines) + "\n"


def _points_in_spheres(points: np.ndarray, voxel: float, radius: float) -> int:
    """The number of subsampled points in a large input sphere: the 99th percentile of some."""
    places = kp.grid_subsample(points, voxel).points
    chosen = np.random.default_rng(0).choice(len(places), min(500, len(places)), replace=False)
    return int(np.quantile(kp.radius_search(places, places[chosen], radius, count_only=True), 0.99))


def _unit(scans: Sequence[Scan]) -> str:
    """A comment about the unit of lengths."""
    stated = {(one.horizontal, one.vertical): one.name for scan in scans if (one := scan.reference) is not None}
    if len(stated) > 1:
        names = ", ".join(printable(name or "one without a name") for name in stated.values())
        raise ReadError(f"expected files with coordinates of one unit, got those of {names}: convert some first")
    if not stated:
        return "# The files do not say the unit of their coordinates; lengths here are in the same one."
    (horizontal, vertical), name = stated.popitem()
    unit = "unknown" if horizontal is None else f"{horizontal:.6g} m"
    if vertical not in (None, horizontal):
        unit += f", of z {vertical:.6g} m"
    return f"# Unit of the files and of lengths here: {unit} ({printable(name or 'no name of the reference system')})."


def _features(scans: Sequence[Scan], size: np.ndarray, voxel: float) -> tuple[list[str], list[str]]:
    """(features, lines after them: comments, and the settings of the ground)."""
    stated = [one.horizontal for scan in scans if (one := scan.reference) is not None]
    metres = next(filter(None, stated), 1.0)  # in a unit of the files
    features, lines = ["one"], []
    if metres * float(size[:2].max()) >= max(_LARGE, 2 * metres * float(size[2])):
        features.append("height_above_ground")
        lines.append("# height_above_ground is alike on a hill and in a valley; height, the last coordinate, is not.")
        cell = nice(max(1 / metres, 2 * voxel))
        if (cell, metres) != (1.0, 1.0):
            window = nice(Ground().window / metres)
            lines.append(f"ground = {{ cell = {cell!r}, window = {window!r} }}     # window: wider than any building")
    else:
        features.append("height")
        lines.append("# height is the last coordinate in the file: leave it out where floors are at different heights.")
    colored = [scan.path.name for scan in scans if scan.has_colors]
    if len(colored) == len(scans):
        features.append("color")
    elif colored:
        lines.append(f"# color is left out: {printable(colored[0])} has colours, not all files do.")
    described: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for scan in scans for name in scan.fields):
        what, is_feature = _described(name, scans)
        described.setdefault(what, []).append(printable(name))
        features += [name] * is_feature
    if described:
        lines.append("# Fields of the files, any of which may be a feature:")
        lines += [f"#   {', '.join(some)}: {what}" for what, some in described.items()]
    return features, lines


def _described(name: str, scans: Sequence[Scan]) -> tuple[str, bool]:
    """(what a field holds, whether it is a feature)."""
    if name.replace("_", "") == "heightaboveground":
        return "read in place of heights that kpcore computes", False
    if reason := _reason(name):
        return f"not used, {reason}", False
    if missing := [scan.path.name for scan in scans if name not in scan.fields]:
        return f"not used, {printable(missing[0])} does not have it", False
    values = [one for scan in scans if (one := scan.fields[name]) is not None]
    if len(values) < len(scans):
        return "not used, not a number for each point", False
    if bad := sum(one.bad for one in values):
        return f"not used, NaN or infinite for {bad:,} points", False
    low, high = min(one.low for one in values), max(one.high for one in values)
    if low == high:
        return f"not used, {low:g} throughout", False
    first, last = np.quantile(np.concatenate([one.sample for one in values]), (0.05, 0.95))
    what = f"{low:g} to {high:g}, the middle nine tenths {first:g} to {last:g}"
    return (what, True) if name in _MEASURED else (f"not used, as kpcore does not know it; {what}", False)


def _classes(scans: Sequence[Scan], counts: Counter[int],
             of_test: Counter[int] | None) -> tuple[list[str], list[float]]:  # fmt: skip
    """(lines of the classes, the share of each in the points to train on)."""
    named = {label: _class_name(label, scans) for label in sorted(counts)}
    train = counts - of_test if of_test is not None else counts
    total, total_train = counts.total(), train.total()
    labelled = [label for label in named if label != UNLABELED and train[label]]
    surfaces = [label for label in labelled if label not in _IGNORED or not _is_las(scans)]
    enough = [label for label in surfaces if train[label] >= max(_FEW, _FEW_SHARE * total_train)]
    chosen = next((some for some in (enough, surfaces, labelled) if len(some) > 1), [])
    if not chosen:
        held = ", ".join(f"{label} ({train[label]:,} of {num:,} points)" for label, num in sorted(counts.items()))
        of = scans[0].path if len(scans) == 1 else f"{len(scans)} files"
        raise SettingsError(f"{of}: expected labels of two classes or more to train on, got {held}")
    lines = []
    width = max(len(f"{toml_key(name)} = [{label}]") for label, name in named.items())
    for label, name in named.items():
        num, line = counts[label], f"{toml_key(name)} = [{label}]"
        what = f"{num:,} points, {100 * num / total:.2g} %"
        if of_test is not None:
            what += f"; {100 * of_test[label] / num:.0f} % of them in test"
        if label in chosen:
            lines.append(f"{line:{width}}     # {what}")
            continue
        few = "too few to train on" if train[label] else "none to train on"
        reason = few if label in surfaces or label not in _IGNORED else _IGNORED[label]
        lines.append(f"# {line:{width}}   # ignored, {reason}: {what}")
    return lines, [train[label] / total_train for label in chosen]


def _is_las(scans: Sequence[Scan]) -> bool:
    return all(scan.path.suffix.lower() in (".las", ".laz") for scan in scans)


def _class_name(label: int, scans: Sequence[Scan]) -> str:
    name = ASPRS.get(label) if _is_las(scans) else None
    if name is None and _is_las(scans) and label in _IGNORED:
        name = _IGNORED[label].replace(" ", "_")
    return name or (f"class_{label}" if label >= 0 else f"class_minus_{-label}")


def _split(files: Sequence[Path], scans: Sequence[Scan], cloud: Cloud,
           folder: Path) -> tuple[list[str], Counter[int] | None]:  # fmt: skip
    """(lines of train and test, the number of points of each label in test or None if it is not known)."""
    names = [_relative(path, folder) for path in files]
    if len(files) > 1:
        number = max(1, round(len(files) / 5))
        inside = None
        if len(scans) == len(files):
            inside = sum((scan.labels for scan in scans[-number:]), Counter())
        return [*_file_list("train", names[:-number]), *_file_list("test", names[-number:])], inside
    axis, limit, rows = _cut(cloud)
    is_above = bool(cloud.points[rows[0], axis] + cloud.shift[axis] >= limit)
    low = f"min = [{', '.join(['-inf'] * axis + [repr(limit)])}]"
    high = f"max = [{', '.join(['inf'] * axis + [repr(limit)])}]"
    train, test = (high, low) if is_above else (low, high)
    return [
        f"train = [{{ file = {toml_text(names[0])}, {train} }}]",
        f"test = [{{ file = {toml_text(names[0])}, {test} }}]     # {100 * len(rows) / len(cloud.points):.0f} % of the "
        f"points, beyond {'xy'[axis]} = {limit!r}",
    ], _counts(cloud.labels[rows])  # fmt: skip


def _cut(cloud: Cloud) -> tuple[int, float, np.ndarray]:
    """(axis, coordinate in the file, rows of the points to test): a seventh to a half of a cloud at one end.

    Of all ends that is taken that leaves a tenth of most classes to train on, then has a twentieth of most to test, and
    then divides the classes best.
    """
    labels, number, counts = np.unique(cloud.labels, return_inverse=True, return_counts=True)
    counted = counts >= min(_FEW, counts.max())
    best, chosen = (-1.0,) * 3, None
    for axis in range(2):
        values = cloud.points[:, axis] + cloud.shift[axis]
        low, high = np.quantile(values[:: 1 + len(values) // _SAMPLE], (0.005, 0.995))
        digits = max(0, -math.floor(math.log10(max(high - low, 1e-30) / 50)))
        for share in (*_SHARES, *(1 - share for share in _SHARES)):
            limit = round(float(np.quantile(values, share)), digits)
            is_test = values >= limit if share > 0.5 else values < limit
            parts = (np.bincount(number[is_test], minlength=len(labels)) / counts)[counted]
            both = np.minimum(parts, 1 - parts)
            score = float(np.count_nonzero(parts <= 0.9)), float(np.count_nonzero(both >= 0.05)), float(both.mean())
            if 0.1 <= is_test.mean() <= 0.5 and score > best:
                best, chosen = score, (axis, limit, np.flatnonzero(is_test))
    if chosen is None:
        raise SettingsError("expected a cloud that can be cut into a part to train and one to test, got one with "
                            "points at few places")  # fmt: skip
    return chosen


# ---- objects


def _folders_of_objects(path: Path) -> dict[str, list[Path]]:
    """The folders in a folder by name, with the meshes or clouds in each; empty unless they are classes of objects."""
    if not path.is_dir():
        return {}
    suffixes = {*MESHES, *READERS}
    classes = {}
    for one in sorted(path.iterdir()):
        if one.is_dir() and not one.name.startswith("."):
            files = [file for file in one.rglob("*") if file.suffix.lower() in suffixes and file.is_file()]
            if files:
                classes[one.name] = sorted(files)
    return classes if len(classes) > 1 and not _has_labels(next(iter(classes.values()))[0]) else {}


def _has_labels(path: Path) -> bool:
    """Whether a file is a cloud whose points have labels."""
    if path.suffix.lower() not in READERS:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(path).labels is not None


def _text_of_objects(path: Path, classes: dict[str, list[Path]], folder: Path) -> str:
    splits = Counter(file.relative_to(path / name).parts[0] if file.parent != path / name else ""
                     for name, files in classes.items() for file in files)  # fmt: skip
    inside = [split for split in splits if split]
    train = "train" if "train" in inside else ""
    test = next((split for split in ("test", "val", "validation") if split in inside), "")
    if inside and not (train and test):
        raise SettingsError(f"{path}: expected the files of a class in its folder, or in its folders train and test, "
                            f"got {', '.join(inside[:5])}")  # fmt: skip
    name = toml_text(_relative(path, folder))
    lines = [
        f"# Settings of a training, written by kpcore init from a folder with {sum(splits.values()):,} objects of "
        f"{len(classes)} classes.",
        "# kpcore train FILE.toml --out runs/first     trains for some minutes; docs/settings.md has every key.",
        "", "[data]", 'kind = "objects"     # which are moved and scaled into the unit sphere',
    ]  # fmt: skip
    if train:
        lines += [f'train = [{{ folder = {name}, split = "train", points = 2000 }}]     # points: sampled from a mesh',
                  f"test = [{{ folder = {name}, split = {toml_text(test)}, points = 2000 }}]"]  # fmt: skip
    else:
        lines += [
            f"train = [{{ folder = {name}, points = 2000 }}]     # points: sampled from a mesh",
            '# test = [{ folder = "...", points = 2000 }]     # other objects; without them there are no scores',
        ]
    lines += ['features = ["one"]', f"classes = {_list(list(classes))}"]
    lines += [f"# {printable(one)}: {len(files):,} objects" for one, files in classes.items()]
    lines += [
        "", "[network]", "voxel_size = 0.05    # of the unit sphere; 0.02 in the paper, for some ten times the time",
        "levels = 4", "width = 32", "head_width = 256", "",
        "[training]", "batch_points = 200000", "batch_clouds = 16", "epochs = 20", "steps = 75", 'optimizer = "adamw"',
        "lr = 0.004", 'schedule = "one_cycle"', "weight_decay = 0.01", "scale = [0.8, 1.2]",
        'rotate = "vertical"     # "none" if all stand alike', "noise = 0.005",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


# ---- text


def nice(value: float) -> float:
    """The nearest of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten.

    >>> nice(0.2437), nice(29.0), nice(9.4)
    (0.25, 30.0, 10.0)
    """
    power = math.floor(math.log10(value))
    best = min((1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10), key=lambda factor: abs(math.log(value / (factor * 10.0**power))))
    return float(f"{best}e{power}")


def toml_text(value: str) -> str:
    """A string in TOML."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SettingsError(f"expected a name in UTF-8, as TOML is, got {value!r}") from None
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(name: str) -> str:
    """The key of a table in TOML."""
    return name if name.isascii() and name.replace("_", "a").replace("-", "a").isalnum() else toml_text(name)


def printable(name: str) -> str:
    """A name for a comment, on one line."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _list(values: Sequence[str]) -> str:
    return f"[{', '.join(map(toml_text, values))}]"


def _file_list(name: str, files: Sequence[str]) -> list[str]:
    if len(files) == 1:
        return [f"{name} = [{toml_text(files[0])}]"]
    return [f"{name} = [", *(f"    {toml_text(file)}," for file in files), "]"]


def _relative(path: Path, folder: Path) -> str:
    """The name of a file in settings in a folder: relative to it, unless the path is absolute."""
    if path.is_absolute():
        return path.as_posix()
    try:
        name = Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return path.absolute().as_posix()
    return f"./{name}" if name.startswith("~") else name  # ~ is the home folder
