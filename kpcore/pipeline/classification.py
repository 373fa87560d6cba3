"""Classes of whole clouds: predictions for files, confusion matrices and pictures of errors."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.files import replacing
from kpcore.pipeline import objects, voting
from kpcore.pipeline.data import object_scene

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.model import Model

_MOST_DRAWN = 20  # in a picture


class Classified(NamedTuple):
    """Objects and their predicted classes."""

    scenes: list[Scene]
    probabilities: np.ndarray  #: (objects, classes)

    @property
    def classes(self) -> np.ndarray:
        """(objects,) the predicted class numbers."""
        return self.probabilities.argmax(axis=1)

    @property
    def errors(self) -> np.ndarray:
        """Numbers of the objects whose class is another, the most probable mistakes first."""
        wrong = np.flatnonzero(self.classes != [int(scene.labels[0]) for scene in self.scenes])
        return wrong[np.argsort(-self.probabilities[wrong].max(axis=1), kind="stable")]

    def confusion(self) -> np.ndarray:
        """The confusion matrix; rows are true classes."""
        true = np.concatenate([scene.labels for scene in self.scenes])
        return voting.confusion(true, self.classes, self.probabilities.shape[1])


def objects_of_files(model: Model, paths: Sequence[Path]) -> list[Scene]:
    """Scenes of meshes or clouds, made as those of the training."""
    settings = model.settings
    num_points, columns = settings.data.train[0].points, settings.data.columns
    points = (objects.points_of_file(path, num_points, columns, strict=False) for path in paths)
    return [object_scene(settings, model.columns, path.name, one) for path, one in zip(paths, points, strict=True)]


def classify(model: Model, scenes: list[Scene], votes: int | None = None,
             watch: Callable[[float], object] | None = None) -> Classified:  # fmt: skip
    """Class probabilities of scenes, see `voting.scene_probabilities`."""
    return Classified(scenes, voting.scene_probabilities(model, scenes, votes, watch=watch))


def write_confusion(path: Path, names: Sequence[str], confusion: np.ndarray) -> None:
    """Write a confusion matrix as CSV with a row for each true class and a column for each predicted class."""
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["true class", *names])
        table.writerows([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))


def draw_errors(path: Path, model: Model, classified: Classified, theme: str = "dark") -> None:
    """Write a picture of the objects with a wrong class, at most 20, the most probable first."""
    wrong = classified.errors
    title = f"{len(wrong)} of {len(classified.scenes)} objects with a wrong class"
    _draw(path, title, model, classified, wrong[:_MOST_DRAWN], theme)


def draw_examples(path: Path, title: str, model: Model, classified: Classified, theme: str = "dark") -> None:
    """Write a picture of objects at equal steps through the list, and of errors, at most 20 of both."""
    wrong = classified.errors[: _MOST_DRAWN // 2]
    others = np.setdiff1d(np.arange(len(classified.scenes)), wrong)
    chosen = others[np.linspace(0, len(others) - 1, min(len(others), _MOST_DRAWN - len(wrong))).round().astype(int)]
    _draw(path, title, model, classified, np.concatenate([chosen, wrong]), theme)


def _draw(path: Path, title: str, model: Model, classified: Classified, numbers: np.ndarray, theme: str) -> None:
    from kpcore import visualization

    names, shown = model.settings.names, []
    for number in numbers:
        scene, row = classified.scenes[number], classified.probabilities[number]
        shown.append(visualization.Activation(
            scene.points, scene.points[:, -1], model.settings.network.voxel_size,
            f"{names[row.argmax()]} {row.max():.0%}", f"is {names[int(scene.labels[0])]}: {scene.name}",
        ))  # fmt: skip
    with replacing(path) as part:
        visualization.draw_objects(part, title, "the predicted class and its probability", shown, theme=theme)
