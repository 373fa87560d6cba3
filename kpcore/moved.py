"""Names of earlier versions, and where they are now: every import that once worked goes on to work."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys

MODULES = {
    "kpcore.rows": "kpcore.layers",
    "kpcore.scenes.batches": "kpcore.pipeline.batches",
    "kpcore.scenes.data": "kpcore.pipeline.data",
    "kpcore.scenes.segmentation": "kpcore.pipeline.segmentation",
    "kpcore.scenes.settings": "kpcore.pipeline.settings",
    "kpcore.scenes.training": "kpcore.pipeline.training",
    "kpcore.scenes.voting": "kpcore.pipeline.voting",
}
_SEARCH = ("GridIndex", "KDTree", "_rebuilt", "knn_search", "radius_search")  # pickled trees name `_rebuilt`
ATTRIBUTES = {"kpcore.neighbors": dict.fromkeys(_SEARCH, "kpcore.search")}


def attribute(module: str, name: str) -> object:
    """What a module had by that name; for its ``__getattr__``."""
    place = ATTRIBUTES[module].get(name)
    if place is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(importlib.import_module(place), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module by its earlier name: the module itself, not a copy."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in MODULES else None

    def create_module(self, spec):
        return None  # an empty one, which exec_module replaces

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(MODULES[module.__name__])


if not any(type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
