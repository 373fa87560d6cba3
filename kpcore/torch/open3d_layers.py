"""Open3D's convolution layers: ContinuousConv, SparseConv and SparseConvTranspose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn import functional
from torch.nn.parameter import UninitializedParameter, is_lazy

import kpcore
from kpcore import continuous
from kpcore.backends import checks

# Modules, not names from them: they import kpcore.torch, and may be the ones that are being imported.
from kpcore.compat import arguments, open3d_ragged, open3d_search
from kpcore.neighbors import Neighbors, new_list
from kpcore.nn import blocks
from kpcore.torch import initializers
from kpcore.torch.initializers import Activation, Initializer
from kpcore.torch.open3d_searches import hash_table_fields
from kpcore.torch.ops import checked, numpy_dtype, on_arrays, on_stream_of, to_array, to_tensor

if TYPE_CHECKING:
    from kpcore.compat.open3d_ragged import RaggedTensor
    from kpcore.compat.open3d_search import SearchResult, SpatialHashTable

Regularizer: TypeAlias = Callable[[torch.Tensor], torch.Tensor] | None
Rows: TypeAlias = "torch.Tensor | RaggedTensor"
# Half precision is for a GPU, or for autocast, which makes it float32 before the operator checks it.
_FEATURES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class _InferredChannels(torch.nn.Module):
    """A module with one parameter whose number of input channels may be unknown until the first call.

    Until then the parameter is torch's UninitializedParameter, as in torch's lazy modules: an optimizer may hold it,
    and a state_dict may be made and loaded.
    """

    in_channels: int | None

    def _set_inferred(self, name, shape, axis, dtype):
        """Register the parameter `name` of this shape, in which the size along `axis` may be None."""
        self.in_channels, self._inferred = shape[axis], (name, shape, axis)
        if shape[axis] is None:
            parameter = UninitializedParameter(dtype=dtype)
        else:
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
        self.register_parameter(name, parameter)

    def _infer(self, in_channels):
        """Give the parameter its shape, if it has none yet; returns whether it had none."""
        name, shape, axis = self._inferred
        parameter = getattr(self, name)
        if not is_lazy(parameter):
            return False
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        parameter.materialize((*shape[:axis], in_channels, *shape[axis % len(shape) + 1 :]))
        return True

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars=True)  # an uninitialised one cannot be detached
        for name in () if keep_vars else (*self._parameters, *self._buffers):
            value = destination.get(prefix + name)
            if value is not None and not is_lazy(value):
                destination[prefix + name] = value.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name, shape, axis = self._inferred
        value = state_dict.get(prefix + name)
        if isinstance(value, torch.Tensor) and not is_lazy(value) and value.ndim == len(shape):
            self._infer(value.shape[axis])  # if other sizes differ, torch says which
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Dense(_InferredChannels):
    """The linear layer without bias that `use_dense_layer_for_center` adds; named and stored as torch's Linear."""

    weight: torch.nn.Parameter

    def __init__(self, in_channels, filters, initializer, dtype):
        super().__init__()
        self.initializer = initializer
        self._set_inferred("weight", (filters, in_channels), -1, dtype)
        self.reset_parameters()

    def reset_parameters(self):
        if not is_lazy(self.weight):
            with torch.no_grad():
                initializers.initialize(self.initializer, self.weight, transposed=True)

    def extra_repr(self):
        return f"{self.in_channels}, {self._inferred[1][0]}, bias=False"

    def forward(self, features):
        if self._infer(features.shape[1]):
            self.reset_parameters()
        return functional.linear(features, self.weight)


