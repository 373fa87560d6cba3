"""Import of checkpoints of the published PyTorch code (HuguesTHOMAS/KPConv-PyTorch)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kpcore.nn.networks import Network, check_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

# {published name of a setting: field of `Network`}
_SETTINGS = {
    "num_classes": "num_classes", "in_features_dim": "num_features", "first_features_dim": "width",
    "first_subsampling_dl": "voxel_size", "conv_radius": "conv_radius", "deform_radius": "deform_radius",
    "KP_extent": "extent", "KP_influence": "influence", "aggregation_mode": "aggregation", "modulated": "modulated",
    "batch_norm_momentum": "momentum", "num_kernel_points": "kernel_size", "in_points_dim": "dimension",
    "deform_fitting_power": "fitting_power", "repulse_extent": "repulse_extent",
}  # fmt: skip
_NEEDED = ("num_classes", "in_features_dim", "first_features_dim", "first_subsampling_dl")
_BLOCKS = {"block_ops": "encoder", "encoder_blocks": "encoder", "decoder_blocks": "decoder"}
_HEADS = {"head_mlp": "head.0", "head_softmax": "head.1"}
_LAYERS = {"KPConv": "conv", "batch_norm": "norm", "batch_norm_conv": "norm"}
_NORM = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "variance"}


def import_kpconv_pytorch(
    state_dict: Mapping[str, ArrayLike], architecture: Sequence[str], config: Mapping[str, Any]
) -> tuple[Network, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A network and its parameters from a checkpoint of the published PyTorch code.

    Nothing is unpickled here: load the file with ``torch.load(path, weights_only=True)["model_state_dict"]``.

    Parameters
    ----------
    state_dict : dict of arrays or torch tensors on the CPU
    architecture : sequence of str
        As in the checkpoint's ``parameters.txt``.
    config : dict
        Settings by the names in that file; at least num_classes, in_features_dim, first_features_dim and
        first_subsampling_dl. Settings that do not describe the network are ignored.

    Returns
    -------
    net : Network
        Its maxima over neighbours include the zeros with which the published code pads (``pool_pad_value=0.0``), and
        the grids of its pyramids begin where those of the published code do (``origin="published"``). The published
        code also subsamples whole scenes in this way, before it cuts spheres out of them.
    params, state : dict of float32 arrays by name

    Raises
    ------
    ValueError
        For settings or arrays that are missing, arrays of other shapes, or arrays that the network does not have.
    """
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise ValueError(f"config: expected {', '.join(missing)}, got none")
    options = {name: config[published_name] for published_name, name in _SETTINGS.items() if published_name in config}
    if not config.get("use_batch_norm", True):
        options["norm"] = None
    net = Network(tuple(architecture), **options, pool_pad_value=0.0, origin="published")
    values = {}
    for published_name, value in state_dict.items():
        if published_name.endswith("num_batches_tracked"):
            continue
        name = network_name(published_name)
        value = np.asarray(value, np.float32)
        values[name] = np.ascontiguousarray(value.T if published_name.endswith("mlp.weight") else value)
    expected = net.init()
    params = {name: value for name, value in values.items() if name in expected[0]}
    state = {name: value for name, value in values.items() if name not in params}
    check_values((params, state), expected, ("state_dict", "state_dict"))
    return net, params, state


def network_name(published_name: str) -> str:
    """The name in `Network` of an array of the published code.

    encoder_blocks.1.unary1.batch_norm.batch_norm.weight -> encoder.1.unary1.norm.scale
    """
    first, *layers, leaf = published_name.split(".") if "." in published_name else (published_name, "")
    if first in _HEADS:
        # In the published code, the bias of these layers belongs to a submodule batch_norm that does not normalise.
        return f"{_HEADS[first]}.{'bias' if layers == ['batch_norm'] else 'weights'}"
    if first not in _BLOCKS or not layers:
        raise ValueError(f"state_dict: expected names of the published PyTorch code, got {published_name}")
    path = [_BLOCKS[first]]
    for layer in layers:
        part = _LAYERS.get(layer, layer)
        if part not in ("mlp", path[-1]):
            path.append(part)
    leaf = _NORM.get(leaf, leaf) if path[-1] == "norm" else "weights" if leaf == "weight" else leaf
    return ".".join([*path, leaf])
