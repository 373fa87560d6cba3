"""Checks of the tensors that the functions of this folder take.

An error names the argument, what was expected and what was passed. Where a shape is wrong it also says "invalid shape",
which tests written for Open3D look for.
"""

from __future__ import annotations

import itertools
from typing import TypeAlias

import torch

from kpcore.backends import checks, devices
from kpcore.neighbors import Neighbors, named_list
from kpcore.torch.ops import checked, on_arrays, on_stream_of, to_array

# What the tensors of a call have to agree on: {dimension: (its size, name of the tensor that set it)}, and under
# "device" (the device, name of the tensor that set it).
Sizes: TypeAlias = dict[str, tuple[object, str]]

REAL = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
SPLITS = (torch.int64,)


def tensor(name: str, value: object, shape: str, dtypes: tuple[torch.dtype, ...], sizes: Sizes) -> torch.Tensor:
    """Check the shape, dtype and device of a tensor and return it.

    `shape` names the dimensions, separated by spaces ("N 3"): a number is the size itself, a name is looked up in
    `sizes` or added to it, and "..." at the end stands for any further dimensions.
    """
    value = checked(None, name, value)
    device, other = sizes.setdefault("device", (value.device, name))
    if value.device != device:
        raise TypeError(
            f"{name}: expected a tensor on {device}, because {other} is one, got one on {value.device}; nothing is "
            f'moved between devices by itself, move it with {name}.to("{device}")'
        )
    dimensions, shown, others = shape.split(), [], set()
    is_open = dimensions[-1:] == ["..."]
    agree = value.ndim >= len(dimensions) - 1 if is_open else value.ndim == len(dimensions)
    for dimension, size in itertools.zip_longest(dimensions, value.shape[: len(dimensions)]):
        known = (int(dimension), name) if dimension.isdigit() else sizes.get(dimension)
        if known is None:
            sizes[dimension] = size, name
            shown.append(dimension)
        else:
            agree = agree and known[0] == size
            shown.append(str(known[0]))
            others |= {known[1]} - {name}
    if not agree:
        expected = ", ".join(shown) + "," * (len(shown) == 1)
        matching = f" to match {' and '.join(sorted(others))}" if others else ""
        raise ValueError(f"{name}: invalid shape, expected ({expected}){matching}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(d)[6:] for d in dtypes)}, got {str(value.dtype)[6:]}")
    return value


def row_splits(name: str, value: object, rows: int, rows_name: str, device: torch.device | str, *,
               may_end_before: bool = False) -> torch.Tensor:  # fmt: skip
    """Check bounds of rows, (B + 1,) int64 on any device, and return them on `device`.

    They must go from 0 to `rows`, the length of `rows_name`, or at most there if they `may_end_before`, and never
    decrease. As in Open3D they may be on the CPU while the other tensors are on a GPU.
    """
    value = tensor(name, value, "B+1", SPLITS, {})
    on_host = devices.on_host(to_array(name, value.cpu()))
    if may_end_before and len(on_host):
        rows = min(rows, int(on_host[-1]))
    checks.check_splits(name, on_host, rows, rows_name)
    return value.to(device)


def check_range(name: str, value: torch.Tensor, end: int, end_name: str) -> None:
    """Check that indices are from 0 to `end` - 1, the rows of `end_name`; waits for a GPU."""
    if value.numel():
        low, high = (int(bound) for bound in torch.aminmax(value))
        if low < 0 or high >= end:
            bad = low if low < 0 else high
            raise ValueError(f"{name}: expected values from 0 to {end - 1} to match {end_name}, got {bad}")


def check_above_zero(name: str, value: torch.Tensor) -> None:
    """Check that all numbers of a tensor are above zero; waits for a GPU."""
    if not (value > 0).all():
        rows = value.reshape(len(value) if value.ndim else 1, -1)
        row, column = (~(rows > 0)).nonzero()[0].tolist()
        raise ValueError(f"{name}: expected numbers above zero, got {float(rows[row, column])} in row {row}")


def neighbors(prefix: str, index: object, row_splits: object, num_points: int, sizes: Sizes) -> Neighbors:
    """The list of the tensors `<prefix>index`, (E,), and `<prefix>row_splits`, (M + 1,); the latter may be on the CPU.

    Their lengths are added to `sizes` as "E" and "M+1".
    """
    index = tensor(f"{prefix}index", index, "E", INTEGERS, sizes)
    bounds = tensor(f"{prefix}row_splits", row_splits, "M+1", SPLITS, {k: v for k, v in sizes.items() if k == "M+1"})
    sizes.setdefault("M+1", (len(bounds), f"{prefix}row_splits"))

    def make() -> Neighbors:
        arrays = to_array("index", index), to_array("row_splits", bounds.to(index.device))
        return on_arrays(named_list, prefix, *arrays, num_points)

    return on_stream_of(index, make)
