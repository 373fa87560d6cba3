"""Which device holds an array, and the backend that computes on it: `cpu` for NumPy arrays, `gpu` for CuPy arrays.

kpcore does not import CuPy here. It looks for it in `sys.modules`, since a caller with a CuPy array has imported it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from kpcore.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

    from numpy.typing import ArrayLike
    from typing_extensions import TypeVar  # with a default, which Python has from 3.13 on

    from kpcore.autodiff import Tensor


class AnyArray(Protocol):
    """A NumPy, CuPy or JAX array, a torch tensor, or a `kpcore.autodiff.Tensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> object: ...


if TYPE_CHECKING:
    Value = TypeVar("Value", bound=AnyArray, default=np.ndarray)
    Buffer = TypeVar("Buffer", bound=AnyArray, default=np.ndarray)
    # Bound to Tensor only. With np.ndarray in the bound, a type checker would give the result the shape and dtype of an
    # array argument, and a call that mixes arrays and tensors would return a union.
    Computed = TypeVar("Computed", bound=Tensor, default=np.ndarray)  # pyright: ignore[reportGeneralTypeIssues]
else:
    from typing import TypeVar

    Value = TypeVar("Value", bound=AnyArray)  # a parameter, or features computed from parameters
    Buffer = TypeVar("Buffer", bound=AnyArray)  # an array that is not trained: running statistics, kernel points
    Computed = TypeVar("Computed")  # the result of an operator: a Tensor if an argument is a Tensor, else an array

# The type of an argument in which an operator is differentiable. kpcore.ops.kinds reads this name in annotations.
# CuPy has no type annotations: a type checker accepts its arrays as anything and takes results for NumPy arrays.
Array: TypeAlias = Computed | np.ndarray
REAL: tuple[np.dtype, ...] = (np.dtype(np.float32), np.dtype(np.float64))
# The 16-bit dtypes of features on the GPU, with the largest number of each.
HALVES: dict[str, float] = {"float16": 65504.0, "bfloat16": 255 / 128 * 2.0**127}


class Backend(Protocol):
    """What the two backends have, the modules kpcore/backends/cpu.pyx and gpu.py."""

    NotFinite: type[Exception]
    OutOfRange: type[Exception]
    Index: type
    radius_search: Callable[..., Any]
    knn_search: Callable[..., Any]
    grid_subsample: Callable[..., Any]

    def run(self, name: str, call: Any = None, **fields: Any) -> None:
        """Run the kernel of that name, which writes into the arrays of its output fields.

        Its fields (src/cpu/kernels.h) are the attributes of `call` and `fields`, which override these. On the CPU that
        is the C++ function ``name`` in src/cpu; on the GPU the function ``name`` in one of kpcore/backends/gpu_*.py.
        """


def is_array(value: object) -> bool:
    """Whether `value` is a NumPy or CuPy array."""
    if isinstance(value, np.ndarray):
        return True
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def backend(value: object) -> Backend:
    """The module that computes on an array: `cpu` or `gpu`."""
    return cpu if isinstance(value, (np.ndarray, np.generic)) else _gpu()


@functools.cache
def _gpu():
    return importlib.import_module("kpcore.backends.gpu")


def namespace(value: object) -> ModuleType:
    """The module that makes arrays on the device of `value`: numpy or cupy."""
    return np if isinstance(value, np.ndarray) else sys.modules["cupy"]


def on_host(value: AnyArray) -> np.ndarray:
    """Copy an array from the GPU to the host, which waits for the GPU; return NumPy arrays and scalars unchanged."""
    return value.get() if not isinstance(value, (np.ndarray, np.generic)) else value


def as_array(value: AnyArray) -> np.ndarray:
    """Convert a NumPy scalar, which arithmetic on 0-d arrays gives, to an array; return arrays unchanged."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def to_device_of(array: AnyArray, values: ArrayLike) -> np.ndarray:
    """Copy host values to `array`'s device."""
    return np.asarray(values) if isinstance(array, np.ndarray) else namespace(array).asarray(values)


def contiguous(value: np.ndarray) -> np.ndarray:
    """Make an array C-contiguous and aligned, as kernels require it, copying only where needed."""
    flags = value.flags
    if flags.c_contiguous and (not isinstance(value, np.ndarray) or flags.aligned):
        return value
    return (
        np.require(value, None, ("C", "A"))
        if isinstance(value, np.ndarray)
        else namespace(value).ascontiguousarray(value)
    )


def is_real(value: np.ndarray) -> bool:
    """Whether a gradient can be computed with respect to an array: its dtype is a real one that kernels support."""
    return value.dtype in REAL or (value.dtype.name in HALVES and not isinstance(value, np.ndarray))
