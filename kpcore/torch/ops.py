"""The operators of kpcore as torch operators: each `Op` becomes two of them, the forward pass and its vjp.

Tensors share memory with NumPy arrays, on a GPU with CuPy arrays, in both directions. On a GPU everything runs on
torch's current stream. A Neighbors is passed to torch as its arrays and numbers, since torch traces only tensors. The
vjp is a separate torch operator so that it can be traced too.
"""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress
from typing import Any

import numpy as np
import torch

from kpcore import config, ops
from kpcore.backends import checks, cpu, devices
from kpcore.features import CovarianceFeatures
from kpcore.layers import BatchNormed
from kpcore.neighbors import Neighbors, list_for_one_call, padded_list, unchecked_list
from kpcore.ops import Out, Shaped
from kpcore.pyramid import Level, Pyramid
from kpcore.sampling import Sampled
from kpcore.subsampling import Subsampled
from kpcore.torch import internals

_DTYPES = {
    getattr(torch, name): np.dtype(name)
    for name in ("float16", "float32", "float64", "complex64", "complex128", "bool", "uint8", "int8", "int16", "int32",
                 "int64", "uint16", "uint32", "uint64")
}  # fmt: skip
_TORCH_DTYPES = {dtype: ours for ours, dtype in _DTYPES.items()}
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_LIBRARY = torch.library.Library("kpcore", "DEF")

NO_SECOND = "second derivatives (double backward) are not supported by kpcore.torch"
NO_JVP = "forward-mode derivatives (jvp) are not supported by kpcore.torch"
NO_VMAP = "vmap is not supported by kpcore.torch; call it for one item after the other"

# Integer arguments that change with every call, such as the seed of dropout. torch gets them as 0-d tensors, because a
# compiler makes a new program for every value of an integer. A caller may pass a tensor too, drawn in compiled code.
_SEEDS = ("seed",)

# Error messages of kpcore speak of arrays: (what they say, what it becomes for tensors).
_ADVICE = (
    (re.compile(r"(\w+)\.astype\(numpy\.(\w+)\)"), r"\1.to(torch.\2)"),
    (re.compile(r"(\w+)\.astype\((\w+)\.dtype\)"), r"\1.to(\2.dtype)"),
    (re.compile(r"cupy\.asnumpy\((\w+)\)"), r'\1.to("cpu")'),
    (re.compile(r"cupy\.asarray\((\w+)\)"), r'\1.to("cuda")'),
    (re.compile("a number, got ndarray"), "a number, got Tensor"),
    (re.compile("NumPy or CuPy array"), "torch tensor"),
    (re.compile(r"numpy\.asarray"), "torch.tensor"),
    (re.compile("NumPy array"), "tensor on the CPU"),
    (re.compile("CuPy array"), "tensor on a GPU"),
)

# A Neighbors argument becomes these arguments of the torch operator: {name: type in the schema}.
_PARTS = {
    "index": "Tensor",
    "row_splits": "Tensor",
    "transposed_index": "Tensor?",
    "transposed_row_splits": "Tensor?",
    "num_points": "SymInt",
    "width": "SymInt?",
}


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether kpcore computes on the tensor as a CuPy array."""
    return tensor.is_cuda


def on_stream_of(tensor: torch.Tensor | None, function: Callable[..., Out], *arguments: object) -> Out:
    """Call the function, on torch's current stream if `tensor` is on a GPU."""
    if tensor is None or not on_gpu(tensor):
        return function(*arguments)
    with torch_stream(tensor.device):
        return function(*arguments)


@contextmanager
def torch_stream(device: torch.device) -> Iterator[None]:
    """Within it CuPy uses this GPU and torch's current stream on it."""
    cuda, index = config.cupy().cuda, torch.cuda.current_device() if device.index is None else device.index
    with cuda.Device(index), cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, index):
        yield


