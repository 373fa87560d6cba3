"""Reverse-mode differentiation over a small tape.

Every differentiable operator is one row, an `Op`: its forward, its vector-Jacobian product, and the arguments it can
be differentiated in. Called with arrays, an operator just computes. Called with a `Tensor` for one of those arguments
it also remembers what it did, and `vjp` walks back over that.

    conv = lambda f, w: kpcore.kpconv(points, None, neighbors, f, w, kernel_points, extent)
    out, pullback = kpcore.autodiff.vjp(conv, features, weights)
    grad_features, grad_weights = pullback(grad_out)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kpcore import _array


class Tensor:
    """An array under differentiation: its `value`, and the call that made it (None for an input)."""

    __slots__ = ("call", "value")

    def __init__(self, value, call=None):
        self.value = value
        self.call = call

    def __repr__(self):
        made = f"made by {self.call.op.name}" if self.call else "input"
        return f"Tensor({self.value.shape}, {self.value.dtype}, {made})"


@dataclass(frozen=True, eq=False)
class _Call:
    """One use of an operator: what its vjp needs, and the tensors it was given by argument name."""

    op: Op
    arguments: dict
    saved: tuple
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """A differentiable operator.

    ``forward(**arguments) -> (out, saved)`` checks its arguments and computes; `saved` is a tuple of the arrays that
    the gradient needs besides the arguments, mostly empty: it recomputes the rest.
    ``vjp(arguments, saved, grad, needs)`` returns a dict with the gradient of every argument named in `needs`, a subset
    of `diff`. Where `out` is a named tuple, `field` is the one of its fields that is differentiable; `grad` is that
    field's, and the others stay plain arrays. ``result(**arguments)`` gives (shape, dtype) of `out` and of each array
    saved, from the shapes and dtypes of the arguments alone; None where they depend on values.
    """

    name: str
    forward: Callable
    vjp: Callable
    diff: tuple[str, ...]
    result: Callable | None = None
    field: str | None = None

    def __call__(self, **arguments):
        inputs = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
        for name in inputs:
            if name not in self.diff:
                raise TypeError(f"{name}: {self.name} cannot be differentiated in it, only in {', '.join(self.diff)}")
        arguments.update((name, tensor.value) for name, tensor in inputs.items())
        out, saved = self.forward(**arguments)
        if not inputs:
            return out
        call = _Call(self, arguments, saved, inputs)
        if self.field is None:
            return Tensor(out, call)
        return out._replace(**{self.field: Tensor(getattr(out, self.field), call)})


def vjp(fn, *primals):
    """Evaluate a function and get its vector-Jacobian product.

    Parameters
    ----------
    fn : callable
        Takes one argument per primal and returns what a kpcore operator, or a chain of them, made of these.
    *primals : arrays

    Returns
    -------
    out : array
        ``fn(*primals)``
    pullback : callable
        Takes the gradient of a scalar with respect to `out`, an array like it, and returns those with respect to the
        primals, a tuple of arrays like them; zeros where `fn` does not use a primal. May be called several times.

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
    inputs = tuple(Tensor(p) for p in primals)
    out = fn(*inputs)
    if not isinstance(out, Tensor):
        raise TypeError(
            f"fn: expected a result computed from its arguments by kpcore operators, got {type(out).__name__}"
        )

    def pullback(grad):
        sizes = {str(axis): (size, "the output") for axis, size in enumerate(out.value.shape)}
        grad = _array.array("grad", grad, " ".join(sizes), _array.REAL, sizes, like=("the output", out.value))
        gradients = {id(out): grad}
        for tensor in _consumers_first(out):
            gradient = gradients.get(id(tensor))
            if tensor.call is None or gradient is None:
                continue
            call = tensor.call
            given = call.inputs
            for name, g in call.op.vjp(call.arguments, call.saved, gradient, frozenset(given)).items():
                if name in given:
                    key = id(given[name])
                    gradients[key] = gradients[key] + g if key in gradients else g
        return tuple(gradients[id(t)] if id(t) in gradients else np.zeros_like(t.value) for t in inputs)

    return out.value, pullback


def _consumers_first(out):
    """The tensors `out` was made from, each after all that were made from it. Not recursive: chains may be long."""
    order, seen, stack = [], set(), [(out, False)]
    while stack:
        tensor, inputs_done = stack.pop()
        if inputs_done:
            order.append(tensor)
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            stack.append((tensor, True))
            if tensor.call is not None:
                stack.extend((t, False) for t in tensor.call.inputs.values())
    return reversed(order)
