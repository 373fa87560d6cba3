"""Pooling over padded matrices of neighbours, as in the models of KPConv-PyTorch."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import kpcore as kp
from kpcore.backends import checks
from kpcore.backends.devices import AnyArray
from kpcore.neighbors import Neighbors

__all__ = ["closest_pool", "max_pool"]


def max_pool(x: AnyArray, inds: AnyArray) -> Any:
    """The maximum of each channel over the neighbours of each query: KPConv-PyTorch's ``max_pool``.

    As published, a row with fewer neighbours than columns also sees a row of zeros, so that its maxima are at least 0.
    Differentiable in `x`, for torch tensors under autograd; for arrays see `kpcore.autodiff`.

    Parameters
    ----------
    x : (N, C) float32 or float64
        An array or a tensor.
    inds : (M, H) int32 or int64
        Neighbours, of the same kind; N and -1 stand for no neighbour. A tensor is converted once, see `cache`.

    Returns
    -------
    (M, C)
        Zeros for rows without neighbours, also if H is 0.

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree, or an index outside -1 to N.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import max_pool
    >>> max_pool(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[0, 1], [1, 2]]))
    tensor([[-1.],
            [ 0.]])
    """
    return _pooled("neighbor_reduce", x, inds, "max", pad_value=0.0)


def closest_pool(x: AnyArray, inds: AnyArray) -> Any:
    """The features of the first neighbour of each query, zeros where there is none: ``closest_pool`` of KPConv-PyTorch.

    Differentiable in `x`, as `max_pool`.

    Parameters
    ----------
    x : (N, C) float32 or float64
        An array or a tensor.
    inds : (M, H) int32 or int64
        Neighbours, of the same kind, of which the first column is used; N and -1 stand for no neighbour.

    Returns
    -------
    (M, C)
        Zeros if H is 0.

    Raises
    ------
    ValueError, TypeError
        As `max_pool`.

    Examples
    --------
    >>> import torch
    >>> from kpcore.compat import closest_pool
    >>> closest_pool(torch.tensor([[10.0], [20.0]]), torch.tensor([[1, 0], [0, 2], [2, 2]]))
    tensor([[20.],
            [10.],
            [ 0.]])
    """
    return _pooled("nearest_upsample", x, inds, first=True)


def _pooled(name, x, inds, *args, first=False, **options):
    """The operator of that name over a padded matrix, or over its first column; for arrays or tensors."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())
    if isinstance(x, tensor) or isinstance(inds, tensor):
        from kpcore.compat import padded

        module, neighbors = importlib.import_module("kpcore.torch"), padded.neighbors("inds", inds, len(x), first=first)
    else:
        module, column = kp, inds[:, :1] if first and getattr(inds, "ndim", None) == 2 else inds
        with checks.argument_names({"index": "inds"}):
            neighbors = Neighbors.from_padded(column, len(x))
    with checks.argument_names({"features": "x"}):
        return getattr(module, name)(x, neighbors, *args, **options)