def use_torch_allocator() -> None:
    """Make CuPy, and so kpcore, allocate GPU memory from torch's pool instead of CuPy's.

    With two pools, memory that one has freed is not available to the other. With one, memory of kpcore is also counted
    by ``torch.cuda.max_memory_allocated``. This holds for the whole process, until ``cupy.cuda.set_allocator`` is
    called again.
    """
    cuda = config.cupy().cuda

    def allocate(size, device):
        return torch.cuda.caching_allocator_alloc(size, device, cuda.get_current_stream().ptr)

    def free(address, device):
        torch.cuda.caching_allocator_delete(address)

    cuda.set_allocator(cuda.PythonFunctionAllocator(allocate, free).malloc)


def to_array(name: str, tensor: torch.Tensor) -> np.ndarray:
    """A NumPy array, on a GPU a CuPy array, that shares the memory of a tensor."""
    if on_gpu(tensor):
        return config.cupy().from_dlpack(tensor.detach())
    dtype = _DTYPES.get(tensor.dtype) or numpy_dtype(name, tensor.dtype, tensor)
    if tensor.is_neg():  # a view with torch's negative bit: the memory holds the numbers with the opposite sign
        tensor = tensor.resolve_neg()
    # Not tensor.numpy(): torch never again resizes a storage that NumPy has seen, and FSDP has to resize parameters.
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        raise NotImplementedError(
            f"{name}: expected a tensor with memory, got one of is_grads_batched, vmap or a tracer, which kpcore.torch "
            "does not support"
        ) from None
    if not address and tensor.numel():
        raise ValueError(f"{name}: expected a tensor with memory, got {tuple(tensor.shape)} in a storage of no bytes")
    return cpu.array_at(address, tensor.shape, tensor.stride(), dtype, tensor.untyped_storage())


def on_arrays(function: Callable[..., Out], *args: object, **kwargs: object) -> Out:
    """Call the function; advice about arrays in its errors becomes advice about tensors."""
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        _reword_for_tensors(error)
        raise


def _reword_for_tensors(error):
    if error.args and isinstance(error.args[0], str):
        message = error.args[0]
        for pattern, advice in _ADVICE:
            message = pattern.sub(advice, message)
        error.args = (message, *error.args[1:])


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares the memory of an array."""
    if isinstance(array, (np.ndarray, np.generic)):
        return torch.from_numpy(np.asarray(array))
    return torch.from_dlpack(array)


def padded_tensor(name: str, matrix: object, num_points: int) -> Neighbors:
    """A list from a padded matrix (M, H) of int32 or int64, in which -1 and `num_points` mean "no neighbour".

    Errors speak of `name`.
    """
    matrix = checked(None, name, matrix)
    return on_stream_of(matrix, lambda: on_arrays(padded_list, name, to_array(name, matrix), num_points))


def numpy_dtype(name: str, dtype: torch.dtype, tensor: torch.Tensor | None = None) -> np.dtype:
    """The NumPy dtype of a torch dtype; an error about the argument `name` if there is none."""
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype == torch.bfloat16 and tensor is not None and on_gpu(tensor):
        import ml_dtypes  # CuPy's bfloat16 is the dtype of this package

        return np.dtype(ml_dtypes.bfloat16)
    expected, dtypes = "float32 or float64", checks.REAL
    if name.rpartition(".")[2] in ("batch", "index", "labels", "row_splits"):
        expected, dtypes = "integers", checks.SPLITS if name.endswith("row_splits") else checks.INTEGERS
    kind, advice = str(dtype)[6:], ""
    if tensor is not None and tensor.is_quantized:
        advice = f"; convert it with {name}.dequantize()" if dtypes is checks.REAL else ""
    elif kind == "bfloat16" or hasattr(np, kind):  # NumPy has no bfloat16; like float16 it converts to float32 exactly
        to = checks.lossless(np.dtype("float16" if kind == "bfloat16" else kind), dtypes)
        advice = "" if to is None else f"; convert it with {name}.to(torch.{to.name})"
    raise TypeError(f"{name}: expected {expected}, got {kind}{advice}")


def _torch_dtype(dtype):
    dtype = np.dtype(dtype)
    return torch.bfloat16 if dtype.name == "bfloat16" else _TORCH_DTYPES[dtype]


def checked(op: ops.Op | None, name: str, value: object, optional: bool = False) -> Any:
    """Check that `value` is a tensor on the CPU or a GPU, or None where `optional`, and return it.

    With `op`, a tensor that requires a gradient which the operator does not have is an error.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_nested or not (value.is_cpu or value.is_cuda):
            raise _unusual(name, value)
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


