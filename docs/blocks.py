"""Makes the table of docs/labelling.md: the test scenes of trained models labelled by potentials and in blocks.

    python docs/blocks.py MODEL... [--data DIR] [--edge LENGTH]

For each way to label: mean IoU, accuracy of all points and of those near an edge of a block, and seconds.
"""

import argparse
import time
from pathlib import Path

import numpy as np

import kpcore as kp
from kpcore.pipeline import labelling, voting
from kpcore.pipeline.blocks import BlockSize
from kpcore.pipeline.data import coordinates, load


def near_edge(scene, side, length):
    """True for the points of a scene within a length of an edge between two blocks."""
    places = coordinates(scene.cloud, scene.rows)[:, :2] % side
    return (np.minimum(places, side - places) < length).any(axis=1)


def row(model, scenes, name, edge, *, mode, side=None, halo=None, lattices=1):
    """Print the row of one way to label."""
    if side:
        model.block_size = BlockSize(side, halo, lattices)
    begin = time.perf_counter()
    labels = [labelling.labels_of(model, scene, mode=mode) for scene in scenes]
    seconds = time.perf_counter() - begin
    true = np.concatenate([scene.full_labels for scene in scenes])
    predicted, counted = np.concatenate(labels), true >= 0
    scores = voting.scores(voting.confusion(true, predicted, len(model.classes)), model.classes)
    accuracy = "–"
    if side:
        near = np.concatenate([near_edge(scene, side, edge) for scene in scenes]) & counted
        if near.any():
            accuracy = f"{(true == predicted)[near].mean():.4f}"
    print(f"| {name} | {scores['miou']:.4f} | {scores['accuracy']:.4f} | {accuracy} | {seconds:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--edge", type=float, default=2.0)
    args = parser.parse_args()
    for path in args.models:
        model = kp.load_model(path)
        scenes = load(model.settings, model.settings.data.test, args.data, model.columns)[0]
        radius, (side, halo, _) = model.settings.training.radius, model.block_size
        print(f"\n{path}: {sum(len(scene.full) for scene in scenes):,} points, radius {radius:g}\n")
        print(f"| | mIoU | accuracy | within {args.edge:g} of an edge | s |\n|---|---|---|---|---|")
        row(model, scenes, "potentials", args.edge, mode="potentials")
        row(model, scenes, "one pass over the whole", args.edge, mode="blocks", side=1e5, halo=0.0)
        sizes = [(side, halo), *((radii * radius, share * radius) for radii in (8, 4) for share in (1.0, 0.5))]
        for side, halo in dict.fromkeys(sizes):
            for lattices in (1, 2):
                name = f"blocks of {side:g}, halo {halo:g}, {lattices} lattice{'s' * (lattices > 1)}"
                row(model, scenes, name, args.edge, mode="blocks", side=side, halo=halo, lattices=lattices)


if __name__ == "__main__":
    main()
