"""What a trained network has learned: effective receptive fields in a scan, and inputs that maximise a feature.

The commands `kpcore erf` and `kpcore features`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import kpcore as kp
from kpcore import receptive_field
from kpcore.files import replacing
from kpcore.io import ReadError
from kpcore.pipeline import batches
from kpcore.pipeline.classification import objects_of_files
from kpcore.pipeline.data import digit_scene, read_cloud, read_idx, scene_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kpcore import visualization
    from kpcore.picture import Patch
    from kpcore.pipeline.batches import Batch, Sphere
    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.model import Model

__all__ = ["Input", "ReceptiveField", "draw_features", "draw_fields", "field_at", "kernels_at", "maximizing_inputs",
           "middle_point", "nearest_point", "point_field", "scene_of_file", "scenes_of_files"]  # fmt: skip


class ReceptiveField(NamedTuple):
    """The effective receptive field of one output in a scene."""

    center: np.ndarray  #: (D,) the position of the output
    sphere: Sphere  #: the input
    values: np.ndarray  #: (n,) of the points of the sphere, see `kpcore.effective_receptive_field`
    size: float  #: `kpcore.receptive_field_size`, in voxels
    radius: float  #: `kpcore.receptive_field_radius`, with 95 % of the mass
    deviations: np.ndarray  #: (D,) standard deviations along the axes, the roots of `kpcore.receptive_field_moments`
    predicted: int  #: the class number that the network finds there


def scene_of_file(model: Model, path: str | os.PathLike[str]) -> Scene:
    """The Scene of a scan, labelled or not."""
    return scene_of(model.settings, model.columns, read_cloud(model.settings, path, labelled=False))


def scenes_of_files(model: Model, paths: Sequence[Path]) -> tuple[list[Scene], list[str]]:
    """Scenes of scans or objects and their names; for a network of digits those of all images with ink in idx files."""
    if model.settings.data.kind == "objects":
        scenes = objects_of_files(model, paths)
        return scenes, [scene.name for scene in scenes]
    if not model.settings.digits:
        return [scene_of_file(model, path) for path in paths], [path.name for path in paths]
    scenes, names = [], []
    for path in paths:
        images = read_idx(path)
        if images.ndim != 3:
            raise ReadError(f"{path}: expected images (N, H, W), got {images.shape}")
        with_ink = np.flatnonzero(images.any(axis=(1, 2)))
        scenes += [digit_scene(model.columns, images[number]) for number in with_ink]
        names += [f"{path.name} {number}" for number in with_ink]
    return scenes, names


def middle_point(scene: Scene) -> np.ndarray:
    """The point of a scene that is nearest to the middle of its points."""
    middle = scene.points.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)
    return scene.points[scene.tree.knn_search(middle, 1).index[0]]


def nearest_point(model: Model, scene: Scene, position: np.ndarray) -> np.ndarray:
    """The point of a scene at a position (D,); an error if none is within the diagonal of a voxel."""
    if not np.isfinite(position).all():
        raise ValueError("expected finite coordinates")
    nearest = scene.tree.knn_search(position[None].astype(np.float32), 1, return_distances=True)
    limit = math.sqrt(scene.points.shape[1]) * model.settings.network.voxel_size
    if (distance := float(nearest.distance[0])) > limit:
        raise ValueError(f"expected a position on the scan, within {limit:.4g} of a point, got one {distance:.4g} away")
    return scene.points[nearest.index[0]]


def field_at(model: Model, scene: Scene, center: np.ndarray, level: int | None = None, *, radius: float | None = None,
             detach_offsets: bool = False) -> ReceptiveField:  # fmt: skip
    """The effective receptive field at a point of a scene, in a sphere around it as in training, or of a `radius`.

    It is that of the logit of the class that the network finds there; or with `level` that of the output of the last
    block of the encoder on this level, at its point that is nearest to the centre, summed over all channels.
    """
    sphere, batch = _input_at(model, scene, center, radius)
    nearest = [_nearest(batch.pyramid[number].points) for number in (0, level or 0)]

    def logits(features):
        inputs = model.params, model.state, batch.pyramid, features
        return model.net(kp, *inputs, detach_offsets=detach_offsets).logits

    def activations(features):
        return _activations(model, batch, features, detach_offsets=detach_offsets)[level]

    predicted = int(logits(batch.features)[nearest[0]].argmax())
    fn, channels = (logits, [predicted]) if level is None else (activations, None)
    fields = kp.effective_receptive_field(fn, batch.features, nearest[1:], channels=channels)
    points, place = batch.pyramid[0].points, batch.pyramid[level or 0].points[nearest[1:]]
    return ReceptiveField(
        center + place[0], sphere, fields[0], receptive_field.receptive_field_size(fields)[0],
        receptive_field.receptive_field_radius(fields, place, positions=points)[0],
        np.sqrt(receptive_field.receptive_field_moments(fields, positions=points)[0]), predicted,
    )  # fmt: skip


def kernels_at(model: Model, scene: Scene, center: np.ndarray) -> list[Patch]:
    """The kernel of the last deformable convolution at its query nearest to a point, at rest and deformed.

    Empty for a network without deformable convolutions. Shown is the linear influence, whichever the network has.
    """
    from kpcore.picture import Patch

    _, batch = _input_at(model, scene, center)
    seen = [out for _, level, out in _observed(model, batch, batch.features) if level is None]
    if not seen:
        return []
    kernels = seen[-1]
    points, queries, lists = kernels.where
    queries = points if queries is None else queries
    row = _nearest(queries)
    neighbors = points[lists.index[lists.row_splits[row] : lists.row_splits[row + 1]]] - queries[row]
    radius = float(np.linalg.norm(neighbors, axis=1).max(initial=0))
    rest = kernels.kernel_points
    return [
        Patch.with_linear_influence(neighbors, kernel, radius, kernels.extent, words)
        for words, kernel in (("at rest", rest), ("deformed", rest + kernels.offsets[row]))
    ]


class Input(NamedTuple):
    """An input that maximises a feature, and the activation of the feature on its points."""

    name: str  #: of the scene
    center: np.ndarray  #: (D,) of the sphere
    points: np.ndarray  #: (n, D) relative to the centre
    activation: np.ndarray  #: (n,) of each point, that of the nearest point of the level


def maximizing_inputs(model: Model, scenes: Sequence[Scene], names: Sequence[str], levels: Sequence[int], *,
                      channels: Sequence[int] | None = None, num_channels: int = 4, num_inputs: int = 2,
                      watch: Callable[[float], object] | None = None
                      ) -> dict[tuple[int, int], list[Input]]:  # fmt: skip
    """The inputs in which features of the encoder are largest, by (level, channel), the largest first.

    Inputs are spheres that cover the scenes, or whole digits or objects; a feature is a channel of the last block on a
    level, and as large as its largest value on a point that a sphere would vote for. Spheres of a feature are at least
    a radius apart. Without `channels` those are chosen that are largest in standard deviations above their mean over
    all inputs: the most selective ones.
    """
    training, classifies = model.settings.training, model.settings.classifies
    levels = [*dict.fromkeys(levels)]
    spheres = [batches.whole_scene(scenes, i) for i in range(len(scenes))] if classifies else _covering(model, scenes)
    largest: dict[int, list[np.ndarray]] = {level: [] for level in levels}

    def make(sphere: Sphere) -> Batch:
        return batches.make_batch(model.net, scenes, model.columns, [sphere])

    for number, batch in enumerate(batches.Prefetched(spheres, make, training.workers)):
        outputs = _activations(model, batch, batch.features)
        for level in levels:
            distance = np.linalg.norm(batch.pyramid[level].points, axis=1)
            votes = distance <= (math.inf if classifies else training.vote_radius * training.radius)
            if channels is not None and max(channels) >= (width := outputs[level].shape[1]):
                raise ValueError(f"channels: expected numbers below {width} on level {level}, got {max(channels)}")
            largest[level].append(outputs[level][votes].max(axis=0, initial=-np.inf))
        if watch:
            watch((number + 1) / len(spheres))

    chosen = {}
    for level in levels:
        maxima = np.array(largest[level])
        for channel in _selective(maxima, num_channels) if channels is None else channels:
            order = np.argsort(-maxima[:, channel], kind="stable")
            apart = _apart([spheres[i] for i in order], 0 if classifies else training.radius, num_inputs)
            chosen[level, channel] = [
                _projected(model, make(sphere), level, channel, names[sphere.scene]) for sphere in apart
            ]
    return chosen


def _covering(model: Model, scenes: Sequence[Scene]) -> list[Sphere]:
    """Spheres that cover all points of scenes, drawn as for votes."""
    sampler = batches.Potentials(scenes, model.settings.training.radius, np.random.default_rng(0), move=False)
    spheres = []
    while sampler.lowest < 1e-3:  # potentials begin below this
        spheres.append(sampler.next())
    return spheres


def _selective(maxima: np.ndarray, number: int) -> list[int]:
    """The channels whose largest value is the most standard deviations above their mean over inputs, (inputs, C)."""
    finite = maxima[np.isfinite(maxima).all(axis=1)]
    deviation = finite.std(axis=0)
    selectivity = (finite.max(axis=0) - finite.mean(axis=0)) / np.where(deviation > 0, deviation, np.inf)
    return np.argsort(-selectivity, kind="stable")[:number].tolist()


def _apart(spheres: Sequence[Sphere], distance: float, number: int) -> list[Sphere]:
    """The first `number` spheres that are at least a distance from all earlier ones of the same scene."""
    kept: list[Sphere] = []
    for sphere in spheres:
        if len(kept) < number and all(
            sphere.scene != other.scene or np.linalg.norm(sphere.center - other.center) >= distance for other in kept
        ):
            kept.append(sphere)
    return kept


def _projected(model: Model, batch: Batch, level: int, channel: int, name: str) -> Input:
    values = _activations(model, batch, batch.features)[level][:, channel]
    points = batch.pyramid[0].points
    nearest = kp.knn_search(batch.pyramid[level].points, points, 1).index
    return Input(name, batch.spheres[0].center, points, values[nearest])


def _input_at(model: Model, scene: Scene, center: np.ndarray, radius: float | None = None) -> tuple[Sphere, Batch]:
    """The sphere around a point of a scene, with the radius of the settings by default, as an input."""
    sphere = batches.sphere_at([scene], 0, center, radius or model.settings.training.radius)
    return sphere, batches.make_batch(model.net, [scene], model.columns, [sphere])


def _nearest(points: np.ndarray) -> int:
    """The row of the point that is nearest to the centre of a sphere, which is the origin of its points."""
    return int(np.linalg.norm(points, axis=1).argmin())


def _activations(model: Model, batch: Batch, features: Any, *, detach_offsets: bool = False) -> Mapping[int, Any]:
    """The output of the last block of the encoder on each level."""
    observed = _observed(model, batch, features, detach_offsets=detach_offsets)
    return {level: out for name, level, out in observed if level is not None and name.startswith("encoder")}


def _observed(model: Model, batch: Batch, features: Any, **options: Any) -> list[tuple[str, int | None, Any]]:
    """What a pass through the network shows, see `kpcore.nn.Run`."""
    seen: list[tuple[str, int | None, Any]] = []
    run = model.net.new_run(kp, model.params, model.state, observe=lambda *what: seen.append(what), **options)
    model.net.compute_logits(run, batch.pyramid, features, None, *batch.options.values())
    return seen


# ---- pictures


def point_field(model: Model, scene: Scene, field: ReceptiveField, name: str,
                shown: float | None = None) -> visualization.PointField:  # fmt: skip
    """A field on the points of the file around it: each has the value of the nearest input point.

    Points within the distance `shown`; by default within twice the radius of the field.
    """
    from kpcore import visualization

    values, spacing = np.zeros(len(scene.points)), model.settings.network.voxel_size
    values[field.sphere.rows] = field.values
    shown = shown or max(2 * field.radius, 10 * spacing)
    near = np.flatnonzero(((scene.full - field.center) ** 2).sum(axis=1) <= shown**2)
    points, colors = scene.full[near], scene.cloud.colors
    place = " ".join(f"{value:.12g}" for value in np.round(field.center + scene.cloud.shift, 3))
    return visualization.PointField(
        points, None if colors is None else colors[near], values[scene.tree.knn_search(points, 1).index], field.center,
        _drawn_spacing(points, spacing), name, f"at {place}: 95 % of the mass within {field.radius:.3g}",
    )  # fmt: skip


def _drawn_spacing(points: np.ndarray, voxel: float) -> float:
    """The diameter of points in a picture: a voxel, or less where points of the file are much denser."""
    sample = points[:: max(1, len(points) // 1000)]
    nearest = kp.knn_search(points, sample, 5, return_distances=True)  # 4 others, as around a point of a square grid
    farthest = nearest.distance.reshape(len(sample), -1)[:, -1]
    return min(voxel, max(1.5 * float(np.median(farthest)), voxel / 8))


def draw_fields(path: Path, title: str, subtitle: str, model: Model, scene: Scene,
                fields: Sequence[ReceptiveField], theme: str = "dark") -> list[Path]:  # fmt: skip
    """Write a picture of fields and pages that the mouse turns, and a picture of deformed kernels; the paths of all.

    `title` names the scan and `subtitle` says of which outputs the fields are.
    """
    from kpcore import visualization

    names, up = model.settings.names, scene.cloud.up
    shown = [
        point_field(model, scene, field, f"{number}: {names[field.predicted]}")
        for number, field in enumerate(fields, 1)
    ]
    with replacing(path) as part:
        visualization.draw_point_fields(part, title, subtitle, shown, up, theme=theme)
    paths = [path]
    for number, (field, one) in enumerate(zip(fields, shown, strict=True), 1):
        paths.append(path.with_name(f"{path.stem}-{number}.html"))
        with replacing(paths[-1]) as part:
            visualization.write_html(part, replace(one, name=f"{title}, {subtitle}, {one.name}"), up)
        if patches := kernels_at(model, scene, field.center):
            paths.append(path.with_name(f"{path.stem}-{number}-kernel.png"))
            with replacing(paths[-1]) as part:
                visualization.draw_kernels(part, title, f"last deformable convolution, {one.name}", patches, up,
                                           theme=theme)  # fmt: skip
    return paths


def draw_features(path: Path, title: str, model: Model,
                  features: Mapping[tuple[int, int], Sequence[Input]], theme: str = "dark") -> None:  # fmt: skip
    """Write a picture of the activations on inputs, which are shown with z upwards."""
    from kpcore import visualization

    shown = [
        [
            visualization.Activation(
                one.points, one.activation, model.settings.network.voxel_size, f"level {level}, channel {channel}",
                f"{one.name}: {one.activation.min():.2f} to {one.activation.max():.2f}",
            )
            for one in inputs
        ]
        for (level, channel), inputs in features.items()
    ]  # fmt: skip
    visualization.draw_activations(path, title, "activations on the inputs that maximise them", shown, (0, 0, 1),
                                   cut=not model.settings.classifies, theme=theme)  # fmt: skip