def _unusual(name, tensor):
    """The error for a tensor on another device, a nested tensor, or one that is not dense."""
    if not (tensor.is_cpu or tensor.is_cuda):
        return TypeError(
            f"{name}: expected a tensor on the CPU or a CUDA GPU, got one on {tensor.device}; move it with {name}.cpu()"
        )
    if tensor.is_nested:
        return TypeError(
            f"{name}: expected a tensor of rows, got a nested one; stack its items with torch.cat({name}.unbind()) "
            f"and pass their bounds as row_splits"
        )
    return TypeError(
        f"{name}: expected a dense tensor, got one of layout {tensor.layout}; convert it with {name}.to_dense()"
    )


def _checked_length(name, value, dtype):
    if not torch.compiler.is_compiling():
        return checks.length(name, value, dtype)
    if not 0 < value < math.inf:  # without functions of NumPy, which torch does not trace
        raise ValueError(f"{name}: expected a finite number above zero, got {value}")
    return value


class _Arguments:
    """The arguments of an operator in two forms: by name, as the public function has them, and `flat`, a sequence of
    the arguments of the torch operator, in which every Neighbors is replaced by its parts."""

    def __init__(self, op, public):
        self.op, self._bind, self.numbers = op, ops.binder(public), ops.arrays_or_numbers(public)
        self.rows, schema = [], []  # (name, kind, whether it may be None, position of its first part in `flat`)
        for name, (kind, optional) in ops.kinds(public).items():
            self.rows.append((name, kind, optional, len(schema)))
            if kind == "Array" or name in _SEEDS:
                schema.append(f"Tensor{'?' * optional} {name}")
            elif kind == "Neighbors":
                schema += [f"{part.rstrip('?')}{'?' * (optional or '?' in part)} {name}_{which}"
                           for which, part in _PARTS.items()]  # fmt: skip
            else:
                schema.append(f"{kind.removeprefix('int or ')}{'?' * optional} {name}")
        self.schema = ", ".join(schema)
        self.tensors = tuple(i for i, s in enumerate(schema) if s.startswith("Tensor"))
        self.others = tuple(i for i in range(len(schema)) if i not in self.tensors)
        stored = (*self.tensors, *self.others)
        self.order = tuple(stored.index(i) for i in range(len(schema)))  # flat[i] = (*tensors, *others)[order[i]]
        positions = {name: at for name, _, _, at in self.rows}
        self.diff = tuple(positions[name] for name in op.diff)

    def bind(self, args, kwargs):
        """The arguments by name; a number that stands for an array becomes a tensor."""
        bound = self._bind(args, kwargs)
        for name in self.numbers:
            points = bound["points"]
            if isinstance(bound[name], numbers.Real) and isinstance(points, torch.Tensor) and points.dtype in _DTYPES:
                bound[name] = points.new_full((), _checked_length(name, bound[name], _DTYPES[points.dtype]))
        return bound

    def split(self, bound):
        """(tensors by name, all other arguments by name); None if the call has to go through torch's dispatcher
        because a tensor is of a subclass, which may override operators."""
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
                if not isinstance(value, Neighbors) or isinstance(value.stored_index, torch.Tensor):
                    return None
                others[name] = value
            elif name in _SEEDS and isinstance(value, torch.Tensor):
                if type(value) not in _PLAIN:
                    return None
                others[name] = checks.integer(name, checked(self.op, name, value), 0)
            else:
                others[name] = ops.setting(name, kind, optional, value)
        return tensors, others

    def flatten(self, bound):
        """`flat` from the arguments by name; makes the transpose of lists for which a gradient will need it."""
        flat, transpose = [], False
        for name in self.op.transposes:
            transpose = transpose or getattr(bound[name], "requires_grad", False)
        for name, kind, optional, _ in self.rows:
            value = bound[name]
            if kind == "Array":
                flat.append(checked(self.op, name, value, optional))
            elif name in _SEEDS:
                if not isinstance(value, torch.Tensor):
                    value = torch.full((), ops.setting(name, kind, optional, value), dtype=torch.int64, device="cpu")
                flat.append(checked(self.op, name, value))
            elif kind != "Neighbors":
                flat.append(ops.setting(name, kind, optional, value))
            elif isinstance(value, Neighbors):
                flat += neighbors_parts(value, transpose and torch.is_grad_enabled())
            elif value is None and optional:
                flat += [None] * len(_PARTS)
            else:
                raise TypeError(f"{name}: expected kpcore.Neighbors, got {type(value).__name__}")
        return flat

    def unflatten(self, flat, to, transposed=False):
        """The arguments by name from `flat`: arrays are ``to(name, tensor)``, lists have a transpose if `transposed`.

        Lists are checked again, since their tensors may come from anywhere and may have been changed.
        """
        arguments = {}
        for name, kind, _, at in self.rows:
            value = flat[at]
            if value is not None:
                if kind == "Array":
                    value = to(name, value)
                elif kind == "Neighbors":
                    index, row_splits, back_index, back_splits, num_points, width = flat[at : at + len(_PARTS)]
                    index, row_splits = to(f"{name}.index", index), to(f"{name}.row_splits", row_splits)
                    back = None
                    if transposed and back_index is not None:
                        back = to(name, back_index), to(name, back_splits)
                    if to is _shaped:
                        value = unchecked_list(index, row_splits, num_points, None, width)
                    else:
                        value = list_for_one_call(index, row_splits, num_points, width, back)
            arguments[name] = value
        return arguments


