"""Reverse-mode differentiation over a small tape.

Every differentiable operator is one row of a table, a `kpcore.ops.Op`: its checks, its forward pass, its
vector-Jacobian product, and the arguments it can be differentiated in. Called with arrays, an operator just computes.
Called with a `Tensor` for one of those arguments it also remembers what it did, and gradients are computed by walking
back over that: from a Tensor with `Tensor.backward`, of a function with `vjp`, `grad` and `value_and_grad`.
kpcore.torch and kpcore.jax hand the same rows to their frameworks.

    conv = lambda f, w: kpcore.kpconv(points, None, neighbors, f, w, kernel_points, extent)
    out, pullback = kpcore.autodiff.vjp(conv, features, weights)
    grad_features, grad_weights = pullback(grad_out)

The tape is the tensors themselves. There is no global state, so functions may be differentiated inside others that are
being differentiated, in several threads at once, and an exception leaves nothing behind.
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
Primal = TypeVar("Primal", bound=Nest)  # the gradient with respect to it is like it

_accumulating = threading.Lock()  # two threads may add to the gradient of one tensor


class Tensor:
    """An array under differentiation.

    Made from an array it is an input, and collects its gradient in `grad` (None before the first `backward`).
    Differentiable operators return others; `value` is the array, `node` what made it.

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

    __array_ufunc__: None = None  # a NumPy scalar times a tensor is the tensor's business, not an array of objects

    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        """This tensor with other axes, as arrays do it: offsets (M, K D), say, as (M, K, D)."""
        return _reshape(self, shape)

    def __mul__(self, factor: float | np.number) -> Tensor:
        """This tensor times a number, which does not change its dtype."""
        return _scale(self, checks.number("factor", factor, self.dtype))

    __rmul__ = __mul__

    def __add__(self, other: Tensor | np.ndarray | np.generic) -> Tensor:
        """This tensor and another like it, or a row (C,) for each of its rows: a bias, say."""
        return _plus(self, other) if _addable(other) else NotImplemented

    def __radd__(self, other: np.ndarray | np.generic) -> Tensor:
        return _plus(other, self) if _addable(other) else NotImplemented

    def __getitem__(self, columns: tuple[slice, slice]) -> Tensor:
        """Some columns, ``tensor[:, begin:end]``."""
        return _columns(self, columns)

    def backward(self, grad: np.ndarray | None = None) -> None:
        """Add the gradient of a scalar to `grad` of every input this tensor was made from.

        Parameters
        ----------
        grad : array like `value`, optional
            The scalar's gradient with respect to this tensor. Not given, this tensor is the scalar.
        """
        if grad is None:
            if self.value.size != 1:
                raise ValueError(f"grad: expected an array, because the tensor is no scalar but {self.shape}, got None")
            grad = np.ones_like(self.value)
        found = _pull(self, _checked_grad(self, grad))
        with _accumulating:
            for tensor, gradient in found.values():
                tensor.grad = gradient if tensor.grad is None else devices.as_array(tensor.grad + gradient)


class _Node:
    """One use of an operator: what its vjp needs, and where its arguments came from, by name.

    Each came from another node, or from a tensor that is an input. The tensors between are not kept, so that their
    arrays can be freed.
    """

    __slots__ = ("call", "inputs", "op", "saved")
    if TYPE_CHECKING:
        op: Op
        call: Call[Any]
        saved: Saved
        inputs: dict[str, _Node | Tensor]

    def __init__(self, op: Op, call: Call[Any], saved: Saved, inputs: dict[str, _Node | Tensor]) -> None:
        self.op, self.call, self.saved, self.inputs = op, call, saved, inputs


def operator(**parts: object) -> Callable[[Callable[Parameters, Call[Out]]], Callable[Parameters, Out]]:
    """Make of a function that checks its arguments and returns a `Call` one that also computes, on the tape where an
    argument is a `Tensor`; `parts` are those of `kpcore.ops.Op`, which is entered in the table of operators."""

    def make(check: Any) -> Any:
        op = Op(check.__name__, check, **{"kernel": check.__name__} | parts)
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
    """The result of an operator with tensors among its arguments, as a tensor that knows how it was made."""
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
    """What is known of an array that is not kept."""
    return Shaped(value.shape, value.dtype) if devices.is_array(value) else value


# ---- methods of a Tensor; the frameworks' tensors have theirs


