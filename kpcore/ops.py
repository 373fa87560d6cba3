"""The record of an operator, `Op` (its checks, forward and backward pass), and `OPS`, the table of all operators.

An operator is declared by its public function, which checks the arguments and returns a `Call`: the fields that the
kernels read. The decorator `kpcore.autodiff.operator` turns it into the function that users call and enters it in
`OPS`. The tape, `kpcore.torch` and `kpcore.jax` know operators from that table only.

The annotations of the public function give the kind of each argument: Array[Computed] (if the argument is a `Tensor`,
so is the result), AnyArray, Neighbors, float, int, bool, str, Sequence[int] or int | Sequence[int]; "| None" marks an
optional one, and Array[Computed] | float an array for which a number may be passed. Frameworks trace arrays and the
arrays of a Neighbors; all other arguments are settings, which are constants of a compiled function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np

from kpcore.backends import devices

Out = TypeVar("Out")


class Call(SimpleNamespace, Generic[Out]):
    """A checked call of an operator that returns an `Out`.

    Its attributes are the arguments that have a gradient (the names in `Op.diff`) and the fields of the kernels
    (src/cpu/kernels.h), each under its name there: contiguous arrays of agreeing shapes and dtypes, and numbers.
    """


@dataclass(frozen=True)
class Shaped:
    """The shape and dtype of an array without its values, for `Op.result`.

    There is no ``len()``: while a framework traces, a size may be a symbol, and ``len()`` must return an int.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


Saved = tuple[np.ndarray, ...]
OPS: dict[str, Op] = {}
# Public functions without gradients, which frameworks call but do not trace: the shapes of most results depend on
# values.
EAGER = ("batch_to_row_splits", "build_pyramid", "calibrate_neighbor_limits", "covariance_features",
         "farthest_point_sampling", "kernel_map", "kernel_points", "knn_graph", "knn_search", "lengths", "normals",
         "outlier_mask", "radius_search", "row_splits", "row_splits_to_batch")  # fmt: skip
# Their arguments that are iterables of arrays, of which only one is to be in memory at a time.
ITERABLES = ("clouds",)


@dataclass(frozen=True)
class Op:
    """A differentiable operator.

    name
        Of the public function.
    check(*arguments) -> call
        Makes all checks that need no values of arrays; frameworks call it while they trace.
    diff
        Names of the arguments that it can be differentiated in.
    forward(call) -> (out, saved)
        Computes the result. `saved` is a tuple of the arrays that the gradient needs besides the call; it is empty for
        most operators, which recompute the rest. Without `forward`, `run` runs the kernel.
    kernel, outputs
        The kernel's name, by default that of the operator, and the names of its output fields: the result, then the
        arrays to save.
    vjp(call, saved, grad, needs) -> {argument: gradient}
        The gradients of the arguments named in `needs`, a subset of `diff`.
    field
        If `out` is a named tuple, the name of its differentiable field; `grad` is the gradient of that field. The other
        fields stay plain arrays.
    result(call) -> [(shape, dtype), ...]
        Of `out` and of each array in `saved`. None if they depend on values. While a framework traces, the arrays of
        the call are `Shaped` and not checked; sizes may be symbols, which can be computed with but not compared.
    record
        If `out` is a named tuple of arrays, its type; `result` then begins with one entry for each field.
    transposes
        Names of the arguments whose gradient uses ``neighbors.transpose()``. Frameworks make the transpose before they
        trace; a vjp that calls it for other arguments works too, but computes the transpose in each call.
    keeps
        Names of the fields of the call that the vjp reads; None for all. For the other arrays the tape keeps a `Shaped`
        only, so that their memory can be freed.
    copies
        Names of the integer arguments that the tape copies. They decide which rows a gradient reads and writes, and a
        training loop may overwrite the same array for every batch.
    by_result(call) -> bool
        True if the gradient can be computed from the result instead of the argument, as that of a ReLU. The tape then
        keeps the result in the place of the argument, so that the argument can be freed. For operators with one name in
        `diff`.

    Operators must not read the `distance` of a Neighbors: frameworks do not pass it on.
    """

    name: str
    check: Callable[..., Call[Any]]
    vjp: Callable[[Call[Any], Saved, np.ndarray, AbstractSet[str]], dict[str, np.ndarray]]
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
        """(out, saved) of the forward pass."""
        return self.run(call) if self.forward is None else self.forward(call)

    def run(self, call: Call[Out], **fields: Any) -> tuple[Out, Saved]:
        """(out, saved) of the kernel, its outputs allocated as `result` says; `fields` override those of `call`."""
        results, like = self.result(call), getattr(call, self.diff[0])
        backend, xp = devices.backend(like), devices.namespace(like)
        if len(results) == 1:  # most operators; saves the 0.5 us that zip and dict below take
            out = fields[self.outputs[0]] = xp.empty(*results[0])
            backend.run(self.kernel, call, **fields)
            return out, ()
        outputs = [xp.empty(shape, dtype) for shape, dtype in results]
        backend.run(self.kernel, call, **fields, **dict(zip(self.outputs, outputs, strict=False)))
        return outputs[0], tuple(outputs[1:])

    def compute_and_keep(self, call: Call[Out]) -> tuple[Out, Saved]:
        """(out, saved), with arrays in `saved` copied if they are also fields of `out`, which a user may write to."""
        out, saved = self.compute(call)
        if self.field is not None:
            saved = tuple(a.copy() if any(a is field for field in out) and a is not None else a for a in saved)
        return out, saved

    def gradients(
        self, call: Call[Out], saved: Saved, grad: np.ndarray, needs: AbstractSet[str]
    ) -> dict[str, np.ndarray]:
        """{argument: gradient} from `vjp`, for those in `needs`, in the order of `diff`; an error if one is missing."""
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