def neighbors_parts(neighbors: Neighbors, transpose: bool) -> tuple[Any, ...]:
    """The values of `_PARTS` for a list; the transpose is made first if `transpose` and it is possible."""
    transposed = neighbors.stored_transposed
    # While torch compiles, the transpose cannot be made: the vjp makes it in each call unless the list carries it.
    if torch.compiler.is_compiling():
        transposed = transposed if neighbors.carries_transpose else None
    elif transposed is None and transpose and devices.is_array(neighbors.stored_index):
        transposed = neighbors.transpose()
    return (
        _as_tensor(neighbors.stored_index),
        _as_tensor(neighbors.stored_row_splits),
        None if transposed is None else _as_tensor(transposed.stored_index),
        None if transposed is None else _as_tensor(transposed.stored_row_splits),
        neighbors.num_points,
        neighbors.width,
    )


def _as_tensor(array):
    return array if isinstance(array, torch.Tensor) else to_tensor(array)


def define(op: ops.Op, public: Callable[..., Any]) -> Callable[..., Any]:
    """Make the torch operators kpcore::<name> and kpcore::<name>_vjp; return the public function for tensors."""
    layout = _Arguments(op, public)
    grad_name = f"gradient of {op.name}"
    num_outputs = 1 if op.record is None else len(op.record._fields)
    differentiable = 0 if op.record is None else op.record._fields.index(op.field)

    def forward(*flat):
        first = next(t for t in flat if isinstance(t, torch.Tensor))
        return on_stream_of(first, lambda: compute(layout.unflatten(flat, to_array)))

    def compute(arguments):
        try:  # not on_arrays, which would pass the arguments on once more
            out, saved = op.compute(op.check(**arguments))
        except (TypeError, ValueError) as error:
            _reword_for_tensors(error)
            raise
        return _tensors((out, *saved) if op.record is None else (*out, *saved), arguments)

    def compute_on_tensors(tensors, others):
        return compute(others | _arrays(tensors))

    def gradients_on_tensors(tensors, others, saved, grad, needs):
        return gradients(others | _arrays(tensors), saved, grad, needs)

    def fake_forward(*flat):
        try:
            shapes = op.result(ops.Call(**layout.unflatten(flat, _shaped)))
        except IndexError:  # an array has too few axes; the check says which
            on_arrays(op.check, **layout.unflatten(flat, _zeros))
            raise
        like = next(t for t in flat if isinstance(t, torch.Tensor))
        return [like.new_empty(shape, dtype=_torch_dtype(dtype)) for shape, dtype in shapes]

    def vjp(*flat):
        *flat, saved, grad, needs = flat

        def compute_gradients():
            arguments = layout.unflatten(flat, to_array, transposed=True)
            return gradients(arguments, saved, grad, set(compress(op.diff, needs)))

        return on_stream_of(grad, compute_gradients)

    def gradients(arguments, saved, grad, needs):
        grad = devices.contiguous(to_array(grad_name, grad))
        saved = tuple([to_array("saved", t) for t in saved])
        return _tensors(op.gradients(op.check(**arguments), saved, grad, needs).values(), arguments, grad)

    def fake_vjp(*flat):
        needs = flat[-1]
        return [flat[at].new_empty(flat[at].shape) for at, need in zip(layout.diff, needs, strict=True) if need]

    # Autograd of a call that goes through torch's dispatcher. Not torch.library.register_autograd: for operators that
    # return lists it takes twice as long as the rest of the call, and torch.func cannot see through it. Only the
    # arguments in `op.diff` are passed to autograd as inputs, because each input takes it a microsecond or two.
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(run, flat, *inputs):
            return tuple(run(*flat))

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            flat = inputs[1]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outputs[:differentiable], *outputs[differentiable + 1 :])
            ctx.save_for_backward(*[flat[i] for i in layout.tensors], *outputs[num_outputs:])
            ctx.others = [flat[i] for i in layout.others]

        @staticmethod
        def backward(ctx, *grads):
            grad, needs = grads[differentiable], ctx.needs_input_grad[2:]
            if grad is None:
                return (None, None, *(None for _ in needs))
            tensors, num_tensors = ctx.saved_tensors, len(layout.tensors)
            stored = [*tensors[:num_tensors], *ctx.others]
            flat = [stored[i] for i in layout.order]
            gradients = iter(vjp_operator(*flat, list(tensors[num_tensors:]), grad, list(needs)))
            return (None, None, *(next(gradients) if need else None for need in needs))

        vmap = internals.refusal(f"{op.name}: {NO_VMAP}")
        jvp = internals.refusal(f"{op.name}: {NO_JVP}")

    # Autograd of a call that went past the dispatcher: the operator has already been computed on arrays, and its lists
    # are kept as they are.
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
            tensors, saved = dict(zip(ctx.names, stored)), stored[len(ctx.names) :]  # noqa: B905 - `saved` is longer
            if torch.is_grad_enabled() or type(grad) is not torch.Tensor or internals.needs_dispatcher():
                flat = layout.flatten(others | tensors)
                gradients = vjp_operator(*flat, list(saved), grad, [name in needs for name in op.diff])
            else:
                gradients = on_stream_of(grad, gradients_on_tensors, tensors, others, saved, grad, needs)
                if not internals.keeps_graph():
                    ctx.others = None  # frees the lists, as torch frees the saved tensors, even if the graph is kept
            gradients = iter(gradients)
            return (None, *[next(gradients) if name in needs else None for name in ctx.inputs])

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(run, *flat):
            return tuple(run(*flat))

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(f"{op.name}: {NO_SECOND}")

        vmap = internals.refusal(f"{op.name}: {NO_VMAP}")
        jvp = internals.refusal(f"{op.name}: {NO_JVP}")

    def apply_forward(run, flat):
        return internals.apply(Forward, run, flat, *[flat[i] for i in layout.diff])

    operator = _register(op.name, layout.schema, forward, fake_forward, apply_forward)

    def apply_backward(run, flat):
        return internals.apply(Backward, run, *flat)

    more = "Tensor[] saved, Tensor grad, bool[] needs"
    vjp_operator = _register(f"{op.name}_vjp", f"{layout.schema}, {more}", vjp, fake_vjp, apply_backward)

    @functools.wraps(public)
    def function(*args, **kwargs):
        bound = layout.bind(args, kwargs)
        split = None if internals.needs_dispatcher() else layout.split(bound)
        if split is None:
            outputs = operator(*layout.flatten(bound))
        else:
            tensors, others = split
            outputs = on_stream_of(next(iter(tensors.values()), None), compute_on_tensors, tensors, others)
            inputs = tuple([name for name in op.diff if name in tensors and tensors[name].requires_grad])
            if inputs and torch.is_grad_enabled():
                call = inputs, tensors, others, outputs
                outputs[differentiable] = internals.apply(Direct, call, *[tensors[name] for name in inputs])
        return outputs[0] if op.record is None else op.record(*outputs[:num_outputs])

    return function


