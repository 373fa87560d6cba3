"""Open3D's RaggedTensor: rows of different lengths in one tensor."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from kpcore.compat import arguments

__all__ = ["RaggedTensor"]


class RaggedTensor:
    """Items of different lengths, stacked along the first axis of one tensor and bounded by row_splits.

    Made by `from_row_splits`. ``ragged[i]`` is item i, ``len(ragged)`` the number of items. Arithmetic with a number, a
    tensor or another RaggedTensor of the same row_splits is that of the values.

    A number keeps the dtype of the values, as elsewhere in torch; Open3D rounds it to float32 and then converts the
    result to float64. A negative index counts from the end; Open3D returns other rows for it, or none.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat.open3d import RaggedTensor
    >>> ragged = RaggedTensor.from_row_splits(torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 3, 3, 5]))
    >>> ragged.shape, (ragged * 2).to_list()
    ([3, None], [tensor([6, 2, 8]), tensor([], dtype=torch.int64), tensor([ 2, 10])])
    """

    __slots__ = ("_row_splits", "_values")
    _values: torch.Tensor
    _row_splits: torch.Tensor

    def __init__(self, *_: object, **__: object) -> None:
        raise ValueError("RaggedTensor: expected a call of RaggedTensor.from_row_splits, got one of the class")

    @classmethod
    def _new(cls, values, row_splits):
        self = cls.__new__(cls)
        self._values, self._row_splits = values, row_splits
        return self

    @classmethod
    def from_row_splits(cls, values: Any, row_splits: Any, validate: bool = True, copy: bool = True) -> RaggedTensor:
        """A RaggedTensor of these values.

        Parameters
        ----------
        values : (N, ...) tensor, NumPy array or list
            A list becomes float64, as in Open3D.
        row_splits : (B + 1,) int64 tensor, NumPy array or list
            From 0 to N, never decreasing; kept on the device of the values.
        validate : bool
            Whether the numbers in `row_splits` are checked.
        copy : bool
            Whether tensors are copied. NumPy arrays are not: the values share their memory.
        """
        values = _as_tensor(values, torch.float64, copy)
        row_splits = _as_tensor(row_splits, torch.int64, copy)
        if not (isinstance(values, torch.Tensor) and values.ndim):
            raise TypeError(f"values: expected a tensor (N, ...), a NumPy array or a list, got {type(values).__name__}")
        if validate:
            row_splits = arguments.row_splits("row_splits", row_splits, len(values), "values", values.device)
        else:
            row_splits = arguments.tensor("row_splits", row_splits, "B+1", arguments.SPLITS, {}).to(values.device)
        return cls._new(values.contiguous(), row_splits.contiguous())

    @property
    def values(self) -> torch.Tensor:
        """(N, ...) the rows of all items."""
        return self._values

    @property
    def row_splits(self) -> torch.Tensor:
        """(B + 1,) int64 bounds of the items."""
        return self._row_splits

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        """The device of the values."""
        return self._values.device

    @property
    def shape(self) -> list[int | None]:
        """[B, None, ...]: the number of items, their varying length, and the shape of a row."""
        return [len(self), None, *self._values.shape[1:]]

    @property
    def requires_grad(self) -> bool:
        """Whether the values require a gradient; may be set."""
        return self._values.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._values.requires_grad = value

    def clone(self) -> RaggedTensor:
        """A RaggedTensor with a copy of the values."""
        return self._new(self._values.clone(), self._row_splits)

    def to_list(self) -> list[torch.Tensor]:
        """The items, as views of the values."""
        return list(self)

    def concat(self, other: RaggedTensor, axis: int) -> RaggedTensor:
        """Concatenate two RaggedTensors: their items (axis 0), or the values of corresponding rows (axis 1 or more).

        For an axis of 1 or more corresponding items must have as many rows. In Open3D this is a method of ``r_tensor``,
        and axis 0 leaves the row_splits as they were.
        """
        if not isinstance(other, RaggedTensor):
            raise TypeError(f"other: expected a RaggedTensor, got {type(other).__name__}")
        if axis == 0:
            row_splits = torch.cat([self._row_splits, self._row_splits[-1] + other._row_splits[1:]])
            return self._new(torch.cat([self._values, other._values]), row_splits)
        return self._new(torch.cat([self._values, self._operand(other)], axis), self._row_splits)

    def __len__(self) -> int:
        return len(self._row_splits) - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        item = range(len(self))[operator.index(index)]  # raises an IndexError outside of it
        return self._values[self._row_splits[item] : self._row_splits[item + 1]]

    def __repr__(self) -> str:
        return f"RaggedTensor(values={self._values}, row_splits={self._row_splits})"

    def _operand(self, other):
        """What the values are combined with: the values of a RaggedTensor of the same rows, a tensor or a number."""
        if isinstance(other, RaggedTensor):
            if not torch.equal(self._row_splits, other._row_splits):
                raise ValueError(
                    f"other: expected row_splits {self._row_splits.tolist()}, got {other._row_splits.tolist()}"
                )
            return other._values
        if isinstance(other, (torch.Tensor, int, float, bool)):
            return other
        raise ValueError(f"other: expected a RaggedTensor, a tensor or a number, got {type(other).__name__}")

    def __add__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        return self._new(self._values + self._operand(other), self._row_splits)

    def __sub__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        return self._new(self._values - self._operand(other), self._row_splits)

    def __mul__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        return self._new(self._values * self._operand(other), self._row_splits)

    def __truediv__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        return self._new(self._values / self._operand(other), self._row_splits)

    def __floordiv__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        return self._new(self._values // self._operand(other), self._row_splits)

    def __iadd__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        self._values += self._operand(other)
        return self

    def __isub__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        self._values -= self._operand(other)
        return self

    def __imul__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        self._values *= self._operand(other)
        return self

    def __itruediv__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        self._values /= self._operand(other)
        return self

    def __ifloordiv__(self, other: RaggedTensor | torch.Tensor | float) -> RaggedTensor:
        self._values //= self._operand(other)
        return self


def _as_tensor(value, dtype_of_list, copy):
    if isinstance(value, list):
        return torch.tensor(value, dtype=dtype_of_list)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value.clone() if copy and isinstance(value, torch.Tensor) else value
