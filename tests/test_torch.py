"""kpcore.torch: every operator under autograd, tracing, compilation and autocast; the other functions eagerly."""

import copy
import pickle
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import clouds
import examples
import numpy as np
import ops
import pytest
from reference import assert_same_bits

import kpcore as kp

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402
from torch.autograd.gradcheck import GradcheckError, gradcheck  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map, tree_structure  # noqa: E402

import kpcore.torch as kpt  # noqa: E402
from kpcore.ops import Call, Op  # noqa: E402
from kpcore.torch.ops import define  # noqa: E402

TIGHT = {"rtol": 1e-5, "atol": 1e-7}  # with gradcheck's defaults a relative error of 1e-3 passes


def tensors(arguments, names=()):
    """The arguments as tensors; those in `names` require a gradient."""
    return {
        name: torch.from_numpy(a.copy()).requires_grad_(name in names) if isinstance(a, np.ndarray) else a
        for name, a in arguments.items()
    }


def call(op, arguments):
    return ops.output(op, getattr(kpt, op.name)(**arguments))


def gradients(op, arguments, names, grad):
    out = call(op, arguments)
    return torch.autograd.grad(out, [arguments[name] for name in names], torch.from_numpy(grad))


# ---- every operator


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_by_finite_differences(variant):
    op, arguments = ops.call(variant, num=9)
    names = ops.diff(op, arguments)
    given = tensors(arguments, names)

    def fn(*values):
        return call(op, {**given, **dict(zip(names, values, strict=True))})

    assert gradcheck(fn, [given[name] for name in names], **TIGHT)


@pytest.mark.parametrize("num", [24, 1, 0])
@pytest.mark.parametrize("dtypes", [(np.float32, np.float64), (np.float64, np.float32)])
@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_the_bits_of_the_tape(variant, dtypes, num):
    op, arguments = ops.call(variant, num, *dtypes)
    names = ops.diff(op, arguments)
    out, pullback = ops.vjp(op, arguments, names)
    given, grad = tensors(arguments, names), ops.covector(out)
    assert_same_bits(call(op, given).detach().numpy(), out)
    for got, expected in zip(gradients(op, given, names, grad), pullback(grad), strict=True):
        assert_same_bits(got.numpy(), expected)


