"""The command `kpcore`: the main job on a real scan, timed and drawn."""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kpcore as kp
from kpcore import scenes
from kpcore.scenes.readers import require

NUM_KERNEL_POINTS = 15
RADIUS, KERNEL_RADIUS, EXTENT = 2.5, 0.66 * 2.5, 1.2  # in voxels, as published
HEADER = "level     voxel      points  neighbours   subsample    search   forward  backward   M points/s   peak MB"
ROW = "{:>5}{:>10.4g}{:>12,}{:>12.1f}{:>12.1f}{:>10.1f}{:>10.1f}{:>10.1f}{:>13.2f}{:>10,}"


def main(argv=None):
    """The console script: returns 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except (scenes.ReadError, Refused, ModuleNotFoundError) as error:
        print(f"kpcore: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class Refused(ValueError):
    """The options cannot be carried out."""


def _parser():
    def length(text):
        value = float(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a positive length, got {text}")
        return value

    def up_to(most):
        def number(text):
            value = int(text)
            if not 1 <= value <= most:
                raise argparse.ArgumentTypeError(f"expected 1 to {most}, got {text}")
            return value

        return number

    parser = argparse.ArgumentParser(prog="kpcore", description="The numerical core of point convolutions.")
    parser.add_argument("--version", action="version", version=f"kpcore {kp.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="subsample, search and convolve a scan, level by level; a table and a picture",
        description="Reads a scan, or makes a furnished flat of a million points; level by level subsamples it, "
        "searches neighbours and runs a KPConv forward and backward; prints a table and writes a picture.",
    )
    demo.add_argument("file", nargs="?", metavar="FILE", help="PLY, PCD, LAS, LAZ, NPY, NPZ, XYZ, TXT, CSV, KITTI BIN")
    demo.add_argument("--voxel", type=length, default=0.04, help="voxel of level 0 in the file's unit (default 0.04)")
    demo.add_argument("--levels", type=up_to(12), default=5, help="each of twice the voxel (default 5)")
    demo.add_argument("--channels", type=up_to(1024), default=64, help="channels in and out (default 64)")
    demo.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the picture goes (default here)")
    demo.set_defaults(run=_demo)
    commands.add_parser("config", help="version, instruction set, threads").set_defaults(run=lambda _: kp.show_config())
    return parser


def _demo(args):
    tqdm, _ = require("tqdm", "io").tqdm, require("matplotlib", "plot")
    from kpcore import picture

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {args.out}: {error.strerror}") from None
    cloud = scenes.read(args.file) if args.file else scenes.indoor()
    name, stem = (Path(args.file).name, Path(args.file).stem) if args.file else ("indoor scene", "indoor")
    about = _about(cloud)
    print(f"{name}: {about}")
    if cloud.left_out:
        print(f"left out: {cloud.left_out:,} points with NaN or infinite coordinates")
    if cloud.shift.any():
        print(f"subtracted in float64: {' '.join(f'{value:.0f}' for value in cloud.shift)}")

    levels = []
    style = {"bar_format": "{desc:20}{bar:40}{percentage:4.0f} %", "leave": False, "ncols": 72, "nrows": 24}
    with tqdm(desc="level 0", total=4 * args.levels + 1, disable=None, **style) as bar:
        for number in range(args.levels):
            levels.append(_level(number, levels[-1] if levels else cloud, args, bar))
        bar.set_description_str("picture")
        path = args.out / f"kpcore-{stem}.png"
        panels = [
            (
                level.points,
                level.colors,
                level.voxel,
                f"level {number} · voxel {level.voxel:.4g}",
                f"{len(level.points):,} points · {level.mean_neighbors:.1f} neighbours",
            )
            for number, level in enumerate(levels)
        ]
        try:
            picture.draw(path, name, about, cloud, panels, _patch(levels[0]))
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}") from None
        bar.update()
    _table(levels, args.channels)
    print(f"picture: {path}")


def _about(cloud):
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
    peak: int  # MB of memory so far

    @property
    def mean_neighbors(self):
        return self.neighbors.num_pairs / len(self.points)


def _level(number, finer, args, bar):
    """The main job on one level: its points from the finer level's, their neighbours, a KPConv and its gradients."""
    voxel = args.voxel * 2**number
    seconds = []

    def step(name, job):
        bar.set_description_str(f"level {number}: {name}")
        start = time.perf_counter()
        result = job()
        seconds.append(time.perf_counter() - start)
        bar.update()
        return result

    colors = None if finer.colors is None else finer.colors.astype(np.float32)
    try:
        sub = step("subsample", lambda: kp.grid_subsample(finer.points, voxel, features=colors, labels=finer.labels))
    except ValueError as error:  # more voxels along an axis than their keys have room for
        raise Refused(f"--voxel {args.voxel:g}: {error}{_try(finer.points)}") from None
    rng = np.random.default_rng(number)
    channels = args.channels
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
        _check_voxel(finer.points, level, bar)
    return level


