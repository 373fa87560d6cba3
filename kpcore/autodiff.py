"""Reverse-mode differentiation over a small tape.

Every differentiable operator is one row, an `Op`: its forward, its vector-Jacobian product, and the arguments it can
be differentiated in. Called with arrays, an operator just computes. Called with a `Tensor` for one of those arguments
it also remembers what it did, and gradients are found by walking back over that: from a Tensor with `Tensor.backward`,
of a function with `vjp`, `grad` and `value_and_grad`. kpcore.torch and kpcore.jax hand the same rows to their
frameworks.

    conv = lambda f, w: kpcore.kpconv(points, None, neighbors, f, w, kernel_points, extent)
    out, pullback = kpcore.autodiff.vjp(conv, features, weights)
    grad_features, grad_weights = pullback(grad_out)

The tape is the tensors themselves. There is no global state, so functions may be differentiated inside others that are
being differentiated, in several threads at once, and an exception leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kpcore import config
from kpcore.backends import checks, devices

_accumulating = threading.Lock()  # two threads may add to the gradient of one tensor


class Tensor:
    """An array under differentiation.

    Made from an array it is an input, and collects its gradient in `grad` (None before the first `backward`).
    Differentiable operators return others; `value` is the array, `call` what made it.

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

    __slots__ = ("call", "grad", "value")

    def __init__(self, value, call=None):
        if call is None:
            _check_primal("value", value)
        self.value, self.call, self.grad = value, call, None

    def __repr__(self):
        made = f"made by {self.call.op.name}" if self.call else "input"
        return f"Tensor({self.value.shape}, {self.value.dtype}, {made})"

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    __array_ufunc__ = None  # a NumPy scalar times a tensor is the tensor's business, not an array of objects

    def reshape(self, *shape):
        """This tensor with other axes, as arrays do it: offsets (M, K D), say, as (M, K, D)."""
        return _RESHAPE(array=self, shape=shape)

    def __mul__(self, factor):
        """This tensor times a number, which does not change its dtype."""
        return _SCALE(array=self, factor=checks.number("factor", factor, self.dtype))

    __rmul__ = __mul__

    def __add__(self, other):
        """This tensor and another like it, or a row (C,) for each of its rows: a bias, say."""
        return _PLUS(array=self, other=other) if _addable(other) else NotImplemented

    def __radd__(self, other):
        return _PLUS(array=other, other=self) if _addable(other) else NotImplemented

    def __getitem__(self, columns):
        """Some columns, ``tensor[:, begin:end]``."""
        return _COLUMNS(array=self, columns=columns)

    def backward(self, grad=None):
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


class _Call:
    """One use of an operator: what its vjp needs, and where its arguments came from, by name.

    That is another call, or a tensor that is an input. Not the tensors between, whose arrays may then go.
    """

    __slots__ = ("arguments", "inputs", "op", "saved")

    def __init__(self, op, arguments, saved, inputs):
        self.op, self.arguments, self.saved, self.inputs = op, arguments, saved, inputs


@dataclass(frozen=True)
class Shaped:
    """What `Op.result` sees of an array. It has no length: frameworks trace with sizes that are not known yet."""

    shape: tuple
    dtype: np.dtype


@dataclass(frozen=True)
class Op:
    """A differentiable operator.

    ``forward(**arguments) -> (out, saved)`` checks its arguments and computes; `saved` is a tuple of the arrays that
    the gradient needs besides the arguments, mostly empty: it recomputes the rest.
    ``vjp(arguments, saved, grad, needs)`` returns a dict with the gradient of every argument named in `needs`, a subset
    of `diff`. Where `out` is a named tuple, `field` is the one of its fields that is differentiable; `grad` is that
    field's, and the others stay plain arrays. ``result(**arguments)`` gives (shape, dtype) of `out` and of each array
    saved, from the shapes and dtypes of the arguments alone; None where they depend on values.

    For frameworks that trace: arrays come to `result` as `Shaped`, whose sizes may be symbols, to be computed with but
    not compared; a Neighbors has arrays of these. Where `out` is a named tuple of arrays, `record` is its type and
    `result` begins with one entry for each field. `transposes` names the arguments whose gradient walks
    ``neighbors.transpose()``, so that it is made before they trace; a vjp may call it anyway, but would then make it
    each time. Of a Neighbors an operator sees everything but `distance`. What kind of thing each argument is says the
    signature of the public function, see kpcore/ops.py.

    ``check(**arguments)`` makes those of forward's checks that look at no value of an array; frameworks make them while
    they trace.

    `keeps` names the arguments whose values the vjp looks at, if not all: of the others the tape keeps a `Shaped`.
    `copies` names those of integers, of which it keeps copies: they say which rows a gradient reads and writes, and
    loops fill one array anew for every batch.
    ``by_result(arguments)`` says whether the result in place of `diff`'s only argument gives the same gradient, so that
    the tape need not keep that one.
    """

    name: str
    forward: Callable
    vjp: Callable
    diff: tuple[str, ...]
    result: Callable | None = None
    check: Callable | None = None
    field: str | None = None
    record: type | None = None
    transposes: tuple[str, ...] = ()
    keeps: tuple[str, ...] | None = None
    copies: tuple[str, ...] = ()
    by_result: Callable | None = None

    def __call__(self, **arguments):
        tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
        for name in tensors:
            if name not in self.diff:
                raise TypeError(f"{name}: {self.name} cannot be differentiated in it, only in {', '.join(self.diff)}")
        if not tensors:
            return self.forward(**arguments)[0]
        arguments.update({name: tensor.value for name, tensor in tensors.items()})
        for name in self.copies:
            if devices.is_array(arguments[name]):
                arguments[name] = arguments[name].copy()
        out, saved = self.recorded(arguments)
        if self.by_result is not None and self.by_result(arguments):
            arguments[self.diff[0]] = out
        if self.keeps is not None:
            arguments = {name: a if name in self.keeps else _shaped(a) for name, a in arguments.items()}
        call = _Call(self, arguments, saved, {name: tensor.call or tensor for name, tensor in tensors.items()})
        if self.field is None:
            return Tensor(out, call)
        return out._replace(**{self.field: Tensor(getattr(out, self.field), call)})

    def recorded(self, arguments):
        """(out, saved) of `forward`, where nobody who gets `out` can change what is saved."""
        out, saved = self.forward(**arguments)
        if self.field is not None:
            saved = tuple(a.copy() if any(a is field for field in out) and a is not None else a for a in saved)
        return out, saved

    def gradients(self, arguments, saved, grad, needs):
        """What `vjp` returns for the arguments named in `needs`, in the order of `diff`; an error if one is missing."""
        found = self.vjp(arguments, saved, grad, needs)
        gradients = {}
        for name in self.diff:
            if name in needs:
                gradient, like = found.get(name), arguments[name]
                if gradient is None:
                    raise NotImplementedError(f"{name}: {self.name} has no gradient with respect to it")
                if gradient.shape != like.shape or gradient.dtype != like.dtype:
                    raise AssertionError(
                        f"{name}: {self.name} gave a gradient {gradient.shape} {gradient.dtype} "
                        f"for an array {like.shape} {like.dtype}"
                    )
                gradients[name] = gradient
        return gradients


