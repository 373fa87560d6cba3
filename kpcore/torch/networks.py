"""The networks of kpcore.nn as torch modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

import kpcore
from kpcore.nn.networks import check_values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from kpcore import nn
    from kpcore.nn.blocks import Parameters
    from kpcore.pyramid import Level


class _Network(torch.nn.Module):
    """Parameters and buffers of a network of `kpcore.nn`, by the names that they have there, and its passes."""

    seed: int

    def __init__(self, net, params, state, seed):
        super().__init__()
        if (params is None) != (state is None):
            raise ValueError(
                f"{'params' if params is None else 'state'}: expected both params and state, or none of them"
            )
        expected = net.init(seed)
        if params is None:
            params, state = expected
        check_values((params, state), expected)
        self.net, self.seed = net, seed
        for name, value in params.items():
            self._part(name).register_parameter(name.rpartition(".")[2], torch.nn.Parameter(torch.tensor(value)))
        for name, value in state.items():
            self._part(name).register_buffer(name.rpartition(".")[2], torch.tensor(value))
        self._places = [
            {name: (self._part(name), name.rpartition(".")[2]) for name in names} for names in (params, state)
        ]

    @property
    def _parts(self) -> list[_Part]:
        return [module for module in self.modules() if isinstance(module, _Part)]

    def _part(self, name: str) -> torch.nn.Module:
        """The submodule that holds the parameter `name`, created if it does not exist."""
        module = self
        for part in name.split(".")[:-1]:
            if part not in module._modules:
                module.add_module(part, _Part())
            module = module._modules[part]
        return module

    def _values(self) -> list[dict[str, torch.Tensor]]:
        """(params, state): tensors by name, read as attributes of the parts, which evaluates parametrisations."""
        return [{name: getattr(*place) for name, place in places.items()} for places in self._places]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set parameters and buffers to those of ``net.init(seed)``."""
        for values, new in zip(self._values(), self.net.init(self.seed), strict=True):
            for name, value in values.items():
                value.copy_(_distributed_as(value, torch.from_numpy(new[name])))

    def _evaluate(self, *inputs, **options):
        """The `kpcore.nn.Result` of a pass; in training the running statistics are updated."""
        for part in self._parts:
            part()
        seed = torch.randint(2**62, (), device="cpu") if self.net.dropout and self.training else None
        params, buffers = self._values()
        # Copies, because autograd keeps the inputs of operators and the running statistics are overwritten below.
        state = {name: buffer.clone() for name, buffer in buffers.items()} if self.training else buffers
        result = self.net(kpcore.torch, params, state, *inputs, training=self.training, seed=seed, **options)
        if self.training:
            with torch.no_grad():
                for name, value in result.state.items():
                    if value is not state[name]:
                        buffers[name].copy_(value)
        return result

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(params, state): copies as NumPy arrays by name, for `kpcore.nn`, other frameworks and files."""
        params, state = (
            {name: value.detach().cpu().clone().numpy() for name, value in values.items()} for values in self._values()
        )
        return params, state


class Network(_Network):
    """A network of `kpcore.nn` as a module; parameters and buffers have the names that they have there.

    It prints as the table of its blocks, `kpcore.nn.summary`.

    Parameters
    ----------
    net : kpcore.nn.Network or kpcore.nn.KPNeXt
    params, state : dict of NumPy arrays by name, optional
        Copied into the module; by default those of ``net.init(seed)``.
    seed : int

    Examples
    --------
    >>> import torch, kpcore as kp, kpcore.torch as kpt
    >>> net = kp.nn.Network(kp.nn.architecture(2, 2), num_features=1, num_classes=4, voxel_size=0.1, width=16)
    >>> module = kpt.Network(net)
    >>> pyramid = net.pyramid(torch.rand(1000, 3), F=kpt)
    >>> logits, _ = module(pyramid, torch.ones(len(pyramid[0].points), 1))
    >>> logits.shape == (len(pyramid[0].points), 4), len(list(module.parameters())) == len(net.init()[0])
    (True, True)
    """

    net: nn.Network | nn.KPNeXt

    def __init__(self, net: nn.Network | nn.KPNeXt, params: Parameters[np.ndarray] | None = None,
                 state: Parameters[np.ndarray] | None = None, seed: int = 0) -> None:  # fmt: skip
        super().__init__(net, params, state, seed)

    def __repr__(self) -> str:
        return kpcore.nn.summary(self.net)

    def forward(self, pyramid: Sequence[Level], features: torch.Tensor, *, detach_offsets: bool = False,
                categories: torch.Tensor | Sequence[int] | None = None,
                between: Callable[[torch.Tensor], torch.Tensor] | None = None,
                observe: Callable[[str, int | None, Any], object] | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """(logits, regularization), as in `kpcore.nn.Result`; in training the running statistics are updated.

        Parameters
        ----------
        pyramid : sequence of Level
            ``net.pyramid(..., F=kpcore.torch)``.
        features : (N, num_features) tensor
        detach_offsets : bool
            Whether offsets of deformable convolutions are constants of the gradient, see `kpcore.nn.Network`.
        categories : (B,) integers
            The category of each batch item, for a network that has heads, see `kpcore.nn.Network`.
        between : callable
            What computes the input of the decoder, for a network with `bottleneck_width`, see `kpcore.nn.Network`.
        observe : callable, optional
            Called with the name, level and output of each block, see `kpcore.nn.Network`.
        """
        more = {"categories": categories, "between": between}  # which KPNeXt does not take
        more = {name: value for name, value in more.items() if value is not None}
        result = self._evaluate(pyramid, features, detach_offsets=detach_offsets, observe=observe, **more)
        return result.logits, result.regularization


class ImageNetwork(_Network):
    """An image network of `kpcore.nn` as a module; parameters and buffers have the names that they have there.

    Parameters
    ----------
    net : kpcore.nn.ImageNetwork
    params, state, seed
        As in `Network`.

    Examples
    --------
    >>> import torch, kpcore as kp, kpcore.torch as kpt
    >>> net = kp.nn.ImageNetwork("inverted", [(1, 8, 1, 1), (2, 8, 2, 2)], 8, num_classes=4, kernel="local")
    >>> kpt.ImageNetwork(net)(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 4])
    """

    net: nn.ImageNetwork

    def __init__(self, net: nn.ImageNetwork, params: Parameters[np.ndarray] | None = None,
                 state: Parameters[np.ndarray] | None = None, seed: int = 0) -> None:  # fmt: skip
        super().__init__(net, params, state, seed)

    def extra_repr(self) -> str:
        return f"{self.net.num_features} features, {self.net.num_classes} classes, {len(self.net.stages)} stages"

    def forward(self, x: torch.Tensor, detach_offsets: bool = False) -> torch.Tensor:
        """Logits (B, num_classes); in training the running statistics are updated.

        Parameters
        ----------
        x : (B, num_features, H, W) tensor
            Images as torch has them; those in memory format channels_last are not copied.
        detach_offsets : bool
            As in `Network`.
        """
        if x.ndim != 4 or x.shape[1] != self.net.num_features:
            raise ValueError(f"x: expected (B, {self.net.num_features}, H, W), got {tuple(x.shape)}")
        return self._evaluate(x.permute(0, 2, 3, 1), detach_offsets=detach_offsets).logits


class _Part(torch.nn.Module):
    """Holds some of the parameters of a network; it computes nothing, since a network is one function of them all.

    It is called without arguments before each pass, so that forward pre-hooks which compute a parameter, such as those
    of torch.nn.utils.prune, run.
    """

    def forward(self) -> None:
        pass

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "Network: expected a hook on the whole network, got one on a part of it, which only holds parameters and "
            "has no input or result"
        )

    register_full_backward_pre_hook = register_full_backward_hook = register_forward_hook


def _distributed_as(like: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Distribute a tensor over processes as `like` is, if it is a DTensor (fully_shard); else return it unchanged."""
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)
