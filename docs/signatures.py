"""Writes the type stubs of kpcore.torch and kpcore.jax from the table of operators: ``python docs/signatures.py``.

Those modules make their functions when they are imported; editors and type checkers read these files instead. A test
fails if they are out of date.
"""

import inspect
import sys
from pathlib import Path

import kpcore as kp
from kpcore.ops import EAGER, OPS

FRAMEWORKS = {
    "torch/__init__.pyi": ("from torch import Tensor", "Tensor"),
    "jax/__init__.pyi": ("from jax import Array", "Array"),
}
LAYERS = ("DeformableKPConv", "KPConv", "KPConvX")
RECORDS = {"batch_norm": "BatchNormed", "build_pyramid": "Pyramid", "farthest_point_sampling": "Sampled",
           "grid_subsample": "Subsampled", "knn_search": "Neighbors"}  # fmt: skip


def text(file):
    """What the file is to hold."""
    imported, array = FRAMEWORKS[file]
    lines = ["from typing import Any", "", imported, "", "import kpcore"]
    lines.append("from kpcore import BatchNormed, Pyramid, Sampled, Subsampled")
    lines.append("from kpcore import Neighbors as Neighbors")
    if array == "Tensor":
        lines += [f"from kpcore.torch.layers import {layer} as {layer}" for layer in LAYERS]
        lines += ["from kpcore.torch.networks import Network as Network"]
        lines += ["from kpcore.torch.ops import use_torch_allocator as use_torch_allocator"]
    lines += ["", "class GridIndex(kpcore.GridIndex): ...", "class KDTree(kpcore.KDTree): ...", ""]
    for name in sorted({*EAGER, *OPS}):
        parameters, star = [], False
        signature = inspect.signature(getattr(kp, name))
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not star:
                star = parameters.append("*") is None
            annotation = "Any" if parameter.annotation is parameter.empty else str(parameter.annotation)
            if array == "Tensor" and parameter.name == "seed" and name in OPS:
                annotation = "int | Tensor"
            default = "" if parameter.default is parameter.empty else " = ..."
            parameters.append(f"{parameter.name}: {annotation.replace('Array', array)}{default}")
        result = RECORDS.get(
            name, "Any" if signature.return_annotation is signature.empty else signature.return_annotation
        )
        lines += [
            f"def {name}(",
            *(f"    {p}," for p in parameters),
            f") -> {str(result).replace('Array', array)}: ...",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for file in FRAMEWORKS:
        (Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "kpcore") / file).write_text(text(file))
