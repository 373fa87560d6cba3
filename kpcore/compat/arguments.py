"""Checks of the tensors that the functions of this folder take.

An error names the argument, what was expected and what was passed. Where a shape is wrong it also says "invalid shape",
which tests written for Open3D look for.
"""

from __future__ import annotations

import itertools
from typing import TypeAlias

import torch

from kpcore.backends import checks, devices
from kpcore.torch.ops import checked, to_array

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