def _on_tape(**parts):
    """As `operator`, for what is not in the table: all that takes an array by the name `array`."""

    def make(forward):
        bind = binder(forward)
        op = Op(forward.__name__.strip("_"), lambda **arguments: Call(**arguments),
                forward=lambda call: (forward(**vars(call)), ()), keeps=(), **parts)  # fmt: skip
        return lambda *args: record(op, bind(args, {}))

    return make


def _reshape_vjp(call, saved, grad, needs):
    return {"array": grad.reshape(call.array.shape).copy()}  # who gets it may add to it in place


@_on_tape(vjp=_reshape_vjp, diff=("array",))
def _reshape(array, shape):
    return array.reshape(*shape)


def _scale_vjp(call, saved, grad, needs):
    return {"array": devices.as_array(grad * call.factor)}


@_on_tape(vjp=_scale_vjp, diff=("array",))
def _scale(array, factor):
    return devices.as_array(array * factor)


def _addable(other):
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


@_on_tape(vjp=_plus_vjp, diff=("array", "other"))
def _plus(array, other):
    array, other, sizes = devices.as_array(array), devices.as_array(other), {}
    axes = [str(axis) for axis in range(array.ndim)]
    checks.array("the first", array, " ".join(axes), checks.FEATURES, sizes)
    shape = " ".join(axes[-1:] if other.ndim == 1 else axes)  # a row has the last axis alone
    checks.array("the second", other, shape, checks.FEATURES, sizes, like=("the first", array))
    return devices.as_array(array + other)


def _columns_vjp(call, saved, grad, needs):
    out = devices.namespace(grad).zeros(call.array.shape, grad.dtype)
    out[call.columns] = grad
    return {"array": out}


@_on_tape(vjp=_columns_vjp, diff=("array",))
def _columns(array, columns):
    axes = columns if isinstance(columns, tuple) else (columns,)
    some = axes[1] if len(axes) == 2 and axes[0] == slice(None) else None
    if not isinstance(some, slice) or some.step not in (None, 1):
        raise TypeError(f"expected columns as tensor[:, begin:end], got {columns}")
    return devices.contiguous(array[:, some])


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
        Takes one argument per primal and returns what a kpcore operator, or a chain of them, made of these.
    *primals : arrays, or nests of lists, tuples and dicts of arrays
        float32 or float64.
    has_aux : bool
        Whether `fn` returns a pair: what is differentiated, and anything else.

    Returns
    -------
    out : array
        ``fn(*primals)``
    pullback : callable
        Takes the gradient of a scalar with respect to `out`, an array like it, and returns those with respect to the
        primals, a tuple of arrays (or nests) like them; zeros where `fn` does not use an array. May be called several
        times.
    aux
        With `has_aux`, the second thing that `fn` returned, with arrays for its tensors.

    Raises
    ------
    TypeError
        If `fn` returns something that does not come from its primals, or uses one in an argument without a gradient.
    NotImplementedError
        From `pullback`, if an operator lacks the gradient; and for second derivatives.

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
        found = _pull(out, _checked_grad(out, grad))
        return _map(lambda t: found[id(t)][1] if id(t) in found else np.zeros_like(t.value), inputs)

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
        Returns a tensor of one element; or, with `has_aux`, that and anything else.
    argnums : int or tuple of int
        Which of its positional arguments to differentiate: arrays, or nests of lists, tuples and dicts of arrays.

    Returns
    -------
    callable
        Takes the arguments of `fn` and returns (value, gradient), or ((value, aux), gradient); the gradient is like the
        argument, or a tuple of those with a tuple of argnums.

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
        def of_chosen(*primals):
            given = list(args)
            for position, primal in zip(chosen, primals, strict=True):
                given[position] = primal
            return fn(*given, **kwargs)

        out, pullback, *aux = vjp(of_chosen, *(args[position] for position in chosen), has_aux=has_aux)
        if out.size != 1:
            raise ValueError(f"fn: expected a scalar to differentiate, got {out.shape}")
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
        value, found = differentiated(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def _pull(out, grad):
    """{id: (tensor, gradient)} of every input that `out` was made from."""
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
    """The nodes that led to the last one, each after all that used its result; none for an input.

    Not recursive: chains may be long.
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
        return grad  # as it mostly is; asking so takes a tenth of the time
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
        raise TypeError(f"{name}: expected float32 or float64 to differentiate in, got {value.dtype}")


def _map(fn, nest):
    """A nest of lists, tuples and dicts with `fn` of its leaves."""
    if isinstance(nest, dict):
        return {key: _map(fn, value) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        values = [_map(fn, value) for value in nest]
        if hasattr(nest, "_fields"):
            return type(nest)(*values)
        return type(nest)(values)
    return fn(nest)
