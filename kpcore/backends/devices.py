"""Where an array is, and what computes there: `cpu` for arrays of NumPy, `gpu` for those of CuPy.

CuPy is looked for only among the modules that are imported already: who has an array of CuPy has imported it.
"""

from __future__ import annotations

import functools
import importlib
import sys

import numpy as np

from kpcore.backends import cpu

Array = np.ndarray  # or an autodiff.Tensor, where a function is differentiable; adapters read this name, see ops.py
REAL = (np.dtype(np.float32), np.dtype(np.float64))
HALVES = {"float16": 65504.0, "bfloat16": 255 / 128 * 2.0**127}  # on the GPU, and the largest number of each


def is_array(value):
    """Whether it is an array of NumPy or CuPy."""
    if isinstance(value, np.ndarray):
        return True
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def backend(value):
    """The module with the kernels for such an array: `cpu`, or `gpu`, which has the same names and arguments."""
    return cpu if isinstance(value, (np.ndarray, np.generic)) else _gpu()


@functools.cache
def _gpu():
    return importlib.import_module("kpcore.backends.gpu")


def namespace(value):
    """numpy or cupy: what makes other arrays where this one is."""
    return np if isinstance(value, np.ndarray) else sys.modules["cupy"]


def on_host(value):
    """A NumPy array or number of what may be on the GPU; waits for it there."""
    return value.get() if not isinstance(value, (np.ndarray, np.generic)) else value


def as_array(value):
    """An array for the scalar that NumPy's arithmetic makes of an array without axes; everything else as it is."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def to_device_of(array, values):
    """Copy host values to `array`'s device."""
    return np.asarray(values) if isinstance(array, np.ndarray) else namespace(array).asarray(values)


def contiguous(value):
    """C-contiguous and aligned, as kernels want an array that was checked before."""
    flags = value.flags
    if flags.c_contiguous and (not isinstance(value, np.ndarray) or flags.aligned):
        return value
    return (
        np.require(value, None, ("C", "A"))
        if isinstance(value, np.ndarray)
        else namespace(value).ascontiguousarray(value)
    )


def is_real(value):
    """Whether an array may be differentiated in."""
    return value.dtype in REAL or (value.dtype.name in HALVES and not isinstance(value, np.ndarray))
