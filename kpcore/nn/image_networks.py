"""ResNet-50-DW and MobileNet-V2 with convolutions that may adapt to the image (Gao et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kpcore.backends import checks
from kpcore.nn import blocks, images
from kpcore.nn.blocks import Buffer, Run, Value
from kpcore.nn.networks import Result, initialised
from kpcore.ops import OPS, Call, binder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from numpy.typing import DTypeLike

    from kpcore.nn.blocks import AnyArray, Parameters

_MOST_BLOCKS, _MOST_SIZE = 1000, 64


@dataclass(frozen=True)
class ImageNetwork:
    """The description of a network that classifies images, without its parameters.

    It is called with parameters, as a pure function over the operators of `F`: `kpcore`, `kpcore.torch` or
    `kpcore.jax`. `resnet50_dw` and `mobilenet_v2` describe the published ones.

    Parameters
    ----------
    block : {"bottleneck", "inverted"}
        "bottleneck": a residual block of ResNet with a depthwise 3 x 3 convolution between two of 1 x 1, the stride in
        the 3 x 3, after a stem of 7 x 7 and a maximum over 3 x 3, each of stride 2. "inverted": that of MobileNet-V2,
        with ReLU6, without an activation at its end and with a shortcut only where the shape stays, after a stem of
        3 x 3 and stride 2.
    stages : sequence of (inner, width, depth, stride)
        `depth` blocks with `width` output channels, the first of them strided. `inner` is the number of channels of the
        3 x 3 convolutions; in an inverted block it is a multiple of that of the block's input.
    stem_width : int
    head_width : int, optional
        Channels of a last 1 x 1 convolution.
    num_classes, num_features : int
        Number of classes, and of channels of the images.
    kernel : {None, "local", "global"}
        Kernel offsets of the 3 x 3 convolutions of all blocks.
    scope : int
        The scope of these kernels.
    data_offsets : {None, "plain", "modulated"}
        Data offsets of the 3 x 3 convolutions from stage `data_offsets_from` on.
    data_offsets_from : int
        The published numbers of parameters and operations are those of 1, without the first stage, in ResNet-50-DW and
        of 2 in MobileNet-V2.
    experts : int, optional
        Number of experts of the 3 x 3 convolutions.
    pointwise : {None, "global"}
        Kernel offsets of the 1 x 1 convolutions: the two of each block, and that of `head_width`, but not those of
        shortcuts.
    pointwise_scope : int
        The scope of these kernels.
    pointwise_experts : int, optional
        Number of experts of the 1 x 1 convolutions.
    grid, clip
        As in `kpcore.deformable_kernel_conv2d`.
    momentum : float
        Momentum of the running statistics, see `kpcore.batch_norm`.
    dropout : float
        Dropout rate of the layer before the logits, in training.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> net = kp.nn.ImageNetwork("bottleneck", [(8, 16, 1, 1), (16, 32, 1, 2)], 8, num_classes=4, kernel="local")
    >>> params, state = net.init(seed=0)
    >>> net(kp, params, state, np.ones((2, 32, 32, 3), np.float32)).logits.shape
    (2, 4)
    """

    block: Literal["bottleneck", "inverted"]
    stages: Sequence[Sequence[int]]
    stem_width: int
    head_width: int | None = None
    num_classes: int = 1000
    num_features: int = 3
    kernel: Literal["local", "global"] | None = None
    scope: int = 4
    data_offsets: Literal["plain", "modulated"] | None = None
    data_offsets_from: int = 0
    experts: int | None = None
    pointwise: Literal["global"] | None = None
    pointwise_scope: int = 2
    pointwise_experts: int | None = None
    grid: Literal["unit", "uniform"] = "unit"
    clip: Literal["scope"] | None = "scope"
    momentum: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("block", ("bottleneck", "inverted")), ("kernel", (None, "local", "global")),
                              ("data_offsets", (None, "plain", "modulated")), ("pointwise", (None, "global")),
                              ("grid", ("unit", "uniform")), ("clip", (None, "scope"))):  # fmt: skip
            checks.choice(name, getattr(self, name), allowed)
        try:
            stages = tuple((inner, width, depth, stride) for inner, width, depth, stride in self.stages)
        except (TypeError, ValueError):
            expected = "a sequence of (inner, width, depth, stride)"
            raise ValueError(f"stages: expected {expected}, got {self.stages!r}") from None
        stages = tuple(tuple(checks.integer("stages", number, 1) for number in stage) for stage in stages)
        object.__setattr__(self, "stages", stages)
        if not stages or sum(depth for _, _, depth, _ in stages) > _MOST_BLOCKS:
            raise ValueError(f"stages: expected 1 to {_MOST_BLOCKS} blocks, got {stages}")
        blocks.check_fields(self, checks.integer, ("num_classes", "num_features", "stem_width"), 1)
        optional = [n for n in ("head_width", "experts", "pointwise_experts") if getattr(self, n) is not None]
        blocks.check_fields(self, checks.integer, optional, 1, blocks.MOST_CHANNELS)
        blocks.check_fields(self, checks.integer, ("scope", "pointwise_scope"), 1, _MOST_SIZE)
        if checks.integer("data_offsets_from", self.data_offsets_from, 0) >= len(stages):
            raise ValueError(f"data_offsets_from: expected one of {len(stages)} stages, got {self.data_offsets_from}")
        blocks.check_channels("stem_width", self.stem_width)
        channels = self.stem_width
        for inner, width, _, _ in stages:
            blocks.check_channels("stages", max(width, inner * (channels if self.block == "inverted" else 1)))
            channels = width
        blocks.check_fields(self, checks.between, ("momentum", "dropout"), 0, 1)

    def init(self, seed: int = 0, dtype: DTypeLike = np.float32) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(params, state), as `Network.init` returns them."""
        return initialised(self, seed, dtype)

    def no_data(self, dtype: DTypeLike) -> tuple[np.ndarray, None]:
        """(x, seed) of no images, the input of the pass in which parameters are created or checked."""
        return np.zeros((0, 32, 32, self.num_features), dtype), None

    def __call__(self, F: ModuleType, params: Parameters[Value], state: Parameters[Buffer], x: Value | np.ndarray, *,
                 training: bool = False, seed: int | AnyArray | None = None,
                 detach_offsets: bool = False) -> Result[Value, Buffer]:  # fmt: skip
        """Logits of a batch of images.

        Parameters
        ----------
        F, params, state, training, seed, detach_offsets
            As when a `Network` is called.
        x : (B, H, W, num_features)
            The images.

        Returns
        -------
        Result
            Without a regularization.
        """
        if len(x.shape) != 4 or x.shape[3] != self.num_features:
            raise ValueError(f"x: expected (B, H, W, {self.num_features}), got {tuple(x.shape)}")
        run = self.new_run(F, params, state, training=training, detach_offsets=detach_offsets)
        return Result(self.compute_logits(run, x, seed), run.new_state, None)

    def new_run(self, F: ModuleType, params: Parameters[Value], state: Parameters[Buffer],
                **more: Any) -> Run[Value, Buffer]:  # fmt: skip
        """The `nn.Run` of a pass through this network."""
        return Run(F, params, state, momentum=self.momentum, slope=0.0, **more)

    def compute_logits(self, run: Run[Value, Buffer], x: Value | np.ndarray,
                       seed: int | AnyArray | None) -> Value:  # fmt: skip
        """The logits of the images `x`."""
        rows = blocks.dropout(run, images.average(run, self.compute_features(run, x)), self.dropout, seed)
        return blocks.dense(run, "head", rows, self.num_classes, activate=False)

    def compute_features(self, run: Run[Value, Buffer], x: Value | np.ndarray) -> Value:
        """(B, H', W', C): the last features of the images `x` that have positions, of which the logits see the mean."""
        size = 7 if self.block == "bottleneck" else 3
        x = images.conv(run, "stem.conv", x, self.stem_width, size, stride=2, padding=size // 2, bias=False)
        x = images.norm(run, "stem.norm", x, self._activation)
        if self.block == "bottleneck":
            x = images.max_pool(run, x, 3, stride=2, padding=1)
        for number, (inner, width, depth, stride) in enumerate(self.stages):
            for place in range(depth):
                block = self._bottleneck if self.block == "bottleneck" else self._inverted
                x = block(run, f"stage.{number}.{place}", x, inner, width, 1 if place else stride,
                          number >= self.data_offsets_from)  # fmt: skip
        if self.head_width is not None:
            x = self._pointwise(run, "last", x, self.head_width, self._activation)
        return x

    @property
    def _activation(self) -> Literal["relu", "relu6"]:
        return "relu" if self.block == "bottleneck" else "relu6"

    def _bottleneck(self, run, name, x, inner, width, stride, moves):
        out = self._pointwise(run, f"{name}.first", x, inner, "relu")
        out = self._depthwise(run, f"{name}.depthwise", out, stride, moves)
        out = self._pointwise(run, f"{name}.second", out, width, None)
        if stride > 1 or x.shape[3] != width:
            x = images.conv(run, f"{name}.shortcut.conv", x, width, 1, stride=stride, bias=False)
            x = images.norm(run, f"{name}.shortcut.norm", x, None)
        return run.F.relu(run.F.add(out, x))

    def _inverted(self, run, name, x, factor, width, stride, moves):
        out = x
        if factor > 1:
            out = self._pointwise(run, f"{name}.first", x, factor * x.shape[3], "relu6")
        out = self._depthwise(run, f"{name}.depthwise", out, stride, moves)
        out = self._pointwise(run, f"{name}.second", out, width, None)
        return run.F.add(out, x) if stride == 1 and x.shape[3] == width else out

    def _depthwise(self, run, name, x, stride, moves):
        x = images.conv(
            run, f"{name}.conv", x, x.shape[3], 3, stride=stride, padding=1, groups=x.shape[3], bias=False,
            kernel_offsets=self.kernel, scope_size=self.scope if self.kernel else None,
            data_offsets=self.data_offsets if moves else None, experts=self.experts, **self._options
        )  # fmt: skip
        return images.norm(run, f"{name}.norm", x, self._activation)

    def _pointwise(self, run, name, x, width, activation):
        if self.pointwise is None and self.pointwise_experts is None:
            x = images.pointwise(run, f"{name}.conv", x, width)
        else:
            x = images.conv(run, f"{name}.conv", x, width, 1, bias=False, kernel_offsets=self.pointwise,
                            scope_size=self.pointwise_scope if self.pointwise else None,
                            experts=self.pointwise_experts, **self._options)  # fmt: skip
        return images.norm(run, f"{name}.norm", x, activation)

    @property
    def _options(self) -> dict[str, Any]:
        return {"grid": self.grid, "clip": self.clip}


def resnet50_dw(num_classes: int = 1000, **options: Any) -> ImageNetwork:
    """ResNet-50-DW (Gao et al. 2020, table 5): ResNet-50 with depthwise 3 x 3 convolutions of twice the channels.

    `options` are those of `ImageNetwork`.

    >>> import kpcore as kp
    >>> [kp.nn.count(kp.nn.resnet50_dw(kernel=kernel).init()[0]) for kernel in (None, "local")]
    [23682216, 24958792]
    """
    stages = (128, 256, 3, 1), (256, 512, 4, 2), (512, 1024, 6, 2), (1024, 2048, 3, 2)
    return ImageNetwork("bottleneck", stages, 64, num_classes=num_classes, **options)


def mobilenet_v2(num_classes: int = 1000, **options: Any) -> ImageNetwork:
    """MobileNet-V2 (Sandler et al. 2018), if wanted with the convolutions of Gao et al. (2020).

    `options` are those of `ImageNetwork`.

    >>> import kpcore as kp
    >>> [kp.nn.count(kp.nn.mobilenet_v2(kernel=kernel).init()[0]) for kernel in (None, "local")]
    [3504872, 4711162]
    """
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
              (6, 320, 1, 1))  # fmt: skip
    return ImageNetwork("inverted", stages, 32, 1280, num_classes=num_classes, **options)


