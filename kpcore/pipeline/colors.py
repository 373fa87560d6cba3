"""Colours of classes: those of ASPRS classes, those of the settings, and others that are easy to tell apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kpcore.pipeline.settings import Settings

__all__ = ["ASPRS", "are_asprs", "class_colors", "distinct_colors", "named_colors"]

# By the code of a class in LAS 1.4: grey unclassified, brown ground, green vegetation (the higher, the darker), orange
# buildings, blue water, magenta noise, yellow bridges, as GIS programs show them. The shades are chosen so that those
# of codes 1 to 7, 9, 11, 14, 15 and 17 are at least 0.1 apart in OKLab also for colour-blind readers: with the usual
# shades ground and high vegetation are 0.016 apart.
ASPRS = {
    0: "#c8c8d0", 1: "#9898a0", 2: "#b05808", 3: "#b0f0b8", 4: "#80c890", 5: "#008868", 6: "#f08000", 7: "#d020b8",
    8: "#d8a070", 9: "#58a0f8", 10: "#e0a8a0", 11: "#485058", 12: "#d8d0a0", 13: "#a8a0ff", 14: "#7068f8",
    15: "#981008", 16: "#cbbcff", 17: "#e0d000", 18: "#ff80e8", 19: "#b8b060", 20: "#7a4a38", 21: "#b8e0f8",
    22: "#5f7f5f",
}  # fmt: skip
# Words in names of classes, and the codes that they stand for.
_WORDS = {
    "ground": (2, 8, 20), "terrain": (2, 8, 20), "soil": (2,), "earth": (2,), "vegetation": (3, 4, 5), "veg": (3, 4, 5),
    "tree": (3, 4, 5), "trees": (3, 4, 5), "shrub": (3, 4), "shrubs": (3, 4), "grass": (2, 3), "building": (6,),
    "buildings": (6,), "roof": (6,), "roofs": (6,), "house": (6,), "noise": (7, 18), "water": (9,), "rail": (10,),
    "rails": (10,), "railway": (10,), "road": (11,), "roads": (11,), "wire": (13, 14, 16), "wires": (13, 14, 16),
    "powerline": (14,), "conductor": (14,), "tower": (15,), "pylon": (15,), "bridge": (17,), "snow": (21,),
}  # fmt: skip
_CODES, _CODES_OF_1_1 = 23, 10  # codes of LAS 1.4 are below 23, those that LAS 1.1 to 1.3 define below 10
# The seven colours with hue of Okabe and Ito (2008), which colour-blind readers tell apart.
_FIRST = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
_BACKGROUNDS = ("#0f1319", "#ffffff", "#7a828c")  # of both pages, and the grey of what has no class
_CYCLE = 64  # nobody tells more colours apart
_NEAR = 0.07  # distance in OKLab: nearer colours look alike


def class_colors(settings: Settings) -> np.ndarray:
    """Colours of the classes of a training, (classes, 3) uint8, the same in every picture.

    The first of these that applies: the colour in ``[data.colors]``; that of the ASPRS class, if `are_asprs` says that
    labels are ASPRS classes, of the first label of the class; one of `distinct_colors`.
    """
    names, colors = settings.names, dict(settings.data.colors)
    if are_asprs(settings):
        for name, labels in settings.data.classes.items():
            if labels[0] in ASPRS:
                colors.setdefault(name, ASPRS[labels[0]])
    others = iter(distinct_colors(len(names) - len(colors), _rgb([*colors.values()])))
    return np.array([_rgb([colors[name]])[0] if name in colors else next(others) for name in names], np.uint8)


def named_colors(names: Settings | Sequence[str]) -> tuple[Sequence[str], np.ndarray]:
    """(names of classes, their colours, (classes, 3) uint8): of settings by `class_colors`, else `distinct_colors`."""
    if isinstance(names, Sequence):
        return names, distinct_colors(len(names))
    return names.names, class_colors(names)


def are_asprs(settings: Settings) -> bool:
    """Whether the labels of a training are ASPRS classes, by the names of its classes and its files.

    No name may contradict, as the name ground for label 1 does, or building for 50. A name for which LAS has a code
    only since 1.4 may have any label from 23 on, such as the bridges with 26 in the tiles of AHN. If none contradicts,
    labels are ASPRS classes if all files are LAS or LAZ files, of which the field classification is read; or if two
    names at least agree, such as ground for 2 and building for 6. Labels of SemanticKITTI are not, neither those in its
    files (50 building, 70 vegetation) nor those of its benchmark (13 building, 15 vegetation).
    """
    data = settings.data
    if data.kind != "scenes":
        return False
    agreeing = 0
    for name, labels in data.classes.items():
        meant = {code for word in re.findall("[a-z]+", name.lower()) for code in _WORDS.get(word, ())}
        if meant & {*labels}:
            agreeing += 1
        elif meant and (min(meant) < _CODES_OF_1_1 or min(labels) < _CODES):
            return False
    parts = [*data.train, *data.test, *(data.validation if isinstance(data.validation, list) else ())]
    of_las = all(Path(part.file or "").suffix.lower() in (".las", ".laz") for part in parts)
    return (of_las and (data.label or "classification").lower() == "classification") or agreeing >= 2


def distinct_colors(number: int, taken: np.ndarray | None = None) -> np.ndarray:
    """Colours that are easy to tell apart, also for colour-blind readers, on a dark page and on a white one.

    The first are those of Okabe and Ito [1]_. Each further one is the farthest from all before it, in the smallest of
    the distances in OKLab [2]_ as seen with normal vision, protanopia and deuteranopia (simulated as in [3]_).

    Parameters
    ----------
    number : int
        From 64 on they repeat.
    taken : (n, 3) uint8, optional
        Colours that others have; none of the first seven which looks like one of these is used.

    Returns
    -------
    (number, 3) uint8

    References
    ----------
    .. [1] M. Okabe, K. Ito, Color Universal Design, 2008.
    .. [2] B. Ottosson, A perceptual color space for image processing, 2020.
    .. [3] G. M. Machado et al., A physiologically-based model for simulation of color vision deficiency, TVCG 2009.

    Examples
    --------
    >>> from kpcore.pipeline.colors import distinct_colors
    >>> distinct_colors(2).tolist()
    [[0, 114, 178], [230, 159, 0]]
    """
    taken = np.zeros((0, 3), np.uint8) if taken is None else taken
    first, candidates = _rgb(_FIRST), _candidates()
    chosen = [one for one in first if len(taken) == 0 or _distances(one[None], taken).min() >= _NEAR]
    nearest = _distances(candidates, np.concatenate([taken, _rgb(_BACKGROUNDS), *([chosen] if chosen else ())]))
    nearest = nearest.min(axis=1)
    while len(chosen) < min(number, _CYCLE):
        chosen.append(candidates[nearest.argmax()])
        nearest = np.minimum(nearest, _distances(candidates, chosen[-1][None])[:, 0])
    return np.array([chosen[i % len(chosen)] for i in range(number)], np.uint8).reshape(-1, 3)


def _rgb(colors: Sequence[str]) -> np.ndarray:
    return np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors], np.uint8).reshape(-1, 3)


# Rows: linear red, green and blue as seen; from Machado et al. 2009, severity 1.
_VISIONS = np.array([
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],  # protanopia
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],  # deuteranopia
])  # fmt: skip
# From linear sRGB to the responses of the cones, and from their cube roots to OKLab.
_TO_CONES = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                      [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_TO_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                    [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip


def _seen(colors: np.ndarray) -> np.ndarray:
    """(3, n, 3): uint8 colours in OKLab, with each kind of vision."""
    values = colors / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return np.cbrt((linear @ _VISIONS.transpose(0, 2, 1)).clip(0, 1) @ _TO_CONES.T) @ _TO_LAB.T


def _distances(colors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m): the smallest distance between colours over all kinds of vision."""
    difference = _seen(colors)[:, :, None] - _seen(np.asarray(others))[:, None]
    return np.sqrt((difference**2).sum(axis=3)).min(axis=0)


def _candidates() -> np.ndarray:
    """(n, 3) uint8 colours of sRGB that are neither too dark for a dark page nor too light for a white one."""
    steps = np.array([20, 60, 100, 140, 180, 220, 250], np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lightness, a, b = _seen(colors)[0].T
    chroma = np.hypot(a, b)
    return colors[(lightness > 0.42) & (lightness < 0.88) & (chroma > 0.05) & (chroma < 0.24)]
