"""Sweeps of a turning lidar: float32 numbers without a header, as KITTI has them."""

from __future__ import annotations

import numpy as np

from kpcore.io.cloud import Columns, ReadError, from_columns


def read(path, size, asked):
    if size % 16:
        raise ReadError(f"truncated or no KITTI scan: {size} bytes are not whole records of 4 float32")
    table = np.fromfile(path, np.float32).reshape(-1, 4)
    points = table[:, :3]
    if np.abs(points, where=np.isfinite(points), out=np.zeros_like(points)).max(initial=0) > 1e5:  # a lidar sees 200 m
        raise ReadError("is no KITTI scan: as float32 x, y, z, intensity its coordinates exceed 100 km")
    return from_columns(Columns(zip(("x", "y", "z", "intensity"), table.T, strict=True)), asked)
