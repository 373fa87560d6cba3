"""Write the type stubs of kpcore.torch and kpcore.jax from the table of operators: ``python docs/signatures.py``.

These modules create their functions when they are imported; editors and type checkers read the stubs instead. A test
fails if they are out of date.
"""

import inspect
import re
import sys
from pathlib import Path

import kpcore as kp
from kpcore.ops import EAGER, OPS

# {stub: (its imports, type of an array that is returned, type of an array argument, type of a dtype argument)}
FRAMEWORKS = {
    "torch/__init__.pyi": (("from torch import Tensor, dtype",), "Tensor", "Tensor", "DTypeLike | dtype"),
    "jax/__init__.pyi": (
        ("from jax import Array", "from numpy import ndarray"),
        "Array",
        "Array | ndarray",
        "DTypeLike",
    ),
}
# {framework: {module of kpcore.<framework>: what kpcore.<framework> has from it}}
EXPORTED = {
    "torch": {
        "data": ("PyramidCollate", "PyramidDataset", "dynamic_shapes", "to_device"),
        "deform2d_layers": (
            "ConditionalConv2d",
            "DeformableConv2d",
            "DeformableKernelConv2d",
            "GlobalDeformableKernel2d",
            "LocalDeformableKernel2d",
        ),
        "layers": ("DeformableKPConv", "KPConv", "KPConvX"),
        "networks": ("ImageNetwork", "Network"),
        "open3d_layers": ("ContinuousConv", "SparseConv", "SparseConvTranspose"),
        "open3d_searches": ("FixedRadiusSearch", "KNNSearch", "RadiusSearch", "VoxelPooling"),
        "ops": ("use_torch_allocator",),
        "sparse_layers": ("InverseConv", "StridedConv", "SubmanifoldConv"),
        "sparse_tensors": ("to_sparse",),
    },
    "jax": {"sparse_arrays": ("to_bcoo",)},
}
# The array types in kpcore's annotations; a stub has the framework's in their place.
_ARRAYS = re.compile(r"Array\[Computed\]|\b(AnyArray|Computed|np\.ndarray)\b")


def text(file):
    """The text of a stub."""
    imported, array, *argument_and_dtype = FRAMEWORKS[file]
    lines = ["from collections.abc import Collection, Iterable, Sequence", "from typing import Literal, overload", ""]
    lines += [*sorted([*imported, "from numpy.typing import DTypeLike"]), "", "import kpcore"]
    lines.append("from kpcore import BatchNormed, CovarianceFeatures, KernelMap, Pyramid, Sampled, Subsampled")
    lines.append("from kpcore import Neighbors as Neighbors")
    framework = file.partition("/")[0]
    more = [f"from kpcore.{framework}.{module} import {name} as {name}"
            for module, names in EXPORTED[framework].items() for name in names]  # fmt: skip
    more += ["from kpcore.neighbors import Flow", "from kpcore.search import IgnoreQueryPoint, Metric, Sort"]
    lines += sorted(more, key=lambda line: line.split()[1])
    for index in ("GridIndex", "KDTree"):
        lines += ["", f"class {index}(kpcore.{index}):"]
        lines += [f"    {line}" for line in _declared(kp.KDTree.radius_search, array, *argument_and_dtype)]
    lines.append("")
    for name in sorted({*EAGER, *OPS}):
        lines += _declared(getattr(kp, name), array, *argument_and_dtype, seeds=array == "Tensor" and name in OPS)
    return "\n".join(lines).replace("'", '"') + "\n"


def _declared(function, array, argument, dtype, seeds=False):
    """The lines that declare a function on arrays of the framework; with `seeds`, `seed` may be a tensor too."""
    parameters, star = [], False
    signature = inspect.signature(function)
    result = _ARRAYS.sub(array, str(signature.return_annotation))
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = parameters.append("*") is None
        if parameter.annotation is parameter.empty:
            parameters.append(parameter.name)
            continue
        annotation = _ARRAYS.sub(argument, str(parameter.annotation)).replace("DTypeLike", dtype)
        if seeds and parameter.name == "seed":
            annotation = "int | Tensor"
        default = "" if parameter.default is parameter.empty else " = ..."
        parameters.append(f"{parameter.name}: {annotation}{default}")
    if parameters[-1].startswith("count_only: "):
        counting = {"Literal[False] = ...": "Neighbors", "Literal[True]": array}
        variants = [([*parameters[:-1], f"count_only: {kind}"], result) for kind, result in counting.items()]
    else:
        variants = [(parameters, result)]
    lines = []
    for parameters, result in variants:
        lines += ["@overload"] * (len(variants) > 1)
        lines += [f"def {function.__name__}(", *(f"    {p}," for p in parameters), f") -> {result}: ..."]
    return lines


if __name__ == "__main__":
    for file in FRAMEWORKS:
        (Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "kpcore") / file).write_text(text(file))