LAYOUTS = {
    "transposed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "every second": lambda t: t.repeat_interleave(2, 0)[::2],
    "within a larger one": lambda t: torch.nn.functional.pad(t, (1, 1))[..., 1:-1],
    "expanded": lambda t: t[:1].expand(t.shape),
    "a negative view": lambda t: torch.complex(t, -t).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_any_layout(variant, layout):
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    given = {name: LAYOUTS[layout](t) if name in names else t for name, t in tensors(arguments).items()}
    arguments |= {name: given[name].resolve_neg().contiguous().numpy() for name in names}
    out, pullback = ops.vjp(op, arguments, names)
    given |= {name: given[name].requires_grad_() for name in names}
    result = call(op, given)
    assert_same_bits(result.detach().numpy(), out)
    grad = LAYOUTS[layout](torch.from_numpy(ops.covector(out))) if out.ndim else torch.tensor(2.0, dtype=result.dtype)
    got = torch.autograd.grad(result, [given[name] for name in names], grad)
    for g, expected in zip(got, pullback(grad.resolve_neg().contiguous().numpy()), strict=True):
        assert_same_bits(g.numpy(), expected)


@pytest.mark.parametrize("variant", ops.TRACED)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck of torch 2.14
def test_opcheck(variant):
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    torch_op = getattr(torch.ops.kpcore, op.name).default
    torch.library.opcheck(torch_op, flat(op, tensors(arguments, names)))
    for transposed in (False, True):
        vjp_arguments = flat(op, tensors(arguments, names if transposed else ()))
        *_, saved, grad, needs = vjp_call(op, arguments)
        with torch.no_grad():
            detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in vjp_arguments]
        # It is compiled by the test below.
        torch.library.opcheck(
            getattr(torch.ops.kpcore, f"{op.name}_vjp").default, (*detached, saved, grad, needs),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def flat(op, arguments):
    """The arguments of the torch operator, as torch.library.opcheck takes them."""
    return tuple(kpt.ops._Arguments(op, getattr(kp, op.name)).flatten(arguments))


def vjp_call(op, arguments):
    out, saved = examples.computed(op, arguments)
    grad = torch.from_numpy(ops.covector(ops.output(op, out)))
    return [torch.from_numpy(a) for a in saved], grad, [arguments[name] is not None for name in op.diff]


@pytest.mark.parametrize("variant", ops.TRACED)
def test_compiled_in_one_graph(variant):
    torch._dynamo.reset()  # torch limits how often a function is compiled
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    compiled = torch.compile(lambda arguments: call(op, arguments), fullgraph=True, backend="aot_eager")
    for num in (24, 24, 31, 40):  # the second shape is compiled for any number of points
        op, arguments = ops.call(variant, num)
        out, pullback = ops.vjp(op, arguments, names)
        given, grad = tensors(arguments, names), ops.covector(out)
        result = compiled(given)
        assert_same_bits(result.detach().numpy(), out)
        got = torch.autograd.grad(result, [given[name] for name in names], torch.from_numpy(grad))
        for g, expected in zip(got, pullback(grad), strict=True):
            assert_same_bits(g.numpy(), expected)


@pytest.mark.parametrize("variant", ops.TRACED)
def test_autocast_computes_in_float32(variant):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    names = ops.diff(op, arguments)
    given = tensors(arguments)
    given |= {name: given[name].to(torch.bfloat16) for name in names}
    with torch.autocast("cpu", torch.bfloat16):
        out = call(op, given)
    expected = call(op, given | {name: given[name].to(torch.float32) for name in names})
    assert out.dtype == torch.float32
    assert_same_bits(out.numpy(), expected.numpy())


@pytest.mark.parametrize("variant", ops.TRACED)
def test_only_what_is_needed_is_computed(variant):
    op, arguments = ops.call(variant)
    asked = []
    made = vjp_counting(op, asked)
    for name in ops.diff(op, arguments):
        asked.clear()
        given = tensors(arguments, [name])
        out = ops.output(op, made(**given))
        torch.autograd.grad(out, given[name], torch.ones_like(out))
        assert asked == [{name}]
    with torch.no_grad():
        assert not ops.output(op, made(**given)).requires_grad


def vjp_counting(op, asked):
    """The torch operator of a copy of the op that records which gradients are needed."""
    vjp_counting.made = getattr(vjp_counting, "made", 0) + 1
    counting = replace(
        op,
        name=f"{op.name}_counting{vjp_counting.made}",
        vjp=lambda a, s, g, needs: asked.append(set(needs)) or op.vjp(a, s, g, needs),
    )
    return define(counting, getattr(kp, op.name))


@pytest.mark.parametrize("variant", ops.TRACED)
def test_second_derivatives_are_an_error(variant):
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    given = tensors(arguments, names)
    first = torch.autograd.grad(call(op, given).sum(), [given[name] for name in names], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op.name}: second derivatives"):
        sum(g.sum() for g in first).backward()


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_gradients_by_torch_func(variant):
    """torch.func.grad_and_value and vjp, also nested, and under torch.autograd."""
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    given = tensors(arguments)
    covector = torch.from_numpy(ops.covector(call(op, given).numpy()))
    expected = gradients(op, tensors(arguments, names), names, covector.numpy())

    def fn(values):
        return call(op, {**given, **values})

    def loss(values):
        return (fn(values) * covector).sum()

    def same(found):
        for name, gradient in zip(names, expected, strict=True):
            assert_same_bits(found[name].detach().numpy(), gradient.numpy())

    primals = {name: given[name] for name in names}
    found, value = torch.func.grad_and_value(loss)(primals)
    same(found)
    assert torch.equal(value, loss(primals))
    out, pullback = torch.func.vjp(fn, primals)
    assert torch.equal(out, call(op, given))
    same(pullback(covector)[0])
    first, *rest = names
    outer = {name: given[name].clone().requires_grad_() for name in rest}  # of an outer level, or of torch.autograd

    def inner(values):
        return torch.func.grad_and_value(lambda t: loss({first: t, **values}))(primals[first])[1]

    if rest:
        same({first: expected[0], **torch.func.grad(inner)({name: primals[name] for name in rest})})
        inner(outer).backward()
        same({first: expected[0], **{name: tensor.grad for name, tensor in outer.items()}})


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by jvp itself
@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_transforms_that_are_not_supported(variant):
    op, arguments = ops.call(variant)
    name = ops.diff(op, arguments)[0]
    given = tensors(arguments)

    def fn(value):
        return call(op, {**given, name: value})

    batch, leaf = torch.stack([given[name]] * 2), given[name].clone().requires_grad_()
    out = fn(leaf)
    with pytest.raises(NotImplementedError, match=rf"{op.name}: vmap .* kpcore\.torch"):
        torch.func.vmap(fn)(batch)
    with pytest.raises(NotImplementedError, match=rf"{op.name}: vmap .* kpcore\.torch"):
        torch.func.vmap(torch.func.grad(lambda value: fn(value).sum()))(batch)
    with pytest.raises(NotImplementedError, match=rf"{op.name}: forward-mode derivatives .* kpcore\.torch"):
        torch.func.jvp(fn, (given[name],), (given[name],))
    with pytest.raises(NotImplementedError, match=rf"{op.name}: second derivatives .* kpcore\.torch"):
        torch.func.grad(lambda value: torch.func.grad(lambda v: fn(v).square().sum())(value).sum())(given[name])
    with pytest.raises(NotImplementedError, match=rf"gradient of {op.name}: .* is_grads_batched"):
        torch.autograd.grad(out, leaf, torch.stack([torch.ones_like(out)] * 2), is_grads_batched=True)


def test_a_torch_operator_within_torch_func_says_what_to_call():
    weights = torch.ones(2, 3)
    with pytest.raises(
        NotImplementedError, match=r"linear: expected a call of kpcore\.torch\.linear, .* got one of torch"
    ):
        torch.func.grad(lambda x: torch.ops.kpcore.linear(x, weights, None)[0].sum())(torch.ones(4, 2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by make_dual itself
@pytest.mark.parametrize("variant", ops.TRACED)
def test_forward_mode_is_an_error(variant):
    op, arguments = ops.call(variant)
    name = ops.diff(op, arguments)[0]
    given = tensors(arguments)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{op.name}: forward-mode derivatives"):
        call(op, given | {name: forward_ad.make_dual(given[name], torch.ones_like(given[name]))})


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_an_argument_without_gradient_says_so(variant):
    op, arguments = ops.call(variant)
    for name, array in arguments.items():
        if isinstance(array, np.ndarray) and array.dtype.kind == "f" and name not in op.diff:
            with pytest.raises(TypeError, match=f"^{name}: {op.name} cannot be differentiated"):
                call(op, tensors(arguments, [name]))


@pytest.mark.parametrize("variant", ops.TRACED)
def test_wrong_arguments_are_named(variant):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    for name, array in arguments.items():
        if not isinstance(array, np.ndarray):
            continue
        for wrong, error in (
            (array, TypeError),
            (array.tolist(), TypeError),
            (torch.from_numpy(array).to("meta"), TypeError),
            (torch.from_numpy(array).to(torch.complex64), TypeError),
            *([(torch.from_numpy(array)[None], ValueError)] if ops.has_one_shape(op, name) else []),
        ):
            with pytest.raises(error, match=rf"^{name}\b"):
                call(op, tensors(arguments) | {name: wrong})
    for wrong in ({"surplus": 1}, dict.fromkeys(list(arguments)[:1])):
        with pytest.raises(TypeError):
            call(op, tensors(arguments) | wrong)


# ---- how operators are defined and called


def scaled(x: "Array[Computed]", factor: "float" = 2.0) -> "Call[Computed]":  # noqa: F821
    return Call(x=x, factor=factor)


COPY = Op(
    "scaled",
    scaled,
    lambda call, saved, grad, needs: {"x": grad * call.factor if call.factor != 1 else grad},
    diff=("x",),
    result=lambda call: [(call.x.shape, call.x.dtype)],
    forward=lambda call: (np.multiply(call.x, call.factor) if call.factor != 1 else call.x, ()),
)


@pytest.fixture(scope="module")
def scaled_torch():
    return define(COPY, scaled)


@pytest.fixture(scope="module")
def weighted_torch():
    return define(ops.WEIGHTED, ops.weighted)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_weights", [True, False])
def test_a_record_and_every_kind_of_argument(weighted_torch, with_weights, compiled):
    def fn(features, weights, neighbors):
        return weighted_torch(features, weights, neighbors, 3, power=2, negate=True, name="text", more=[2, 3])

    if compiled:
        fn = torch.compile(fn, fullgraph=True, backend="aot_eager")
    neighbors = kp.Neighbors.from_padded(np.array([[0, 1], [1, 2]]), 2)
    for num in (2, 5, 7):
        features = torch.randn(num, 3, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(3, dtype=torch.float64, requires_grad=True) if with_weights else None
        out = fn(features, weights, neighbors if num == 5 else None)
        assert type(out) is ops.Weighted and not out.sums.requires_grad
        assert torch.equal(out.sums, torch.arange(num, dtype=torch.int32))
        assert torch.allclose(out.features, -54 * features * (1 if weights is None else weights))
        out.features.square().sum().backward()
        expected = 2 * 54**2 * features * (1 if weights is None else weights**2)
        assert torch.allclose(features.grad, expected)
        if with_weights:
            assert torch.allclose(weights.grad, 2 * 54**2 * (weights * features**2).sum(0))
    with pytest.raises(TypeError, match="power: expected an integer"):
        weighted_torch(features, power=1.5)
    with pytest.raises(TypeError, match="negate: expected True or False"):
        weighted_torch(features, negate=1)
    with pytest.raises(TypeError, match="more: expected a tuple of integers or None, got int"):
        weighted_torch(features, more=2)
    with pytest.raises(TypeError, match=r"more\[1\]: expected an integer, got float"):
        weighted_torch(features, more=(2, 3.0))


def test_memory_is_shared_in_both_directions(monkeypatch):
    seen = {}

    def forward(call):
        seen["x"], seen["out"] = call.x, call.x * call.factor
        return seen["out"], ()

    def vjp(call, saved, grad, needs):
        seen["grad"], seen["grad_x"] = grad, grad * call.factor
        return {"x": seen["grad_x"]}

    made = define(replace(COPY, name="seeing", forward=forward, vjp=vjp), scaled)
    x = torch.randn(5, 3, requires_grad=True)
    out = made(x)
    assert seen["x"].ctypes.data == x.data_ptr() and seen["out"].ctypes.data == out.data_ptr()
    grad = torch.randn(5, 3)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert seen["grad"].ctypes.data == grad.data_ptr() and seen["grad_x"].ctypes.data == grad_x.data_ptr()


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_memory_stays_resizable(variant):
    """FSDP frees the memory of parameters between uses, which torch does not allow after tensor.numpy()."""
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    given = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in tensors(arguments).items()}
    grad = torch.ones_like(call(op, given))
    inputs = [given[name].requires_grad_() for name in names]
    torch.autograd.grad(call(op, given), inputs, grad)
    for tensor in (grad, *(t for t in given.values() if isinstance(t, torch.Tensor))):
        tensor.detach().resize_(2 * tensor.numel())


def test_memory_that_was_freed():
    x = torch.rand(5, 3)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^features: expected a tensor with memory, got \(5, 3\) in a storage of no"):
        kpt.relu(x)
    assert kpt.relu(torch.empty(0, 3)).shape == (0, 3)


def test_memory_outlives_its_tensor():
    import gc

    array = kpt.ops.to_array("x", torch.full((1000, 1000), 7.0))  # so large that freeing it unmaps its memory
    gc.collect()
    others = [torch.zeros(1000, 1000) for _ in range(5)]
    assert (array == 7).all() and not others[0].any()


def test_lists_share_memory():
    points = torch.rand(50, 3)
    neighbors = kpt.radius_search(points, None, 0.3)
    index, row_splits, *_ = kpt.ops.neighbors_parts(neighbors, False)
    assert index.data_ptr() == neighbors.index.ctypes.data
    assert row_splits.data_ptr() == neighbors.row_splits.ctypes.data


def test_an_operator_that_returns_its_argument_is_copied(scaled_torch):
    x = torch.randn(5, 3, requires_grad=True)
    out = scaled_torch(x, 1.0)
    assert out.data_ptr() != x.data_ptr()
    grad = torch.randn(5, 3)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert grad_x.data_ptr() != grad.data_ptr()
    assert torch.equal(out, x) and torch.equal(grad_x, grad)


def test_a_wrong_gradient_is_caught():
    wrong = define(replace(COPY, name="wrong", vjp=lambda call, s, g, n: {"x": g * call.factor * 1.001}), scaled)
    with pytest.raises(GradcheckError):
        gradcheck(wrong, [torch.randn(5, 3, dtype=torch.float64, requires_grad=True)], **TIGHT)


def test_a_missing_gradient_names_operator_and_argument():
    missing = define(replace(COPY, name="missing", vjp=lambda *_: {}), scaled)
    with pytest.raises(NotImplementedError, match="x: missing"):
        missing(torch.ones(3, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda x: x.to_sparse(),
            r"a dense tensor, got one of layout torch\.sparse_coo; convert it with X\.to_dense\(\)",
        ),
        (lambda x: x.to_sparse_csr(), r"a dense tensor, got one of layout torch\.sparse_csr; .* X\.to_dense\(\)"),
        (lambda x: x.to_mkldnn(), r"a dense tensor, got one of layout torch\._mkldnn; convert it with X\.to_dense\(\)"),
        (lambda x: torch.nested.nested_tensor([x, x]), r"a tensor of rows, got a nested one; .* torch\.cat\(X\.unbind"),
        (
            lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
            r"a tensor of rows, got a nested one; .* row_splits",
        ),
        (
            lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
            r"float32 or float64, got quint8; convert it with X\.dequantize\(\)",
        ),
        (lambda x: x.to("meta"), r"a tensor on the CPU or a CUDA GPU, got one on meta; move it with X\.cpu\(\)"),
        (lambda x: torch.complex(x, x).conj(), r"float32 or float64, got complex64$"),
        (lambda x: x.to(torch.float16), r"float32 or float64, got float16; convert it with X\.to\(torch\.float32\)"),
        (lambda x: x.to(torch.bfloat16), r"float32 or float64, got bfloat16; convert it with X\.to\(torch\.float32\)"),
        (lambda x: x.to(torch.int16), r"float32 or float64, got int16; convert it with X\.to\(torch\.float32\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's of what it deprecates itself
def test_unsupported_tensors_are_named(make, error):
    x = make(torch.ones(4, 3))
    with pytest.raises(TypeError, match=f"^features: expected {error.replace('X', 'features')}"):
        kpt.linear(x, torch.ones(3, 2))
    with pytest.raises(TypeError, match=f"^points: expected {error.replace('X', 'points')}"):
        kpt.radius_search(x, None, 1.0)


def test_advice_is_about_tensors():
    x = torch.ones(4, 3)
    for call_of, error in (
        (lambda: kpt.linear(x, x.T.double()), r"; convert features with features\.to\(weights\.dtype\)$"),
        (lambda: kpt.softmax_cross_entropy(x, x[:, 0]), "labels: expected uint8 or int32 or int64, got float32$"),
        (
            lambda: kpt.softmax_cross_entropy(x, torch.zeros(4, dtype=torch.uint16)),
            r"got uint16; .* labels\.to\(torch\.int32\)$",
        ),
        (
            lambda: kpt.gather(x, torch.ones(2, dtype=torch.int16)),
            r"index: expected int32 or int64, .* index\.to\(torch",
        ),
        (lambda: kpt.grid_subsample(x.int(), 1.0), r"points\.to\(torch\.float64\)"),
        (lambda: kpt.KDTree(x.int()), r"points\.to\(torch\.float64\)"),
        (lambda: kpt.knn_search([[0.0, 0.0]], None, 1), r"points: expected a torch tensor, got list; .*torch\.tensor"),
    ):
        with pytest.raises(TypeError, match=error):
            call_of()


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("concatenate", [(4,), (9, 4)], r"first: expected \(N, C1\), got \(4,\)"),
        ("linear", [(9,), (4, 3)], r"features: expected \(N, .*\), got \(9,\)"),
        ("gather", [(9, 4), ()], r"index: expected \(M,\), got \(\)"),
        ("batch_norm", [(9,), *[(9,)] * 4], r"features: expected \(N, .*\), got \(9,\)"),
        ("segment_reduce", [(9,), None], r"features: expected \(N, C\), got \(9,\)"),
    ],
)
def test_too_few_axes_under_the_compiler(name, arguments, error):
    given = [None if shape is None else torch.zeros(shape) for shape in arguments]
    if name == "gather":
        given[1] = given[1].int()
    function = getattr(kpt, name)
    with pytest.raises(ValueError, match=f"^{error}"):
        function(*given)
    with pytest.raises(Exception, match=error):
        torch.compile(function, fullgraph=True, backend="eager")(*given)


def test_a_release_of_torch_with_other_internals_is_named(python):
    """The ImportError names the attribute of torch that is missing."""
    done = python(
        "import ast, pathlib, torch, kpcore.torch.internals as internals\n"
        "for node in ast.parse(pathlib.Path(internals.__file__).read_text()).body:\n"
        "    if isinstance(node, ast.Try):\n"
        "        names = [ast.unparse(n.value) for n in node.body if isinstance(n.value, ast.Attribute)]\n"
        "import sys\n"
        "for name in names:\n"
        "    owner, _, last = name.rpartition('.')\n"
        "    owner = eval(owner); kept = getattr(owner, last); delattr(owner, last)\n"
        "    sys.modules.pop('kpcore.torch.internals', None)\n"
        "    try: import kpcore.torch.internals\n"
        "    except ImportError as error: print(last in str(error), error)\n"
        "    setattr(owner, last, kept)\n"
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 14, done.stderr
    assert all(line.startswith("True kpcore.torch: expected torch 2.6 to 2.14, got ") for line in lines)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_needs_dispatcher():
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from kpcore.torch import internals

    assert not internals.needs_dispatcher() and not internals.transforming()
    for context in (
        torch.autocast("cpu"), TorchDispatchMode(), TorchFunctionMode(), torch.profiler.profile(),
        forward_ad.dual_level(), torch.device("cpu")
    ):  # fmt: skip
        with context:
            assert internals.needs_dispatcher(), context
        assert not internals.needs_dispatcher(), context
    seen = []
    torch.func.grad(lambda x: seen.append((internals.needs_dispatcher(), internals.transforming())) or x.sum())(
        torch.ones(2)
    )
    torch.jit.trace(
        lambda x: seen.append((internals.needs_dispatcher(), internals.transforming())) or x + 1, torch.ones(2)
    )
    assert seen[:2] == [(True, True), (True, False)]
    assert not internals.needs_dispatcher() and not internals.transforming()


def test_an_unknown_annotation_is_an_error():
    def unknown(x: "complex"):
        pass

    with pytest.raises(TypeError, match="x: expected an annotation"):
        define(replace(COPY, name="unknown"), unknown)


def test_modes_and_profilers_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    _, arguments = ops.call("kpconv-0")
    given = tensors(arguments, ["weights"])
    with Mode():
        kpt.kpconv(**given).sum().backward()
    assert {"kpcore.kpconv.default", "kpcore.kpconv_vjp.default"} <= set(seen)
    with torch.profiler.profile() as profile:
        kpt.kpconv(**given).sum().backward()
    assert {"kpcore::kpconv", "kpcore::kpconv_vjp"} <= {event.name for event in profile.events()}
    out = kpt.kpconv(**given)
    with torch.profiler.profile() as profile:
        out.sum().backward()
    assert "kpcore::kpconv_vjp" in {event.name for event in profile.events()}


def test_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, arguments = ops.call("kpconv-0")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in tensors(arguments).items()}
        out = kpt.kpconv(**given)
    assert type(out) is type(given["points"]) and out.shape == (16, 2)


def test_signature_and_docstring_are_those_of_the_function():
    import inspect

    assert inspect.signature(kpt.kpconv) == inspect.signature(kp.kpconv)
    assert kpt.kpconv.__doc__ == kp.kpconv.__doc__ and kpt.kpconv.__name__ == "kpconv"


@pytest.mark.parametrize("name", ["features", "points"])
def test_changing_an_argument_in_place_before_backward_is_noticed(name):
    _, arguments = ops.call("kpconv-0")
    given = tensors(arguments, ["features", "weights"])
    changed = given[name] * 1
    out = kpt.kpconv(**{**given, name: changed})
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


@pytest.mark.parametrize("variant", ["kpconv-0", "neighbor_reduce-1", "batch_norm-0"])
def test_a_second_backward_needs_retain_graph(variant):
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    given = tensors(arguments, names)
    out = call(op, given)
    inputs, grad = [given[name] for name in names], torch.ones_like(out)
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    for again, gradient in zip(torch.autograd.grad(out, inputs, grad), first, strict=True):
        assert_same_bits(again.numpy(), gradient.numpy())
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out, inputs, grad)


def test_backward_frees_lists_while_the_result_is_kept():
    import gc
    import weakref

    op, arguments = ops.call("kpconv-0")
    given = tensors(arguments, ["features", "weights"])
    index, out = weakref.ref(given["neighbors"].stored_index), call(op, given)
    del arguments, given["neighbors"]
    gc.collect()
    assert index() is not None
    out.sum().backward()
    gc.collect()
    assert index() is None and given["features"].grad is not None


def test_hooks_of_saved_tensors_see_and_may_replace_them():
    op, arguments = ops.call("kpconv-0")
    names = ops.diff(op, arguments)
    given, saved = tensors(arguments, names), []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor.detach().clone()

    grad = np.ones_like(call(op, given).detach().numpy())
    expected = gradients(op, given, names, grad)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(op, given)
    assert {given[name].data_ptr() for name in names} <= set(saved)
    found = torch.autograd.grad(out, [given[name] for name in names], torch.from_numpy(grad))
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one.numpy(), other.numpy())


# ---- compiled and exported


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = kpt.KPConv(3, 8, 5, radius=0.2, extent=0.2)
        self.norm = torch.nn.BatchNorm1d(8)
        self.second = kpt.KPConv(8, 2, 5, radius=0.2, extent=0.2)

    def forward(self, points, neighbors, features):
        hidden = torch.nn.functional.leaky_relu(self.norm(self.first(points, None, neighbors, features)), 0.1)
        return self.second(points, None, neighbors, hidden)


def net_case(num, seed=0):
    torch.manual_seed(seed)
    points = torch.rand(num, 3)
    return points, kpt.radius_search(points, None, 0.3), torch.randn(num, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_a_network_under_the_default_compiler():
    torch.manual_seed(0)
    net = Net()
    compiled = torch.compile(net, fullgraph=True)
    for num in (60, 80, 100):
        case = net_case(num, num)
        expected = net(*case)
        expected.square().sum().backward()
        grads = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        out = compiled(*case)
        out.square().sum().backward()
        assert torch.allclose(out, expected, atol=1e-5)
        for p, grad in zip(net.parameters(), grads, strict=True):
            assert torch.allclose(p.grad, grad, rtol=1e-4, atol=1e-4)
        net.zero_grad()


@pytest.mark.parametrize("transposed", [False, True])
def test_new_lists_do_not_recompile(transposed):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    torch.manual_seed(0)
    net = torch.compile(Net(), fullgraph=True, backend=counter)
    for num in (50, 60, 70, 80):
        case = net_case(num)
        if transposed:
            case = case[0], case[1].with_transpose(), case[2]
        net(*case).sum().backward()
    assert counter.frame_count <= 2  # once for 50 points, once for any number


class Counting:
    """A compiler that counts its graphs."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph.forward


def test_new_seeds_do_not_recompile():
    torch._dynamo.reset()
    counting, x = Counting(), torch.rand(50, 4)
    compiled = torch.compile(lambda x, seed: kpt.dropout(x, 0.5, seed), backend=counting, fullgraph=True)
    for seed in (*range(2, 14), 2**62, torch.tensor(3), torch.tensor(4)):
        assert torch.equal(compiled(x, seed), kpt.dropout(x, 0.5, int(seed)))
    assert counting.num_graphs <= 3  # for the first seed, for any, and for tensors


def test_a_compiled_network_drops_others_in_each_step():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = kp.nn.kpfcnn(1, 4, 0.15, levels=2, convs=2, width=8, dropout=0.5)
    module, counting = kpt.Network(net), Counting()
    levels = net.pyramid(torch.rand(300, 3), F=kpt)
    x = torch.ones(len(levels[0].points), 1)
    compiled = torch.compile(module, backend=counting, fullgraph=True)
    outs = [compiled(levels, x)[0] for _ in range(10)]
    assert counting.num_graphs == 1 and len({float(out.detach().sum()) for out in outs}) == 10
    outs[-1].sum().backward()
    module.eval()
    assert torch.equal(module(levels, x)[0], module(levels, x)[0])


def test_seeds_are_integers_or_tensors_of_one():
    x = torch.rand(50, 4, requires_grad=True)
    seed = torch.tensor(5)
    out = kpt.dropout(x, 0.5, seed)
    assert torch.equal(out, kpt.dropout(x, 0.5, 5))
    with torch.no_grad():
        seed.fill_(6)
    out.sum().backward()
    assert torch.equal(x.grad != 0, out != 0)
    for wrong, got in ((torch.tensor(0.5), "Tensor"), (torch.ones(2, dtype=torch.int64), "Tensor"), (0.5, "float")):
        with pytest.raises(TypeError, match=f"^seed: expected an integer, got {got}"):
            kpt.dropout(x, 0.5, wrong)


def test_exported():
    torch.manual_seed(0)
    net, case = Net().eval(), net_case(60)
    exported = torch.export.export(net, case)
    assert torch.equal(exported.module()(*case), net(*case))
    other = net_case(60, 1)
    if other[1].num_pairs == case[1].num_pairs:
        assert torch.equal(exported.module()(*other), net(*other))


def test_exported_for_any_number_of_points():
    torch.manual_seed(0)
    net, case = Net().eval(), net_case(60)
    num, pairs = torch.export.Dim("num", min=2), torch.export.Dim("pairs", min=2)
    shapes = {
        "points": {0: num},
        "neighbors": [torch.export.Dim.AUTO, {0: pairs}, {0: torch.export.Dim.AUTO}],
        "features": {0: num},
    }
    exported = torch.export.export(net, case, dynamic_shapes=shapes)
    other = net_case(90, 1)
    assert torch.equal(exported.module()(*other), net(*other))


EXPORTED = {
    "kpfcnn": kp.nn.kpfcnn(
        1, 4, 0.15, levels=2, convs=2, width=8, pool_pad_value=0.0, deformable=1, modulated=True, upsample="kpconv"
    ),
    "kpnext": kp.nn.KPNeXt((1, 1), 1, 4, 0.1, width=16, num_neighbors=(6, 8)),
}


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's, of its own doings
def test_a_network_exported_saved_and_loaded(name, monkeypatch):
    import io
    import logging

    # torch warns when it loads the example inputs, since it does not know their classes, and fails to format it.
    monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)

    def case(*lengths):
        points = torch.rand(sum(lengths), 3)
        levels = net.pyramid(points, row_splits=torch.from_numpy(kp.row_splits(lengths)), F=kpt)
        return levels, torch.rand(len(levels[0].points), 1)

    torch.manual_seed(0)
    net, file = EXPORTED[name], io.BytesIO()
    module, example = kpt.Network(net).eval(), case(200, 100)
    torch.export.save(torch.export.export(module, example, dynamic_shapes=kpt.dynamic_shapes(example)), file)
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    for inputs in (example, case(500), case(900, 40, 300), case(7, 0)):
        assert torch.equal(loaded(*inputs)[0], module(*inputs)[0])


def test_dynamic_shapes_have_the_form_of_the_inputs():
    any_size = torch.export.Dim.AUTO
    points, neighbors, x = net_case(60)
    padded = neighbors.with_width(90)
    level = kpt.build_pyramid(points, voxel_size=0.3, num_levels=1)[0]
    assert kpt.dynamic_shapes((points, None, 0.3, [neighbors, padded], {"x": x, "n": torch.tensor(3)})) == (
        {0: any_size},
        None,
        None,
        [[any_size, {0: any_size}, {0: any_size}], [any_size, any_size, {0: any_size}, {0: any_size}]],
        {"x": {0: any_size}, "n": None},
    )
    shapes = kpt.dynamic_shapes(level)
    assert type(shapes) is type(level) and shapes.voxel_size is None and shapes.points == {0: any_size}
    assert shapes.neighbors == [any_size, {0: any_size}, {0: any_size}]


@pytest.mark.parametrize("trained_first", [False, True])
def test_an_exported_program_takes_lists_trained_with_or_not(trained_first):
    layer = kpt.KPConv(3, 2, 5, radius=0.2, extent=0.2)
    cases = [(points, None, neighbors, x) for points, neighbors, x in (net_case(60), net_case(80, 1))]
    points, _, neighbors, x = cases[0 if trained_first else 1]
    layer(points, None, neighbors, x.clone().requires_grad_()).sum().backward()
    assert neighbors.stored_transposed is not None
    program = torch.export.export(layer, cases[0], dynamic_shapes=kpt.dynamic_shapes(cases[0])).module()
    assert torch.equal(program(*cases[1]), layer(*cases[1]))


# ---- lists as pytrees of tensors


LISTED = [variant for variant in ops.TRACED if "neighbors" in ops.call(variant)[1]]


def test_a_list_mapped_over():
    points, _ = clouds.uniform(100)
    neighbors = kp.radius_search(points, None, 0.3, return_distances=True).with_width(90)
    for given in (neighbors, neighbors.with_transpose()):
        mapped = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, given)
        for name in ("index", "row_splits", "distance", "counts"):
            assert_same_bits(getattr(mapped, name), getattr(given, name))
        for name in ("num_points", "num_queries", "num_pairs", "width", "carries_transpose"):
            assert getattr(mapped, name) == getattr(given, name)
        assert_same_bits(mapped.to_padded(), given.to_padded())
        assert_same_bits(mapped.transpose().index, given.transpose().index)
        assert_same_bits(mapped.transpose().distance, given.transpose().distance)
        assert (mapped.to_sparse() != given.to_sparse()).nnz == 0
        assert repr(mapped) == repr(given) and mapped.to("cpu") is mapped
        mapped = tree_map(lambda leaf: leaf, given)
        for again in (pickle.loads(pickle.dumps(mapped)), copy.deepcopy(mapped)):
            assert_same_bits(again.index, given.index)
            assert_same_bits(again.distance, given.distance)


def test_leaves_are_copies():
    points, neighbors, _ = net_case(60)
    expected = kpt.neighbor_reduce(points, neighbors)
    for leaf in tree_leaves(neighbors)[1:]:
        leaf.fill_(10**8)
    assert torch.equal(kpt.neighbor_reduce(points, neighbors), expected)


def test_the_pytree_of_a_list_has_a_transpose_only_if_it_carries_one():
    _, neighbors, _ = net_case(60)
    before = tree_structure(neighbors)
    neighbors.transpose()
    assert tree_structure(neighbors) == before != tree_structure(neighbors.with_transpose())
    assert tree_structure(neighbors.with_transpose().with_transpose(False)) == before


def test_a_transpose_that_is_carried_is_not_made_again(monkeypatch):
    torch._dynamo.reset()
    op, arguments = ops.call("kpconv-0")
    names = ops.diff(op, arguments)
    given = tensors(arguments, names)
    expected = torch.autograd.grad(call(op, given).sum(), given["features"])
    given["neighbors"] = given["neighbors"].with_transpose()
    monkeypatch.setattr("kpcore.neighbors.transposed", None)
    out = torch.compile(lambda given: call(op, given), fullgraph=True, backend="aot_eager")(given)
    assert torch.equal(torch.autograd.grad(out.sum(), given["features"])[0], expected[0])


def test_a_pyramid_mapped_over():
    points, _ = clouds.uniform(300)
    pyramid = kpt.build_pyramid(torch.from_numpy(points), voxel_size=0.1, num_levels=3)

    def double(leaf):
        return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    mapped = tree_map(double, pyramid)
    assert type(mapped) is kp.Pyramid and all(type(level) is kp.pyramid.Level for level in mapped)
    for found, level in zip(mapped, pyramid, strict=True):
        assert torch.equal(found.points, level.points.double())
        assert_same_bits(found.neighbors.index, level.neighbors.index)
        assert found.voxel_size == level.voxel_size and found.labels is None


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("variant", LISTED)
def test_lists_cast_with_their_batch(variant, dtype, traced):
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    out, pullback = ops.vjp(op, arguments, names)
    given, grad = tensors(arguments, names), ops.covector(out)
    given["neighbors"] = tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) else leaf,
                                  given["neighbors"])  # fmt: skip
    with torch.profiler.profile() if traced else nullcontext():
        assert_same_bits(call(op, given).detach().numpy(), out)
        for got, expected in zip(gradients(op, given, names, grad), pullback(grad), strict=True):
            assert_same_bits(got.numpy(), expected)


WRONG = {
    "beyond the points": lambda leaf: leaf + 10**8 if len(leaf) > 20 else leaf,
    "negative": lambda leaf: -leaf,
    "row_splits beyond the index": lambda leaf: leaf * 1000 if leaf[0] == 0 and len(leaf) < 20 else leaf,
    "float32": lambda leaf: leaf.float(),
    "bfloat16": lambda leaf: leaf.bfloat16(),
    "two axes": lambda leaf: leaf[None],
    "nothing": lambda leaf: leaf[:0],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("variant", LISTED)
def test_lists_that_a_map_made_wrong(variant, wrong):
    op, arguments = ops.call(variant)
    given = tensors(arguments, ops.diff(op, arguments))
    bad = tree_map(lambda leaf: WRONG[wrong](leaf) if isinstance(leaf, torch.Tensor) else leaf, given["neighbors"])
    for context in (nullcontext(), torch.profiler.profile()):
        with context, pytest.raises((TypeError, ValueError), match=r"^neighbors\."):
            call(op, given | {"neighbors": bad})
    if wrong in ("float32", "bfloat16"):
        with pytest.raises(TypeError, match=rf"^neighbors\.index: expected int.*, got {wrong}$"):
            call(op, given | {"neighbors": bad})


@pytest.mark.parametrize("part", ["index", "row_splits"])
@pytest.mark.parametrize("variant", LISTED)
def test_torch_operators_check_lists_in_each_call(variant, part):
    """Callers of torch.ops.kpcore, such as a loaded program, may pass any tensors."""
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    given = tensors(arguments, names)
    layout = kpt.ops._Arguments(op, getattr(kp, op.name))
    given_flat = [t.detach() if isinstance(t, torch.Tensor) else t for t in layout.flatten(given)]
    saved, grad, needs = vjp_call(op, arguments)
    at = next(at for name, _, _, at in layout.rows if name == "neighbors") + (part == "row_splits")
    given_flat[at] = given_flat[at].clone()
    given_flat[at][3] = 10**8
    with pytest.raises(ValueError, match=rf"^neighbors\.{part}: expected"):
        getattr(torch.ops.kpcore, op.name)(*given_flat)
    with pytest.raises(ValueError, match=rf"^neighbors\.{part}: expected"):
        getattr(torch.ops.kpcore, f"{op.name}_vjp")(*given_flat, saved, grad, needs)


# ---- with the rest of torch


def test_on_several_processes(tmp_path):
    """Training with DistributedDataParallel and fully_shard agrees with training in one process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).parent / "torch_processes.py", "ranks", tmp_path],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_loader(tmp_path, method):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).parent / "torch_processes.py", "workers", method],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def dropped(seed=0):
    """A network in training, with dropout, and its arguments."""
    torch.manual_seed(seed)
    net = kp.nn.kpfcnn(1, 4, 0.15, levels=2, convs=2, width=8, dropout=0.5)
    levels = net.pyramid(torch.rand(300, 3), F=kpt)
    return kpt.Network(net), (levels, torch.ones(len(levels[0].points), 1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """A pass that is computed again for the backward pass drops the same values."""
    from torch.utils.checkpoint import checkpoint

    results = []
    for run in (lambda module, *given: module(*given), lambda *given: checkpoint(*given, use_reentrant=reentrant)):
        module, (levels, x) = dropped()
        x.requires_grad_()
        torch.manual_seed(1)
        logits, _ = run(module, levels, x)
        logits.square().sum().backward()
        results.append([logits, x.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_autograd():
    net, case = Net(), net_case(60)
    net(*case).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def step():
        net(*case).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        step()
    for p, grad in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-5, atol=1e-6)


def test_an_ensemble():
    """Members with stacked parameters are called one after the other, since vmap is not supported."""
    points, neighbors, x = net_case(60)
    layers = [kpt.KPConv(3, 2, 5, radius=0.2, extent=0.2) for _ in range(3)]
    stacked = torch.func.stack_module_state(layers)

    def member(*state):
        return torch.func.functional_call(layers[0], state, (points, None, neighbors, x))

    with pytest.raises(NotImplementedError, match="kpconv: vmap"):
        torch.func.vmap(member)(*stacked)
    for number, layer in enumerate(layers):
        state = [{name: values[number] for name, values in which.items()} for which in stacked]
        assert torch.equal(member(*state), layer(points, None, neighbors, x))


def test_another_extent_is_another_program():
    torch._dynamo.reset()
    points, neighbors, x = net_case(60)
    counting, weights, places = Counting(), torch.rand(5, 3, 2), kpt.kernel_points(5, 0.2)

    def convolve(extent):
        return kpt.kpconv(points, None, neighbors, x, weights, places, extent)

    compiled = torch.compile(convolve, fullgraph=True, backend=counting)
    for extent in (0.1, 0.2, 0.3, 0.2):
        assert torch.equal(compiled(extent), convolve(extent))
    assert counting.num_graphs == 3


@pytest.mark.parametrize("name", ["grid_subsample", "interpolate"])
def test_autocast_ignores_operators_that_are_not_traced(name):
    op, arguments = ops.call(f"{name}-0", 24, np.float32, np.float32)
    given = tensors(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(op, given), call(op, given))
        with pytest.raises(TypeError, match=r"^features: expected .*, got bfloat16"):
            call(op, given | {"features": given["features"].bfloat16()})


# ---- functions that are not traced


def test_searches_are_those_of_kpcore():
    points, radius = clouds.uniform(300)
    tensor, queries = torch.from_numpy(points), points[:40] + np.float32(0.01)
    splits = np.array([0, 100, 300]), np.array([0, 10, 40])
    expected = kp.radius_search(points, queries, radius, points_row_splits=splits[0], queries_row_splits=splits[1])
    got = kpt.radius_search(
        tensor, torch.from_numpy(queries), radius,
        points_row_splits=torch.from_numpy(splits[0]), queries_row_splits=torch.from_numpy(splits[1])
    )  # fmt: skip
    assert isinstance(got, kp.Neighbors)
    assert_same_bits(got.index, expected.index)
    for index in kpt.KDTree(tensor), kpt.GridIndex(tensor, radius):
        assert_same_bits(index.radius_search(None, radius).index, kp.radius_search(points, None, radius).index)
        assert_same_bits(index.knn_search(None, 3).index, kp.knn_search(points, None, 3).index)
    assert_same_bits(kpt.knn_search(tensor, None, 3).index, kp.knn_search(points, None, 3).index)
    chosen = kpt.farthest_point_sampling(tensor, 10)
    assert_same_bits(chosen.index.numpy(), kp.farthest_point_sampling(points, 10).index)
    made = kpt.kernel_points(15, 0.5, dtype=torch.float64)
    assert_same_bits(made.numpy(), kp.kernel_points(15, 0.5, dtype=np.float64))
    counts = kpt.radius_search(tensor, None, radius, count_only=True)
    assert_same_bits(counts.numpy(), kp.radius_search(points, None, radius, count_only=True))
    lattice = torch.tensor([[0.0, 0], [1, 0], [2, 0]])
    for search in (kpt.KDTree(lattice).radius_search, kpt.GridIndex(lattice, 1.0).radius_search):
        assert search(None, 1.0, inclusive=False).counts.tolist() == [1, 1, 1]
    chosen = kpt.farthest_point_sampling(lattice, min_distance=2.0)
    assert (chosen.index.tolist(), chosen.row_splits.tolist()) == ([0, 2], [0, 2])


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_labels_of_any_type_and_in_columns(name):
    points, high = np.zeros((3, 2)), np.iinfo(name).max
    labels = torch.from_numpy(np.array([[high, 1], [high, 0], [2, 0]], name))
    for given, expected in ((labels, [[high, 0]]), (labels[:, 0], [high])):
        got = kpt.grid_subsample(torch.from_numpy(points), 1.0, labels=given, ignore_label=1).labels
        assert got.dtype == getattr(torch, name) and got.numpy().tolist() == expected


def test_levels():
    points, _ = clouds.uniform(300)
    got = kpt.build_pyramid(torch.from_numpy(points), voxel_size=0.1, num_levels=3)
    expected = kp.build_pyramid(points, voxel_size=0.1, num_levels=3)
    assert type(got) is kp.Pyramid
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a.points.numpy(), b.points)
        assert_same_bits(a.neighbors.index, b.neighbors.index)


def test_grid_subsample_keeps_the_gradient_of_features():
    _, arguments = ops.call("grid_subsample-0")
    given = tensors(arguments, ["features"])
    sub = kpt.grid_subsample(**given)
    assert type(sub) is kp.Subsampled and sub.features.requires_grad
    expected = kp.grid_subsample(**arguments)
    for got, array in zip(sub, expected, strict=True):
        if array is not None:
            assert_same_bits(got.detach().numpy(), array)
    assert kpt.grid_subsample(given["points"], 0.4).features is None
    for origin in ("published", np.array([[0.03, -0.1, 0.2]])):
        passed = origin if isinstance(origin, str) else torch.from_numpy(origin)
        got = kpt.grid_subsample(given["points"], 0.4, origin=passed)
        assert_same_bits(got.points.numpy(), kp.grid_subsample(arguments["points"], 0.4, origin=origin).points)
    levels = kpt.build_pyramid(given["points"], voxel_size=0.4, num_levels=2, origin="published")
    expected = kp.build_pyramid(arguments["points"], voxel_size=0.4, num_levels=2, origin="published")
    assert_same_bits(levels[1].points.numpy(), expected[1].points)
    sub.features.sum().backward()
    first = torch.autograd.grad(
        kpt.grid_subsample(**given).features.square().sum(), given["features"], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="grid_subsample: second derivatives"):
        first[0].sum().backward()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (np.zeros((5, 3), np.float32), TypeError),
        (torch.zeros(5, 3, device="meta"), TypeError),
        (torch.zeros(5), ValueError),
    ],
)
def test_wrong_points_of_a_search(wrong, error):
    with pytest.raises(error, match=r"^points"):
        kpt.radius_search(wrong, None, 1.0)


def test_every_name_of_all_exists():
    assert [name for name in kpt.__all__ if not hasattr(kpt, name)] == []
    assert set(kp.ops.OPS) <= set(kpt.__all__)


def test_without_torch_one_line_says_what_to_install(python):
    done = python(
        "import sys; sys.modules['torch'] = None\n"
        "import kpcore\n"
        "try: kpcore.torch\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert done.stdout == "kpcore.torch needs PyTorch: pip install kpcore[torch]\n", done.stderr


def test_torch_is_not_imported_before_it_is_used(python):
    done = python("import sys, kpcore; print('torch' in sys.modules, 'jax' in sys.modules)")
    assert done.stdout == "False False\n", done.stderr