def multiply_adds(net: ImageNetwork, height: int = 224, width: int = 224) -> int:
    """The number of multiply-adds of a pass over one image: what papers call FLOPs.

    Counted are those of convolutions and linear layers, those of mixing the kernels of experts, and two for each
    bilinear sample of a kernel or of the image. Two is the number that agrees with the differences of convolutions in
    tables 1 and 2 of Gao et al. (2020), where the weights of the four neighbours count nothing.

    >>> import kpcore as kp
    >>> rigid, local = (kp.nn.multiply_adds(kp.nn.resnet50_dw(kernel=kernel)) for kernel in (None, "local"))
    >>> round((local - rigid) / 1e9, 2)
    0.5
    """
    counted = _Counted()
    params, state = {}, {}
    run = net.new_run(counted, params, state, new={"seed": None, "dtype": np.float32})
    height, width = checks.integer("height", height, 1), checks.integer("width", width, 1)
    net.compute_logits(run, np.broadcast_to(np.float32(0), (1, height, width, net.num_features)), None)
    return counted.total


class _Counted:
    """The operators of `kpcore`, which here compute only the shape of their result and count its multiply-adds."""

    def __init__(self) -> None:
        self.total = 0

    def __getattr__(self, name: str) -> Any:
        op = OPS[name]
        bind = binder(op.check)

        def function(*args, **kwargs):
            call = Call(**bind(args, kwargs))
            # All values of a result are one zero in memory: a pass over a large image needs no memory.
            results = [np.broadcast_to(np.zeros((), dtype), shape) for shape, dtype in op.result(call)]
            self.total += _operations(name, call, results[0].shape)
            return results[0] if op.record is None else op.record(*results[: len(op.record._fields)])

        return function


def _operations(name, call, out):
    """The multiply-adds of a call of an operator with a result of the shape `out`."""
    if name == "linear":
        return call.features.shape[0] * call.weights.size
    if not name.endswith("conv2d"):
        return 0
    experts = getattr(call, "weights", None)
    weight = (call.weight if experts is None else experts[0]).shape
    rows, columns = getattr(call, "kernel_size", None) or weight[-2:]
    total = int(np.prod(out)) * weight[1] * rows * columns
    offsets = getattr(call, "kernel_offsets", None)
    if offsets is not None:
        resampled = weight[0] * weight[1] * rows * columns
        total += 2 * resampled * (out[1] * out[2] if offsets.ndim == 4 else 1)
    if call.data_offsets is not None:
        total += 2 * out[1] * out[2] * rows * columns * call.x.shape[3]
    if experts is not None:
        total += experts.size
    return total
