"""Arrays of published checkpoints: their names, and the arrays of a network from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from kpcore.nn.networks import shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import ArrayLike

    from kpcore.nn.kpnext import KPNeXt
    from kpcore.nn.networks import Network

Arrays: TypeAlias = dict[str, np.ndarray]
_MOST_BLOCKS = 1024  # of a network
# {name of an array of a normalisation here: its published name}
NORM = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}


class Client(NamedTuple):
    """A project that checkpoints come from."""

    title: str
    function: str  #: of `kpcore.nn`
    unused: str  #: a pattern of the names of arrays that the network here does not have


CLIENTS = {
    "kpconv-pytorch": Client("KPConv-PyTorch", "import_kpconv_pytorch", r"criterion\.weight"),
    "open3d-ml": Client("Open3D-ML", "import_open3d_ml", "(?!)"),
    "kpconvx": Client("KPConvX (ml-kpconvx)", "import_kpconvx", r"criterion\.weight"),
    "geotransformer": Client("GeoTransformer", "import_geotransformer", "(?!)"),
    "predator": Client("Predator", "import_predator", r"epsilon|(bottle|gnn|proj_gnn|proj_score)\..*"),
}


def speller(net: Network, paths: Mapping[str, str], norm: str, conv_norm: str, bias: str) -> Callable[[str], str]:
    """A function from the name of an array in `Network` to that in the published code.

    `paths` are those of the blocks there, `norm` that of the normalisation in a block or linear layer, `conv_norm` that
    after the convolution of a residual block, `bias` the name of the bias of a linear layer.
    encoder.1.unary1.norm.scale -> encoder_blocks.1.unary1.batch_norm.batch_norm.weight
    """

    def spell(name: str) -> str:
        part, number, *layers, leaf = name.split(".")
        path, normalized = paths[f"{part}.{number}"], norm
        if layers and layers[0].startswith("unary"):
            path = f"{path}.{layers.pop(0)}"
        elif part == "encoder" and net.architecture[int(number)].startswith("resnetb"):
            normalized = conv_norm
        if not layers:
            return f"{path}.{'mlp.weight' if leaf == 'weights' else bias}"
        if layers[0] == "conv":
            return ".".join([path, "KPConv", *layers[1:], leaf])
        return f"{path}.{normalized}.{NORM[leaf]}"

    return spell


def need(config: Mapping[str, Any], *names: str) -> None:
    """Raise an error that lists the settings among `names` that a config does not have."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected settings by name, got {type(config).__name__}")
    if missing := [name for name in names if config.get(name) is None]:
        raise ValueError(f"config: expected {', '.join(missing)}, got none")


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A setting that is on or off."""
    value = config.get(name, default)
    if value not in (0, 1):
        raise ValueError(f"config: expected {name} 0 or 1, got {value!r}")
    return bool(value)


def check_sizes(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Check that settings, where a config has them, are as the arrays show: {name: value}."""
    for name, size in sizes.items():
        if config.get(name, size) != size:
            raise ValueError(f"config: expected {name} {size!r}, as of the arrays, got {config[name]!r}")


def arrays_of(client: str, state_dict: Mapping[str, ArrayLike]) -> Arrays:
    """The arrays of a checkpoint, without the prefix of DataParallel; an error if the names are another client's."""
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise TypeError(f"state_dict: expected arrays by name, got {type(state_dict).__name__}")
    arrays = {name: _array(name, value) for name, value in state_dict.items()}
    for prefix in ("module.", "_orig_mod.", "module."):  # of DataParallel and torch.compile, in either order
        if arrays and all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): value for name, value in arrays.items()}
    for name in arrays:
        if re.search(r"\d{5}", name) or any(number > _MOST_BLOCKS for number in numbers(name)):
            raise ValueError(f"state_dict: expected names with numbers up to {_MOST_BLOCKS}, got {name[:100]}")
    looks_like = clients_of(arrays)
    if looks_like and client not in looks_like:
        titles = " or ".join(CLIENTS[other].title for other in looks_like)
        advice = " or ".join(f"kpcore.nn.{CLIENTS[other].function} (--from {other})" for other in looks_like)
        raise ValueError(f"state_dict: expected names of {CLIENTS[client].title}, got those of {titles}, such as "
                         f"{next(iter(arrays))}: use {advice}")  # fmt: skip
    return arrays