class _Convolution(_InferredChannels):
    """What the three layers share: kernel, bias and offset, their initialisers and regularisers, and the activation."""

    kernel: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    offset: torch.Tensor
    filters: int
    kernel_size: tuple[int, int, int]
    _searched: Neighbors | None = None

    def __init__(self, in_channels, filters, kernel_size, activation, use_bias, kernel_initializer, bias_initializer,
                 kernel_regularizer, bias_regularizer, normalize, offset, max_temp_mem_MB, allow_tf32,
                 dtype):  # fmt: skip
        super().__init__()
        if in_channels is not None:
            in_channels = checks.integer("in_channels", in_channels, 1)
        self.filters = checks.integer("filters", filters, 1)
        if kernel_size is None:
            raise TypeError("kernel_size: expected 3 integers, or one for all axes, got None")
        self.kernel_size = tuple(checks.integers("kernel_size", kernel_size, 3, 1).tolist())
        initializers.check_activation("activation", activation)
        self.activation, self.use_bias = activation, checks.boolean("use_bias", use_bias)
        for name, initializer in (("kernel_initializer", kernel_initializer), ("bias_initializer", bias_initializer)):
            initializers.check(name, initializer)
        self.kernel_initializer, self.bias_initializer = kernel_initializer, bias_initializer
        for name, regularizer in (("kernel_regularizer", kernel_regularizer), ("bias_regularizer", bias_regularizer)):
            _check_function(name, regularizer)
        self.kernel_regularizer, self.bias_regularizer = kernel_regularizer, bias_regularizer
        self.normalize = checks.boolean("normalize", normalize)
        self.max_temp_mem_MB = checks.integer("max_temp_mem_MB", max_temp_mem_MB, 0)
        self.allow_tf32 = checks.boolean("allow_tf32", allow_tf32)
        offset = self._default_offset() if offset is None else offset
        values = offset.tolist() if isinstance(offset, torch.Tensor) else list(offset)
        if len(values) != 3:
            raise ValueError(f"offset: expected 3 numbers, got {len(values)}")
        self.register_buffer(
            "offset", torch.tensor(values, dtype=torch.get_default_dtype() if dtype is None else dtype)
        )
        self._set_inferred("kernel", (*self.kernel_size, in_channels, self.filters), -2, dtype)
        self.register_parameter(
            "bias", torch.nn.Parameter(torch.empty(self.filters, dtype=dtype)) if use_bias else None
        )

    def _default_offset(self):
        return 0.0, 0.0, 0.0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_searched": None}

    @property
    def nns(self) -> SearchResult | None:
        """The neighbours that the last call searched, without distances; None before."""
        if self._searched is None:
            return None
        index, _, row_splits = open3d_search.pairs(self._searched)
        return open3d_search.SearchResult(index.clone(), row_splits.clone(), self.offset.new_empty(0))

    def reset_parameters(self) -> None:
        """Draw a new kernel and a new bias; a kernel whose number of input channels is not known yet stays so."""
        if not is_lazy(self.kernel):
            initializers.initialize(self.kernel_initializer, self.kernel)
        if self.bias is not None:
            initializers.initialize(self.bias_initializer, self.bias)

    def regularization(self) -> torch.Tensor:
        """The sum of the regularisers of the parameters, a 0-d tensor; 0 without any."""
        return sum((function(parameter) for function, parameter in self._regularized() if function is not None),
                   self.offset.new_zeros(()))  # fmt: skip

    def _regularized(self):
        pairs = [(self.kernel_regularizer, self.kernel)]
        return pairs if self.bias is None else [*pairs, (self.bias_regularizer, self.bias)]

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.filters}, kernel_size={self.kernel_size}, normalize={self.normalize}"
        return text + ", bias=False" * (self.bias is None)

    def _checked_inputs(self, inp_features, inp_positions, out_positions):
        """(features, input positions, output positions, their row_splits or None); infers the number of channels."""
        inputs = {"inp_features": inp_features, "inp_positions": inp_positions, "out_positions": out_positions}
        ragged = [isinstance(value, open3d_ragged.RaggedTensor) for value in inputs.values()]
        splits = None
        if any(ragged):
            if not all(ragged):
                raise TypeError(
                    "inp_features, inp_positions, out_positions: expected RaggedTensors, because one of them is one, "
                    f"got {', '.join(type(value).__name__ for value in inputs.values())}"
                )
            if not torch.equal(inp_features.row_splits, inp_positions.row_splits):
                raise ValueError(
                    f"inp_features: expected row_splits {inp_positions.row_splits.tolist()} to match inp_positions, "
                    f"got {inp_features.row_splits.tolist()}"
                )
            splits = inp_positions.row_splits, out_positions.row_splits
            inputs = {name: value.values for name, value in inputs.items()}
        sizes: arguments.Sizes = {} if self.in_channels is None else {"Cin": (self.in_channels, "in_channels")}
        features = arguments.tensor("inp_features", inputs["inp_features"], "N Cin", _FEATURES, sizes)
        inp = arguments.tensor("inp_positions", inputs["inp_positions"], "N 3", arguments.REAL, sizes)
        out = arguments.tensor("out_positions", inputs["out_positions"], "M 3", arguments.REAL, sizes)
        if out.dtype != inp.dtype:
            raise TypeError(
                f"out_positions: expected {str(inp.dtype)[6:]} to match inp_positions, got {str(out.dtype)[6:]}"
            )
        if self._infer(features.shape[1]):
            initializers.initialize(self.kernel_initializer, self.kernel)
        if {features.dtype, self.kernel.dtype} == {torch.float32, torch.float64} and not torch.is_autocast_enabled():
            expected, got = str(self.kernel.dtype)[6:], str(features.dtype)[6:]
            raise TypeError(f"inp_features: expected {expected} to match the kernel, got {got}")
        return *inputs.values(), splits

    def _importances(self, inp_importance):
        """The factors as a tensor or None; Open3D's callers pass an empty tensor for none."""
        if isinstance(inp_importance, open3d_ragged.RaggedTensor):
            inp_importance = inp_importance.values
        is_empty = isinstance(inp_importance, torch.Tensor) and inp_importance.shape == (0,)
        return None if is_empty else inp_importance

    def _check_hash_table(self, table, points, splits):
        if table is not None:
            bounds = torch.tensor([0, len(points)]) if splits is None else splits
            open3d_search.check_hash_table(*hash_table_fields(table), points, bounds)

    def _output(self, out, splits):
        """The result of the convolution with bias and activation, of batches as a RaggedTensor."""
        if self.bias is not None:
            out = out + self.bias
        out = initializers.activated(self.activation, out)
        if splits is None:
            return out
        return open3d_ragged.RaggedTensor.from_row_splits(out, splits[1], validate=False, copy=False)

    def _offset(self, points):
        return self.offset.to(points.dtype)


