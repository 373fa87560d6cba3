"""Makes the pictures and the table of docs/receptive_field.md: ``python docs/receptive_fields.py [folder]``.

Three small KP-FCNNs are trained on the flats of the demo, three to six minutes each on two busy cores; their last three
convolutions are rigid, deformable, or have kernel offsets. Effective receptive fields are those of the features of the
fourth level, as in figure 7 of Thomas et al. 2019, in a flat that the networks have not seen. Features that inputs
maximise, as in its figure 6, are of the rigid network. With a folder, networks are kept there and read from there.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import kpcore as kp
from kpcore import demo, visualization
from kpcore.pipeline import inspection, labelling, voting
from kpcore.pipeline.data import load
from kpcore.pipeline.settings import from_dict
from kpcore.pipeline.training import BEST, Model, Training
from kpcore.scenes.indoor import CHAIR, FLOOR

KINDS = {"rigid": {}, "deformable": {"deformable": 3}, "kernel offsets": {"resampled": 3}}
STEPS, LEVEL, POSITIONS = 1100, 3, 40
RADIUS = 3.0  # of the input spheres in metres; those of training, 1.5, would cut off fields of deformable convolutions
SHOWN = {"chair": (-3.7, 3.1, 0.45), "floor": (-9.1, 2.0, 0.0)}  # of the floor 1.6 m from anything
FEATURES = {0: (6, 19), 2: (9, 16, 20, 31)}  # level: channels


def trained(kind, folder):
    """The Model of a kind, from the folder if it is there."""
    out = folder / kind.replace(" ", "_")
    if not (out / BEST).exists():
        network = {"voxel_size": 0.04, "levels": 4, "width": 32} | KINDS[kind]
        training = demo.TRAINING["training"] | {"steps": STEPS}
        Training(from_dict(demo.TRAINING | {"network": network, "training": training}), out, out).run()
    return Model.load(out / BEST)


def measured(model, scene, label, detach_offsets=False):
    """(radius, size in voxels, share of the mass on points with a label, share of the points within the radius).

    Means over points that have the label.
    """
    rows = np.random.default_rng(0).choice(np.flatnonzero(scene.labels == label), POSITIONS, replace=False)
    values = []
    for row in rows:
        field = inspection.field_at(
            model, scene, scene.points[row], LEVEL, radius=RADIUS, detach_offsets=detach_offsets
        )
        points, has_label = scene.points[field.sphere.rows], scene.labels[field.sphere.rows] == label
        share = kp.receptive_field_share(field.values[None], has_label)[0]
        near = np.linalg.norm(points - field.center, axis=1) <= field.radius
        values.append((field.radius, field.size, share, has_label[near].mean()))
    return np.mean(values, axis=0)


def main(folder):
    shown = []
    print("| network | mIoU | at a point of | radius (m) | size (voxels) | mass on the class | points of the class |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        model = trained(kind, Path(folder))
        (scene,), _ = load(model.settings, [demo.UNSEEN], ".", model.columns)
        miou = voting.scores(labelling.evaluate(model, [scene]), model.settings.names)["miou"]
        for detach_offsets in (False, True)[: 1 + (kind != "rigid")]:
            for label in (CHAIR, FLOOR):
                radius, size, mass, points = measured(model, scene, label, detach_offsets)
                words = f"{kind}, constant offsets" if detach_offsets else kind
                print(f"| {words} | {miou:.3f} | {model.settings.names[label]} | {radius:.2f} | {size:.1f} | "
                      f"{100 * mass:.0f} % | {100 * points:.0f} % |", flush=True)  # fmt: skip
        for name, position in SHOWN.items():
            center = inspection.nearest_point(model, scene, np.array(position))
            field = inspection.field_at(model, scene, center, LEVEL, radius=RADIUS)
            shown.append(inspection.point_field(model, scene, field, f"{name}, {kind}", shown=1.9))
        if kind == "rigid":
            draw_features(model, scene)
    path = Path(__file__).with_name("receptive_fields.png")
    words = "Effective receptive fields", "features of the fourth level at a point of a chair and of the floor"
    visualization.draw_point_fields(path, *words, shown, up=(0, 0, 1), across=2)
    make_small(path, 1120)


def draw_features(model, scene):
    path, chosen = Path(__file__).with_name("features.png"), {}
    for level, channels in FEATURES.items():
        chosen |= inspection.maximizing_inputs(model, [scene], ["unseen flat"], [level], channels=channels)
    inspection.draw_features(path, "Features of the first and the third level", model, chosen)
    make_small(path, 1200)


def make_small(path, width):
    image = Image.open(path)
    image.thumbnail((width, 10 * width))
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