def empty_like(call: Call[Out], names: Iterable[str], needs: AbstractSet[str]) -> dict[str, np.ndarray]:
    """{"grad_<name>": an empty array like that argument} for each of `names` in `needs`: output fields of a kernel."""
    return {
        f"grad_{name}": devices.namespace(value := getattr(call, name)).empty(value.shape, value.dtype)
        for name in names
        if name in needs
    }


_SETTINGS = {"float": (float, int, np.floating, np.integer), "int": (int, np.integer), "bool": (bool,), "str": (str,),
             "int[]": (tuple, list), "int or int[]": (int, np.integer, tuple, list)}  # fmt: skip
_NOUNS = {"float": "a number", "int": "an integer", "bool": "True or False", "str": "a string",
          "int[]": "a tuple of integers", "int or int[]": "an integer or a tuple of integers"}  # fmt: skip
_KINDS = {name: name for name in ("Neighbors", "float", "int", "bool", "str")}
_ARRAY_OR_NUMBER = "Array[Computed] | float"
_KINDS |= {"Array[Computed]": "Array", _ARRAY_OR_NUMBER: "Array", "AnyArray": "Array", "Sequence[int]": "int[]",
           "int | Sequence[int]": "int or int[]"}  # fmt: skip


def kinds(public: Callable[..., object]) -> dict[str, tuple[str, bool]]:
    """{argument: (kind, whether it may be None)} of a public function, from its annotations."""
    arguments = {}
    for name, parameter in inspect.signature(public).parameters.items():
        annotation = str(parameter.annotation).removesuffix(" | None")
        if annotation not in _KINDS:
            raise TypeError(
                f"{name}: expected an annotation in {public.__name__} that is {', '.join(_KINDS)}, "
                f"with or without | None, got {parameter.annotation}"
            )
        arguments[name] = _KINDS[annotation], annotation != parameter.annotation
    return arguments


def arrays_or_numbers(public: Callable[..., object]) -> tuple[str, ...]:
    """Names of the array arguments that may be a number too, which stands for an array () with the points' dtype."""
    parameters = inspect.signature(public).parameters.items()
    return tuple(name for name, parameter in parameters if parameter.annotation == _ARRAY_OR_NUMBER)


def binder(public: Callable[..., object]) -> Callable[[tuple[object, ...], Mapping[str, object]], dict[str, Any]]:
    """A function (args, kwargs) -> {argument: value} that binds the arguments of a call and fills in the defaults.

    It takes a seventh of the time of `inspect.Signature.bind`, which would be a third of the overhead of a call.
    """
    signature = inspect.signature(public)
    parameters = dict(signature.parameters)  # torch 2.6 cannot compile the mapping that it is
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    positional = tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)

    def bind(args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Any]:
        by_position = dict(zip(positional, args))  # noqa: B905 - too many args are noticed below
        bound = {**defaults, **by_position, **kwargs}
        wrong = len(args) > len(positional) or len(bound) != len(parameters)
        for name in kwargs:
            wrong = wrong or name in by_position or name not in parameters
        if wrong:
            signature.bind(*args, **kwargs)  # raises the TypeError that Python raises for such a call
        return bound

    return bind


def setting(name: str, kind: str, optional: bool, value: object) -> float | bool | str | tuple[int, ...] | None:
    """The value of a setting as a plain float, int, bool, str, tuple of int or None; TypeError if it is not of that
    kind."""
    if value is None and optional:
        return None
    if not isinstance(value, _SETTINGS[kind]):
        raise TypeError(f"{name}: expected {_NOUNS[kind]}{' or None' * optional}, got {type(value).__name__}")
    if kind.endswith("int[]"):
        if not isinstance(value, (tuple, list)):
            value = (value,)
        return tuple([setting(f"{name}[{at}]", "int", False, number) for at, number in enumerate(value)])
    return float(value) if kind == "float" else int(value) if kind == "int" else value
