"""`kpcore demo`: trains a small network and uses it; or subsamples, searches and convolves a scan, with times."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kpcore as kp
from kpcore import scenes
from kpcore.config import require
from kpcore.console import Progress, Refused, classes_in_mean, make_folder, print_line, say
from kpcore.files import check_writable, replacing
from kpcore.pipeline.settings import Objects, Part
from kpcore.scenes.indoor import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kpcore.io import Cloud
    from kpcore.picture import Patch
    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.model import Model
    from kpcore.pipeline.settings import Settings, Source

SCAN = {"voxel": 0.04, "levels": 5, "channels": 64, "columns": None}  # options for a FILE and their defaults
NUM_KERNEL_POINTS = 15
RADIUS, KERNEL_RADIUS, EXTENT = 2.5, 0.66 * 2.5, 1.2  # in voxels, as in the KPConv paper
HEADER = "level     voxel      points  neighbours   subsample    search   forward  backward   M points/s   peak MB"
ROW = "{:>5}{:>10.4g}{:>12,}{:>12.1f}{:>12.1f}{:>10.1f}{:>10.1f}{:>10.1f}{:>13.2f}{:>10,}"


# Five flats whose furniture differs by the seed; the unseen flat has another seed and is mirrored.
TRAINING = {
    "data": {
        "train": [{"indoor": seed} for seed in range(5)],
        "features": ["one", "color", "height"],
        "classes": {name: [number] for number, name in enumerate(NAMES)},
    },
    "network": {"voxel_size": 0.06, "levels": 4, "width": 32},
    "training": {
        "radius": 1.5, "batch_points": 20_000, "batch_clouds": 8, "epochs": 1, "steps": 1100, "momentum": 0.9,
        "schedule": "one_cycle", "lr": 0.05, "flip": [True, True, False], "class_weights": "root",
    },
}  # fmt: skip
UNSEEN = Part(indoor=100, mirror=True)

OBJECTS = {
    "data": {"kind": "objects", "train": [{"shapes": 0, "number": 100, "points": 2000}], "features": ["one"]},
    "network": {"voxel_size": 0.06, "levels": 4, "width": 16, "head_width": 64},
    "training": {
        "batch_points": 100_000, "batch_clouds": 16, "epochs": 1, "steps": 600, "optimizer": "adamw", "lr": 0.005,
        "weight_decay": 0.01, "schedule": "one_cycle", "scale": [0.8, 1.2], "flip": [True, True, False], "noise": 0.005,
    },
}  # fmt: skip
UNSEEN_OBJECTS = Objects(shapes=100_000, number=20, points=2000)
OBJECT_VOTES = 5


def scan(file: Path, out: Path, voxel: float, levels: int, channels: int, columns: Sequence[str] | None = None,
         theme: str = "dark") -> dict[str, Any]:  # fmt: skip
    """Run the operators on a file, level by level: print a table and write a picture.

    `columns` are names for the columns of a table that has none. Returns what --json prints.
    """
    require("tqdm", "io")
    require("matplotlib", "plot")
    from kpcore import picture

    name, path = Path(file).name, out / f"kpcore-{Path(file).stem}.png"
    cloud = scenes.read(file, columns=columns)
    make_folder(out)
    check_writable(path)
    summary = _summary(cloud)
    say(f"{name}: {summary}")
    if cloud.left_out:
        say(f"left out: {cloud.left_out:,} points with NaN or infinite coordinates")
    if zeros := cloud.dropped.get("zeros"):
        say(f"left out: {zeros:,} points at (0, 0, 0), as without a return")
    notes = []
    if cloud.shift.any():
        notes.append(f"subtracted in float64: {' '.join(f'{value:.0f}' for value in cloud.shift)}")
    if cloud.rounding > 0:
        notes.append(f"float32 changes coordinates by at most {_rounded_up(cloud.rounding)}")
    if notes:
        say("; ".join(notes))

    finished = []
    with Progress("level 0", 4 * levels + 1) as bar:
        for number in range(levels):
            finished.append(_level(number, finished[-1] if finished else cloud, voxel * 2**number, channels, bar))
        bar.to(bar.done, "picture")
        panels = [
            (
                level.points,
                level.colors,
                level.voxel,
                f"level {number} · voxel {level.voxel:.4g}",
                f"{len(level.points):,} points · {level.mean_neighbors:.1f} neighbours",
            )
            for number, level in enumerate(finished)
        ]
        with replacing(path) as part:
            picture.draw(part, name, summary, cloud, panels, _patch(finished[0]), theme=theme)
        bar.step()
    _table(finished, channels)
    say(f"picture: {path}")
    steps = "subsample", "search", "forward", "backward"
    return {"file": file, "picture": path, "levels": [
        {
            "voxel": level.voxel, "points": len(level.points), "neighbours": level.mean_neighbors,
            "seconds": dict(zip(steps, level.seconds, strict=True)),
        }
        for level in finished
    ]}  # fmt: skip


def train(out: Path, theme: str = "dark") -> dict[str, Any]:
    """Train a small KP-FCNN on embedded scenes for some two minutes, then label a scene that it has not seen."""
    path, settings, model, (scene,) = _trained(out, "kpcore-indoor.png", TRAINING, UNSEEN, "KP-FCNN", "furnished flats")
    from kpcore.pipeline import labelling, segmentation

    begin = time.perf_counter()
    with Progress("labelling an unseen flat") as bar:
        classes = labelling.labels_of(model, scene, watch=bar.to)
    segmented = segmentation.compare(model, scene.cloud, scene.full_labels, classes)
    seconds = time.perf_counter() - begin
    say(
        f"{len(classes):,} points of another flat labelled in {seconds:.1f} s ({len(scene.points):,} after subsampling)"
    )
    say("")
    say(f"{'class':>10} {'IoU':>7} {'points':>9}")
    true = np.bincount(segmented.true, minlength=len(settings.names))
    for name, number in zip(settings.names, true, strict=True):
        value = segmented.scores["iou"][name]
        say(f"{name:>10} {'-' if value is None else f'{value:.3f}':>7} {number:>9,}")
    mean = f"{segmented.scores['miou']:>7.3f}{classes_in_mean(segmented.scores)}"
    say(f"{'mean':>10} {mean}   accuracy {segmented.scores['accuracy']:.3f}")
    with replacing(path) as part:
        segmentation.draw(part, "A flat that the network has not seen", segmented, settings, theme=theme, unit="m")
    say(f"picture: {path}")
    return {"picture": path, "scores": segmented.scores}


def objects(out: Path, theme: str = "dark") -> dict[str, Any]:
    """Train a small KP-CNN on generated objects for some two minutes, then classify objects that it has not seen."""
    path, settings, model, unseen = _trained(
        out, "kpcore-objects.png", OBJECTS, UNSEEN_OBJECTS, "KP-CNN", "generated objects"
    )
    from kpcore.pipeline import classification, voting

    begin = time.perf_counter()
    with Progress("classifying others") as bar:
        classified = classification.classify(model, unseen, OBJECT_VOTES, bar.to)
    seconds = time.perf_counter() - begin
    say(f"{len(unseen)} other objects classified in {seconds:.1f} s, with {OBJECT_VOTES} votes for each")
    say("")
    scores = voting.scores(classified.confusion(), settings.names)
    say(f"{'class':>10} {'accuracy':>9}")
    for name, value in scores["class_accuracy"].items():
        say(f"{name:>10} {value:>9.3f}")
    say(f"{'all':>10} {scores['accuracy']:>9.3f}")
    classification.draw_examples(path, "Objects that the network has not seen", model, classified, theme)
    say(f"picture: {path}")
    return {"picture": path, "scores": scores}


def _trained(out: Path, picture_name: str, sections: dict[str, Any], unseen: Source, network: str,
             scenes: str) -> tuple[Path, Settings, Model, list[Scene]]:  # fmt: skip
    """(path of the picture, settings, the trained model, the unseen scenes); prints how long training takes."""
    require("tqdm", "io")
    require("matplotlib", "plot")
    require("safetensors", "io")
    from kpcore.pipeline.data import load
    from kpcore.pipeline.settings import from_dict
    from kpcore.pipeline.training import Training

    make_folder(out)
    path = out / picture_name
    check_writable(path)  # before minutes of training
    settings = from_dict(sections)
    steps = settings.training.epochs * settings.training.steps
    with tempfile.TemporaryDirectory() as folder:
        training = Training(settings, folder, folder)
        size = kp.nn.count(training.model.params)
        say(f"{network} of {size:,} parameters: {steps} steps on {len(training.scenes)} {scenes}")
        with Progress("training", steps, rate=True) as bar:

            def watch(entry):
                bar.step(note=f"loss {entry['loss']:.3f}, {entry['accuracy']:.1%} right")

            begin = time.perf_counter()
            training.run(watch)
        say(f"trained in {time.perf_counter() - begin:.0f} s; the last loss was {training.loss:.3f}")
    return path, settings, training.model, load(settings, [unseen], ".", training.model.columns)[0]


def _rounded_up(value: float) -> str:
    """A number rounded up to one significant digit."""
    power = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / power) * power:.0e}"


def _summary(cloud: Cloud) -> str:
    parts = [f"{len(cloud.points):,} points", " × ".join(f"{length:.4g}" for length in np.ptp(cloud.points, axis=0))]
    if cloud.labels is not None:
        parts.append(f"{np.unique(cloud.labels).size} classes")
    return " · ".join(parts)


@dataclass(frozen=True, eq=False)
class Level:
    points: np.ndarray
    colors: np.ndarray | None
    labels: np.ndarray | None
    voxel: float
    neighbors: kp.Neighbors
    seconds: tuple[float, ...]  # subsample, search, forward, backward
    peak: float  # MB of memory used by the process so far, at most; NaN where the system does not say

    @property
    def mean_neighbors(self) -> float:
        return self.neighbors.num_pairs / len(self.points)


def _level(number: int, finer: Cloud | Level, voxel: float, channels: int, bar: Progress) -> Level:
    """Run the operators on one level: subsample the finer level, search neighbours, KPConv forward and backward."""
    seconds = []

    def step(name: str, job: Callable[[], Any]) -> Any:
        bar.to(bar.done, f"level {number}: {name}")
        start = time.perf_counter()
        result = job()
        seconds.append(time.perf_counter() - start)
        bar.step()
        return result

    colors = None if finer.colors is None else finer.colors.astype(np.float32)
    try:
        sub = step("subsample", lambda: kp.grid_subsample(finer.points, voxel, features=colors, labels=finer.labels))
    except ValueError as error:  # too many voxels along an axis
        raise Refused(f"--voxel {voxel:g}: {error}{_suggestion(finer.points)}") from None
    rng = np.random.default_rng(number)
    features, grad = rng.standard_normal((2, len(sub.points), channels), np.float32)
    weights = rng.standard_normal((NUM_KERNEL_POINTS, channels, channels), np.float32) / channels
    kernel = kp.kernel_points(NUM_KERNEL_POINTS, KERNEL_RADIUS * voxel)
    neighbors = step("search", lambda: kp.radius_search(sub.points, None, RADIUS * voxel))

    def conv(features, weights):
        return kp.kpconv(sub.points, None, neighbors, features, weights, kernel, EXTENT * voxel)

    _, pullback = step("forward", lambda: kp.autodiff.vjp(conv, features, weights))
    step("backward", lambda: pullback(grad))
    level = Level(sub.points, sub.features, sub.labels, voxel, neighbors, tuple(seconds), _peak_memory())
    if number == 0:
        _check_voxel(finer.points, level)
    return level


def _check_voxel(points: np.ndarray, level: Level) -> None:
    """Print one line on stderr if the voxel size seems to be in another unit than the file."""
    if len(points) < 50 or not np.ptp(points, axis=0).any():
        return
    if len(level.points) < 8:
        outcome = f"leaves {len(level.points)} of {len(points):,} points"
    elif level.mean_neighbors < 4:
        outcome = f"leaves {level.mean_neighbors:.1f} neighbours per point, itself included"
    else:
        return
    print_line(f"kpcore: --voxel {level.voxel:g} {outcome}; is it in the file's unit?{_suggestion(points)}", sys.stderr)


def _suggestion(points: np.ndarray) -> str:
    """Advice with the largest voxel size of 1, 2, 5, 10, ... that leaves a third of the points, or 20,000."""
    size = float(np.ptp(points.astype(np.float64), axis=0).max())
    power = math.floor(math.log10(size)) if size > 0 else 0
    for voxel in (digit * 10.0**exponent for exponent in range(power, power - 5, -1) for digit in (5, 2, 1)):
        if len(kp.grid_subsample(points, voxel).points) >= min(len(points) / 3, 20_000):
            return f" Try --voxel {voxel:g}"
    return ""


def _patch(level: Level) -> Patch:
    """The least flat of 500 neighbourhoods, as a corner shows more of a kernel than a wall."""
    from kpcore.picture import Patch

    starts, index = level.neighbors.row_splits, level.neighbors.index
    counts = np.diff(starts)
    full = np.flatnonzero(counts >= np.median(counts))
    largest, chosen = -1.0, 0
    for query in full[:: len(full) // 500 + 1]:
        offsets = level.points[index[starts[query] : starts[query + 1]]] - level.points[query]
        thickness = np.linalg.svd(offsets - offsets.mean(axis=0), compute_uv=False)[-1] / len(offsets) ** 0.5
        if thickness > largest:
            largest, chosen = thickness, query
    offsets = level.points[index[starts[chosen] : starts[chosen + 1]]] - level.points[chosen]
    kernel = kp.kernel_points(NUM_KERNEL_POINTS, KERNEL_RADIUS * level.voxel)
    caption = f"{len(offsets)} within {RADIUS} voxels (dashed), {NUM_KERNEL_POINTS} kernel points of extent {EXTENT}"
    return Patch.with_linear_influence(offsets, kernel, RADIUS * level.voxel, EXTENT * level.voxel, caption)


def _table(levels: Sequence[Level], channels: int) -> None:
    say("")
    say(f"KPConv, {NUM_KERNEL_POINTS} kernel points, {channels} -> {channels} channels, float32, times in ms")
    say(HEADER)
    for number, level in enumerate(levels):
        rate = len(level.points) / sum(level.seconds) / 1e6
        times = [1000 * seconds for seconds in level.seconds]
        say(ROW.format(number, level.voxel, len(level.points), level.mean_neighbors, *times, rate, level.peak))
    say("M points/s: the level's points over all four steps, each run once and cold; peak MB: of the process so far")
    say("")


def _peak_memory() -> float:
    """Peak memory in MB. VmHWM of Linux belongs to the program; ru_maxrss also counts the shell that started it.
    NaN on Windows, which has neither."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024
    except (OSError, IndexError):
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << 20 if sys.platform == "darwin" else 1 << 10)
