"""The GPU backend: the functions of `cpu` for CuPy arrays. `run` calls the launcher of a kernel, from gpu_*.py."""

from __future__ import annotations

from kpcore.backends import (  # noqa: F401 - their launchers register themselves
    cpu,
    gpu_cell_conv,
    gpu_deform2d,
    gpu_deformation,
    gpu_features,
    gpu_kernel_map,
    gpu_kpconv,
    gpu_layers,
    gpu_lists,
    gpu_pooling,
    gpu_sampling,
)
from kpcore.backends.gpu_launch import LAUNCHERS, NotFinite, OutOfRange
from kpcore.backends.gpu_search import Index, Search, feature_search, knn_search, radius_search, radius_searches
from kpcore.backends.gpu_sources import source
from kpcore.backends.gpu_subsampling import grid_subsample

__all__ = [
    "Index",
    "NotFinite",
    "OutOfRange",
    "Search",
    "feature_search",
    "grid_subsample",
    "knn_search",
    "radius_search",
    "radius_searches",
    "run",
    "source",
]

_FIELDS = cpu.fields()
_OPTIONAL = {
    name: {field: None for field, kind in kinds.items() if kind == "optional_array"} for name, kinds in _FIELDS.items()
}


class Fields:
    """The fields of a kernel as attributes."""

    def __init__(self, fields):
        self.__dict__ = fields


def run(name, call=None, **more):
    """Call the launcher `name`. Each field is taken from `more`, else from the attributes of `call`."""
    kinds, attributes = _FIELDS[name], {} if call is None else call.__dict__
    fields = {**_OPTIONAL[name], **attributes, **more}
    if fields.keys() != kinds.keys():
        for field in kinds:
            if field not in fields:
                raise TypeError(f"{name}: expected a field {field}, got none")
        for field in fields.keys() - kinds.keys():
            if field in more:
                raise TypeError(f"{name}: expected no fields but {', '.join(kinds)}, got {', '.join(more)}")
            del fields[field]  # an attribute of `call` that is not a field
    LAUNCHERS[name](Fields(fields))
