"""Measures labelling surveys that need not fit into memory, with targets: ``python bench/run.py scale``.

The surveys are boxes of one procedural city (`kpcore.scenes.write_city`), about 13 points per square metre, in LAZ
files that are in the page cache where they fit. The network is a KP-FCNN of the size of `docs/ahn3.toml`, trained for
some steps, so that its labels are not all the same. What is measured is the command, as a user calls it, from its start
to its end: ``kpcore segment MODEL FILE... --out DIR --memory 3GB``. The peak is the sum of the peaks of resident memory
of the command's process and of all its workers, which need not be at the same time; mapped files count.

Dense torch evaluates the same network on the pyramids of the same blocks: its time is that of the network alone. The
command's also has reading, writing, subsampling, the search of neighbours and the start of the process.

The full size takes some hours, 5 GB of disk for the files and 10 GB while they are labelled.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peers

import kpcore as kp
from kpcore import io, scenes

SIZES = {
    "full": {"points": 10_000_000, "large": 100_000_000, "workers": 4_000_000, "dense": 1_000_000, "rounds": 1},
    "quick": {"points": 40_000, "large": 120_000, "workers": 40_000, "dense": 40_000, "rounds": 1},
}
NETWORKS = {
    "full": {"voxel_size": 0.5, "levels": 4, "width": 32},
    "quick": {"voxel_size": 1.0, "levels": 2, "width": 8},
}
TASKS = {"growing": [{}], "tilings": [{}], "dense": [{}], "workers": [{}]}
# {(case, what, order, against): target}
TARGETS = {
    ("growing", "time per point", "", "a tenth of the points"): ("<=", 1.15),
    ("growing", "peak of all processes", "", None): ("<=", 3),
    ("growing", "reading and writing", "", "the time of all workers"): ("<=", 25),
    ("tilings", "4 files", "", "one file"): ("<=", 1.1),
    ("tilings", "9 files", "", "one file"): ("<=", 1.1),
    ("tilings", "9 files with buffers of 20 m", "", "one file"): ("<=", 1.1),
    ("dense", "segment", "", "dense torch"): (">=", 6),
    ("workers", "two Dask workers", "", "one Dask worker"): (">=", 1.8),
}
MEMORY = "3GB"
LOW, DENSITY = np.array([155_000.0, 463_000.0]), 12.0
POINTS_PER_SQUARE_METRE = 13.2  # of the city at this density
MODEL = "city.safetensors"
LARGEST_FILE = 12_000_000  # points
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "KPCORE_NUM_THREADS")


def prepare(folder, size):
    """Train the network on another city than those that are labelled."""
    from kpcore.pipeline.settings import from_dict
    from kpcore.pipeline.training import Training

    quick = size["points"] < 1e6
    (file,) = scenes.write_city(folder / "train.laz", LOW, LOW + (60 if quick else 320), density=DENSITY, seed=1)
    features = ["one", "height_above_ground", "intensity", "return_number", "number_of_returns"]
    classes = {"ground": [2], "vegetation": [5], "building": [6], "wire": [14, 15], "car": [64]}
    settings = from_dict({
        "data": {"train": [file.name], "features": features, "classes": classes, "may_be_empty": ["wire"]},
        "network": NETWORKS["quick" if quick else "full"],
        "training": {"radius": 6.0 if quick else 15.0, "batch_points": 4000 if quick else 20_000, "epochs": 1,
                     "steps": 3 if quick else 40, "optimizer": "adamw", "lr": 0.004},
        "blocks": {"side": 24.0 if quick else 120.0},
    })  # fmt: skip
    Training(settings, folder / "run", folder).run()
    shutil.copy(folder / "run" / "best.safetensors", folder / MODEL)


def survey(bench, points, tiles=1, buffer=0.0):
    """The files of a survey of about so many points, in tiles x tiles files."""
    folder = bench.folder / f"{points}-{tiles}-{buffer:g}"
    if not folder.exists():
        high = LOW + np.round((points / POINTS_PER_SQUARE_METRE) ** 0.5, 1)
        scenes.write_city(folder, LOW, high, tiles=(tiles, tiles), buffer=buffer, density=DENSITY)
    return sorted(folder.iterdir())


class Run(NamedTuple):
    """What the command did."""

    seconds: float
    peak: int  #: bytes
    disk: int  #: bytes under `out`, with the scratch folder, at most
    summary: dict
    out: Path


def segment(bench, files, *options):
    """Run the command; an error if it fails."""
    from run import kilobytes

    out = bench.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-P", "-m", "kpcore", "segment", bench.folder / MODEL, *files, "--out", out]
    command += ["--together", "--memory", MEMORY, "--json", *options]
    environment = {name: value for name, value in os.environ.items() if name not in THREADS}
    peaks, disk, looked = {}, 0, 0.0
    with (bench.folder / "json").open("w") as json_file, (bench.folder / "errors").open("w") as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*map(str, command)], env=environment, stdout=json_file, stderr=errors, cwd=bench.folder
        )
        while process.poll() is None:
            for pid in processes(process.pid):
                try:
                    peaks[pid] = 1024 * kilobytes(f"/proc/{pid}/status", "VmHWM")
                except (OSError, StopIteration):  # it has ended
                    continue
            if time.perf_counter() > looked + 0.5:
                disk, looked = max(disk, occupied(out)), time.perf_counter()
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
    if process.returncode:
        lines = (bench.folder / "errors").read_text().strip().splitlines() or ["no message"]
        raise RuntimeError(f"kpcore segment ended with {process.returncode}: {lines[-1]}")
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["failed"], summary["failed"]
    return Run(seconds, sum(peaks.values()), disk, summary, out)


def processes(pid):
    """A process and those that it has started, and so on."""
    tree = [pid]
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            tree += [one for child in (thread / "children").read_text().split() for one in processes(int(child))]
    except OSError:  # it has ended
        pass
    return tree


def occupied(folder):
    """Bytes of the disk that the files in a folder take."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += 512 * file.lstat().st_blocks
        except OSError:  # it has been removed
            continue
    return total


