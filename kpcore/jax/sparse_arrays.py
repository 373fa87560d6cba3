"""Neighbour lists as sparse arrays of JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from kpcore.backends import checks
from kpcore.jax.operators import checked
from kpcore.jax.pytree import flatten
from kpcore.neighbors import Neighbors
from kpcore.neighbors import checked as checked_list


def to_bcoo(neighbors: Neighbors, values: jax.Array | np.ndarray | None = None) -> BCOO:
    """A `jax.experimental.sparse.BCOO` (M, N) that holds `values` (E,), by default ones (float32).

    Differentiable in `values`. Pairs keep their order, and a pair that occurs twice counts twice; ``indices_sorted``
    and ``unique_indices`` say whether the columns of all rows rise, and whether all pairs differ.

    Parameters
    ----------
    neighbors : Neighbors
        While JAX traces a list, its values are not known: the pairs count as neither sorted nor unique, and E is the
        length of ``neighbors.index``.
    values : (E,) float32 or float64, optional
        One for each pair, in the order of ``neighbors.index``.

    Examples
    --------
    >>> import jax.numpy as jnp, numpy as np, kpcore as kp
    >>> nb = kp.Neighbors(np.array([0, 1, 1], np.int32), kp.row_splits([2, 0, 1]), num_points=2)
    >>> values, x = jnp.array([1.0, 2.0, 3.0], jnp.float32), jnp.array([[10.0], [100.0]], jnp.float32)
    >>> kp.jax.to_bcoo(nb, values) @ x
    Array([[210.],
           [  0.],
           [300.]], dtype=float32)
    """
    if not isinstance(neighbors, Neighbors):
        raise TypeError(f"neighbors: expected kpcore.Neighbors, got {type(neighbors).__name__}")
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(neighbors))
    if not is_traced:
        checked_list(neighbors)
    (index, row_splits, *_), _ = flatten(neighbors)
    pairs = len(index) if is_traced else neighbors.num_pairs
    checked("values", values, True)
    if values is None:
        values = jnp.ones(pairs, jnp.float32)
    else:
        checks.array("values", np.empty(values.shape, values.dtype), "E", checks.REAL, {"E": (pairs, "neighbors")})
    # An index behind the last pair gets the row M, which BCOO defines to be no entry.
    rows = jnp.searchsorted(jnp.asarray(row_splits[1:]), jnp.arange(pairs), side="right")
    indices = jnp.stack([rows.astype(jnp.int32), jnp.asarray(index[:pairs])], axis=1)
    is_sorted, is_unique = (False, False) if is_traced else _order(neighbors, pairs)
    return BCOO((jnp.asarray(values), indices), shape=(neighbors.num_queries, neighbors.num_points),
                indices_sorted=is_sorted, unique_indices=is_unique)  # fmt: skip


def _order(neighbors, pairs):
    """(whether the pairs rise by query and point, whether all are different)"""
    keys = neighbors.edge_index()[1] * neighbors.num_points + neighbors.index[:pairs]
    steps = np.diff(keys)
    if (steps >= 0).all():
        return True, bool((steps > 0).all())
    return False, len(np.unique(keys)) == pairs
