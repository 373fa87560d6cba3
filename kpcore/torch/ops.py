"""The table of operators on torch tensors: each row becomes two torch operators, itself and its vjp.

Tensors share memory with NumPy's arrays, on a GPU with CuPy's, in both directions; there everything is asked for on the
stream that torch is using. A Neighbors is passed as its arrays and numbers, since torch traces tensors only.
Everything here that is Python runs once per call or once per trace; the gradient is an operator of its own so that it
can be traced too.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from itertools import compress

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import GetAttrKey, register_pytree_node

from kpcore import _array, config, ops
from kpcore.autodiff import Shaped
from kpcore.neighbors import Neighbors

_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.uint8: np.dtype(np.uint8),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.bool: np.dtype(np.bool_),
}
_TORCH_DTYPES = {dtype: ours for ours, dtype in _DTYPES.items()}
_HALVES = (torch.float16, torch.bfloat16)  # on a GPU
_HALVES_BY_NAME = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_LIBRARY = torch.library.Library("kpcore", "DEF")

# What a Neighbors is to torch: each argument of that kind becomes these of a torch operator.
_PARTS = {
    "index": "Tensor",
    "row_splits": "Tensor",
    "transposed_index": "Tensor?",
    "transposed_row_splits": "Tensor?",
    "num_points": "SymInt",
    "width": "SymInt?",
}


def on_gpu(tensor):
    """Whether its array is CuPy's."""
    return tensor.is_cuda


def on_stream_of(tensor, function, *arguments):
    """Its result, computed on torch's stream if the tensor, or None, is on a GPU."""
    if tensor is None or not on_gpu(tensor):
        return function(*arguments)
    with _torch_stream(tensor.device):
        return function(*arguments)


@contextmanager
def _torch_stream(device):
    cuda = config.cupy().cuda
    with cuda.Device(device.index), cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index):
        yield


def use_torch_allocator():
    """Let CuPy, and so kpcore, take memory on the GPU from torch's pool, in place of one of its own.

    Two pools each keep what the other could use; with one, ``torch.cuda.max_memory_allocated`` also counts what kpcore
    takes. For the whole process, until ``cupy.cuda.set_allocator`` is called again.
    """
    cuda = config.cupy().cuda

    def allocate(size, device):
        return torch.cuda.caching_allocator_alloc(size, device, cuda.get_current_stream().ptr)

    def free(address, device):
        torch.cuda.caching_allocator_delete(address)

    cuda.set_allocator(cuda.PythonFunctionAllocator(allocate, free).malloc)


def to_array(name, tensor):
    """The array in the memory of a tensor: NumPy's, or CuPy's."""
    if on_gpu(tensor):
        return config.cupy().from_dlpack(tensor.detach())
    try:
        return (tensor.detach() if tensor.requires_grad else tensor).numpy()
    except TypeError:  # bfloat16 and others that NumPy lacks
        raise _wrong_dtype(name, tensor.dtype) from None


def to_tensor(array):
    """The tensor in the memory of an array."""
    if isinstance(array, (np.ndarray, np.generic)):
        return torch.from_numpy(np.asarray(array))
    return torch.from_dlpack(array)


def numpy_dtype(name, dtype, tensor=None):
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if tensor is not None and on_gpu(tensor) and dtype in _HALVES:
        return _half(dtype)
    raise _wrong_dtype(name, dtype)


def _half(dtype):
    if dtype == torch.float16:
        return np.dtype(np.float16)
    import ml_dtypes  # which CuPy needs for it

    return np.dtype(ml_dtypes.bfloat16)


def _torch_dtype(dtype):
    dtype = np.dtype(dtype)
    return _HALVES_BY_NAME[dtype.name] if dtype.name in _HALVES_BY_NAME else _TORCH_DTYPES[dtype]


def _wrong_dtype(name, dtype):
    return TypeError(
        f"{name}: expected float32 or float64, got {str(dtype)[6:]}; convert it with {name}.to(torch.float32)"
    )


