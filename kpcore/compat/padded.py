"""Padded matrices of neighbours as lists, made once for each matrix.

Published layers get the same (M, H) tensor of indices in every block of a level, and again in the gradient. The list
made from it is kept as long as the tensor exists, and so is the transpose that the gradient makes of the list.

A list is used again only for the same tensor object with the same memory, shape and version, which torch increases
with every change in place, and for the same number of points; on a GPU also only on the same stream, since no other one
waits for the list. Changes that torch does not count are not seen: through the NumPy array of a tensor, through
``tensor.data``, or from another process. Nothing is kept for tensors of inference mode, which have no version.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TypeAlias

import torch

from kpcore.backends import checks
from kpcore.neighbors import Neighbors
from kpcore.torch.internals import not_compiled
from kpcore.torch.ops import padded_tensor

# {(id of a matrix, whether only its first column is in the list): (the matrix, its state, the list)}. Single operations
# on a dict are atomic, so threads need no lock; two that convert the same matrix at once both do it.
_Key: TypeAlias = tuple[int, bool]
_lists: dict[_Key, tuple[weakref.ref[torch.Tensor], tuple[object, ...], Neighbors]] = {}
_is_on = True


def cache(enabled: bool) -> None:
    """Whether lists made from padded matrices are kept; by default they are. ``cache(False)`` also drops all lists."""
    global _is_on
    _is_on = checks.boolean("enabled", enabled)
    if not _is_on:
        _lists.clear()


def neighbors(name: str, matrix: torch.Tensor | Neighbors, num_points: int, *, first: bool = False) -> Neighbors:
    """The list of a padded matrix (M, H) of int32 or int64, in which -1 and `num_points` mean "no neighbour".

    Parameters
    ----------
    name : str
        What errors call the matrix.
    matrix : tensor, or Neighbors
        A list is returned as it is. Under torch.compile a matrix is converted between two compiled parts, which is an
        error with ``fullgraph=True``; a list is not.
    num_points : int
    first : bool
        Whether to convert the first column only, for functions that read nothing else.
    """
    return matrix if isinstance(matrix, Neighbors) else _converted(name, matrix, num_points, first)


@not_compiled("a padded matrix is converted outside of compiled code; pass kpcore.Neighbors.from_padded of it instead")
def _converted(name: str, matrix: torch.Tensor, num_points: int, first: bool) -> Neighbors:
    if not _is_on or type(matrix) is not torch.Tensor or matrix.is_inference():
        return _convert(name, matrix, num_points, first)
    stream = torch.cuda.current_stream(matrix.device).cuda_stream if matrix.is_cuda else None
    state = num_points, matrix._version, matrix.data_ptr(), matrix.shape, matrix.stride(), stream
    key = id(matrix), first
    kept = _lists.get(key)
    if kept is not None and kept[0]() is matrix and kept[1] == state:
        return kept[2]
    made = _convert(name, matrix, num_points, first)
    _lists[key] = weakref.ref(matrix, partial(_forget, key)), state, made
    return made


def _convert(name: str, matrix: torch.Tensor, num_points: int, first: bool) -> Neighbors:
    if first and isinstance(matrix, torch.Tensor) and matrix.ndim == 2:
        matrix = matrix[:, :1]
    return padded_tensor(name, matrix, num_points)


def _forget(key: _Key, reference: weakref.ref[torch.Tensor]) -> None:
    """Drop the list of a matrix that no longer exists, unless another matrix got its id."""
    kept = _lists.get(key)
    if kept is not None and kept[0] is reference:
        _lists.pop(key, None)
