"""The layers over images of kpcore.torch: against kpcore.nn.images, convolutions of torch and differences."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.autograd.gradcheck import gradcheck  # noqa: E402
from torch.nn import functional  # noqa: E402

import kpcore as kp  # noqa: E402
import kpcore.torch as kpt  # noqa: E402
from kpcore import nn  # noqa: E402
from kpcore.nn import images  # noqa: E402

GEOMETRY = {"stride": 2, "padding": 1}
# {name: (layer, its arguments, function of kpcore.nn.images, its arguments after x)}
LAYERS = {
    "local": (kpt.LocalDeformableKernel2d, (6, 6, 3), {"offset_groups": 2, "clip": None},
              images.local_deformable_kernel, (3,), {}),
    "global": (kpt.GlobalDeformableKernel2d, (6, 4, 3), {"groups": 2, "grid": "uniform"},
               images.global_deformable_kernel, (4, 3), {}),
    "pointwise": (kpt.GlobalDeformableKernel2d, (6, 4, 1), {}, images.global_deformable_kernel, (4, 1), {}),
    "data": (kpt.DeformableConv2d, (6, 4, 3), {}, images.deformable_conv, (4, 3), {}),
    "modulated": (kpt.DeformableConv2d, (6, 4, (3, 2)), {"modulated": True, "groups": 2, "bias": False},
                  images.deformable_conv, (4, (3, 2)), {}),
    "both": (kpt.DeformableKernelConv2d, (6, 6, 3), {"modulated": True, "data_offset_groups": 3, "scope_size": 5},
             images.deformable_kernel_conv, (3,), {}),
    "conditional": (kpt.ConditionalConv2d, (6, 4, 3), {}, images.conditional_conv, (4, 3), {"experts": 8}),
    "conditional local": (kpt.ConditionalConv2d, (6, 6, 3),
                          {"num_experts": 3, "groups": 6, "kernel_offsets": "local", "data_offsets": "plain"},
                          images.conditional_conv, (6, 3), {"experts": 3}),
}  # fmt: skip


def made(name, dtype=torch.float64, moved=0.0, **more):
    """A layer with its parameters moved from the initial values at random."""
    torch.manual_seed(0)
    layer_class, arguments, options, *_ = LAYERS[name]
    layer = layer_class(*arguments, **options, **{**GEOMETRY, "dtype": dtype} | more)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += moved * torch.randn_like(parameter)
    return layer


def batch(dtype=torch.float64, size=(2, 6, 7, 8)):
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def params_of(layer):
    """The parameters of a layer under the names of kpcore.nn, where linear layers are (inputs, outputs) "weights"."""
    params = {}
    for name, value in layer.state_dict().items():
        if name.endswith(".weight") and value.ndim == 2:
            name, value = f"{name}s", value.T
        params[f"a.{name}"] = np.ascontiguousarray(value)
    return params


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_functions(name):
    *_, options, function, arguments, more = LAYERS[name]
    layer, x = made(name, moved=0.1), batch()
    options = {key: value for key, value in options.items() if key != "num_experts"} | more | GEOMETRY
    if function is images.local_deformable_kernel or function is images.deformable_kernel_conv:
        options.pop("groups", None)
    run = nn.Run(kp, params_of(layer), {})
    expected = function(run, "a", x.permute(0, 2, 3, 1).contiguous().numpy(), *arguments, **options)
    torch.testing.assert_close(layer(x), torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=1e-10, atol=1e-12)
    # Every parameter of the layer has its counterpart, initialised alike: generators are zero.
    new = {}
    function(nn.Run(kp, new, {}, new={"seed": 0, "dtype": np.float64}), "a", np.zeros((1, 9, 9, 6)), *arguments,
             **options)  # fmt: skip
    initial = params_of(made(name))
    assert {key: value.shape for key, value in new.items()} == {key: value.shape for key, value in initial.items()}
    for key, value in initial.items():
        assert not value.any() if "offset_generator" in key else value.any(), key
        if key == "a.weight":
            bound = 1 / np.sqrt(layer.in_channels // layer.groups * np.prod(layer.kernel_size))
            assert all(0.85 * bound < np.abs(weight).max() <= bound for weight in (value, new[key]))


@pytest.mark.parametrize(
    "geometry", [{}, {"padding": 1}, {"stride": (2, 1), "padding": (1, 0), "dilation": 2}], ids=str
)
def test_layers_begin_as_rigid_convolutions(geometry):
    x = batch()
    more = {"dtype": torch.float64} | geometry
    layer = kpt.DeformableConv2d(6, 4, 3, groups=2, **more)
    expected = functional.conv2d(x, layer.weight, layer.bias, groups=2, **geometry)
    torch.testing.assert_close(layer(x), expected)
    for layer in (kpt.LocalDeformableKernel2d(6, 6, 3, **more), kpt.DeformableKernelConv2d(6, 6, 3, **more),
                  kpt.GlobalDeformableKernel2d(6, 6, 3, groups=6, **more)):  # fmt: skip
        # Each tap is at the centre of 2 x 2 cells of the scope of 4 x 4.
        weight = functional.avg_pool2d(layer.weight, 2, 1)
        torch.testing.assert_close(layer(x), functional.conv2d(x, weight, layer.bias, groups=6, **geometry))
    layer = kpt.ConditionalConv2d(6, 4, 3, num_experts=2, **more)
    torch.nn.init.zeros_(layer.routing.weight)
    torch.nn.init.zeros_(layer.routing.bias)
    expected = functional.conv2d(x, layer.weight.mean(0), layer.bias, **geometry)  # both experts have half
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name):
    layer = made(name, moved=0.05)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = [batch(size=(2, 6, 5, 4)).requires_grad_(), *parameters]
    assert gradcheck(run, inputs, fast_mode=True)
    for name_, grad in zip(names, torch.autograd.grad(run(*inputs).sum(), parameters), strict=True):
        assert grad.abs().max() > 0, name_


@pytest.mark.parametrize("name", ["local", "global", "both", "conditional local"])
def test_detached_offsets_are_constants(name):
    layer, x = made(name, moved=0.1), batch().requires_grad_()
    detached = made(name, moved=0.1, detach_offsets=True)
    detached.load_state_dict(layer.state_dict())
    out = layer(x)
    torch.testing.assert_close(detached(x), out)
    (full,) = torch.autograd.grad(out.square().sum(), x)
    detached(x).square().sum().backward()
    assert not torch.allclose(x.grad, full)
    grads = {key: parameter.grad for key, parameter in detached.named_parameters()}
    assert all(bool(grad.any()) != ("offset_generator" in key) for key, grad in grads.items())


@pytest.mark.parametrize("name", LAYERS)
def test_memory_formats(name):
    layer, x = made(name, moved=0.1), batch()
    expected = layer(x)
    assert expected.is_contiguous()
    got = layer(x.to(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(layer(torch.cat([x, x], 3)[..., ::2]), layer(torch.cat([x, x], 3)[..., ::2].clone()))


@pytest.mark.parametrize("name", LAYERS)
def test_mixed_precision(name):
    layer, x = made(name, torch.float32, moved=0.1), batch(torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
        got.sum().backward()
    # The convolution itself computes in float32; generators in bfloat16 move offsets by up to 2**-8 of their size.
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    with pytest.raises(TypeError, match=r"^x: expected float32 or float64, got bfloat16; convert it with x.to"):
        layer.bfloat16()(x.bfloat16())


@pytest.mark.parametrize("name", LAYERS)
def test_module_basics(name):
    layer, x = made(name, moved=0.1), batch()
    plain = {"weight", "bias", *(f"{part}.{which}" for which in ("weight", "bias") for part in
             ("offset_generator", "data_offset_generator", "routing"))}  # fmt: skip
    assert {*layer.state_dict()} <= plain
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    other = made(name)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert not any(p.any() for n, p in layer.named_parameters() if "offset_generator" in n)
    assert layer(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("name", LAYERS)
def test_compiled(name):
    layer, x = made(name, moved=0.1), batch().requires_grad_()
    compiled = torch.compile(lambda x: torch.relu(layer(x)), backend="aot_eager", fullgraph=True)
    got, expected = compiled(x), torch.relu(layer(x))
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]) for out in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", LAYERS)
def test_training_lowers_a_loss_and_moves_offsets(name):
    layer = made(name, torch.float32, stride=1)
    x = batch(torch.float32, (4, 6, 8, 8))
    target = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(2))
    slow = [p for n, p in layer.named_parameters() if "offset_generator" in n]
    others = [p for n, p in layer.named_parameters() if "offset_generator" not in n]
    groups = [{"params": group, "lr": lr} for group, lr in ((others, 0.05), (slow, 0.005)) if group]
    optimizer, losses = torch.optim.SGD(groups, momentum=0.9, weight_decay=4e-5), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0] and losses[-1] == min(losses)
    assert all(parameter.abs().max() > 1e-5 for parameter in slow)
    assert bool(slow) == (name != "conditional")


def test_representations():
    shown = {
        kpt.LocalDeformableKernel2d(6, 6, 3): "LocalDeformableKernel2d(\n  6, 6, kernel_size=(3, 3), stride=(1, 1), "
        "groups=6, kernel_offsets='local', scope_size=(4, 4)\n  (offset_generator): Conv2d(6, 18,",
        kpt.DeformableConv2d(6, 4, 3, 2, 1, 2, bias=False, modulated=True): "DeformableConv2d(\n  6, 4, "
        "kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(2, 2), bias=False, data_offsets='modulated'\n  ("
        "data_offset_generator): Conv2d(6, 27,",
        kpt.ConditionalConv2d(6, 4, 1, num_experts=3): "ConditionalConv2d(\n  6, 4, kernel_size=(1, 1), stride=(1, 1)"
        "\n  (routing): Linear(",
    }  # fmt: skip
    for layer, text in shown.items():
        assert repr(layer).startswith(text)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kpt.LocalDeformableKernel2d(6, 4, 3), "out_channels: expected a multiple of groups, 6, got 4"),
        (lambda: kpt.LocalDeformableKernel2d(6, 6, 3, groups=1), "groups: expected in_channels and out_channels, be"),
        (lambda: kpt.LocalDeformableKernel2d(6, 6, 3, offset_groups=4), "offset_groups: expected a divisor of in"),
        (lambda: kpt.DeformableConv2d(6, 6, 3, data_offset_groups=4), "data_offset_groups: expected a divisor of in"),
        (lambda: kpt.GlobalDeformableKernel2d(6, 6, 3, groups=4), "in_channels: expected a multiple of groups, 4"),
        (lambda: kpt.GlobalDeformableKernel2d(6, 6, 3, grid="spread"), "grid: expected 'unit' or 'uniform', got"),
        (lambda: kpt.GlobalDeformableKernel2d(6, 6, 3, clip="image"), "clip: expected 'scope' or None, got 'image'"),
        (lambda: kpt.GlobalDeformableKernel2d(6, 6, (3, 3, 3)), "kernel_size: expected"),
        (lambda: kpt.GlobalDeformableKernel2d(6, 6, 3, scope_size=0), r"scope_size.*: expected"),
        (lambda: kpt.ConditionalConv2d(6, 6, 3, num_experts=0), "num_experts: expected at least 1, got 0"),
        (lambda: kpt.ConditionalConv2d(6, 6, 3, kernel_offsets="local"), "groups: expected in_channels and out_ch"),
        (lambda: kpt.ConditionalConv2d(6, 6, 3, kernel_offsets="all"), "kernel_offsets: expected None or 'local'"),
        (lambda: kpt.ConditionalConv2d(6, 6, 3, data_offsets=True), "data_offsets: expected None or 'plain' or 'modul"),
        (lambda: kpt.ConditionalConv2d(6, 6, 3, offset_groups=2), "offset_groups: expected 1 without local ke"),
        (lambda: kpt.ConditionalConv2d(6, 6, 3, scope_size=4), "scope_size: expected None without kernel_offsets"),
        (lambda: kpt.DeformableConv2d(6, 6, 3)(torch.zeros(6, 8, 8)), r"x: expected \(B, 6, H, W\) to match in_c"),
        (lambda: kpt.DeformableConv2d(6, 6, 3)(torch.zeros(1, 4, 8, 8)), r"x: expected \(B, 6, H, W\) to match in_c"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