def checked(op, name, value, optional=False):
    """`value` if it is a tensor on the CPU or a GPU, or an allowed None; `op` is None for what has no gradients."""
    if isinstance(value, torch.Tensor):
        if not (value.is_cpu or value.is_cuda):
            raise TypeError(
                f"{name}: expected a tensor on the CPU or a CUDA GPU, got one on {value.device}; "
                f"move it with {name}.cpu()"
            )
        if value.requires_grad and op is not None and name not in op.diff and torch.is_grad_enabled():
            raise TypeError(
                f"{name}: {op.name} cannot be differentiated in it, only in {', '.join(op.diff)}; "
                f"detach it with {name}.detach()"
            )
        return value
    if value is None and optional:
        return None
    raise TypeError(
        f"{name}: expected a torch tensor{' or None' * optional}, got {type(value).__name__}"
        + ("; convert it with torch.from_numpy" if isinstance(value, np.ndarray) else "")
    )


class _Arguments:
    """How the arguments of an operator are laid out for torch: `flat` is what torch sees, one after the other."""

    def __init__(self, op, public):
        self.op, self.bind = op, ops.binder(public)
        self.rows, schema = [], []  # (name, kind, whether it may be None, where it begins)
        for name, (kind, optional) in ops.kinds(public).items():
            self.rows.append((name, kind, optional, len(schema)))
            if kind == "Array":
                schema.append(f"Tensor{'?' * optional} {name}")
            elif kind == "Neighbors":
                schema += [f"{part.rstrip('?')}{'?' * (optional or '?' in part)} {name}_{which}"
                           for which, part in _PARTS.items()]  # fmt: skip
            else:
                schema.append(f"{kind}{'?' * optional} {name}")
        self.schema = ", ".join(schema)
        self.tensors = tuple(i for i, s in enumerate(schema) if s.startswith("Tensor"))
        self.others = tuple(i for i in range(len(schema)) if i not in self.tensors)
        stored = (*self.tensors, *self.others)
        self.order = tuple(stored.index(i) for i in range(len(schema)))  # from tensors and then others to `flat`
        positions = {name: at for name, _, _, at in self.rows}
        self.diff = tuple(positions[name] for name in op.diff)

    def split(self, bound):
        """The tensors by name, and all other arguments; None where a tensor is of a class that wants to see its use."""
        tensors, others = {}, {}
        for name, kind, optional, _ in self.rows:
            value = bound[name]
            if value is None and optional:
                others[name] = None
            elif kind == "Array":
                if type(value) not in _PLAIN:
                    return None
                tensors[name] = checked(self.op, name, value)
            elif kind == "Neighbors":
                if not isinstance(value, Neighbors) or isinstance(value.index, torch.Tensor):
                    return None
                others[name] = value
            else:
                others[name] = ops.setting(name, kind, optional, value)
        return tensors, others

    def flatten(self, bound):
        flat, transpose = [], False
        for name in self.op.transposes:
            transpose = transpose or getattr(bound[name], "requires_grad", False)
        for name, kind, optional, _ in self.rows:
            value = bound[name]
            if kind == "Array":
                flat.append(checked(self.op, name, value, optional))
            elif kind != "Neighbors":
                flat.append(ops.setting(name, kind, optional, value))
            elif isinstance(value, Neighbors):
                flat += _parts(value, transpose and torch.is_grad_enabled())
            elif value is None and optional:
                flat += [None] * len(_PARTS)
            else:
                raise TypeError(f"{name}: expected kpcore.Neighbors, got {type(value).__name__}")
        return flat

    def unflatten(self, flat, to, transposed=False):
        """The arguments by name, arrays passed through `to`; lists with their transpose, or without."""
        arguments = {}
        for name, kind, _, at in self.rows:
            value = flat[at]
            if value is not None:
                if kind == "Array":
                    value = to(name, value)
                elif kind == "Neighbors":
                    index, row_splits, back_index, back_splits, num_points, width = flat[at : at + len(_PARTS)]
                    index, row_splits, back = to(name, index), to(name, row_splits), None
                    if transposed and back_index is not None:
                        back = to(name, back_index), to(name, back_splits), row_splits.shape[0] - 1
                        back = Neighbors._trusted(*back)
                    value = Neighbors._trusted(index, row_splits, num_points, None, width, back)
            arguments[name] = value
        return arguments


def _parts(neighbors, transpose):
    transposed = neighbors._transposed
    # While torch compiles it cannot be made, and the vjp makes it each time.
    if transposed is None and transpose and _array.is_array(neighbors.index) and not torch.compiler.is_compiling():
        transposed = neighbors.transpose()
    return (
        _as_tensor(neighbors.index),
        _as_tensor(neighbors.row_splits),
        None if transposed is None else _as_tensor(transposed.index),
        None if transposed is None else _as_tensor(transposed.row_splits),
        neighbors.num_points,
        neighbors.width,
    )


