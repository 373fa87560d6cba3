"""Reverse-mode differentiation over a small tape.

Every differentiable operator is an entry of `kpcore.ops.OPS`, a `kpcore.ops.Op`: its checks, its forward pass, its
vector-Jacobian product, and the arguments it can be differentiated in. Called with arrays, an operator only computes.
Called with a `Tensor` for one of those arguments, it also records the call in a node, and gradients are computed by
walking back over the nodes: from a Tensor with `Tensor.backward`, of a function with `vjp`, `grad` and
`value_and_grad`. kpcore.torch and kpcore.jax register the same entries as operators of their frameworks.

    conv = lambda f, w: kpcore.kpconv(points, None, neighbors, f, w, kernel_points, extent)
    out, pullback = kpcore.autodiff.vjp(conv, features, weights)
    grad_features, grad_weights = pullback(grad_out)

The tape is the graph of nodes that tensors refer to. There is no global state: a function may be differentiated while
another one is, also in several threads at once, and an exception leaves nothing to clean up.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, overload

import numpy as np

from kpcore.backends import checks, devices
from kpcore.ops import OPS, Call, Op, Out, Saved, Shaped, binder

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Primals = TypeVarTuple("Primals")

Parameters = ParamSpec("Parameters")
Nest: TypeAlias = "np.ndarray | list[Any] | tuple[Any, ...] | dict[Any, Any]"  # an array, or a nest of arrays
Primal = TypeVar("Primal", bound=Nest)  # its gradient has the same type

_grad_lock = threading.Lock()  # held while `Tensor.grad` is added to: two threads may do so to one tensor


class Tensor:
    """An array whose use by differentiable operators is recorded.

    A Tensor made from an array is an input: `backward` adds to its gradient, `grad` (None before the first call).
    Operators return tensors that are not inputs. `value` is the array; `node` is the recorded call of the operator that
    computed it, None for an input.

    Parameters
    ----------
    value : float32 or float64 array

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.zeros((1, 3))
    >>> nb = kp.radius_search(points, None, 1.0)
    >>> weights = kp.autodiff.Tensor(np.array([[[5.0]]]))
    >>> out = kp.kpconv(points, None, nb, np.array([[2.0]]), weights, np.zeros((1, 3)), extent=1.0)
    >>> out.backward()
    >>> out.value, weights.grad
    (array([[10.]]), array([[[2.]]]))
    """

    __slots__ = ("grad", "node", "value")
    if TYPE_CHECKING:
        value: np.ndarray
        node: _Node | None
        grad: np.ndarray | None

    def __init__(self, value: devices.AnyArray, node: _Node | None = None) -> None:
        if node is None:
            _check_primal("value", value)
        self.value, self.node, self.grad = value, node, None

    def __repr__(self) -> str:
        made = f"made by {self.node.op.name}" if self.node else "input"
        return f"Tensor({self.value.shape}, {self.value.dtype}, {made})"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype

    # NumPy then leaves `scalar * tensor` to __rmul__; otherwise it would make an array of objects.
    __array_ufunc__: None = None

    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        """This tensor with another shape, as `ndarray.reshape`: for example offsets (M, K D) as (M, K, D)."""
        return _reshape(self, shape)

    def __mul__(self, factor: float | np.number) -> Tensor:
        """This tensor times a number; the dtype stays that of the tensor."""
        return _scale(self, checks.number("factor", factor, self.dtype))

    __rmul__ = __mul__

    def __add__(self, other: Tensor | np.ndarray | np.generic) -> Tensor:
        """The sum with a tensor or array of the same shape, or with a row (C,) that is added to each row, as a bias."""
        return _plus(self, other) if _is_addable(other) else NotImplemented

    def __radd__(self, other: np.ndarray | np.generic) -> Tensor:
        return _plus(other, self) if _is_addable(other) else NotImplemented

    def __getitem__(self, columns: tuple[slice, slice]) -> Tensor:
        """Columns ``tensor[:, begin:end]``; other indices are an error."""
        return _columns(self, columns)

    def backward(self, grad: np.ndarray | None = None) -> None:
        """Add the gradient of a scalar to `grad` of every input this tensor was made from.

        Parameters
        ----------
        grad : array like `value`, optional
            The gradient of the scalar with respect to this tensor. May be left out if this tensor is the scalar.
        """
        if grad is None:
            if self.value.size != 1:
                raise ValueError(
                    f"grad: expected an array, because the tensor has shape {self.shape} and is not a scalar, got None"
                )
            grad = np.ones_like(self.value)
        gradients = _input_gradients(self, _checked_grad(self, grad))
        with _grad_lock:
            for tensor, gradient in gradients.values():
                tensor.grad = gradient if tensor.grad is None else devices.as_array(tensor.grad + gradient)


class _Node:
    """A recorded call of an operator: what its vjp needs, and `inputs`, the source of each argument with a gradient.

    A source is the node that computed the argument, or the Tensor if that is an input. Intermediate tensors are not
    kept, so that their arrays can be freed.
    """

    __slots__ = ("call", "inputs", "op", "saved")
    if TYPE_CHECKING:
        op: Op
        call: Call[Any]
        saved: Saved
        inputs: dict[str, _Node | Tensor]

    def __init__(self, op: Op, call: Call[Any], saved: Saved, inputs: dict[str, _Node | Tensor]) -> None:
        self.op, self.call, self.saved, self.inputs = op, call, saved, inputs


def operator(**fields: object) -> Callable[[Callable[Parameters, Call[Out]]], Callable[Parameters, Out]]:
    """Decorator that makes an operator of a function that checks its arguments and returns a `Call`.

    The decorated function computes the result, and records the call if an argument is a `Tensor`. `fields` are fields
    of the `kpcore.ops.Op` that is entered in `OPS`.
    """

    def make(check: Any) -> Any:
        op = Op(check.__name__, check, **{"kernel": check.__name__} | fields)
        bind, compute = binder(check), op.compute

        @functools.wraps(check)
        def function(*args, **kwargs):
            for value in args:
                if isinstance(value, Tensor):
                    return record(op, bind(args, kwargs))
            for value in kwargs.values():
                if isinstance(value, Tensor):
                    return record(op, bind(args, kwargs))
            return compute(check(*args, **kwargs))[0]

        returned = check.__annotations__.get("return", "").removeprefix("Call[").removesuffix("]")
        function.__annotations__ = check.__annotations__ | {"return": returned}
        function.__signature__ = inspect.signature(check).replace(return_annotation=returned)
        OPS[op.name] = op
        return function

    return make


def record(op: Op, arguments: dict[str, Any]) -> Any:
    """Call an operator that has tensors among its arguments, and return its result as a tensor with a node."""
    tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
    for name in tensors:
        if name not in op.diff:
            raise TypeError(f"{name}: {op.name} cannot be differentiated in it, only in {', '.join(op.diff)}")
    arguments = arguments | {name: tensor.value for name, tensor in tensors.items()}
    for name in op.copies:
        if devices.is_array(arguments[name]):
            arguments[name] = arguments[name].copy()
    call = op.check(**arguments)
    out, saved = op.compute_and_keep(call)
    if op.by_result is not None and op.by_result(call):
        setattr(call, op.diff[0], out)
    if op.keeps is not None:
        call = Call(**{name: a if name in op.keeps else _shaped(a) for name, a in vars(call).items()})
    node = _Node(op, call, saved, {name: tensor.node or tensor for name, tensor in tensors.items()})
    if op.field is None:
        return Tensor(out, node)
    return out._replace(**{op.field: Tensor(getattr(out, op.field), node)})


def _shaped(value):
    """A `Shaped` for an array; any other value as it is."""
    return Shaped(value.shape, value.dtype) if devices.is_array(value) else value


# ---- operators behind the methods of Tensor: not in OPS, since tensors of the frameworks have such methods


def _tensor_method(**fields):
    """As `operator`, without an entry in OPS. The decorated function computes the result from arrays."""

    def make(forward):
        bind = binder(forward)
        op = Op(forward.__name__.strip("_"), lambda **arguments: Call(**arguments),
                forward=lambda call: (forward(**vars(call)), ()), keeps=(), **fields)  # fmt: skip
        return lambda *args: record(op, bind(args, {}))

    return make


def _reshape_vjp(call, saved, grad, needs):
    return {"array": grad.reshape(call.array.shape).copy()}  # a copy, since callers may add to a gradient in place


@_tensor_method(vjp=_reshape_vjp, diff=("array",))
def _reshape(array, shape):
    return array.reshape(*shape)


def _scale_vjp(call, saved, grad, needs):
    return {"array": devices.as_array(grad * call.factor)}


@_tensor_method(vjp=_scale_vjp, diff=("array",))
def _scale(array, factor):
    return devices.as_array(array * factor)


def _is_addable(other):
    return isinstance(other, (Tensor, np.generic)) or devices.is_array(other)


def _plus_vjp(call, saved, grad, needs):
    grads, grad = {}, devices.as_array(grad)
    for name in needs:
        if grad.ndim > len(getattr(call, name).shape):
            rows = devices.contiguous(grad).reshape(-1, grad.shape[-1])
            grads[name] = devices.namespace(rows).empty(rows.shape[1], rows.dtype)
            devices.backend(rows).run("sum_rows", rows=rows, sums=grads[name])
        else:
            grads[name] = grad.copy()
    return grads


@_tensor_method(vjp=_plus_vjp, diff=("array", "other"))
def _plus(array, other):
    array, other, sizes = devices.as_array(array), devices.as_array(other), {}
    axes = [str(axis) for axis in range(array.ndim)]
    checks.array("the first", array, " ".join(axes), checks.FEATURES, sizes)
    shape = " ".join(axes[-1:] if other.ndim == 1 else axes)  # a row (C,) is added to each row
    checks.array("the second", other, shape, checks.FEATURES, sizes, like=("the first", array))
    return devices.as_array(array + other)


def _columns_vjp(call, saved, grad, needs):
    out = devices.namespace(grad).zeros(call.array.shape, grad.dtype)
    out[call.columns] = grad
    return {"array": out}


@_tensor_method(vjp=_columns_vjp, diff=("array",))
def _columns(array, columns):
    axes = columns if isinstance(columns, tuple) else (columns,)
    selected = axes[1] if len(axes) == 2 and axes[0] == slice(None) else None
    if not isinstance(selected, slice) or selected.step not in (None, 1):
        raise TypeError(f"columns: expected a slice, as in tensor[:, begin:end], got {columns}")
    return devices.contiguous(array[:, selected])


# ---- derivatives of functions


@overload
def vjp(
    fn: Callable[..., Tensor], *primals: Unpack[Primals], has_aux: Literal[False] = False
) -> tuple[np.ndarray, Callable[[devices.AnyArray], tuple[Unpack[Primals]]]]: ...
@overload
def vjp(
    fn: Callable[..., tuple[Tensor, Any]], *primals: Unpack[Primals], has_aux: Literal[True]
) -> tuple[np.ndarray, Callable[[devices.AnyArray], tuple[Unpack[Primals]]], Any]: ...
def vjp(fn: Callable[..., Any], *primals: Nest, has_aux: bool = False) -> tuple[Any, ...]:
    """Evaluate a function and get its vector-Jacobian product.

    Parameters
    ----------
    fn : callable
        Takes one argument per primal and returns the result of kpcore operators on them.
    *primals : arrays, or nests of lists, tuples and dicts of arrays
        float32 or float64.
    has_aux : bool
        Whether `fn` returns a pair: the result to differentiate, and anything else.

    Returns
    -------
    out : array
        ``fn(*primals)``
    pullback : callable
        Takes the gradient of a scalar with respect to `out`, an array like it, and returns the gradients with respect
        to the primals, a tuple of arrays (or nests) like them; zeros for an array that `fn` does not use. May be called
        several times.
    aux
        With `has_aux`, the second value that `fn` returned; tensors in it are replaced by their arrays.

    Raises
    ------
    TypeError
        If `fn` returns something that was not computed from its primals, or passes one of them to an operator as an
        argument that has no gradient.
    NotImplementedError
        From `pullback`, if an operator does not implement a gradient; and for second derivatives.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.zeros((1, 3))
    >>> nb = kp.radius_search(points, None, 1.0)
    >>> conv = lambda f, w: kp.kpconv(points, None, nb, f, w, np.zeros((1, 3)), extent=1.0)
    >>> out, pullback = kp.autodiff.vjp(conv, np.array([[2.0]]), np.array([[[5.0]]]))
    >>> out, pullback(np.array([[1.0]]))
    (array([[10.]]), (array([[5.]]), array([[[2.]]])))
    """
    inputs = tuple(_map(Tensor, primal) for primal in primals)
    out = fn(*inputs)
    if has_aux:
        out, aux = out
        aux = _map(lambda a: a.value if isinstance(a, Tensor) else a, aux)
    if not isinstance(out, Tensor):
        raise TypeError(
            f"fn: expected a result computed from its arguments by kpcore operators, got {type(out).__name__}"
        )

    def pullback(grad):
        gradients = _input_gradients(out, _checked_grad(out, grad))
        return _map(lambda t: gradients[id(t)][1] if id(t) in gradients else np.zeros_like(t.value), inputs)

    return (out.value, pullback, aux) if has_aux else (out.value, pullback)


@overload
def value_and_grad(
    fn: Callable[..., Tensor], argnums: Literal[0] = 0, has_aux: Literal[False] = False
) -> Callable[Concatenate[Primal, ...], tuple[np.ndarray, Primal]]: ...
@overload
def value_and_grad(
    fn: Callable[..., tuple[Tensor, Any]], argnums: Literal[0] = 0, *, has_aux: Literal[True]
) -> Callable[Concatenate[Primal, ...], tuple[tuple[np.ndarray, Any], Primal]]: ...
@overload
def value_and_grad(
    fn: Callable[..., Tensor], argnums: int | tuple[int, ...], has_aux: Literal[False] = False
) -> Callable[..., tuple[np.ndarray, Nest]]: ...
@overload
def value_and_grad(
    fn: Callable[..., tuple[Tensor, Any]], argnums: int | tuple[int, ...], has_aux: Literal[True]
) -> Callable[..., tuple[tuple[np.ndarray, Any], Nest]]: ...
def value_and_grad(
    fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Nest]]:
    """A function that returns the value of `fn`, a scalar, and its gradient.

    Parameters
    ----------
    fn : callable
        Returns a tensor of one element; or, with `has_aux`, a pair of that and anything else.
    argnums : int or tuple of int
        Positions of the arguments to differentiate: arrays, or nests of lists, tuples and dicts of arrays.

    Returns
    -------
    callable
        Takes the arguments of `fn` and returns (value, gradient), or with `has_aux` ((value, aux), gradient). The
        gradient has the form of the argument; with a tuple of argnums it is a tuple of gradients.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> points = np.zeros((1, 3))
    >>> nb = kp.radius_search(points, None, 1.0)
    >>> conv = lambda p: kp.kpconv(points, None, nb, p["f"], p["w"], np.zeros((1, 3)), extent=1.0)
    >>> kp.autodiff.value_and_grad(conv)({"f": np.array([[2.0]]), "w": np.array([[[5.0]]])})
    (array([[10.]]), {'f': array([[5.]]), 'w': array([[[2.]]])})
    """
    single = not isinstance(argnums, tuple)
    chosen = (argnums,) if single else argnums

    def differentiated(*args, **kwargs):
        def fn_of_chosen(*primals):
            arguments = list(args)
            for position, primal in zip(chosen, primals, strict=True):
                arguments[position] = primal
            return fn(*arguments, **kwargs)

        out, pullback, *aux = vjp(fn_of_chosen, *(args[position] for position in chosen), has_aux=has_aux)
        if out.size != 1:
            raise ValueError(f"fn: expected a function that returns a scalar, got a result of shape {out.shape}")
        gradients = pullback(np.ones_like(out))
        return (out, *aux) if has_aux else out, gradients[0] if single else gradients

    return differentiated


@overload
def grad(
    fn: Callable[..., Tensor], argnums: Literal[0] = 0, has_aux: Literal[False] = False
) -> Callable[Concatenate[Primal, ...], Primal]: ...
@overload
def grad(
    fn: Callable[..., tuple[Tensor, Any]], argnums: Literal[0] = 0, *, has_aux: Literal[True]
) -> Callable[Concatenate[Primal, ...], tuple[Primal, Any]]: ...
@overload
def grad(
    fn: Callable[..., Tensor], argnums: int | tuple[int, ...], has_aux: Literal[False] = False
) -> Callable[..., Nest]: ...
@overload
def grad(
    fn: Callable[..., tuple[Tensor, Any]], argnums: int | tuple[int, ...], has_aux: Literal[True]
) -> Callable[..., tuple[Nest, Any]]: ...
def grad(
    fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Nest | tuple[Nest, Any]]:
    """A function that returns the gradient of `fn`, or with `has_aux` (gradient, aux); see `value_and_grad`."""
    differentiated = value_and_grad(fn, argnums, has_aux)

    def gradient(*args, **kwargs):
        value, gradients = differentiated(*args, **kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return gradient


def _input_gradients(out, grad):
    """{id(tensor): (tensor, gradient)} of every input that `out` was computed from; `grad` is the gradient of `out`."""
    end = out.node or out
    gradients = {id(end): (end, grad)}
    for node in _nodes_before(end):
        _, gradient = gradients.pop(id(node))
        for name, g in node.op.gradients(node.call, node.saved, gradient, frozenset(node.inputs)).items():
            source = node.inputs[name]
            key = id(source)
            gradients[key] = source, devices.as_array(gradients[key][1] + g) if key in gradients else g
    return gradients


def _nodes_before(end):
    """All nodes that `end` was computed from, itself first, each after every node that used its result.

    There are none if `end` is an input. Not recursive, since a long chain would exceed Python's limit on recursion.
    """
    order, seen, stack = [], set(), [(end, False)]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            order.append(node)
        elif type(node) is _Node and id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(source, False) for source in node.inputs.values()]
    return reversed(order)


def _checked_grad(out, grad):
    like = out.value
    if (
        type(grad) is type(like) is np.ndarray
        and grad.shape == like.shape
        and grad.dtype == like.dtype
        and grad.flags.carray
    ):
        return grad  # the usual case; this test takes a tenth of the time of `checks.array`
    sizes = {str(axis): (size, "the output") for axis, size in enumerate(out.value.shape)}
    dimensions = " ".join(sizes)
    sizes |= checks.device_of(("the output", like))
    return checks.array("grad", grad, dimensions, checks.FEATURES, sizes, like=("the output", out.value))


def _check_primal(name, value):
    if isinstance(value, Tensor):
        raise NotImplementedError(f"{name}: second derivatives are not supported; expected an array, got {value!r}")
    if not devices.is_array(value):
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}")
    if not devices.is_real(value):
        raise TypeError(f"{name}: expected float32 or float64, which have gradients, got {value.dtype}")


def _map(fn, nest):
    """The nest of lists, tuples and dicts with `fn` applied to each leaf."""
    if isinstance(nest, dict):
        return {key: _map(fn, value) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        values = [_map(fn, value) for value in nest]
        if hasattr(nest, "_fields"):
            return type(nest)(*values)
        return type(nest)(values)
    return fn(nest)