def _register(name, schema, kernel, fake_kernel, apply_autograd):
    """Register a torch operator and return a function that calls it.

    `kernel` computes on tensors and `fake_kernel` only gives the shapes of its results; ``apply_autograd(run, flat)``
    calls ``run(*flat)`` under the autograd function of the operator.
    """
    _LIBRARY.define(f"{name}({schema}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.kpcore, name).default

    def run_below_autograd(*flat):
        with internals.below_autograd():
            return operator(*flat)

    def requires_grad(flat):
        return torch.is_grad_enabled() and any(t.requires_grad for t in flat if isinstance(t, torch.Tensor))

    def autograd(*flat):
        if internals.in_forward_mode(flat):
            raise NotImplementedError(f"{name}: {NO_JVP}")
        if not requires_grad(flat):
            return run_below_autograd(*flat)
        if internals.transforming():
            raise NotImplementedError(
                f"{name}: expected a call of kpcore.torch.{name.removesuffix('_vjp')}, outside of torch.compile, in "
                f"torch.func, got one of torch.ops.kpcore.{name}"
            )
        return list(apply_autograd(run_below_autograd, flat))

    def vmapped(info, in_dims, *flat):
        raise NotImplementedError(f"{name}: {NO_VMAP}")

    def call(*flat):
        # torch.func has to see the autograd function itself, so it is applied here: inside the dispatcher it is hidden.
        if not torch.compiler.is_compiling() and internals.transforming() and requires_grad(flat):
            return list(apply_autograd(operator, flat))
        return operator(*flat)

    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"kpcore::{name}", fake_kernel, lib=_LIBRARY)
    for device in ("cpu", "cuda"):
        internals.register_autocast(f"kpcore::{name}", device, torch.float32, lib=_LIBRARY)
    torch.library.register_vmap(f"kpcore::{name}", vmapped, lib=_LIBRARY)
    return call