def _check_voxel(points, level, bar):
    """One line on stderr where the voxel and the unit of the file hardly fit each other."""
    if len(points) < 50 or not np.ptp(points, axis=0).any():
        return
    if len(level.points) < 8:
        outcome = f"leaves {len(level.points)} of {len(points):,} points"
    elif level.mean_neighbors < 4:
        outcome = f"leaves a point {level.mean_neighbors:.1f} neighbours, itself included"
    else:
        return
    bar.write(f"kpcore: --voxel {level.voxel:g} {outcome}; is it in the file's unit?{_try(points)}", file=sys.stderr)


def _try(points):
    """The largest of 1, 2, 5, 10, ... that leaves a third of the points, or 20,000."""
    size = float(np.ptp(points.astype(np.float64), axis=0).max())
    power = math.floor(math.log10(size)) if size > 0 else 0
    for voxel in (digit * 10.0**exponent for exponent in range(power, power - 5, -1) for digit in (5, 2, 1)):
        if len(kp.grid_subsample(points, voxel).points) >= min(len(points) / 3, 20_000):
            return f" Try --voxel {voxel:g}"
    return ""


def _patch(level):
    """Of 500 neighbourhoods, the one that is least flat: a corner says more about a kernel than a wall."""
    from kpcore.picture import Patch

    starts, index = level.neighbors.row_splits, level.neighbors.index
    counts = np.diff(starts)
    full = np.flatnonzero(counts >= np.median(counts))
    best, chosen = -1.0, 0
    for query in full[:: len(full) // 500 + 1]:
        offsets = level.points[index[starts[query] : starts[query + 1]]] - level.points[query]
        thickness = np.linalg.svd(offsets - offsets.mean(axis=0), compute_uv=False)[-1] / len(offsets) ** 0.5
        if thickness > best:
            best, chosen = thickness, query
    offsets = level.points[index[starts[chosen] : starts[chosen + 1]]] - level.points[chosen]
    kernel = kp.kernel_points(NUM_KERNEL_POINTS, KERNEL_RADIUS * level.voxel)
    distance = np.linalg.norm(offsets[:, None] - kernel, axis=2)
    influence = np.maximum(0, 1 - distance / (EXTENT * level.voxel))
    caption = f"{len(offsets)} within {RADIUS} voxels (dashed), {NUM_KERNEL_POINTS} kernel points of extent {EXTENT}"
    return Patch(offsets, kernel, influence, RADIUS * level.voxel, EXTENT * level.voxel, caption)


def _table(levels, channels):
    print()
    print(f"KPConv, {NUM_KERNEL_POINTS} kernel points, {channels} -> {channels} channels, float32, times in ms")
    print(HEADER)
    for number, level in enumerate(levels):
        rate = len(level.points) / sum(level.seconds) / 1e6
        times = [1000 * seconds for seconds in level.seconds]
        print(ROW.format(number, level.voxel, len(level.points), level.mean_neighbors, *times, rate, level.peak))
    print("M points/s: the level's points over all four steps, each run once and cold; peak MB: of the process so far")
    print()


def _peak_memory():
    """In MB. Linux keeps VmHWM per program; ru_maxrss would count the shell that started it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << 20 if sys.platform == "darwin" else 1 << 10)
