"""How many points and files each class has, and what is wrong with these numbers."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kpcore.io.cloud import list_names
from kpcore.pipeline.data import counts_of
from kpcore.pipeline.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.settings import Settings

ClassTable: TypeAlias = "dict[str, dict[str, dict[str, int]]]"  # {part: {class: {"points": n, "files": n}}}

FEWEST_POINTS, LEAST_SHARE = 100, 1e-3  # of a class with an IoU that says something


def class_table(settings: Settings, parts: Mapping[str, Sequence[Scene]]) -> ClassTable:
    """The numbers of points and of files, or of objects, of each class in each part that has scenes."""
    table = {}
    for part, scenes in parts.items():
        if scenes:
            counts = np.array([counts_of(settings, scene) for scene in scenes])
            numbers = zip(settings.names, counts.sum(axis=0), (counts > 0).sum(axis=0), strict=True)
            table[part] = {name: {"points": int(points), "files": int(files)} for name, points, files in numbers}
    return table


def lines(table: ClassTable, unit: str = "points") -> list[str]:
    """The table as text."""
    names = [*next(iter(table.values()))]
    width = max(16, *map(len, names))
    out = [" " * width + "".join(f"{part + ' ' + unit:>20}{'files':>7}" for part in table)]
    for name in names:
        numbers = (of_part[name] for of_part in table.values())
        out.append(f"{name:>{width}}" + "".join(f"{one['points']:>20,}{one['files']:>7,}" for one in numbers))
    return out


def check_classes(settings: Settings, parts: Mapping[str, Sequence[Scene]], table: ClassTable) -> list[str]:
    """Warnings about classes and labels, a line each.

    Raises
    ------
    SettingsError
        If a class that may not be empty has none of its labels in the training data.
    """
    if settings.digits:
        return []
    missing = [name for name, numbers in table["train"].items() if not numbers["points"]]
    if settings.data.kind != "scenes":
        what = f"no {settings.data.kind} in the training data"
        return [f"[data] classes {', '.join(missing)}: {what}"] if missing else []
    return _check_labels(settings, parts, missing) + _check_counts(table)


def _check_labels(settings: Settings, parts: Mapping[str, Sequence[Scene]], missing: Sequence[str]) -> list[str]:
    """Warnings about labels that no file holds; an error for a class without points in the training data."""
    in_training = _labels_in(parts["train"])
    in_any = _labels_in([scene for scenes in parts.values() for scene in scenes])
    classes = settings.data.classes
    if empty := [name for name in missing if name not in settings.data.may_be_empty]:
        labels = ", ".join(map(str, classes[empty[0]]))
        raise SettingsError(
            f"[data.classes] {empty[0]}: expected points with the label {labels} in the training data, got none; their "
            f"labels are {_shown(in_training, settings)}{_nearest(classes[empty[0]], in_training, settings)}; "
            f'if this is intended: may_be_empty = ["{empty[0]}"] in [data]'
        )
    messages = []
    for name, labels in classes.items():
        if absent := [label for label in labels if label not in in_any]:
            messages.append(f"[data.classes] {name}: no file holds the label {', '.join(map(str, absent))}; there are "
                            f"{_shown(in_any, settings)}{_nearest(absent, in_any, settings)}")  # fmt: skip
    return messages


def _labels_in(scenes: Sequence[Scene]) -> dict[int, int]:
    """The number of points of each label in the files."""
    counts: dict[int, int] = {}
    for scene in scenes:
        stored = scene.stored.labels.items() if scene.stored else None
        for label, number in stored or zip(*np.unique(scene.cloud.labels[scene.rows], return_counts=True), strict=True):
            counts[int(label)] = counts.get(int(label), 0) + int(number)
    return counts


def _shown(labels: Mapping[int, int], settings: Settings) -> str:
    """Labels with their numbers of points, and whether they are of a class."""
    known = {label: name for name, of_class in settings.data.classes.items() for label in of_class}
    return list_names(
        f"{label} ({number:,} point{'s' * (number != 1)}{f', {known[label]}' if label in known else ', of no class'})"
        for label, number in sorted(labels.items())
    )


def _nearest(absent: Sequence[int], labels: Mapping[int, int], settings: Settings) -> str:
    """Which label of no class is the most like those that are absent, since a digit may be mistyped."""
    used = {label for of_class in settings.data.classes.values() for label in of_class}
    free = [label for label in labels if label not in used]
    if not free:
        return ""
    alike = difflib.get_close_matches(str(absent[0]), map(str, free), 1, cutoff=0.4)
    return f"; the nearest of no class is {alike[0] if alike else min(free, key=lambda one: abs(one - absent[0]))}"


def _check_counts(table: ClassTable) -> list[str]:
    """Warnings about classes with few points."""
    messages = []
    for part, numbers in table.items():
        total = sum(one["points"] for one in numbers.values())
        if none := [name for name, one in numbers.items() if not one["points"] and table["train"][name]["points"]]:
            what = (
                "the best network is chosen without them" if part == "validation" else "the score says nothing of them"
            )
            messages.append(f"[data] {part}: no points of {', '.join(none)}: {what}")
        fewest = max(FEWEST_POINTS, LEAST_SHARE * total)
        few = [f"{name} {one['points']:,} ({100 * one['points'] / max(1, total):.2g} %)"
               for name, one in numbers.items() if 0 < one["points"] < fewest]  # fmt: skip
        if few:
            messages.append(f"[data] {part}: few points of {', '.join(few)}: their IoU says little")
    return messages
