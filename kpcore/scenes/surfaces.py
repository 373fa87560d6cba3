"""Surfaces of generated scenes and objects: faces of four corners, of which a point is o + u a + v b + u v twist."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def box(size: Sequence[float], at: Sequence[float] = (0, 0, 0), sides: str = "xXyYzZ") -> list[np.ndarray]:
    """The (4, 3) faces of a box that stands on `at`. In `sides` x, y, z are the low faces and X, Y, Z the high ones."""
    half = np.array(size) / 2
    middle = np.add(at, (0, 0, half[2]))
    faces = []
    for side in sides:
        axis = "xyz".index(side.lower())
        face = np.zeros((4, 3))
        face[:, axis] = half[axis] if side.isupper() else -half[axis]
        for other, signs in zip([i for i in range(3) if i != axis], ([-1, 1, -1, 1], [-1, -1, 1, 1]), strict=True):
            face[:, other] = half[other] * np.array(signs)
        faces.append(face + middle)
    return faces


def turned(profile: Sequence[Sequence[float]], at: Sequence[float] = (0, 0, 0), sides: int = 20) -> list[np.ndarray]:
    """The (4, 3) faces of a profile of (radius, height) rotated about the vertical: legs, pots, lamps, spheres."""
    angle = np.linspace(0, 2 * np.pi, sides + 1)
    ring = np.stack([np.cos(angle), np.sin(angle), np.zeros(sides + 1)], axis=1)
    rings = [radius * ring + [0, 0, height] + np.asarray(at, float) for radius, height in profile]
    return joined(rings)


def joined(rings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The (4, 3) faces between each ring, (n, 3), and the next."""
    return [
        np.stack([low[i], low[i + 1], high[i], high[i + 1]])
        for low, high in pairwise(rings)
        for i in range(len(low) - 1)
    ]


def rotation(yaw: float) -> np.ndarray:
    """(3, 3): ``corners @ rotation(yaw)`` are rotated about the vertical."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