def _arrays(tensors):
    return {name: to_array(name, tensor) for name, tensor in tensors.items()}


def _zeros(name, tensor):
    """An array of zeros with the shape and dtype of a tensor, which may have no memory."""
    return np.broadcast_to(np.zeros((), numpy_dtype(name, tensor.dtype, tensor)), [int(size) for size in tensor.shape])


def _shaped(name, tensor):
    return Shaped(tuple(tensor.shape), numpy_dtype(name, tensor.dtype, tensor))


def _tensors(arrays, arguments, grad=None):
    """Convert the results of an operator to tensors, copying those that share memory with an argument or each other.

    torch assumes that the outputs of an operator share no memory with anything else.
    """
    tensors, converted = [], []
    for array in arrays:
        array = devices.as_array(array)
        if not array.flags.owndata or any(array is other for other in converted):
            others = [*converted, *(a for a in (grad, *arguments.values()) if devices.is_array(a))]
            if any(np.may_share_memory(array, other) for other in others):
                array = array.copy()
        converted.append(array)
        tensors.append(to_tensor(array))
    return tensors


def _flatten_neighbors(neighbors):
    names, leaves = _leaves(neighbors)
    return leaves, [neighbors.width is not None, neighbors.carries_transpose, "distance" in names]


def _flatten_with_keys(neighbors):
    names, leaves = _leaves(neighbors)
    context = [neighbors.width is not None, neighbors.carries_transpose, "distance" in names]
    return [(internals.GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)], context


