"""What an operator is: its checks, its forward and backward pass, and the table in which every adapter finds them.

An operator is declared by its public function, which checks the arguments and returns a `Call`: what the kernels get.
`kpcore.autodiff.operator` makes of it the function that users call, and enters it in `OPS`. The tape, `kpcore.torch`
and `kpcore.jax` go by that table alone. The annotations of the public function say what kind of thing each argument is:
Array[Computed] (the result is a Tensor if it is one), AnyArray, Neighbors, float, int, bool or str, and whether it may
be None ("AnyArray | None"). Arrays and the arrays of a Neighbors are traced, the rest are settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np

from kpcore.backends import devices

Out = TypeVar("Out")


class Call(SimpleNamespace, Generic[Out]):
    """A checked call of an operator, whose result is an `Out`.

    Its attributes are the arguments that the operator is differentiated in, by their names, and the fields of its
    kernels (src/cpu/kernels.h), by theirs: contiguous arrays of agreeing shapes and dtypes, and numbers.
    """


@dataclass(frozen=True)
class Shaped:
    """What `Op.result` sees of an array. It has no length: frameworks trace with sizes that are not known yet."""

    shape: tuple[int, ...]
    dtype: np.dtype


Saved = tuple[np.ndarray, ...]
OPS: dict[str, Op] = {}
# Public functions without gradients, which no framework traces: their sizes depend on values.
EAGER = ("build_pyramid", "farthest_point_sampling", "kernel_points", "knn_search", "radius_search")


@dataclass(frozen=True)
class Op:
    """A differentiable operator.

    ``check(*arguments) -> Call`` makes all checks that look at no value of an array: frameworks make them while they
    trace. ``forward(call) -> (out, saved)`` computes; `saved` is a tuple of the arrays that the gradient needs besides
    the call, mostly empty: it recomputes the rest. Without a `forward` the `kernel` is run, by default that of the
    operator's name, and `outputs` are the names of its fields for what comes out. ``vjp(call, saved, grad, needs)``
    returns a dict with the gradient of every argument named in `needs`, a subset of `diff`. Where `out` is a named
    tuple, `field` is the one of its fields that is differentiable; `grad` is that field's, and the others stay plain
    arrays. ``result(call)`` gives (shape, dtype) of `out` and of each array saved; None where they depend on values.

    For frameworks that trace: `result` gets a call that was not checked, whose arrays are `Shaped`, with sizes that may
    be symbols, to be computed with but not compared; a Neighbors has arrays of these. Where `out` is a named tuple of
    arrays, `record` is its type and `result` begins with one entry for each field. `transposes` names the arguments
    whose gradient walks ``neighbors.transpose()``, so that it is made before they trace; a vjp may call it anyway, but
    would then make it each time. Of a Neighbors an operator sees everything but `distance`.

    `keeps` names what the vjp looks at of the call, if not all: of other arrays the tape keeps a `Shaped`. `copies`
    names the arguments of integers of which the tape keeps copies: they say which rows a gradient reads and writes, and
    loops fill one array anew for every batch. ``by_result(call)`` says whether the result in place of `diff`'s only
    argument gives the same gradient, so that the tape need not keep that one.
    """

    name: str
    check: Callable[..., Call[Any]]
    vjp: Callable[[Call[Any], Saved, np.ndarray, Collection[str]], dict[str, np.ndarray]]
    diff: tuple[str, ...]
    result: Callable[[Call[Any]], Sequence[tuple[tuple[int, ...], np.dtype]]] | None = None
    forward: Callable[[Call[Any]], tuple[Any, Saved]] | None = None
    kernel: str | None = None
    outputs: tuple[str, ...] = ("out",)
    field: str | None = None
    record: type[tuple[object, ...]] | None = None
    transposes: tuple[str, ...] = ()
    keeps: tuple[str, ...] | None = None
    copies: tuple[str, ...] = ()
    by_result: Callable[[Call[Any]], bool] | None = None

    def compute(self, call: Call[Out]) -> tuple[Out, Saved]:
        """(out, saved)"""
        return self.run(call) if self.forward is None else self.forward(call)

    def run(self, call: Call[Out], **fields: Any) -> tuple[Out, Saved]:
        """(out, saved) of the kernel: outputs are allocated as `result` says, `fields` go before those of `call`."""
        results, like = self.result(call), getattr(call, self.diff[0])
        backend, xp = devices.backend(like), devices.namespace(like)
        if len(results) == 1:  # as mostly, when names and outputs need not be joined: 0.5 us less
            out = fields[self.outputs[0]] = xp.empty(*results[0])
            backend.run(self.kernel, call, **fields)
            return out, ()
        outputs = [xp.empty(shape, dtype) for shape, dtype in results]
        backend.run(self.kernel, call, **fields, **dict(zip(self.outputs, outputs, strict=False)))
        return outputs[0], tuple(outputs[1:])

    def compute_and_keep(self, call: Call[Out]) -> tuple[Out, Saved]:
        """(out, saved), where nobody who gets `out` can change what is saved."""
        out, saved = self.compute(call)
        if self.field is not None:
            saved = tuple(a.copy() if any(a is field for field in out) and a is not None else a for a in saved)
        return out, saved

    def gradients(
        self, call: Call[Out], saved: Saved, grad: np.ndarray, needs: Collection[str]
    ) -> dict[str, np.ndarray]:
        """What `vjp` returns for the arguments named in `needs`, in the order of `diff`; an error if one is missing."""
        computed = self.vjp(call, saved, grad, needs)
        gradients = {}
        for name in self.diff:
            if name in needs:
                gradient, like = computed.get(name), getattr(call, name)
                if gradient is None:
                    raise NotImplementedError(f"{name}: {self.name} has no gradient with respect to it")
                if gradient.shape != like.shape or gradient.dtype != like.dtype:
                    raise AssertionError(
                        f"{name}: {self.name} gave a gradient {gradient.shape} {gradient.dtype} "
                        f"for an array {like.shape} {like.dtype}"
                    )
                gradients[name] = gradient
        return gradients


def empty_like(call: Call[Out], names: Iterable[str], needs: Collection[str]) -> dict[str, np.ndarray]:
    """{"grad_" and the name: an array for the gradient} of those that are needed: fields of a kernel."""
    return {
        f"grad_{name}": devices.namespace(value := getattr(call, name)).empty(value.shape, value.dtype)
        for name in names
        if name in needs
    }


_SETTINGS = {"float": (float, int, np.floating, np.integer), "int": (int, np.integer), "bool": (bool,), "str": (str,)}
_NOUNS = {"float": "a number", "int": "an integer", "bool": "True or False", "str": "a string"}
_KINDS = {name: name for name in ("Neighbors", *_SETTINGS)} | {"Array[Computed]": "Array", "AnyArray": "Array"}


def kinds(public: Callable[..., object]) -> dict[str, tuple[str, bool]]:
    """{name: (kind, whether it may be None)} of the arguments of a public function, from its annotations."""
    arguments = {}
    for name, parameter in inspect.signature(public).parameters.items():
        annotation, _, none = str(parameter.annotation).partition(" | ")
        if annotation not in _KINDS or none not in ("", "None"):
            raise TypeError(
                f"{name}: expected an annotation in {public.__name__} that is {', '.join(_KINDS)}, "
                f"with or without | None, got {parameter.annotation}"
            )
        arguments[name] = _KINDS[annotation], none == "None"
    return arguments


def binder(public: Callable[..., object]) -> Callable[[tuple[object, ...], Mapping[str, object]], dict[str, Any]]:
    """A function that puts the arguments of a call, args and kwargs, in a dict by name, defaults filled in.

    A seventh of the time of `inspect.Signature.bind`, which would be a third of what a call costs.
    """
    signature = inspect.signature(public)
    parameters = dict(signature.parameters)  # torch 2.6 cannot compile the mapping that it is
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    positional = tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)

    def bind(args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Any]:
        by_position = dict(zip(positional, args))  # noqa: B905 - more of them are noticed below
        bound = {**defaults, **by_position, **kwargs}
        wrong = len(args) > len(positional) or len(bound) != len(parameters)
        for name in kwargs:
            wrong = wrong or name in by_position or name not in parameters
        if wrong:
            signature.bind(*args, **kwargs)  # raises what Python does for such a call
        return bound

    return bind


def setting(name: str, kind: str, optional: bool, value: object) -> float | bool | str | None:
    """An argument that is no array, as a plain float, int, bool, str or None."""
    if value is None and optional:
        return None
    if not isinstance(value, _SETTINGS[kind]):
        raise TypeError(f"{name}: expected {_NOUNS[kind]}{' or None' * optional}, got {type(value).__name__}")
    return float(value) if kind == "float" else int(value) if kind == "int" else value
