"""Networks in files: safetensors, which hold arrays and a text, and cannot run anything."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np

from kpcore.config import require
from kpcore.files import whole
from kpcore.nn.kpnext import KPNeXt
from kpcore.nn.networks import Network, check_values, zeros


def save(path, net, params, state, **more):
    """Write a network with its parameters to one file, whole or not at all.

    Parameters
    ----------
    path : str or Path
    net : Network or KPNeXt
    params, state : dict of NumPy arrays by name
    **more : anything that JSON can hold
        What else is to be known of it, such as the names of the classes.
    """
    if taken := {"network", "groups"} & more.keys():
        raise ValueError(f"more: expected names that are not the file's own, got {', '.join(sorted(taken))}")
    write(path, {"params": params, "state": state}, about_network(net) | more)


def load(path):
    """(network, params, state, more) of a file that `save` wrote; arrays are NumPy's."""
    groups, about = read(path)
    if "network" not in about:
        raise ValueError(f"path: expected a file that kpcore.nn.save wrote, got {path}")
    given = about.pop("network")
    kinds, kind = {"Network": Network, "KPNeXt": KPNeXt}, given.pop("kind")
    if kind not in kinds:
        raise ValueError(f"path: expected a network of {' or '.join(kinds)}, got {kind} in {path}")
    net = kinds[kind](**given)
    check_values((groups["params"], groups["state"]), zeros(net))
    return net, groups["params"], groups["state"], about


def about_network(net):
    """What JSON holds of a network, of which `load` makes it again."""
    return {"network": {"kind": type(net).__name__, **dataclasses.asdict(net)}}


def write(path, groups, about):
    """Dicts of arrays by name, each dict with a name without dots, and what JSON can hold, in one file that is there
    whole or not at all."""
    safetensors = require("safetensors.numpy", "io")
    arrays = {
        f"{group}.{name}": np.asarray(value, order="C")
        for group, values in groups.items()
        for name, value in values.items()
    }
    data = safetensors.save(arrays, {"kpcore": json.dumps(about | {"groups": [*groups]})})
    with whole(path) as part, open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read(path):
    """What `write` was given."""
    safe_open = require("safetensors", "io").safe_open
    with safe_open(path, "numpy") as file:
        about = json.loads((file.metadata() or {}).get("kpcore", "{}"))
        groups = {group: {} for group in about.pop("groups", ())}
        for whole in file.keys():  # noqa: SIM118 - not a dict
            group, _, name = whole.partition(".")
            groups.setdefault(group, {})[name] = file.get_tensor(whole)
    return groups, about
