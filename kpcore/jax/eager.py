"""What is not traced, on JAX arrays: searches and all else whose sizes depend on values."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kpcore
from kpcore.jax.operators import is_splits
from kpcore.jax.pytree import to_host


def eager(public: Callable[..., Any]) -> Callable[..., Any]:
    """A function of kpcore that takes and returns JAX arrays where that one has NumPy's, outside of jit."""
    signature = inspect.signature(public)

    @functools.wraps(public)
    def function(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        device = next(filter(None, map(_chosen_device, jax.tree.leaves(given.arguments))), None)
        for name, value in given.arguments.items():
            given.arguments[name] = _given(public.__name__, name, value)
        return _returned(public(*given.args, **given.kwargs), device)

    return function


def _chosen_device(value):
    """The device that an array was put on; None for others, which JAX moves to where they are used."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.committed:
        return next(iter(value.devices())) if len(value.devices()) == 1 else None
    return None


class KDTree(kpcore.KDTree):
    __doc__ = kpcore.KDTree.__doc__
    __slots__ = ()
    __init__ = eager(kpcore.KDTree.__init__)
    radius_search = eager(kpcore.KDTree.radius_search)
    knn_search = eager(kpcore.KDTree.knn_search)


class GridIndex(kpcore.GridIndex):
    __doc__ = kpcore.GridIndex.__doc__
    __slots__ = ()
    __init__ = eager(kpcore.GridIndex.__init__)
    radius_search = eager(kpcore.GridIndex.radius_search)
    knn_search = eager(kpcore.GridIndex.knn_search)


def _given(function, name, value):
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name}: {function} is not traced; expected an array outside of jit, grad and vmap, got {value}"
        )
    if isinstance(value, dict):
        return {key: _given(function, key, v) for key, v in value.items()}
    if isinstance(value, jax.Array):
        if not value.is_fully_replicated:
            raise TypeError(
                f"{name}: {function} is not divided among devices; expected an array on one device, got parts on "
                f"{len(value.devices())}"
            )
        array = to_host(name, value)
        return array.astype(np.int64) if is_splits(name, array) else array
    return value


def _returned(value, device):
    if isinstance(value, np.ndarray):
        if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
            narrow = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
            if value.dtype.kind == "f" or np.any(narrow != value):
                raise TypeError(f"expected a result without {value.dtype}, because jax_enable_x64 is off")
            value = narrow
        return jnp.asarray(value) if device is None else jax.device_put(value, device)
    if isinstance(value, tuple):
        values = [_returned(v, device) for v in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return value
