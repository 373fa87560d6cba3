"""Networks in files: safetensors, which hold arrays and a text, and cannot run anything."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from kpcore.config import require
from kpcore.nn.kpnext import KPNeXt
from kpcore.nn.networks import Network


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
    arrays = {f"params.{name}": value for name, value in params.items()}
    arrays |= {f"state.{name}": value for name, value in state.items()}
    write_network(path, net, arrays, more)


def load(path):
    """(network, params, state, more) of a file that `save` wrote; arrays are NumPy's."""
    arrays, about = read(path)
    if "network" not in about:
        raise ValueError(f"path: expected a file that kpcore.nn.save wrote, got {path}")
    given = about.pop("network")
    net = {"Network": Network, "KPNeXt": KPNeXt}[given.pop("kind")](**given)
    params, state = ({name[len(kind) :]: value for name, value in arrays.items() if name.startswith(kind)}
                     for kind in ("params.", "state."))  # fmt: skip
    return net, params, state, about


def write_network(path, net, arrays, about):
    """As `write`, with what makes the network again."""
    kind = {"kind": type(net).__name__}
    write(path, arrays, {"network": kind | dataclasses.asdict(net), **about})


def write(path, arrays, about):
    """Arrays by name and what JSON can hold, in one file that is there whole or not at all."""
    safetensors = require("safetensors.numpy", "io")
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    arrays = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    with open(part, "wb") as file:
        file.write(safetensors.save(arrays, {"kpcore": json.dumps(about)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read(path):
    """What `write` was given."""
    safe_open = require("safetensors", "io").safe_open
    with safe_open(path, "numpy") as file:
        about = json.loads((file.metadata() or {}).get("kpcore", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not a dict