def _as_tensor(array):
    return array if isinstance(array, torch.Tensor) else to_tensor(array)


def define(op, public):
    """Make the torch operators kpcore::<name> and kpcore::<name>_vjp; return the public function for tensors."""
    layout = _Arguments(op, public)
    num_outputs = 1 if op.record is None else len(op.record._fields)
    differentiable = 0 if op.record is None else op.record._fields.index(op.field)

    def forward(*flat):
        first = next(t for t in flat if isinstance(t, torch.Tensor))
        return on_stream_of(first, lambda: computed(layout.unflatten(flat, to_array)))

    def computed(given):
        out, saved = op.forward(**given)
        return _tensors((out, *saved) if op.record is None else (*out, *saved), given)

    def computed_of_tensors(tensors, others):
        return computed(others | _arrays(tensors))

    def gradients_of_tensors(tensors, others, saved, grad, needs):
        return gradients(others | _arrays(tensors), saved, grad, needs)

    def forward_of_shapes(*flat):
        shapes = op.result(**layout.unflatten(flat, _shaped))
        like = next(t for t in flat if isinstance(t, torch.Tensor))
        return [like.new_empty(shape, dtype=_torch_dtype(dtype)) for shape, dtype in shapes]

    def vjp(*flat):
        *flat, saved, grad, needs = flat

        def found():
            given = layout.unflatten(flat, to_array, transposed=True)
            return gradients(given, saved, grad, set(compress(op.diff, needs)))

        return on_stream_of(grad, found)

    def gradients(given, saved, grad, needs):
        grad = _array.contiguous(to_array("grad", grad))
        saved = tuple([to_array("saved", t) for t in saved])
        return _tensors(op.gradients(given, saved, grad, needs).values(), given, grad)

    def vjp_of_shapes(*flat):
        needs = flat[-1]
        return [flat[at].new_empty(flat[at].shape) for at, need in zip(layout.diff, needs, strict=True) if need]

    # Not torch.library.register_autograd: for operators that return lists it takes twice as long as all the rest.
    # Only what may get a gradient is given to autograd as an input: each takes it a microsecond or two.
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, flat, *inputs):
            outputs = run(*flat)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outputs[:differentiable], *outputs[differentiable + 1 :])
            ctx.save_for_backward(*[flat[i] for i in layout.tensors], *outputs[num_outputs:])
            ctx.others = [flat[i] for i in layout.others]
            return tuple(outputs)

        @staticmethod
        def backward(ctx, *grads):
            grad, needs = grads[differentiable], ctx.needs_input_grad[2:]
            if grad is None:
                return (None, None, *(None for _ in needs))
            tensors, num_tensors = ctx.saved_tensors, len(layout.tensors)
            stored = [*tensors[:num_tensors], *ctx.others]
            flat = [stored[i] for i in layout.order]
            found = iter(vjp_operator(*flat, list(tensors[num_tensors:]), grad, list(needs)))
            return (None, None, *(next(found) if need else None for need in needs))

    # The same where nobody listens: after the operator, which was called without torch, and with lists as they are.
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, call, *inputs):
            ctx.inputs, tensors, ctx.others, outputs = call
            ctx.names = tuple(tensors)
            ctx.save_for_backward(*tensors.values(), *outputs[num_outputs:])
            return outputs[differentiable]

        @staticmethod
        def backward(ctx, grad):
            stored, others, needs = ctx.saved_tensors, ctx.others, set(compress(ctx.inputs, ctx.needs_input_grad[1:]))
            tensors, saved = dict(zip(ctx.names, stored)), stored[len(ctx.names) :]  # noqa: B905 - what was saved is left
            if torch.is_grad_enabled() or type(grad) is not torch.Tensor or _listening():
                flat = layout.flatten(others | tensors)
                found = vjp_operator(*flat, list(saved), grad, [name in needs for name in op.diff])
            else:
                found = on_stream_of(grad, gradients_of_tensors, tensors, others, saved, grad, needs)
                if not torch._C._autograd._get_current_graph_task_keep_graph():
                    ctx.others = None  # lists, as torch drops the tensors; a graph outlives its use
            found = iter(found)
            return (None, *[next(found) if name in needs else None for name in ctx.inputs])

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, *flat):
            return tuple(run(*flat))

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(f"{op.name}: second derivatives (double backward) are not there")

    def differentiated(run, flat):
        return Forward.apply(run, flat, *[flat[i] for i in layout.diff])

    operator = _register(op.name, layout.schema, forward, forward_of_shapes, differentiated)

    def differentiated_again(run, flat):
        return Backward.apply(run, *flat)

    more = "Tensor[] saved, Tensor grad, bool[] needs"
    vjp_operator = _register(f"{op.name}_vjp", f"{layout.schema}, {more}", vjp, vjp_of_shapes, differentiated_again)

    @functools.wraps(public)
    def function(*args, **kwargs):
        bound = layout.bind(args, kwargs)
        split = None if _listening() else layout.split(bound)
        if split is None:
            outputs = operator(*layout.flatten(bound))
        else:
            tensors, others = split
            outputs = on_stream_of(next(iter(tensors.values()), None), computed_of_tensors, tensors, others)
            inputs = tuple([name for name in op.diff if name in tensors and tensors[name].requires_grad])
            if inputs and torch.is_grad_enabled():
                call = inputs, tensors, others, outputs
                outputs[differentiable] = Direct.apply(call, *[tensors[name] for name in inputs])
        return outputs[0] if op.record is None else op.record(*outputs[:num_outputs])

    return function


