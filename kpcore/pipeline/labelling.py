"""Class labels of a cloud's points by a trained network, in blocks or by votes of spheres, and their scores."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.backends import checks
from kpcore.config import KpcoreWarning
from kpcore.pipeline import blocks, statistics, voting
from kpcore.pipeline.data import cloud_scene, part_scene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import ArrayLike

    from kpcore.io import Cloud
    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.model import Model
    from kpcore.pipeline.voting import Scores

METHODS = ("blocks", "potentials")


class Labelled(NamedTuple):
    """The classes of a cloud's points."""

    classes: np.ndarray  #: (N,) class numbers
    confidence: np.ndarray  #: (N,) float32, the probability of the class
    probabilities: np.ndarray | None  #: (N, classes) float32, if they were asked for
    warnings: list[str]  #: why they are not to be trusted
    notes: list[str]  #: how they were computed, where it is not the usual way


def chosen_method(model: Model, mode: str | None = None, votes: int | None = None) -> tuple[str, list[str]]:
    """(method, why in a line, if it is not the usual one); an error if the model does not have it."""
    votes = votes if mode == "blocks" else votes or model.settings.training.votes
    if mode is not None:
        checks.choice("mode", mode, METHODS)
    has_local = "local" in model.settings.data.features
    if mode == "blocks" and has_local:
        raise ValueError("mode: expected potentials for a model with the feature local, got blocks: coordinates "
                         "relative to the centre are larger there than in any sphere of the training")  # fmt: skip
    if mode == "blocks" and votes:
        raise ValueError(f"votes: expected none with blocks, where each point gets one, got {votes}")
    if mode is None and has_local:
        return "potentials", ["labelled by potentials: the feature local is measured from the centre of the training's "
                              "spheres, which a block exceeds"]  # fmt: skip
    return mode or ("potentials" if votes and votes > 1 else "blocks"), []


def label(model: Model, cloud: Cloud | None, rows: np.ndarray | None = None, *, scene: Scene | None = None,
          mode: str | None = None, votes: int | None = None, seed: int = 0, category: str | None = None,
          keep_probabilities: bool = False, compare: bool = True, advise: bool = True, like: ArrayLike | None = None,
          watch: Callable[[float], object] | None = None) -> Labelled:  # fmt: skip
    """Label the points of a cloud, or some rows of it.

    `scene` is the Scene of these points, if there is one already. With `compare` the input is compared with that of the
    training, see `statistics.differences` for `advise`. `like` is an array of the device that computes. See
    `Model.predict` for the others.
    """
    check_category(model, category)
    if category is not None:
        number = [*model.settings.heads].index(category)
        scene = scene or part_scene(model.settings, model.columns, "points", cloud.points, None, number)
        shares = next(voting.part_probabilities(model, [scene], votes, watch))
        return Labelled(shares.argmax(axis=1), shares.max(axis=1), shares if keep_probabilities else None, [], [])
    method, notes = chosen_method(model, mode, votes)
    if scene is None and rows is None:
        rows = np.arange(len(cloud.points))
    size = len(rows if scene is None else scene.full), model.net.num_classes
    classes, confidence = np.empty(size[0], np.int64), np.empty(size[0], np.float32)
    probabilities = np.empty(size, np.float32) if keep_probabilities else None
    observed = statistics.Observed(model.columns, model.statistics) if compare and model.statistics else None
    if method == "blocks":
        pieces = blocks.probabilities(model, cloud, rows, like=like, watch=watch, observed=observed)
    else:
        scene = scene or cloud_scene(model.settings, model.columns, cloud, rows)
        pieces = voting.point_probabilities(model, scene, votes, seed, watch)
        if observed:
            observed.add_scenes(model.net, [scene], model.block_size.side)
    for at, shares in pieces:
        classes[at], confidence[at] = shares.argmax(axis=1), shares.max(axis=1)
        if probabilities is not None:
            probabilities[at] = shares
    messages = []
    if observed:
        seen = observed.statistics(statistics.spacing_of(cloud.points[rows]), statistics.unit_of([cloud]))
        messages = statistics.differences(model.statistics, seen, advise)
    elif compare:
        notes.append("the model file has no training statistics, so its input is not compared with them")
    return Labelled(classes, confidence, probabilities, messages, notes)


