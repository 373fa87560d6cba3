"""`kpcore.Neighbors`, `kpcore.Pyramid` and `kpcore.KernelMap` as JAX pytrees."""

import json
from typing import Any

import jax
import numpy as np

from kpcore.features import CovarianceFeatures
from kpcore.jax.ffi import ONLY_ON_CPU
from kpcore.kernel_map import KernelMap
from kpcore.layers.normalization import BatchNormed
from kpcore.neighbors import TO_HOST, Neighbors, unchecked_list
from kpcore.nn.networks import Result
from kpcore.pyramid import Level, Pyramid
from kpcore.sampling import Sampled
from kpcore.subsampling import Subsampled


def flatten(neighbors: Neighbors) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """((index, row_splits, distance, transpose), sizes) of a list, with row_splits that JAX can hold."""
    row_splits = neighbors.row_splits
    if type(row_splits).__module__.split(".")[0] == "cupy":
        raise TypeError(
            "neighbors: expected a list on the CPU, got one with CuPy arrays; move it with neighbors.to('cpu')"
        )
    if isinstance(row_splits, np.ndarray) and row_splits.dtype == np.int64 and not jax.config.jax_enable_x64:
        if len(row_splits) and row_splits[-1] > np.iinfo(np.int32).max:
            raise ValueError(
                f"neighbors: expected at most 2**31 - 1 pairs unless jax_enable_x64 is on, got {row_splits[-1]}"
            )
        row_splits = row_splits.astype(np.int32)
    transposed = None
    if neighbors.carries_transpose:
        transposed = neighbors.transpose() if neighbors.stored_transposed is None else neighbors.stored_transposed
    leaves = neighbors.index, row_splits, neighbors.distance, transposed
    return leaves, (neighbors.num_points, neighbors.width, neighbors.carries_transpose)


def _unflatten(sizes, leaves):
    index, row_splits, distance, transposed = leaves
    num_points, width, carries_transpose = sizes
    return unchecked_list(index, row_splits, num_points, distance, width, transposed, carries_transpose)


def _flatten_map(m):
    arrays = m.neighbors, m.kernel_index, m.out_coords, m.out_row_splits, m.in_coords, m.in_row_splits
    return arrays, (m.kernel, m.is_transposed)


def to_host(name: str, array: jax.Array) -> np.ndarray:
    """Convert a JAX array whose values are needed to a NumPy array; an error while it is traced."""
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{name}: expected an array outside of jit, grad and vmap, got {array}; a traced list has no values"
        )
    if any(device.platform != "cpu" for device in array.devices()):
        raise TypeError(f"{name}: expected an array on the CPU, got one on {array.device}; {ONLY_ON_CPU}")
    return np.asarray(array)


TO_HOST[jax.Array] = to_host
jax.tree_util.register_pytree_node(Neighbors, flatten, _unflatten)
jax.tree_util.register_pytree_node(KernelMap, _flatten_map, lambda kernel, arrays: KernelMap(*arrays, *kernel))
jax.tree_util.register_pytree_node(Pyramid, lambda levels: (tuple(levels), None), lambda _, levels: Pyramid(levels))


def _register_with_export():
    """Register with jax.export, which stores the pytree structure of inputs and outputs with a program."""
    export.register_pytree_node_serialization(
        Neighbors,
        serialized_name="kpcore.Neighbors",
        serialize_auxdata=lambda sizes: json.dumps(sizes).encode(),
        deserialize_auxdata=lambda text: tuple(json.loads(text)),
    )
    export.register_pytree_node_serialization(
        Pyramid,
        serialized_name="kpcore.Pyramid",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: None,
    )
    for record in Level, BatchNormed, CovarianceFeatures, Subsampled, Sampled, Result:
        export.register_namedtuple_serialization(record, serialized_name=f"kpcore.{record.__name__}")


try:
    from jax import export
except ModuleNotFoundError as error:  # jax.export of JAX 0.5 imports absl, which JAX 0.5 does not install
    if error.name != "absl":
        raise
else:
    _register_with_export()
