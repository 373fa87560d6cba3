"""The table of names that moved: every import that worked in an earlier version still works."""

from __future__ import annotations

import importlib
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
_SEARCH = ("GridIndex", "KDTree", "_rebuilt", "knn_search", "radius_search")  # pickled trees refer to `_rebuilt`
# For each module the names that it had, and (module, name) of each now.
ATTRIBUTES = {
    "kpcore.neighbors": {name: ("kpcore.search", name) for name in _SEARCH},
    "kpcore.pipeline.voting": {
        name: ("kpcore.pipeline.labelling", name) for name in ("evaluate", "evaluate_scores", "labels_of")
    }
    | {"part_labels": ("kpcore.pipeline.labelling", "classes_of")},
}


def attribute(module: str, name: str) -> object:
    """The attribute that a module had by this name; for the module's ``__getattr__``."""
    if name not in ATTRIBUTES[module]:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new_module, new_name = ATTRIBUTES[module][name]
    return getattr(importlib.import_module(new_module), new_name)


class _Finder:  # without the base classes of importlib.abc, which take 10 ms to import
    """Imports a module by its earlier name; the result is the module itself, not a copy."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in MODULES else None

    def create_module(self, spec):
        return None  # Python makes an empty module, which exec_module replaces

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(MODULES[module.__name__])


if not any(type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