def _shaped(value):
    """What is known of an array that is not kept."""
    return Shaped(value.shape, value.dtype) if devices.is_array(value) else value


def _reshape(array, shape):
    return array.reshape(*shape), ()


def _reshape_vjp(arguments, saved, grad, needs):
    return {"array": grad.reshape(arguments["array"].shape).copy()}  # who gets it may add to it in place


def _scale(array, factor):
    return devices.as_array(array * factor), ()


def _scale_vjp(arguments, saved, grad, needs):
    return {"array": _scale(grad, arguments["factor"])[0]}


def _addable(other):
    return isinstance(other, (Tensor, np.generic)) or devices.is_array(other)


def _plus(array, other):
    array, other, sizes = devices.as_array(array), devices.as_array(other), {}
    axes = [str(axis) for axis in range(array.ndim)]
    checks.array("the first", array, " ".join(axes), checks.FEATURES, sizes)
    shape = " ".join(axes[-1:] if other.ndim == 1 else axes)  # a row has the last axis alone
    checks.array("the second", other, shape, checks.FEATURES, sizes, like=("the first", array))
    return devices.as_array(array + other), ()


def _plus_vjp(arguments, saved, grad, needs):
    grads = {}
    for name in needs:
        like, given = arguments[name], devices.as_array(grad)
        if given.ndim > len(like.shape):
            rows = devices.contiguous(given).reshape(-1, given.shape[-1])
            grads[name] = devices.backend(rows).sum_rows(rows, config.get_num_threads())
        else:
            grads[name] = given.copy()
    return grads


def _columns(array, columns):
    given = columns if isinstance(columns, tuple) else (columns,)
    some = given[1] if len(given) == 2 and given[0] == slice(None) else None
    if not isinstance(some, slice) or some.step not in (None, 1):
        raise TypeError(f"expected columns as tensor[:, begin:end], got {columns}")
    return devices.contiguous(array[:, some]), ()


def _columns_vjp(arguments, saved, grad, needs):
    out = devices.namespace(grad).zeros(arguments["array"].shape, grad.dtype)
    out[arguments["columns"]] = grad
    return {"array": out}


# What a tensor does by itself; frameworks have their own.
_RESHAPE = Op("reshape", _reshape, _reshape_vjp, diff=("array",), keeps=())
_SCALE = Op("scale", _scale, _scale_vjp, diff=("array",), keeps=())
_PLUS = Op("plus", _plus, _plus_vjp, diff=("array", "other"), keeps=())
_COLUMNS = Op("columns", _columns, _columns_vjp, diff=("array",), keeps=())


def vjp(fn, *primals, has_aux=False):
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


def value_and_grad(fn, argnums=0, has_aux=False):
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


def grad(fn, argnums=0, has_aux=False):
    """A function that returns the gradient of `fn`, or with `has_aux` (gradient, aux); see `value_and_grad`."""
    differentiated = value_and_grad(fn, argnums, has_aux)

    def gradient(*args, **kwargs):
        value, found = differentiated(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def _pull(out, grad):
    """{id: (tensor, gradient)} of every input that `out` was made from."""
    end = out.call or out
    found = {id(end): (end, grad)}
    for call in _made(end):
        _, gradient = found.pop(id(call))
        for name, g in call.op.gradients(call.arguments, call.saved, gradient, frozenset(call.inputs)).items():
            given = call.inputs[name]
            key = id(given)
            found[key] = given, devices.as_array(found[key][1] + g) if key in found else g
    return found


def _made(end):
    """The calls that led to the last one, each after all that used its result; none for an input.

    Not recursive: chains may be long.
    """
    order, seen, stack = [], set(), [(end, False)]
    while stack:
        call, inputs_done = stack.pop()
        if inputs_done:
            order.append(call)
        elif type(call) is _Call and id(call) not in seen:
            seen.add(id(call))
            stack.append((call, True))
            stack += [(given, False) for given in call.inputs.values()]
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
        raise NotImplementedError(f"{name}: second derivatives are not there; expected an array, got {value!r}")
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