def _listening():
    """Whether anybody but autograd is to see a call: a compiler, a tracer, a profiler, autocast, vmap, jvp, modes.

    Where nobody is, it goes past torch's dispatcher, which takes some 10 µs to pass on so many arguments.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _register(name, schema, kernel, kernel_of_shapes, differentiated):
    _LIBRARY.define(f"{name}({schema}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.kpcore, name).default

    def below(*flat):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*flat)

    def autograd(*flat):
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(t).tangent is not None for t in flat if isinstance(t, torch.Tensor)
        ):
            raise NotImplementedError(f"{name}: forward-mode derivatives (jvp) are not there")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            return list(differentiated(below, flat))
        return below(*flat)

    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"kpcore::{name}", kernel_of_shapes, lib=_LIBRARY)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"kpcore::{name}", device, torch.float32, lib=_LIBRARY)
    return operator


def _arrays(tensors):
    return {name: to_array(name, tensor) for name, tensor in tensors.items()}


def _shaped(name, tensor):
    return Shaped(tuple(tensor.shape), numpy_dtype(name, tensor.dtype, tensor))


def _tensors(arrays, given, grad=None):
    """Tensors in the memory of the arrays; of copies of those that share it with what was given, or with each other.

    torch takes what an operator returns for memory of its own.
    """
    tensors, done = [], []
    for array in arrays:
        array = _array.as_array(array)
        if not array.flags.owndata or any(array is other for other in done):
            others = [*done, *(a for a in (grad, *given.values()) if _array.is_array(a))]
            if any(np.may_share_memory(array, other) for other in others):
                array = array.copy()
        done.append(array)
        tensors.append(to_tensor(array))
    return tensors


def _flatten_neighbors(neighbors):
    transposed = neighbors._transposed
    arrays = [neighbors.index, neighbors.row_splits]
    arrays += [] if transposed is None else [transposed.index, transposed.row_splits]
    return [neighbors.num_points, *map(_as_tensor, arrays)], neighbors.width


def _unflatten_neighbors(leaves, width):
    num_points, index, row_splits, *transposed = leaves
    back = Neighbors._trusted(*transposed, row_splits.shape[0] - 1) if transposed else None
    return Neighbors._trusted(index, row_splits, num_points, None, width, back)


def _flatten_with_keys(neighbors):
    leaves, width = _flatten_neighbors(neighbors)
    names = "num_points", "index", "row_splits", "transposed_index", "transposed_row_splits"
    return [(GetAttrKey(name), leaf) for name, leaf in zip(names, leaves)], width  # noqa: B905 - or without the last two


# torch.export takes and gives nests of tensors and numbers.
register_pytree_node(
    Neighbors,
    _flatten_neighbors,
    _unflatten_neighbors,
    serialized_type_name="kpcore.Neighbors",
    flatten_with_keys_fn=_flatten_with_keys,
)