def shape_of(arrays: Arrays, name: str, axes: int, missing: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of an array with a number of axes; `missing`, or an error, if there is none with this name."""
    if name not in arrays and missing is not None:
        return missing
    if name not in arrays or arrays[name].ndim != axes:
        got = arrays[name].shape if name in arrays else "none"
        raise ValueError(f"state_dict: expected {name} with {axes} axes, got {got}")
    return arrays[name].shape


def _array(name: str, value: Any) -> np.ndarray:
    is_tensor = hasattr(value, "is_complex")  # of torch
    if is_tensor and not value.is_complex() and "strided" in str(value.layout) and value.device.type == "cpu":
        array = value.detach().float().numpy()  # NumPy cannot read bfloat16
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf" and not np.ma.isMaskedArray(value):
        with np.errstate(over="ignore"):
            array = np.asarray(value, np.float32)
    else:
        got = f"{value.layout}, {value.dtype}, on {value.device}" if is_tensor else getattr(value, "dtype", type(value))
        raise TypeError(
            f"state_dict: expected dense arrays or tensors of real numbers on the CPU, got {got} for {name}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"state_dict: expected finite numbers in float32, got NaN or infinity in {name}")
    return array


def clients_of(names: Iterable[str]) -> list[str]:
    """The clients by which arrays may be called so; KPFCNN has the same names in KPConv-PyTorch and Open3D-ML."""
    names = [name.removeprefix("module.").removeprefix("backbone.") for name in names]
    for clients, pattern in (
        (["geotransformer"], r"encoder\d+_\d+\."),
        (["kpconvx"], r"stem\.|encoder_\d+\."),
        (["predator"], r"(bottle|gnn|proj_gnn)\."),
        (["kpconv-pytorch"], r"block_ops\.|criterion\."),
        (["kpconv-pytorch", "open3d-ml"], r"encoder_blocks\..*|head_softmax\."),
    ):
        if any(re.match(pattern, name) for name in names):
            return clients
    return []


def loaded(client: str, net: Network | KPNeXt, state_dict: Arrays, spell: Callable[[str], str], *,
           constant: tuple[str, ...] = ()) -> tuple[Arrays, Arrays, list[str]]:  # fmt: skip
    """(params, state, names of unused arrays) of a network from arrays by the published names that `spell` returns.

    An error lists all arrays that are missing, have other shapes or are left over. Weights of linear layers are
    transposed. The last parts of names in `constant` are those of arrays that the published network does not have: a
    "scale" of one, a "shift" of zero.
    """
    groups, used, wrong = [], set(), {"missing": [], "other shape": [], "left over": []}
    for expected in shapes(net):
        values = {}
        for name, shape in expected.items():
            if (leaf := name.rpartition(".")[2]) in constant:
                values[name] = np.full(shape, leaf == "scale", np.float32)
                continue
            published, there = spell(name), _published_shape(name, shape)
            used.add(published)
            if published not in state_dict:
                wrong["missing"].append(f"{published} {there}")
            elif state_dict[published].shape != there:
                wrong["other shape"].append(f"{published}: expected {there}, got {state_dict[published].shape}")
            else:
                value = state_dict[published]  # copied, since optimizers change parameters in place
                values[name] = np.array(value.T if _is_linear(name, shape) else value.reshape(shape), order="C")
        groups.append(values)
    others = [name for name in state_dict if name not in used]
    unused = [name for name in others if re.fullmatch(rf"({CLIENTS[client].unused})|.*num_batches_tracked", name)]
    wrong["left over"] = [f"{name} {state_dict[name].shape}" for name in others if name not in unused]
    if any(wrong.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in wrong.items() if names)
        lines = [f"{kind}: {name}" for kind, names in wrong.items() for name in names]
        title = CLIENTS[client].title
        raise ValueError("\n".join([f"state_dict: expected the arrays of {title} with these settings, got {counts}",
                                    *lines]))  # fmt: skip
    return *groups, unused


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weights") and len(shape) == 2 and not name.endswith("conv.weights")


def _published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name == "stem.conv.weights":  # of KPConvX, with an axis of groups
        return shape[0], 1, *shape[1:]
    return shape[::-1] if _is_linear(name, shape) else shape


def numbers(name: str) -> list[int]:
    """The numbers in a name."""
    return [*map(int, re.findall(r"\d+", name))]
