"""Sweeps of a turning lidar: float32 numbers without a header, as KITTI and nuScenes have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kpcore.io.cloud import Asked, Columns, Content, ReadError, from_columns, whole

if TYPE_CHECKING:
    from pathlib import Path

KITTI = ("x", "y", "z", "intensity")
NUSCENES = (*KITTI, "ring")


def read(path: Path, size: int, asked: Asked) -> Content:
    names = asked.columns or _layout(path, size)
    if size % (4 * len(names)):
        raise ReadError(f"{size} bytes are not whole records of {len(names)} float32: {' '.join(names)}")
    table = np.fromfile(path, np.float32).reshape(-1, len(names))
    return from_columns(Columns(zip(names, table.T, strict=True)), asked)


def _layout(path: Path, size: int) -> tuple[str, ...]:
    """Names of the columns, by what the numbers can be: nothing in such a file tells how many there are."""
    widths = (5,) if path.name.lower().endswith(".pcd.bin") else (4, 5)
    if all(size % (4 * width) for width in widths):
        either = " or ".join(map(str, widths))
        raise ReadError(f"truncated or no sweep: {size} bytes are not whole records of {either} float32")
    values = np.fromfile(path, np.float32)
    four = 4 in widths and size % 16 == 0 and _is_sweep(values.reshape(-1, 4))
    five = size % 20 == 0 and _is_sweep(table := values.reshape(-1, 5)) and _are_rings(table[:, 4])
    if four != five:
        return NUSCENES if five else KITTI
    if four:
        raise ReadError("may hold 4 or 5 float32 for each point: pass columns=, such as "
                        f'"{" ".join(KITTI)}".split() or "{" ".join(NUSCENES)}".split()')  # fmt: skip
    raise ReadError("is no KITTI scan and no nuScenes sweep: as 4 or 5 float32 it has coordinates beyond 100 km, "
                    "negative intensities or rings that are no whole numbers; columns= names others")  # fmt: skip


def _is_sweep(table: np.ndarray) -> bool:
    """Whether it may be x y z intensity ...: a lidar sees 200 m, and no intensity is negative. Integers would be
    numbers of 1e-38."""
    if ((table[:, :3] != 0) & (np.abs(table[:, :3]) < 1e-20)).mean() > 0.01:
        return False
    return not (np.abs(table[:, :3]) > 1e5).any(where=np.isfinite(table[:, :3])) and not (table[:, 3] < 0).any()


def _are_rings(values: np.ndarray) -> bool:
    """Whether it may be the numbers of up to 256 lasers, not all the first."""
    return bool(whole(values, 0, 255).all() and values.any())
