"""Arrays or torch tensors in, the same kind out: what the flat functions of `kpcore.compat` share.

They are written for NumPy and CuPy arrays. `arrays_or_tensors` makes them take tensors too. Neither torch nor CuPy is
imported: a caller who has a tensor has imported torch.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from kpcore.backends import checks, devices

Function = TypeVar("Function", bound=Callable[..., Any])

# Arguments that hold the lengths of batch items. They may be of any kind, on any device, or a sequence of integers.
_LENGTHS = frozenset(("batches", "q_batches", "s_batches", "lengths", "q_lengths", "s_lengths"))


def arrays_or_tensors(*, gradient: str | None) -> Callable[[Function], Function]:
    """Make a function on NumPy and CuPy arrays take torch tensors too, for which it returns tensors on their device.

    `gradient`: for functions that return coordinates, features or distances, the function to advise for tensors that
    require a gradient, since the result has none; None for functions that return indices only.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def on_any(*args, **kwargs):
            tensor = getattr(sys.modules.get("torch"), "Tensor", None)
            if tensor is not None:
                for value in (*args, *kwargs.values()):
                    if isinstance(value, tensor):
                        return _on_tensors(function, signature.bind(*args, **kwargs).arguments, tensor, gradient)
            return function(*args, **kwargs)

        return on_any  # type: ignore[return-value]

    return decorate


def _on_tensors(function, arguments, tensor, gradient):
    """The result of `function` for arguments, by name, of which some are tensors; those without axes are numbers."""
    arguments = {
        name: value.item() if isinstance(value, tensor) and not value.ndim else value
        for name, value in arguments.items()
    }
    data = [name for name in arguments if name not in _LENGTHS]
    first = next((arguments[name] for name in data if isinstance(arguments[name], tensor)), None)
    arrays = [name for name in data if devices.is_array(arguments[name])]
    if "kpcore.torch" not in sys.modules and (first is None or not arrays):
        # It takes a third of a second to import, which each new worker of a DataLoader would spend. What the following
        # refuses (tensors on a GPU, with a gradient or of other dtypes, wrong arguments) takes the other way too.
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return _by_numpy(function, arguments, tensor, first is not None)
    import torch

    from kpcore.torch.ops import checked, on_arrays, on_stream_of, to_array, to_tensor

    for name in _LENGTHS & arguments.keys():
        if isinstance(arguments[name], tensor):
            arguments[name] = to_array(name, checked(None, name, arguments[name]).cpu())
    if first is None:
        return function(**arguments)

    def call():
        for name in data:
            value = arguments[name]
            if not isinstance(value, tensor) and name not in arrays:
                continue
            if checked(None, name, value).requires_grad and gradient and torch.is_grad_enabled():
                raise TypeError(
                    f"{name}: {function.__name__} has no gradient; detach it with {name}.detach(), or call {gradient}"
                )
            arguments[name] = to_array(name, value)
        out = on_arrays(function, **arguments)
        return tuple(map(to_tensor, out)) if isinstance(out, tuple) else to_tensor(out)

    return on_stream_of(first, call)


def _by_numpy(function, arguments, tensor, to_tensors):
    """The same by torch's conversions from and to NumPy arrays."""
    arrays = {name: value.numpy() if isinstance(value, tensor) else value for name, value in arguments.items()}
    out = function(**arrays)
    if not to_tensors:
        return out
    convert = sys.modules["torch"].from_numpy
    return tuple(map(convert, out)) if isinstance(out, tuple) else convert(out)


def row_splits(name: str, lengths: Any, rows: checks.Named) -> np.ndarray:
    """(B + 1,) int64 on the device of the array `rows`, (name, array), from the lengths of the batch items.

    `lengths` are integers (B,), an array or a sequence; they add up to the rows of the array.
    """
    rows_name, array = rows
    if not devices.is_array(array) or array.ndim != 2:
        checks.array(rows_name, array, "N D", checks.REAL, {})  # raises
    values = devices.on_host(lengths) if devices.is_array(lengths) else np.asarray(lengths)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError(f"{name}: expected integers (B,), got {values.dtype} {values.shape}")
    numbers = values.tolist()  # for the few items of a batch faster than NumPy
    bounds = [0, *itertools.accumulate(numbers)]
    if min(numbers, default=0) < 0:
        raise ValueError(f"{name}: expected numbers of at least 0, got {min(numbers)}")
    if bounds[-1] != len(array):
        raise ValueError(f"{name}: expected lengths that add up to {len(array)} to match {rows_name}, got {bounds[-1]}")
    return devices.to_device_of(array, np.array(bounds, np.int64))
