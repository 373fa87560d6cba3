"""Import of checkpoints of KPConvX and KPConvD (apple/ml-kpconvx)."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kpcore.backends import checks
from kpcore.nn.kpnext import KPNeXt
from kpcore.nn.published_arrays import NORM, arrays_of, check_sizes, flag, loaded, need, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

    from kpcore.nn.published_arrays import Arrays

# What `KPNeXt` has; by the names of settings.
_ONLY = {
    "kp_mode": ("kpconvx", "kpconvd"), "kp_influence": ("linear",), "kp_aggregation": ("nearest",),
    "inv_act": ("sigmoid",), "norm": ("batch", "none"), "grid_pool": (True,), "kpx_upcut": (False,),
    "in_sub_mode": ("grid",),
}  # fmt: skip
_SETTINGS = {
    "dim": "dimension", "neighbor_limits": "num_neighbors", "shell_sizes": "shells", "radius_scaling": "grid_factor",
    "bn_momentum": "momentum", "init_sub_size": "voxel_size", "kp_radius": "radius", "kp_sigma": "extent",
}  # fmt: skip
_LAYERS = {
    "unary1": ("up_mlp.0", "up_mlp.1.norm"), "unary2": ("down_mlp.0", "down_mlp.1.norm"),
    "unary_shortcut": ("mlp_downcut.0", "mlp_downcut.1.norm"), "unary": ("mlp", "norm.norm"),
}  # fmt: skip
_ATTENTION = {
    "0.weights": "alpha_mlp.0.weight", "0.bias": "alpha_mlp.1.norm.bias", "1.weights": "alpha_mlp.3.weight",
    "norm.scale": "grpnorm.weight", "norm.shift": "grpnorm.bias",
}  # fmt: skip


def import_kpconvx(state_dict: Mapping[str, ArrayLike], config: Mapping[str, Any]) -> tuple[KPNeXt, Arrays, Arrays]:
    """A network and its parameters from a checkpoint of the KPNeXt of apple/ml-kpconvx: KPConvX or KPConvD.

    Parameters
    ----------
    state_dict : dict of arrays or torch tensors on the CPU
        ``torch.load(path, weights_only=True)["model_state_dict"]``.
    config : dict
        Settings by the names in ``parameters.json``, from its sections ``data`` and ``model``; at least init_sub_size,
        shell_sizes, kp_radius, kp_sigma, radius_scaling, neighbor_limits, and inv_grp_norm for KPConvX. Blocks and
        sizes are those of the arrays.

    Returns
    -------
    net : KPNeXt
        Its neighbours are the nearest, without a limit of the distance, as in pyramids that the published code makes on
        the CPU; and its grids have ``origin="published"``.
    params, state : dict of float32 arrays by name

    Raises
    ------
    ValueError
        As `import_kpconv_pytorch`; for settings that `KPNeXt` does not have, such as the aggregation "sum".
    """
    return kpconvx(state_dict, config)[:3]


def kpconvx(state_dict: Mapping[str, ArrayLike], config: Mapping[str, Any]) -> tuple[KPNeXt, Arrays, Arrays, list[str]]:
    """What `import_kpconvx` returns, and the names of arrays that are not of the network."""
    state_dict = arrays_of("kpconvx", state_dict)
    segment = any(name.startswith("decoder_unary_") for name in state_dict)
    has_attention = any(".alpha_mlp." in name for name in state_dict)
    need(config, "init_sub_size", "shell_sizes", "kp_radius", "kp_sigma", "radius_scaling", "neighbor_limits",
          *["inv_grp_norm"] * has_attention)  # fmt: skip
    for name, allowed in (_ONLY | ({"decoder_layer": (True,)} if segment else {})).items():
        if name in config and config[name] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"config: expected {name} {expected}, as kpcore.nn.KPNeXt has, got {config[name]!r}")
    depths = _depths(state_dict)
    stem = shape_of(state_dict, "stem.conv.weights", 4)
    check_sizes(config, {"kp_mode": "kpconvx" if has_attention else "kpconvd", "init_channels": stem[3]})
    if "layer_blocks" in config:
        check_sizes({"layer_blocks": [*config["layer_blocks"]]}, {"layer_blocks": depths})
    last = shape_of(state_dict, "head.1.weight" if segment else "head.2.weight", 2)
    hidden = shape_of(state_dict, "head.0.mlp.weight", 2)
    options = {"attention_groups": None}
    if has_attention:
        options["attention_groups"] = _attention_groups(state_dict, stem[0], config)
    if not segment:
        options |= {"head_width": hidden[0], "head_norm": False, "dropout": 0.4}
    with checks.argument_names({field: name for name, field in _SETTINGS.items() if name in config}):
        net = KPNeXt(
            depths, stem[2], last[0], segment=segment, dimension=config.get("dim", 3), width=stem[3],
            num_neighbors=config["neighbor_limits"], shells=config["shell_sizes"], grid_factor=config["radius_scaling"],
            norm=None if config.get("norm") == "none" else "batch", momentum=config.get("bn_momentum", 0.1),
            attention_norm=flag(config, "inv_grp_norm", True), origin="published", **_lengths(config), **options,
        )  # fmt: skip
    _check_channels(net, config)
    if not net.attention_norm:  # the published layer has these arrays, and does not use them
        kept = {name: value for name, value in state_dict.items() if ".grpnorm." not in name}
    else:
        kept = state_dict
    params, state, unused = loaded("kpconvx", net, kept, lambda name: _spell(net, name))
    return net, params, state, unused + [name for name in state_dict if name not in kept]


def _lengths(config: Mapping[str, Any]) -> dict[str, float | None]:
    """Voxel size of level 0, and radius and extent in voxels, as the published network computes them."""
    begin, inside = config["init_sub_size"], config.get("in_sub_size", -1)
    double = np.dtype(np.float64)
    begin, inside, radius, sigma = (
        checks.number(name, value, double)
        for name, value in (("init_sub_size", begin), ("in_sub_size", inside), ("kp_radius", config["kp_radius"]),
                            ("kp_sigma", config["kp_sigma"]))
    )  # fmt: skip
    if begin * sigma <= 0:
        raise ValueError(f"config: expected init_sub_size and kp_sigma above 0, got {begin:g} and {sigma:g}: their "
                         "product is the extent of the influence, and with a negative one the published influence "
                         "grows with the distance, which kpcore.nn.KPNeXt does not have")  # fmt: skip
    voxel = inside if inside > 0 else begin
    radius *= (inside if inside > 1.01 * begin else begin) / voxel
    extent = sigma * begin / voxel if begin != voxel else sigma
    return {"voxel_size": voxel, "radius": radius, "extent": None if extent == radius else extent}


def _depths(state_dict: Arrays) -> list[int]:
    """The number of blocks of each stage."""
    blocks = {match[0] for name in state_dict if (match := re.match(r"encoder_(\d+)\.(\d+)\.", name))}
    stages = [int(re.match(r"encoder_(\d+)", block)[1]) for block in blocks]
    if not stages:
        raise ValueError("state_dict: expected arrays of encoder_1.0, encoder_2.0, ..., got none")
    return [max(1, stages.count(stage)) for stage in range(1, max(stages) + 1)]


def _attention_groups(state_dict: Arrays, num: int, config: Mapping[str, Any]) -> int:
    """How many consecutive channels share a number of the attention, the same in all blocks that have one."""
    sizes = {
        value.shape[1] * num // max(1, value.shape[0])
        for name, value in state_dict.items()
        if name.endswith(".alpha_mlp.3.weight") and value.ndim == 2
    }
    first = any(name.startswith("encoder_1.") and ".alpha_mlp." in name for name in state_dict)
    if first or len(sizes) != 1:
        got = "attention in the first stage" if first else f"groups of {sorted(sizes)} channels"
        raise ValueError("config: expected first_inv_layer 1 and inv_groups above 0, with which all stages but the "
                         f"first have the same number of groups, as kpcore.nn.KPNeXt has, got {got}")  # fmt: skip
    groups = config.get("inv_groups", *sizes)
    if groups not in sizes:
        raise ValueError(f"config: expected inv_groups {sizes.pop()}, as of the arrays, got {groups}")
    return groups


def _check_channels(net: KPNeXt, config: Mapping[str, Any]) -> None:
    scaling = checks.between("channel_scaling", config.get("channel_scaling", 1.41), 0, 100)
    published = tuple(math.ceil((net.width * scaling**level - 0.1) / 16) * 16 for level in range(net.num_levels))
    if published != net.widths:
        raise ValueError(f"config: expected channel_scaling and init_channels with which stages have {net.widths} "
                         f"channels, as kpcore.nn.KPNeXt has, got {published}")  # fmt: skip


def _spell(net: KPNeXt, name: str) -> str:
    """encoder.1.0.unary1.norm.scale -> encoder_2.0.up_mlp.1.norm.batch_norm.weight"""
    part, *layers, leaf = name.split(".")
    if part == "stem":
        path = "stem"
    elif part == "head":
        number = layers.pop(0)
        if number == "1":
            return f"head.{1 if net.segment else 2}.{'weight' if leaf == 'weights' else 'bias'}"
        path, layers = "head.0", ["unary", *layers]
    elif part == "encoder":
        path = f"encoder_{int(layers[0]) + 1}.{layers[1]}"
        layers = layers[2:]
    else:
        level, kind, *layers = layers
        path = f"decoder_{'unary' if kind == 'unary' else 'layer'}_{int(level) + 1}"
        layers = ["unary", *layers] if kind == "unary" else layers
    if layers[0] == "conv":
        rest = ".".join([*layers[1:], leaf])
        return f"{path}.conv.{_ATTENTION.get(rest.removeprefix('attention.'), rest)}"
    linear, norm = _LAYERS.get(layers[0], (None, "norm.norm" if part == "stem" else "conv_norm.norm"))
    if layers[-1] == "norm":
        return f"{path}.{norm}.{'batch_norm.' if net.norm else ''}{NORM[leaf]}"
    return f"{path}.{linear}.weight" if leaf == "weights" else f"{path}.{norm}.bias"
