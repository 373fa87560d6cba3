"""Where an array is, and what computes there: `cpu` for arrays of NumPy, `gpu` for those of CuPy.

CuPy is looked for only among the modules that are imported already: who has an array of CuPy has imported it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from kpcore.backends import cpu

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import ArrayLike
    from typing_extensions import TypeVar  # with a default, which Python has from 3.13 on

    from kpcore.autodiff import Tensor


class AnyArray(Protocol):
    """An array of NumPy, CuPy or JAX, a tensor of torch, or a `kpcore.autodiff.Tensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> object: ...


if TYPE_CHECKING:
    Value = TypeVar("Value", bound=AnyArray, default=np.ndarray)
    Buffer = TypeVar("Buffer", bound=AnyArray, default=np.ndarray)
    # The bound leaves np.ndarray to the other half of `Array`. With np.ndarray in it the result would get the shape
    # and the dtype that a type checker knows of an argument, and with one Tensor among arrays it would be either.
    Computed = TypeVar("Computed", bound=Tensor, default=np.ndarray)  # pyright: ignore[reportGeneralTypeIssues]
else:
    from typing import TypeVar

    Value = TypeVar("Value", bound=AnyArray)  # what is trained, and what is computed from it
    Buffer = TypeVar("Buffer", bound=AnyArray)  # an array that is not trained: running statistics, kernel points
    Computed = TypeVar("Computed")  # of an operator: a Tensor where an argument is one, else an array

# An argument that an operator is differentiated in, or may be computed with one. Adapters read these names, see ops.py.
# CuPy declares no types: to a type checker its arrays are anything, and results are NumPy's.
Array: TypeAlias = Computed | np.ndarray
REAL: tuple[np.dtype, ...] = (np.dtype(np.float32), np.dtype(np.float64))
HALVES: dict[str, float] = {
    "float16": 65504.0,
    "bfloat16": 255 / 128 * 2.0**127,
}  # on the GPU, and the largest number of each


def is_array(value: object) -> bool:
    """Whether it is an array of NumPy or CuPy."""
    if isinstance(value, np.ndarray):
        return True
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def backend(value: object) -> ModuleType:
    """The module with the kernels for such an array: `cpu`, or `gpu`, which has the same names and arguments."""
    return cpu if isinstance(value, (np.ndarray, np.generic)) else _gpu()


@functools.cache
def _gpu():
    return importlib.import_module("kpcore.backends.gpu")


def namespace(value: object) -> ModuleType:
    """numpy or cupy: what makes other arrays where this one is."""
    return np if isinstance(value, np.ndarray) else sys.modules["cupy"]


def on_host(value: AnyArray) -> np.ndarray:
    """A NumPy array or number of what may be on the GPU; waits for it there."""
    return value.get() if not isinstance(value, (np.ndarray, np.generic)) else value


def as_array(value: AnyArray) -> np.ndarray:
    """An array for the scalar that NumPy's arithmetic makes of an array without axes; everything else as it is."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def to_device_of(array: AnyArray, values: ArrayLike) -> np.ndarray:
    """Copy host values to `array`'s device."""
    return np.asarray(values) if isinstance(array, np.ndarray) else namespace(array).asarray(values)


def contiguous(value: np.ndarray) -> np.ndarray:
    """C-contiguous and aligned, as kernels want an array that was checked before."""
    flags = value.flags
    if flags.c_contiguous and (not isinstance(value, np.ndarray) or flags.aligned):
        return value
    return (
        np.require(value, None, ("C", "A"))
        if isinstance(value, np.ndarray)
        else namespace(value).ascontiguousarray(value)
    )


def is_real(value: np.ndarray) -> bool:
    """Whether an array may be differentiated in."""
    return value.dtype in REAL or (value.dtype.name in HALVES and not isinstance(value, np.ndarray))
