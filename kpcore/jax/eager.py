"""Functions on JAX arrays that JAX does not trace, because the sizes of their results depend on values."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kpcore
from kpcore.jax.operators import is_int32_splits
from kpcore.jax.pytree import to_host
from kpcore.ops import ITERABLES


def eager(public: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of kpcore for calls outside of jit: JAX arrays take the place of NumPy arrays."""
    signature = inspect.signature(public)

    @functools.wraps(public)
    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        device = next(filter(None, map(_committed_device, jax.tree.leaves(bound.arguments))), None)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _to_numpy(public.__name__, name, value)
        return _to_jax(public(*bound.args, **bound.kwargs), device)

    return function


def _committed_device(value):
    """The device that an array is committed to, by jax.device_put for example; None if JAX may move it."""
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


def _to_numpy(function, name, value):
    """Convert JAX arrays to NumPy arrays, also in a dict or iterable; `function` is the name to use in errors."""
    if name in ITERABLES and not isinstance(value, (jax.Array, np.ndarray)):
        return (_to_numpy(function, name, each) for each in value)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name}: {function} is not traced: expected an array outside of jit, grad and vmap, got {value}"
        )
    if isinstance(value, dict):
        return {key: _to_numpy(function, key, v) for key, v in value.items()}
    if isinstance(value, jax.Array):
        if not value.is_fully_replicated:
            raise TypeError(
                f"{name}: {function} is not divided among devices: expected an array on one device, got one divided "
                f"among {len(value.devices())}"
            )
        array = to_host(name, value)
        return array.astype(np.int64) if is_int32_splits(name, array) else array
    return value


def _to_jax(value, device):
    """Convert NumPy arrays to JAX arrays on `device`, also in tuples, named tuples, pyramids and kernel maps."""
    if isinstance(value, np.ndarray):
        if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
            narrow = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
            if value.dtype.kind == "f" or np.any(narrow != value):
                raise TypeError(
                    f"result: expected one that JAX can hold while jax_enable_x64 is off, got {value.dtype}; turn it "
                    "on with jax.config.update('jax_enable_x64', True)"
                )
            value = narrow
        return jnp.asarray(value) if device is None else jax.device_put(value, device)
    if isinstance(value, kpcore.KernelMap):
        return value.converted(functools.partial(_to_jax, device=device))
    if isinstance(value, tuple):
        values = [_to_jax(v, device) for v in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return value
