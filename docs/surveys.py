"""Shows that labels of a survey do not depend on tiles, threads, engines or interruptions: a table in Markdown.

    python docs/surveys.py [--model MODEL] [--side METRES] [--density POINTS]

Files of the made-up city, as one file, in 4 tiles, in 9 tiles and in 4 tiles with buffers, are labelled as a survey
with each engine, undisturbed and with --resume after the process was killed amid the work. Each row counts the points
of which the label or confidence differs from that in one file in memory, which should be 0.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import kpcore as kp
from kpcore import nn
from kpcore.pipeline import segmentation, tiled
from kpcore.pipeline.blocks import BlockSize
from kpcore.pipeline.data import Columns
from kpcore.pipeline.model import Model
from kpcore.pipeline.settings import from_dict
from kpcore.scenes import write_city

CORNER, BUFFER = (154_970.0, 462_985.0), 8.0  # metres
MOST_IN_GROUP = 8_000  # points: many groups, some of which are done when the process is killed
ENGINES = {
    "here, 1 thread": {"threads": 1}, "here, 2 threads": {"threads": 2}, "3 processes": {"workers": 3},
    "Dask, 3 workers": {"dask": "local:3"}, "ThreadPoolExecutor, 2 workers": {"executor": 2},
}  # fmt: skip
TILINGS = {"1 file": (1, 0.0), "4 tiles": (2, 0.0), "9 tiles": (3, 0.0), "4 tiles, buffers": (2, BUFFER)}


def random_model():
    """A network with random weights, the labels of which change with any change of their input."""
    settings = from_dict({
        "data": {"train": ["a.laz"], "classes": {"ground": [2], "building": [6], "vegetation": [5]},
                 "features": ["one", "height", "height_above_ground", "intensity"], "ground": {"window": 6.0}},
        "network": {"voxel_size": 1.0, "levels": 2, "width": 8, "kernel_size": 5}, "training": {"radius": 5.0},
    })  # fmt: skip
    net = settings.net()
    center = {name: 3.0 for name in settings.widths if name != "one"}
    columns = Columns(settings.widths, center, dict.fromkeys(center, 40.0))
    return Model(net, *net.init(0), settings, columns, BlockSize(20.0, 5.0))


def label(model, tiles, out, *, threads=None, executor=None, **options):
    """Label the tiles in a folder."""
    tiled._MOST_IN_GROUP = MOST_IN_GROUP
    if threads:
        kp.set_num_threads(threads)
    with ThreadPoolExecutor(executor or 1) as pool:
        options |= {"executor": pool} if executor else {}
        survey = tiled.segment_tiles(model, sorted(tiles.iterdir()), out, confidence=True, **options)
    if survey.failed:
        raise SystemExit(f"failed: {survey.failed}")


def labelled(paths):
    """(n, 7) coordinates, GPS time, return, confidence and label of each point, once, sorted."""
    clouds = [kp.io.read(path, fields=["gps_time", "return_number", "confidence"], exact=True) for path in paths]
    return np.unique(np.concatenate([
        np.column_stack([cloud.exact, *(cloud.fields[name] for name in ("gps_time", "return_number", "confidence")),
                         cloud.labels]) for cloud in clouds
    ]), axis=0)  # fmt: skip


def different(rows, expected):
    """The number of points that are in one of two arrays and not in the other."""
    together = len(np.unique(np.concatenate([rows, expected]), axis=0))
    return together - min(len(rows), len(expected))


def kill_amid(folder, tiling, engine, out):
    """Start to label in another process, and kill it after three groups."""
    process = subprocess.Popen([sys.executable, __file__, "--amid", folder, tiling, engine, out])
    while len([*out.glob(".segment*/groups/*.safetensors")]) < 3:
        if process.poll() is not None:
            raise SystemExit(f"the process ended with {process.returncode} before it was killed")
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a best.safetensors (default: a small random network)")
    parser.add_argument("--side", type=float, default=120.0, help="of the area in metres")
    parser.add_argument("--density", type=float, default=4.0, help="points in a square metre")
    parser.add_argument("--amid", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.amid:
        folder, tiling, engine, out = args.amid
        label(Path(folder, "model.safetensors"), Path(folder, tiling), Path(out), **ENGINES[engine])
        return
    with tempfile.TemporaryDirectory() as name:
        folder, high = Path(name), tuple(value + args.side for value in CORNER)
        model = Model.load(args.model) if args.model else random_model()
        nn.save(folder / "model.safetensors", model.net, model.params, model.state, **model.about())
        for tiling, (number, buffer) in TILINGS.items():
            write_city(folder / tiling, CORNER, high, density=args.density, tiles=(number, number), buffer=buffer)
        whole = next((folder / "1 file").iterdir())
        begin = time.perf_counter()
        segmentation.segment(Model.load(folder / "model.safetensors"), whole, folder / "whole.laz", confidence=True)
        seconds, expected = time.perf_counter() - begin, labelled([folder / "whole.laz"])
        print(f"{len(expected):,} points; one file in memory: {seconds:.1f} s\n")
        print("| | engine | resumed | points that differ | s |\n|---|---|---|---|---|", flush=True)
        wrong = 0
        for tiling in TILINGS:
            for engine, options in ENGINES.items():
                for is_resumed in (False, True):
                    out = folder / f"{tiling} {engine} {is_resumed}"
                    if is_resumed:
                        kill_amid(folder, tiling, engine, out)
                    begin = time.perf_counter()
                    label(folder / "model.safetensors", folder / tiling, out, resume=is_resumed, **options)
                    seconds = time.perf_counter() - begin
                    number = different(labelled(sorted(out.glob("*.la[sz]"))), expected)
                    wrong += number
                    how = "after kill -9" if is_resumed else "–"
                    print(f"| {tiling} | {engine} | {how} | {number:,} | {seconds:.1f} |", flush=True)
        sys.exit(f"{wrong:,} points differ" if wrong else 0)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
