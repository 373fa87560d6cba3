"""Everything that kpcore.torch uses of torch's internals, which any release of torch may change.

torch's dispatcher takes about 10 µs to pass on the arguments of an operator, half of what a call on ten points costs.
So a call goes past the dispatcher if only autograd needs to see it. torch has no public function that tells whether
something else (a compiler, a profiler, a mode) needs to see it too, hence `needs_dispatcher` below.
"""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from torch.amp import autocast_mode
from torch.autograd import forward_ad


def _register_autocast(op: str, device_type: str, cast_inputs: torch.dtype, lib: torch.library.Library) -> None:
    """What torch.library.register_autocast of torch 2.7 does, for torch 2.6."""
    overload, key = torch._library.utils.lookup_op(op), f"Autocast{device_type.upper()}"
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(_, *arguments):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*autocast_mode._cast(arguments, device_type, cast_inputs))

    lib.impl(op.rpartition("::")[2], kernel, key, with_keyset=True)


try:
    below_autograd = torch._C._AutoDispatchBelowAutograd
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
    GetAttrKey = torch.utils._pytree.GetAttrKey
    SequenceKey = torch.utils._pytree.SequenceKey
    default_collate_fn_map = torch.utils.data._utils.collate.default_collate_fn_map
    register_autocast = getattr(torch.library, "register_autocast", _register_autocast)
    register_namedtuple = torch.utils._pytree._register_namedtuple
    register_pytree_node = torch.utils._pytree.register_pytree_node
    tree_leaves = torch.utils._pytree.tree_leaves
    _autocast_is_on = torch._C._is_any_autocast_enabled
    _num_dispatch_modes = torch._C._len_torch_dispatch_stack
    _num_function_modes = torch._C._len_torch_function_stack
    _transform_level = torch._C._functorch.maybe_current_level
    _tracing_state = torch._C._get_tracing_state
    _profiler_is_on = torch._C._autograd._profiler_enabled
    _forward_level = attrgetter("_current_level")
    _forward_level(forward_ad)
except AttributeError as error:
    raise ImportError(
        f"kpcore.torch: expected torch 2.6 to 2.14, got {torch.__version__}, whose internals differ: {error}"
    ) from error


def needs_dispatcher() -> bool:
    """Whether more than autograd must see a call: a compiler, tracer, profiler, autocast, vmap, jvp or mode."""
    return (
        torch.compiler.is_compiling()
        or _autocast_is_on()
        or _num_dispatch_modes() > 0
        or _num_function_modes() > 0
        or _transform_level() is not None
        or _tracing_state() is not None
        or _profiler_is_on()
        or _forward_level(forward_ad) >= 0
    )


def transforming() -> bool:
    """Whether the current call is inside a transform of torch.func."""
    return _transform_level() is not None


def in_forward_mode(values: Iterable[object]) -> bool:
    """Whether a tensor among `values` has a forward-mode tangent."""
    return _forward_level(forward_ad) >= 0 and any(
        forward_ad.unpack_dual(value).tangent is not None for value in values if isinstance(value, torch.Tensor)
    )


def apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    """Call `function.apply` without the 15 µs in which torch reads the signature of `forward` to fill in defaults."""
    if transforming():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


def not_compiled(reason: str) -> Any:
    """A decorator for a function that torch.compile calls between two compiled parts; `reason` is for its errors."""
    try:
        return torch.compiler.disable(reason=reason)
    except TypeError:  # torch 2.6
        return torch.compiler.disable


def refusal(message: str) -> Any:
    """A static method for a torch.autograd.Function that raises NotImplementedError with this message."""

    def refuse(*_):
        raise NotImplementedError(message)

    return staticmethod(refuse)
