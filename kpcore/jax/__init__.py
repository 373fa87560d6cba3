"""kpcore on JAX arrays: the same names as in `kpcore`, under jit, grad and vmap, on the CPU.

Differentiable operators are calls through XLA's foreign function interface (FFI), each a `jax.custom_vjp` whose
gradient is another such call. Searches and `grid_subsample` take and return JAX arrays outside of jit, because the
sizes of their results depend on values. `kpcore.Neighbors` is a pytree; `to_bcoo` makes a sparse array of one.
docs/frameworks.md describes all of it, and the limits.
"""

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ModuleNotFoundError("kpcore.jax needs JAX: pip install kpcore[jax]", name="jax") from None

import kpcore as _kpcore
from kpcore.jax import pytree as _pytree  # noqa: F401 - registers Neighbors as a pytree
from kpcore.jax.eager import GridIndex, KDTree
from kpcore.jax.eager import eager as _eager
from kpcore.jax.operators import define as _define
from kpcore.jax.sparse_arrays import to_bcoo
from kpcore.neighbors import Neighbors
from kpcore.ops import EAGER as _EAGER
from kpcore.ops import OPS as _OPS

for _name, _op in _OPS.items():
    _public = getattr(_kpcore, _name)
    globals()[_name] = _eager(_public) if _op.result is None else _define(_op, _public)
for _name in _EAGER:
    globals()[_name] = _eager(getattr(_kpcore, _name))

__all__ = ["GridIndex", "KDTree", "Neighbors", "to_bcoo", *_EAGER, *_OPS]
__all__.sort()