class ContinuousConv(_Convolution):
    """Continuous convolution with its weights, as a layer; see `kpcore.continuous_conv`.

    The arguments are those of Open3D's layers for PyTorch, in their order, and of those for TensorFlow. A `state_dict`
    of Open3D's layer loads.

    Parameters
    ----------
    in_channels : int or None
        None: taken from the features of the first call, as in torch's lazy modules.
    filters : int
        Number of output channels.
    kernel_size : 3 ints, or one for all axes
        Cells of the filter along (z, y, x).
    activation : function, str or None
        Of the result; a str is a name of TensorFlow, such as "relu".
    use_bias : bool
    kernel_initializer, bias_initializer : str or function
        A name of TensorFlow, such as "uniform" (between -0.05 and 0.05), "zeros", "glorot_uniform" or "he_normal", or a
        function that fills a tensor in place, such as ``torch.nn.init.zeros_``.
    align_corners, coordinate_mapping, interpolation
        As in `kpcore.continuous_conv`.
    normalize : bool
        Whether to divide by the number of neighbours, or by the sum of their importances or of the window function.
    radius_search_ignore_query_points : bool
        Leave out neighbours with exactly the coordinates of the output.
    radius_search_metric : {"L1", "L2", "Linf"}
    offset : (3,) tensor or 3 numbers, optional
        Added to the coordinates in the filter, in cells. Ignored with `align_corners`.
    window_function : function, optional
        From distances (E,), divided by the radius, to the importances (E,) of the neighbours. For "L2" it gets squared
        distances, divided by the square of the radius. A torch.nn.Module is registered, so its parameters are trained,
        as ``window_function.*``; a parameter that a lambda refers to is not. Gradients of positions and extents pass
        through the window.
    use_dense_layer_for_center : bool
        Whether to add a linear layer of the features of each point, of which inputs and outputs must be the same.
    dense_kernel_initializer : str or function
        As `kernel_initializer`, of the weight (filters, in_channels) of that layer.
    allow_tf32, max_temp_mem_MB
        Have no effect.
    kernel_regularizer, bias_regularizer, dense_kernel_regularizer : functions of a tensor, optional
        `regularization` returns their sum.
    dtype : torch.float32 or torch.float64
        Of the parameters; by default torch's default dtype.

    Attributes
    ----------
    kernel : (*kernel_size, in_channels, filters) parameter
    bias : (filters,) parameter, or None
    offset : (3,) buffer
    dense.weight : (filters, in_channels) parameter
        With `use_dense_layer_for_center`.
    nns : SearchResult or None
        The neighbours that the last call searched, without distances.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> inp_positions, inp_features, out_positions = torch.rand(20, 3), torch.rand(20, 8), torch.rand(10, 3)
    >>> conv = kpt.ContinuousConv(filters=16, kernel_size=[3, 3, 3], window_function=lambda r_sqr: (1 - r_sqr) ** 3)
    >>> conv(inp_features, inp_positions, out_positions, extents=2.0).shape
    torch.Size([10, 16])
    >>> conv
    ContinuousConv(8, 16, kernel_size=(3, 3, 3), normalize=True, ball_to_cube_radial, linear)
    """

    def __init__(self, in_channels: int | None = None, filters: int | None = None,
                 kernel_size: int | Sequence[int] | None = None, activation: Activation = None, use_bias: bool = True,
                 kernel_initializer: Initializer = "uniform", bias_initializer: Initializer = "zeros",
                 align_corners: bool = True, coordinate_mapping: str = "ball_to_cube_radial",
                 interpolation: str = "linear", normalize: bool = True, radius_search_ignore_query_points: bool = False,
                 radius_search_metric: str = "L2", offset: torch.Tensor | Sequence[float] | None = None,
                 window_function: Callable[[torch.Tensor], torch.Tensor] | None = None,
                 use_dense_layer_for_center: bool = False, dense_kernel_initializer: Initializer = "glorot_uniform",
                 allow_tf32: bool = False, *, kernel_regularizer: Regularizer = None,
                 bias_regularizer: Regularizer = None, dense_kernel_regularizer: Regularizer = None,
                 max_temp_mem_MB: int = 64, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(
            in_channels, filters, kernel_size, activation, use_bias, kernel_initializer, bias_initializer,
            kernel_regularizer, bias_regularizer, normalize, offset, max_temp_mem_MB, allow_tf32, dtype
        )  # fmt: skip
        self.align_corners = checks.boolean("align_corners", align_corners)
        checks.choice("coordinate_mapping", coordinate_mapping, continuous.MAPPINGS)
        checks.choice("interpolation", interpolation, continuous.INTERPOLATIONS)
        self.coordinate_mapping, self.interpolation = coordinate_mapping, interpolation
        self.radius_search_ignore_query_points = checks.boolean(
            "radius_search_ignore_query_points", radius_search_ignore_query_points
        )
        checks.choice("radius_search_metric", radius_search_metric, open3d_search.METRICS)
        _check_function("window_function", window_function)
        self.radius_search_metric, self.window_function = radius_search_metric, window_function
        self.use_dense_layer_for_center = checks.boolean("use_dense_layer_for_center", use_dense_layer_for_center)
        initializers.check("dense_kernel_initializer", dense_kernel_initializer)
        _check_function("dense_kernel_regularizer", dense_kernel_regularizer)
        self.dense_kernel_initializer = dense_kernel_initializer
        self.dense_kernel_regularizer = dense_kernel_regularizer
        if use_dense_layer_for_center:
            self.dense = _Dense(in_channels, self.filters, dense_kernel_initializer, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new kernel, bias and kernel of the dense layer; those of unknown shape stay so."""
        super().reset_parameters()
        if self.use_dense_layer_for_center:
            self.dense.reset_parameters()

    def _regularized(self):
        dense = [(self.dense_kernel_regularizer, self.dense.weight)] if self.use_dense_layer_for_center else []
        return super()._regularized() + dense

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.coordinate_mapping}, {self.interpolation}"

    def search(self, inp_positions: Rows, out_positions: Rows, extents: float | torch.Tensor) -> Neighbors:
        """The neighbours that a call would search, for the argument `neighbors` of several layers.

        Those at most half an extent away, in the metric of the layer. If extents differ between axes, differences along
        each are divided by its extent first: with "L2" neighbours are in an ellipsoid.

        Parameters
        ----------
        inp_positions, out_positions, extents
            As in `forward`.
        """
        (inp_positions, out_positions), splits = _values(inp_positions, out_positions)
        extents = _checked_extents(extents, inp_positions, out_positions)
        return self._search(inp_positions, out_positions, extents, splits, False)[0]

    def forward(self, inp_features: Rows, inp_positions: Rows, out_positions: Rows, extents: float | torch.Tensor,
                inp_importance: Rows | None = None, fixed_radius_search_hash_table: SpatialHashTable | None = None,
                user_neighbors_index: torch.Tensor | None = None, user_neighbors_row_splits: torch.Tensor | None = None,
                user_neighbors_importance: torch.Tensor | None = None, *,
                neighbors: Neighbors | None = None) -> Rows:  # fmt: skip
        """The features (M, filters) of the outputs, as a RaggedTensor if the inputs are RaggedTensors.

        Parameters
        ----------
        inp_features : (N, in_channels) tensor
        inp_positions, out_positions : (N, 3) and (M, 3) tensors
            The first three may be RaggedTensors, of which the items do not see each other. Open3D takes those only in
            its sparse layers.
        extents : float or tensor
            Diameter of the filter: a number or (1,) for all outputs, (M,) for each, (1, 3) or (M, 3) for each axis.
        inp_importance : (N,) tensor, optional
            Factors of the inputs.
        fixed_radius_search_hash_table : SpatialHashTable, optional
            Checked, and not read. To search once for several layers, pass `neighbors`.
        user_neighbors_index, user_neighbors_row_splits : (E,) int32 or int64 and (M + 1,) int64 tensors, optional
            The neighbours of each output, which are then not searched.
        user_neighbors_importance : (E,) tensor, optional
            Their factors. As in Open3D, they and not the window function are used if the two above are passed.
        neighbors : Neighbors, optional
            The neighbours of each output, such as `search` returns; the window function is applied to them.
        """
        inp_features, inp_positions, out_positions, splits = self._checked_inputs(
            inp_features, inp_positions, out_positions
        )
        extents = _checked_extents(extents, inp_positions, out_positions)
        self._check_hash_table(fixed_radius_search_hash_table, inp_positions, splits and splits[0])
        is_user_list = user_neighbors_index is not None or user_neighbors_row_splits is not None
        if user_neighbors_importance is not None and not is_user_list:
            raise ValueError("user_neighbors_importance: expected None without user_neighbors_index, got a tensor")
        factors = None
        if is_user_list:
            if neighbors is not None:
                raise ValueError("neighbors: expected None with user_neighbors_index, got Neighbors")
            sizes: arguments.Sizes = {"M+1": (len(out_positions) + 1, "out_positions")}
            neighbors = arguments.neighbors(
                "user_neighbors_", user_neighbors_index, user_neighbors_row_splits, len(inp_positions), sizes
            )
            factors = self._importances(user_neighbors_importance)
        else:
            measure = None
            if neighbors is None:
                has_gradient = _requires_grad(inp_positions, out_positions, extents)
                with_measure = self.window_function is not None and not has_gradient
                neighbors, measure = self._search(inp_positions, out_positions, extents, splits, with_measure)
                self._searched = neighbors
            if self.window_function is not None:
                if measure is None:
                    measure = self._measure(inp_positions, out_positions, extents, neighbors)
                factors = self._window(measure)
        out = kpcore.torch.continuous_conv(
            inp_positions, out_positions, neighbors, inp_features, self.kernel, extents,
            coordinate_mapping=self.coordinate_mapping, interpolation=self.interpolation,
            align_corners=self.align_corners, normalize=self.normalize, offset=self._offset(inp_positions),
            importances=self._importances(inp_importance), neighbor_importances=factors,
        )  # fmt: skip
        if self.use_dense_layer_for_center:
            if len(inp_features) != len(out):
                raise ValueError(
                    f"out_positions: expected {len(inp_features)} rows to match inp_features, because "
                    f"use_dense_layer_for_center=True, got {len(out)}"
                )
            out = out + self.dense(inp_features)
        return self._output(out, splits)

    @torch.no_grad()
    def _search(self, inp_positions, out_positions, extents, splits, with_measure):
        """(neighbours, their distances as the window function gets them; None unless `with_measure`)"""
        metric, per_axis = self.radius_search_metric, _per_axis(extents)
        radius = 0.5 * (extents.amax(1) if per_axis else extents)
        if isinstance(radius, torch.Tensor) and radius.numel() == 1:
            radius = float(radius)
        bounds = dict(zip(("points_row_splits", "queries_row_splits"), splits or (None, None), strict=True))
        neighbors = kpcore.torch.radius_search(
            inp_positions, out_positions, radius, metric=metric.lower(), **bounds,
            ignore_query_point=self.radius_search_ignore_query_points, return_distances=with_measure and not per_axis
        )  # fmt: skip
        if per_axis:
            measure = self._measure(inp_positions, out_positions, extents, neighbors)
            point, query, row_splits = open3d_search.pairs(neighbors)
            measure, point, _, row_splits = open3d_search.kept_pairs(measure <= 1, measure, point, query, row_splits)
            neighbors = on_stream_of(point, _list_of_tensors, point, row_splits, len(inp_positions))
            return neighbors, measure if with_measure else None
        if not with_measure:
            return neighbors, None
        # Without a gradient the distances of the search serve: three gathers less than in `_measure`.
        distance = to_tensor(neighbors.stored_distance)
        if isinstance(radius, torch.Tensor):
            _, query, _ = open3d_search.pairs(neighbors)
            radius = radius.index_select(0, query)
        distance = distance / radius
        return neighbors, distance * distance if metric == "L2" else distance

    def _measure(self, inp_positions, out_positions, extents, neighbors):
        """Distances of pairs divided by the radius, squared for "L2"; differentiable in positions and extents."""
        where = inp_positions, out_positions, neighbors
        return blocks.relative_distances(kpcore.torch, where, extents, self.radius_search_metric.lower())

    def _window(self, measure):
        """The window function of the distances, as factors of the pairs."""
        factors = self.window_function(measure)
        if not isinstance(factors, torch.Tensor) or factors.shape != measure.shape:
            got = tuple(factors.shape) if isinstance(factors, torch.Tensor) else type(factors).__name__
            raise ValueError(f"window_function: expected a tensor of shape {tuple(measure.shape)}, got {got}")
        return factors.to(self.kernel.dtype)


class _SparseConvolution(_Convolution):
    """What `SparseConv` and `SparseConvTranspose` share: Open3D's rule of which pairs there are and their cells."""

    def __init__(self, in_channels: int | None = None, filters: int | None = None,
                 kernel_size: int | Sequence[int] | None = None, activation: Activation = None, use_bias: bool = True,
                 kernel_initializer: Initializer = "uniform", bias_initializer: Initializer = "zeros",
                 normalize: bool = False, offset: torch.Tensor | Sequence[float] | None = None,
                 allow_tf32: bool = False, *, kernel_regularizer: Regularizer = None,
                 bias_regularizer: Regularizer = None, max_temp_mem_MB: int = 64,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(
            in_channels, filters, kernel_size, activation, use_bias, kernel_initializer, bias_initializer,
            kernel_regularizer, bias_regularizer, normalize, offset, max_temp_mem_MB, allow_tf32, dtype
        )  # fmt: skip
        if len(set(self.kernel_size)) != 1:
            raise ValueError(f"kernel_size: expected the same size along all axes, got {self.kernel_size}")
        self.reset_parameters()

    def _default_offset(self):
        return (0.0 if self.kernel_size[0] % 2 else -0.5,) * 3

    @torch.no_grad()
    def _search(self, points, queries, voxel_size, splits):
        """The points in the window of each query, a cube of 1.02 times the size of the kernel."""
        bounds = dict(zip(("points_row_splits", "queries_row_splits"), splits or (None, None), strict=True))
        return kpcore.torch.radius_search(
            points, queries - self._offset(queries) * voxel_size, 0.51 * self.kernel_size[0] * voxel_size,
            metric="linf", **bounds
        )  # fmt: skip

    def _options(self, voxel_size, inp_positions):
        return {"extents": self.kernel_size[0] * voxel_size, "coordinate_mapping": "identity",
                "interpolation": "nearest_neighbor", "align_corners": False, "normalize": self.normalize,
                "offset": self._offset(inp_positions)}  # fmt: skip


class SparseConv(_SparseConvolution):
    """Open3D's sparse convolution with its weights, as a layer: voxels as floats, in the unit of the positions.

    With D the difference of the positions of an input and an output, in voxels, the input belongs to cell
    ``round(D) + (K - 1) // 2`` of the kernel along each axis, if it is within the window, where D is between
    ``-((K - 1) // 2)`` and ``K // 2``. So for inputs and outputs on a grid the layer is a dense convolution, padded
    by ``(K - 1) // 2`` before the input and ``K // 2`` after it.

    Positions are not rounded to a grid, as in Open3D. Off a grid, an input within 0.51 K voxels of the centre of the
    window belongs to the nearest cell, so that results change abruptly where D crosses the middle between two cells.
    `kpcore.kernel_map` takes integer coordinates only, and `SubmanifoldConv` and `StridedConv` are layers over it.

    The arguments are those of Open3D's layers for PyTorch, in their order, and of those for TensorFlow. A `state_dict`
    of Open3D's layer loads.

    Parameters
    ----------
    in_channels, filters, activation, use_bias, kernel_initializer, bias_initializer
        As in `ContinuousConv`.
    kernel_size : int, or 3 equal ints
        K.
    normalize : bool
        Whether to divide by the number of neighbours.
    offset : (3,) tensor or 3 numbers, optional
        Added to the coordinates in the filter, in cells; by default 0, for even K -0.5.
    allow_tf32, max_temp_mem_MB
        Have no effect.
    kernel_regularizer, bias_regularizer, dtype
        As in `ContinuousConv`.

    Attributes
    ----------
    kernel : (K, K, K, in_channels, filters) parameter
        Cells along z, y and x.
    bias : (filters,) parameter, or None
    offset : (3,) buffer
    nns : SearchResult or None
        The neighbours that the last call searched, without distances.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> positions = torch.randint(0, 10, [20, 3]) + 0.5
    >>> conv = kpt.SparseConv(filters=16, kernel_size=[3, 3, 3])
    >>> conv(torch.rand(20, 8), positions, positions, voxel_size=1.0).shape
    torch.Size([20, 16])
    """

    def search(self, inp_positions: Rows, out_positions: Rows, voxel_size: float | torch.Tensor) -> Neighbors:
        """The neighbours that a call would search, for the argument `neighbors` of layers of the same kernel size.

        Parameters
        ----------
        inp_positions, out_positions, voxel_size
            As in `forward`.
        """
        (inp_positions, out_positions), splits = _values(inp_positions, out_positions)
        return self._search(inp_positions, out_positions, _checked_voxel_size(voxel_size, inp_positions), splits)

    def forward(self, inp_features: Rows, inp_positions: Rows, out_positions: Rows, voxel_size: float | torch.Tensor,
                inp_importance: Rows | None = None,
                fixed_radius_search_hash_table: SpatialHashTable | None = None, *,
                neighbors: Neighbors | None = None) -> Rows:  # fmt: skip
        """The features (M, filters) of the outputs, as a RaggedTensor if the inputs are RaggedTensors.

        Parameters
        ----------
        inp_features : (N, in_channels) tensor
        inp_positions, out_positions : (N, 3) and (M, 3) tensors
            Positions of voxels. The first three may be RaggedTensors, of which the items do not see each other.
        voxel_size : float
            Or a tensor of one number.
        inp_importance : (N,) tensor, optional
            Factors of the inputs.
        fixed_radius_search_hash_table : SpatialHashTable, optional
            Checked, and not read. To search once for several layers, pass `neighbors`.
        neighbors : Neighbors, optional
            The neighbours of each output, such as `search` returns, which are then not searched.
        """
        inp_features, inp_positions, out_positions, splits = self._checked_inputs(
            inp_features, inp_positions, out_positions
        )
        voxel_size = _checked_voxel_size(voxel_size, inp_positions)
        self._check_hash_table(fixed_radius_search_hash_table, inp_positions, splits and splits[0])
        if neighbors is None:
            neighbors = self._searched = self._search(inp_positions, out_positions, voxel_size, splits)
        out = kpcore.torch.continuous_conv(
            inp_positions, out_positions, neighbors, inp_features, self.kernel,
            importances=self._importances(inp_importance), **self._options(voxel_size, inp_positions)
        )  # fmt: skip
        return self._output(out, splits)


class SparseConvTranspose(_SparseConvolution):
    """Open3D's transposed sparse convolution with its weights, as a layer; see `SparseConv`.

    An input belongs to the cell of an output in which, with inputs and outputs exchanged, `SparseConv` would have it.

    Parameters
    ----------
    in_channels, filters, kernel_size, activation, use_bias, kernel_initializer, bias_initializer, offset, allow_tf32
        As in `SparseConv`.
    normalize : bool
        Whether to divide the features of each input by the number of its outputs.
    max_temp_mem_MB, kernel_regularizer, bias_regularizer, dtype
        As in `SparseConv`.

    Attributes
    ----------
    kernel : (K, K, K, in_channels, filters) parameter
        Cells along z, y and x.
    bias : (filters,) parameter, or None
    offset : (3,) buffer
    nns : SearchResult or None
        The inputs of each output that the last call searched, without distances.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> coarse, fine = 2 * torch.randint(0, 5, [20, 3]) + 1.0, torch.randint(0, 10, [40, 3]) + 0.5
    >>> conv = kpt.SparseConvTranspose(in_channels=8, filters=16, kernel_size=[2, 2, 2])
    >>> conv(torch.rand(20, 8), coarse, fine, voxel_size=1.0).shape
    torch.Size([40, 16])
    """

    def search(self, inp_positions: Rows, out_positions: Rows, voxel_size: float | torch.Tensor) -> Neighbors:
        """The inputs of each output, for the argument `neighbors` of layers of the same kernel size.

        Parameters
        ----------
        inp_positions, out_positions, voxel_size
            As in `forward`.
        """
        (inp_positions, out_positions), splits = _values(inp_positions, out_positions)
        voxel_size = _checked_voxel_size(voxel_size, inp_positions)
        return self._search(out_positions, inp_positions, voxel_size, splits and splits[::-1]).transpose()

    def forward(self, inp_features: Rows, inp_positions: Rows, out_positions: Rows, voxel_size: float | torch.Tensor,
                out_importance: Rows | None = None,
                fixed_radius_search_hash_table: SpatialHashTable | None = None, *,
                neighbors: Neighbors | None = None) -> Rows:  # fmt: skip
        """The features (M, filters) of the outputs, as a RaggedTensor if the inputs are RaggedTensors.

        Parameters
        ----------
        inp_features, inp_positions, out_positions, voxel_size
            As in `SparseConv.forward`.
        out_importance : (M,) tensor, optional
            Factors of the outputs.
        fixed_radius_search_hash_table : SpatialHashTable, optional
            Of the outputs. Checked, and not read.
        neighbors : Neighbors, optional
            The inputs of each output, such as `search` returns, which are then not searched.
        """
        inp_features, inp_positions, out_positions, splits = self._checked_inputs(
            inp_features, inp_positions, out_positions
        )
        voxel_size = _checked_voxel_size(voxel_size, inp_positions)
        self._check_hash_table(fixed_radius_search_hash_table, out_positions, splits and splits[1])
        if neighbors is None:
            neighbors = self._search(out_positions, inp_positions, voxel_size, splits and splits[::-1]).transpose()
            self._searched = neighbors
        out = kpcore.torch.continuous_conv_transpose(
            inp_positions, out_positions, neighbors, inp_features, self.kernel,
            importances=self._importances(out_importance), **self._options(voxel_size, inp_positions)
        )  # fmt: skip
        return self._output(out, splits)


def _check_function(name, function):
    if function is not None and not callable(function):
        raise TypeError(f"{name}: expected a function of a tensor or None, got {type(function).__name__}")


def _values(*rows):
    """(tensors, their row_splits or None) of tensors or RaggedTensors."""
    if not isinstance(rows[0], open3d_ragged.RaggedTensor):
        return rows, None
    return [r.values for r in rows], [r.row_splits for r in rows]


def _checked_extents(extents, inp_positions, out_positions):
    """Extents as a number, or a tensor (), (1,), (M,), (1, 3) or (M, 3)."""
    is_tensor = isinstance(extents, torch.Tensor)

    def check():
        points = to_array("inp_positions", inp_positions)
        array = to_array("extents", checked(None, "extents", extents)) if is_tensor else extents
        sizes = checks.device_of(("inp_positions", points))
        on_arrays(continuous.checked_extents, array, points, len(out_positions), "out_positions", sizes)

    on_stream_of(inp_positions, check)
    if not is_tensor:
        return float(extents)
    arguments.check_above_zero("extents", extents)
    return extents.squeeze(1) if extents.ndim == 2 and extents.shape[1] == 1 else extents


def _checked_voxel_size(voxel_size, positions):
    if isinstance(voxel_size, torch.Tensor):
        if voxel_size.numel() != 1:
            raise ValueError(f"voxel_size: expected one number, got {tuple(voxel_size.shape)}")
        voxel_size = voxel_size.item()
    return checks.length("voxel_size", voxel_size, numpy_dtype("inp_positions", positions.dtype))


def _per_axis(extents):
    return isinstance(extents, torch.Tensor) and extents.ndim == 2


def _requires_grad(*values):
    return torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in values)


def _list_of_tensors(index, row_splits, num_points):
    arrays = [to_array("neighbors", a.contiguous()) for a in (index, row_splits)]
    return new_list(*arrays, num_points)