def check_category(model: Model, category: str | None) -> None:
    """Raise an error unless the category is one of the network, or None for a network without categories."""
    heads = model.settings.heads
    if (heads is None) != (category is None) or (heads and category not in heads):
        expected = f"one of {', '.join(heads)}" if heads else "none for a network without parts"
        raise ValueError(f"category: expected {expected}, got {category}")


def labels_of(model: Model, scene: Scene, votes: int | None = None, seed: int = 0,
              watch: Callable[[float], object] | None = None, *, mode: str | None = None,
              compare: bool = False) -> np.ndarray:  # fmt: skip
    """(N,) class numbers of a scene's points before subsampling; `seed` is that of the spheres of potentials.

    With `compare` there is a KpcoreWarning for each difference from the training's input.
    """
    category = None if scene.category is None else [*model.settings.heads][scene.category]
    labelled = label(model, scene.cloud, scene.rows, scene=scene, mode=mode, votes=votes, seed=seed, category=category,
                     compare=compare, watch=watch)  # fmt: skip
    for message in labelled.warnings:
        warnings.warn(f"{scene.name}: {message}", KpcoreWarning, stacklevel=2)
    return labelled.classes


def classes_of(model: Model, scenes: Sequence[Scene], votes: int | None = None,
               watch: Callable[[float], object] | None = None, *, mode: str | None = None,
               compare: bool = False) -> Iterator[np.ndarray]:  # fmt: skip
    """(N,) class numbers of the points of each scene, see `labels_of`."""
    if scenes[0].category is not None:  # many small objects together
        return (shares.argmax(axis=1) for shares in voting.part_probabilities(model, scenes, votes, watch))
    return (labels_of(model, scene, votes, watch=watch, mode=mode, compare=compare) for scene in scenes)


def evaluate(model: Model, scenes: Sequence[Scene], votes: int | None = None,
             watch: Callable[[float], object] | None = None, *, mode: str | None = None,
             compare: bool = False) -> np.ndarray:  # fmt: skip
    """The confusion matrix over the labelled points of scenes before subsampling; rows are true classes.

    For a network that classifies whole scenes it is that over scenes.
    """
    classes = model.net.num_classes
    if not model.net.segments:
        true = np.concatenate([scene.labels for scene in scenes])
        shares = voting.scene_probabilities(model, scenes, votes, watch=watch)
        return voting.confusion(true, shares.argmax(axis=1), classes)
    labels = classes_of(model, scenes, votes, watch, mode=mode, compare=compare)
    matrices = (voting.confusion(scene.full_labels, of, classes) for scene, of in zip(scenes, labels, strict=True))
    return sum(matrices, np.zeros((classes, classes), np.int64))


def evaluate_scores(model: Model, scenes: Sequence[Scene], votes: int | None = None,
                    watch: Callable[[float], object] | None = None, *, mode: str | None = None,
                    compare: bool = False) -> tuple[np.ndarray, Scores]:  # fmt: skip
    """(confusion matrix, scores) of a network on scenes, see `evaluate`, `voting.scores` and `voting.part_scores`."""
    settings, classes = model.settings, model.net.num_classes
    if settings.heads is None:
        matrix = evaluate(model, scenes, votes, watch, mode=mode, compare=compare)
        return matrix, voting.scores(matrix, settings.names)
    matrices = [
        voting.confusion(scene.full_labels, labels, classes)
        for scene, labels in zip(scenes, classes_of(model, scenes, votes, watch), strict=True)
    ]
    categories = [scene.category for scene in scenes]
    return np.sum(matrices, axis=0), voting.part_scores(matrices, categories, settings.heads)
