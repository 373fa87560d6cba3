"""Lidar sweeps of KITTI and nuScenes: .bin files of float32 numbers without a header."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kpcore.io.cloud import (
    LABELS,
    Content,
    NamedArrays,
    ReadError,
    Request,
    are_integers,
    first_name_index,
    from_columns,
)
from kpcore.io.table import points_first, table_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kpcore.io.table import Table

KITTI = ("x", "y", "z", "intensity")
NUSCENES = (*KITTI, "ring")


def field_names(path: Path, size: int, request: Request) -> tuple[str, ...]:
    return request.columns or _layout(path, size)


def read(path: Path, size: int, request: Request) -> Content:
    return from_columns(NamedArrays(_columns(path, size, request.columns)), request)


def table(path: Path, size: int, columns: Sequence[str] | None = None) -> Table:
    """All columns of a sweep."""
    return table_of(
        lambda: points_first(_columns(path, size, columns)), lambda names: first_name_index(names, LABELS), []
    )


def _columns(path: Path, size: int, columns: Sequence[str] | None) -> list[tuple[str, np.ndarray]]:
    names = columns or _layout(path, size)
    if size % (4 * len(names)):
        raise ReadError(
            f"{size} bytes are not a multiple of {4 * len(names)}, a record of {len(names)} float32: {' '.join(names)}"
        )
    return [*zip(names, np.fromfile(path, np.float32).reshape(-1, len(names)).T, strict=True)]


def _layout(path: Path, size: int) -> tuple[str, ...]:
    """Column names of KITTI or nuScenes, whichever fits the numbers: a file does not say how many columns it has."""
    widths = (5,) if path.name.lower().endswith(".pcd.bin") else (4, 5)
    if all(size % (4 * width) for width in widths):
        either = " or ".join(map(str, widths))
        raise ReadError(f"truncated, or not a sweep: {size} bytes are not a multiple of a record of {either} float32")
    values = np.fromfile(path, np.float32)
    four = 4 in widths and size % 16 == 0 and _is_sweep(values.reshape(-1, 4))
    five = size % 20 == 0 and _is_sweep(table := values.reshape(-1, 5)) and _are_rings(table[:, 4])
    if four != five:
        return NUSCENES if five else KITTI
    if four:
        raise ReadError("may hold 4 or 5 float32 for each point: pass columns=, such as "
                        f'"{" ".join(KITTI)}".split() or "{" ".join(NUSCENES)}".split()')  # fmt: skip
    raise ReadError("is neither a KITTI nor a nuScenes sweep: as 4 or 5 float32 it has coordinates beyond 100 km, "
                    "negative intensities or rings that are not integers; name its columns with columns=")  # fmt: skip


def _is_sweep(table: np.ndarray) -> bool:
    """Whether the columns may be x y z intensity: coordinates within 100 km, no negative intensity.

    Integers read as float32 are numbers around 1e-38, so that coordinates below 1e-20 mean another type.
    """
    if ((table[:, :3] != 0) & (np.abs(table[:, :3]) < 1e-20)).mean() > 0.01:
        return False
    return not (np.abs(table[:, :3]) > 1e5).any(where=np.isfinite(table[:, :3])) and not (table[:, 3] < 0).any()


def _are_rings(values: np.ndarray) -> bool:
    """Whether the values may be ring numbers 0 to 255, not all 0."""
    return bool(are_integers(values, 0, 255).all() and values.any())