def _leaves(neighbors):
    """(names, leaves) of a list as a pytree: num_points, the width if there is one, and tensors.

    The numbers are leaves because a program of torch.export has constants in place of what is no leaf. The tensors are
    copies of the arrays, so that writing to a leaf does not change the list. They are made once for each list, because
    torch.export recognises an input by its memory.
    """
    if neighbors.stored_leaves is None:
        arrays = {"index": neighbors.stored_index, "row_splits": neighbors.stored_row_splits}
        if neighbors.stored_distance is not None:
            arrays["distance"] = neighbors.stored_distance
        if neighbors.carries_transpose:
            back = neighbors.transpose() if neighbors.stored_transposed is None else neighbors.stored_transposed
            arrays |= {"transposed_index": back.stored_index, "transposed_row_splits": back.stored_row_splits}
        copies = [to_tensor(array).clone() if devices.is_array(array) else array for array in arrays.values()]
        object.__setattr__(neighbors, "stored_leaves", ((*arrays,), copies))
    names, copies = neighbors.stored_leaves
    numbers = {"num_points": neighbors.num_points} | ({} if neighbors.width is None else {"width": neighbors.width})
    return (*numbers, *names), [*numbers.values(), *copies]


def _unflatten_neighbors(leaves, context):
    has_width, carries_transpose, has_distance = context
    num_points, *leaves = leaves
    width, *leaves = leaves if has_width else (None, *leaves)
    index, row_splits, *others = map(_array_of_leaf, leaves)
    distance, *others = others if has_distance else (None, *others)
    back = None
    if carries_transpose:
        shape = getattr(row_splits, "shape", None)  # a pytree may hold leaves that are not tensors and have no shape
        back = unchecked_list(*others, shape[0] - 1 if shape else None)
    return unchecked_list(index, row_splits, num_points, distance, width, back, carries_transpose)


def _array_of_leaf(leaf):
    """The array of a plain tensor; stand-ins for tensors while torch traces, and all other leaves, unchanged."""
    if type(leaf) not in _PLAIN or torch.compiler.is_compiling() or not (leaf.is_cpu or leaf.is_cuda):
        return leaf
    try:
        return to_array("neighbors", leaf)
    except (TypeError, NotImplementedError):  # a dtype that NumPy does not have, or a tensor wrapped by torch.func
        return leaf


# torch.export passes inputs and outputs as pytrees of tensors and numbers.
internals.register_pytree_node(
    Neighbors,
    _flatten_neighbors,
    _unflatten_neighbors,
    serialized_type_name="kpcore.Neighbors",
    flatten_with_keys_fn=_flatten_with_keys,
)
internals.register_pytree_node(
    Pyramid,
    lambda levels: (list(levels), None),
    lambda levels, _: Pyramid(levels),
    serialized_type_name="kpcore.Pyramid",
    flatten_with_keys_fn=lambda levels: ([(internals.SequenceKey(i), level) for i, level in enumerate(levels)], None),
)
for _record in (BatchNormed, CovarianceFeatures, Level, Sampled, Subsampled):
    internals.register_namedtuple(_record, serialized_type_name=f"kpcore.{_record.__name__}")