def times(runs):
    seconds = sorted(run.seconds for run in runs)
    return {"median": seconds[len(seconds) // 2], "min": seconds[0], "max": seconds[-1], "samples": seconds}


def labels_by_point(out):
    """The labels of all points, in an order of coordinates, GPS time and return, each point once."""
    parts = [io.read(file, fields=("gps_time", "return_number"), exact=True) for file in sorted(out.glob("*.laz"))]
    keys = [np.concatenate([part.exact[:, axis] for part in parts]) for axis in range(3)]
    keys += [np.concatenate([part.fields[name] for part in parts]) for name in ("gps_time", "return_number")]
    labels = np.concatenate([part.labels for part in parts])
    del parts
    order = np.lexsort([labels, *keys])
    labels, keys = labels[order], [key[order] for key in keys]
    same = np.ones(len(labels) - 1, bool)
    for key in keys:
        same &= key[1:] == key[:-1]
    assert (labels[1:] == labels[:-1])[same].all(), "copies of a point have different labels"
    return labels[np.append(True, ~same)]


def growing(bench):
    """Time and memory at ten times as many points."""
    sizes, per_point = bench.sizes, []
    for points in (sizes["points"], sizes["large"]):
        side = max(1, round((points / LARGEST_FILE) ** 0.5))
        files = survey(bench, points, side)
        run = segment(bench, files)
        summary, ours = run.summary, times([run])
        num = summary["points"]
        bench.label("", f"{num:,}")
        per_point.append(run.seconds / num)
        bench.row("points per second and core", num / run.seconds / bench.threads, "points", ours=ours)
        note = f"the command says {summary['peak_memory'] / 1e9:.2f}"
        bench.row("peak of all processes", run.peak / 1e9, "GB", note=note)
        note = f"{sum(file.stat().st_size for file in files) / num:.0f} of the files that are labelled"
        bench.row("disk until the end", run.disk / num, "bytes per point", note=note)
        seconds = summary["seconds"]
        moved = sum(seconds.get(name, 0) for name in ("tiling", "reading", "writing"))
        note = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        share = 100 * moved / (moved + seconds["labelling"])
        bench.row("reading and writing", share, "% of it", "the time of all workers", note=note)
        if points == sizes["large"]:
            bench.row("time per point", per_point[1] / per_point[0], "x its time", "a tenth of the points", ours=ours)
        shutil.rmtree(run.out)


def tilings(bench):
    """One survey in one file, and cut into 4 and 9, with and without buffers: the same labels, and the time."""
    surveys = {
        "one file": (1, 0.0),
        "4 files": (2, 0.0),
        "9 files": (3, 0.0),
        "9 files with buffers of 20 m": (3, 20.0),
    }
    runs, expected = {name: [] for name in surveys}, None
    for number in range(bench.sizes["rounds"]):
        for name, tiling in surveys.items():
            run = segment(bench, survey(bench, bench.sizes["points"], *tiling))
            runs[name].append(run)
            if number:
                continue
            labels = labels_by_point(run.out)
            if expected is None:
                expected = labels
                counts = np.unique(labels, return_counts=True)[1]
                assert len(counts) > 1, "expected several classes among the labels"
                bench.label("", f"{len(labels):,}")
            elif not np.array_equal(labels, expected):
                bench.row(name, against="one file", verdict="WRONG", note="its labels are others")
    theirs = times(runs.pop("one file"))
    for name, of_name in runs.items():
        ours = times(of_name)
        bench.row(name, ours["min"] / theirs["min"], "x its time", "one file", ours=ours, theirs=theirs)
    shutil.rmtree(of_name[0].out)


def dense(bench):
    """The whole command, against dense torch's inference of the same network on the same blocks."""
    if reason := peers.missing(peers.DENSE_NETWORK):
        bench.absent("segment", peers.DENSE_NETWORK.name, reason)
        return
    (file,) = survey(bench, bench.sizes["dense"])
    run = segment(bench, [file])
    num = run.summary["points"]
    bench.label("", f"{num:,}")
    pace = dense_seconds_per_point(bench.folder / MODEL, file)
    ours, theirs = times([run]), dict.fromkeys(("median", "min", "max"), pace * num) | {"samples": [pace * num]}
    note = f"{num / run.seconds / bench.threads:,.0f} points per second and core, {1 / pace / bench.threads:,.0f} of it"
    bench.row("segment", pace * num / run.seconds, "x faster", peers.DENSE_NETWORK.name, ours=ours, theirs=theirs,
              note=note)  # fmt: skip


def dense_seconds_per_point(model, file, blocks_of_lattice=4):
    """Seconds of dense inference for each labelled point, on some blocks of each lattice, after equal logits."""
    import torch

    from kpcore.pipeline import blocks
    from kpcore.pipeline.data import coordinates, reach_of, values_of

    model = kp.load_model(model)
    fields = ("intensity", "return_number", "number_of_returns")
    cloud = io.read(file, fields=fields, exact=True)
    rows = np.arange(len(cloud.points))
    ranks = blocks.ranks_of(coordinates(cloud), values_of(model.settings, cloud, rows))
    params, state = ({name: torch.from_numpy(value) for name, value in group.items()}
                     for group in (model.params, model.state))  # fmt: skip
    pace = 0.0
    for lattice in blocks.LATTICES[: model.block_size.lattices]:
        seconds = labelled = 0
        chosen = blocks.blocks_of(cloud, rows, model.block_size, reach_of(model.settings), ranks, lattice.shift)
        largest_first = sorted(chosen, key=lambda block: -block.inside.sum())
        for block in largest_first[:blocks_of_lattice]:
            block_input = blocks.input_of(model, cloud, block, lattice.angle)
            F, pyramid = peers.dense_network(block_input.pyramid)
            features = torch.from_numpy(block_input.features)
            expected = model.net(kp, model.params, model.state, block_input.pyramid, block_input.features).logits
            with torch.inference_mode():
                logits = model.net(F, params, state, pyramid, features).logits.numpy()
                np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
                begin = time.perf_counter()
                model.net(F, params, state, pyramid, features)
                seconds += time.perf_counter() - begin
            labelled += len(block_input.positions)
        pace += seconds / labelled
    return pace


def workers(bench):
    """Two workers of one core each, against one."""
    if importlib.util.find_spec("distributed") is None:
        bench.absent("two Dask workers", "one Dask worker", "distributed is not installed")
        return
    files = survey(bench, bench.sizes["workers"])
    for name, option in (("Dask worker", "--dask"), ("process", "--workers")):
        runs = [
            segment(bench, files, option, f"local:{number}" if option == "--dask" else number, "--threads", number)
            for number in (1, 2)
        ]
        bench.label("", f"{runs[0].summary['points']:,}")
        theirs, ours = (times([run]) for run in runs)
        plural = f"two {name}es" if name == "process" else f"two {name}s"
        bench.row(plural, theirs["median"] / ours["median"], "x faster", f"one {name}", ours=ours, theirs=theirs)
    shutil.rmtree(runs[-1].out)
