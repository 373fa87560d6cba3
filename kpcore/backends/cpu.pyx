# Typed doors into src/*.cpp: allocate, release the GIL, call, turn a status into an exception. No maths, no checks:
# kpcore/*.py hands over contiguous NumPy arrays of agreeing shapes and dtypes.
from libc.stdint cimport int32_t, int64_t, uint64_t

import numpy as np

cimport numpy as cnp

cnp.import_array()

cdef extern from "cpu/kernels.h" namespace "kp" nogil:
    enum class DType(int):
        float32
        float64
        int32
        int64
        uint8

    struct Array:
        void* data
        int64_t rows, cols
        DType dtype

    enum class Status(int):
        ok
        out_of_memory
        not_finite
        out_of_range

    enum class VoxelPoint(int):
        pass

    enum class VoxelFeature(int):
        pass

    enum class Sort(int):
        pass

    enum class Metric(int):
        pass

    enum class Ignore(int):
        pass

    enum class IndexKind(int):
        grid
        tree

    cdef struct IndexPoints:
        IndexKind kind
        Array points, row_splits
        double cell
        int threads

    cdef struct Search:
        const void* index
        Array queries, queries_row_splits, radii
        double radius
        int64_t most
        Sort sort
        Metric metric
        Ignore ignore
        int threads

    enum class Sampling(int):
        pass

    enum class Influence(int):
        pass

    enum class Aggregation(int):
        pass

    enum class Normalization(int):
        pass

    cdef struct GridSubsample:
        Array points, features, labels, row_splits
        Array voxel_size, origin
        VoxelPoint position
        VoxelFeature feature
        int64_t ignore_label
        bint has_ignore_label
        int threads

    cdef struct Subsampled:
        Array points, features, labels, inverse, counts
        Array nearest

    cdef struct GridSubsampleGrad:
        Array features, inverse, counts, nearest, grad_out
        VoxelFeature feature
        int threads

    cdef struct FarthestPoints:
        Array points, row_splits, start, out_row_splits
        Sampling method
        int threads

    cdef struct Transpose:
        Array index, row_splits, distance, out_index, out_row_splits, out_distance
        int threads

    enum class Reduction(int):
        pass

    cdef struct CheckList:
        Array index, row_splits
        int64_t num_points
        Array out_index, out_row_splits
        int threads

    cdef struct NeighborReduce:
        Array features, index, row_splits, weights, shared
        Reduction reduction
        double empty, pad_value
        int64_t width
        int threads

    cdef struct SegmentReduce:
        Array features, row_splits
        Reduction reduction
        double empty
        int threads

    cdef struct KernelPoints:
        int num, dimension, fixed
        Array radii
        uint64_t seed
        int threads

    cdef struct KPConv:
        Array points, queries, index, row_splits, features, weights, kernel_points
        Array offsets, modulations
        Array transposed_index, transposed_row_splits
        double extent
        Influence influence
        Aggregation aggregation
        Normalization normalization
        int groups, factors
        bint depthwise
        int threads

    cdef struct KPConvGrads:
        Array weights, points, queries, kernel_points, offsets, modulations

    cdef struct Deformation:
        Array points, queries, index, row_splits
        Array kernel_points, offsets
        double extent, repulse_extent
        double weight
        int threads

    cdef struct DeformationGrads:
        Array offsets, kernel_points

    cdef struct Normalize:
        Array features, row_splits
        Array scale, shift
        Array mean, inverse_std
        bint is_given
        double negative_slope
        int threads

    cdef struct NormalizeGrad:
        Array grad_features, grad_scale, grad_shift

    enum class Activation(int):
        pass

    cdef struct Activate:
        Array features
        Activation activation
        double negative_slope
        int threads

    cdef struct Sgd:
        Array value, grad, moment
        double lr, momentum, weight_decay
        int threads

    cdef struct AdamW:
        Array value, grad, mean, square
        double keep, first, second, rate, inverse_root, eps
        int threads

    cdef struct Dropout:
        Array features
        double rate
        uint64_t seed
        int threads

    enum class CrossEntropyReduction(int):
        pass

    cdef struct CrossEntropy:
        Array logits, labels, class_weights
        int64_t ignore_index
        bint has_ignore_index
        CrossEntropyReduction reduction
        int threads

    cdef struct Columns:
        Array parts[4]
        int threads

    cdef struct Kernels:
        const char* isa
        Status (*build_index)(const IndexPoints&, void**) noexcept nogil
        double (*crowding)(const void*) noexcept nogil
        void (*free_index)(void*) noexcept nogil
        Status (*radius_search_count)(const Search&, int64_t*, void**) noexcept nogil
        Status (*radius_search_fill)(void*, int32_t*, void*) noexcept nogil
        void (*radius_search_free)(void*) noexcept nogil
        Status (*knn_search)(const Search&, int32_t*, void*, int64_t*) noexcept nogil
        Status (*transpose)(const Transpose&) noexcept nogil
        Status (*check_list)(const CheckList&) noexcept nogil
        int64_t (*longest_row)(const Array&, int) noexcept nogil
        Status (*pad_list)(const Array&, const Array&, int64_t, const Array&, int) noexcept nogil
        Status (*count_padded)(const Array&, int64_t, const Array&, int) noexcept nogil
        Status (*unpad)(const Array&, int64_t, const Array&, const Array&, int) noexcept nogil
        Status (*grid_subsample_count)(const GridSubsample&, int64_t*, void**) noexcept nogil
        Status (*grid_subsample_fill)(void*, const Subsampled&) noexcept nogil
        void (*grid_subsample_free)(void*) noexcept nogil
        Status (*grid_subsample_grad)(const GridSubsampleGrad&, const Array&) noexcept nogil
        Status (*farthest_points)(const FarthestPoints&, int32_t*) noexcept nogil
        Status (*neighbor_reduce)(const NeighborReduce&, const Array&, int32_t*) noexcept nogil
        Status (*neighbor_reduce_grad_weights)(const NeighborReduce&, const Array&, const Array&) noexcept nogil
        Status (*segment_reduce)(const SegmentReduce&, const Array&, int32_t*) noexcept nogil
        Status (*segment_reduce_grad)(const SegmentReduce&, const Array&) noexcept nogil
        Status (*unpool)(const Array&, const Array&, const Array&, int) noexcept nogil
        Status (*gather_rows)(const Array&, const Array&, const Array&, const Array&, int) noexcept nogil
        Status (*inverse_distance_weights)(const Array&, const Array&, double, const Array&, int) noexcept nogil
        Status (*kpconv)(const KPConv&, const Array&) noexcept nogil
        Status (*kpconv_grad_features)(const KPConv&, const Array&, const Array&) noexcept nogil
        Status (*kpconv_grads)(const KPConv&, const Array&, const KPConvGrads&) noexcept nogil
        Status (*kernel_points)(const KernelPoints&, double*) noexcept nogil
        Status (*lloyd)(const KernelPoints&, double*) noexcept nogil
        Status (*fitting_loss)(const Deformation&, const Array&, const Array&) noexcept nogil
        Status (*fitting_loss_grad)(const Deformation&, const Array&, const DeformationGrads&) noexcept nogil
        Status (*repulsion_loss)(const Deformation&, const Array&) noexcept nogil
        Status (*repulsion_loss_grad)(const Deformation&, const DeformationGrads&) noexcept nogil
        Status (*linear)(const Array&, const Array&, const Array&, const Array&, int) noexcept nogil
        Status (*linear_grad_features)(const Array&, const Array&, const Array&, int) noexcept nogil
        Status (*linear_grad_weights)(const Array&, const Array&, const Array&, int) noexcept nogil
        Status (*sum_rows)(const Array&, const Array&, int) noexcept nogil
        Status (*moments)(const Normalize&, const Array&, const Array&) noexcept nogil
        Status (*normalize)(const Normalize&, const Array&) noexcept nogil
        Status (*normalize_grad)(const Normalize&, const Array&, const NormalizeGrad&) noexcept nogil
        Status (*activate)(const Activate&, const Array&) noexcept nogil
        Status (*activate_grad)(const Activate&, const Array&, const Array&) noexcept nogil
        Status (*add)(const Array&, const Array&, const Array&, int) noexcept nogil
        Status (*sum_squares)(const Array&, double*, int) noexcept nogil
        Status (*sgd)(const Sgd&) noexcept nogil
        Status (*adamw)(const AdamW&) noexcept nogil
        Status (*dropout)(const Dropout&, const Array&) noexcept nogil
        Status (*softmax)(const Array&, const Array&, int) noexcept nogil
        Status (*softmax_grad)(const Array&, const Array&, const Array&, int) noexcept nogil
        Status (*cross_entropy)(const CrossEntropy&, const Array&) noexcept nogil
        Status (*cross_entropy_grad)(const CrossEntropy&, const Array&, const Array&) noexcept nogil
        Status (*concatenate)(const Columns&, const Array&) noexcept nogil
        Status (*split)(const Columns&, const Array&) noexcept nogil
        double (*fma_rate)(DType) noexcept nogil

    const Kernels& kernels() noexcept
    bint c_set_isa "kp::set_isa"(const char*) noexcept
    const char* const* c_isas "kp::isas"() noexcept
    bint c_has_openmp "kp::has_openmp"() noexcept
    const char* c_openmp_library "kp::openmp_library"() noexcept
    void c_pause_threads "kp::pause_threads"() noexcept
    const char* c_version "KP_VERSION"


class NotFinite(Exception):
    """A coordinate is NaN or infinite, or distances overflow or vanish; which is for the caller to find."""


class OutOfRange(Exception):
    """Too many voxels along an axis, a label that is no class, a number of no row; which one is for the caller to find."""


cdef DTYPES = {np.dtype(name): code for code, name in enumerate(("float32", "float64", "int32", "int64", "uint8"))}


cdef Array view(cnp.ndarray a) except *:
    """The array's pointer, rows, columns and dtype; None is an array not given."""
    cdef Array v
    v.data = NULL
    v.rows = v.cols = 0
    v.dtype = <DType>0
    if a is None:
        return v
    v.data = cnp.PyArray_DATA(a)
    v.dtype = <DType><int>DTYPES[a.dtype]
    v.cols = a.shape[a.ndim - 1] if a.ndim > 1 else 1
    v.rows = 1
    for i in range(a.ndim - 1 if a.ndim > 1 else a.ndim):
        v.rows *= a.shape[i]
    return v


cdef int raise_for(Status status) except -1:
    if status == Status.out_of_memory:
        raise MemoryError("kpcore: not enough memory for scratch space")
    if status == Status.not_finite:
        raise NotFinite
    if status == Status.out_of_range:
        raise OutOfRange
    return 0


cdef class Index:
    """Points ready to be searched, a grid of cells or a kd-tree; never changed, so any thread may search it."""

    cdef void* data
    cdef readonly int64_t num_points
    cdef readonly object dtype

    def __cinit__(self):
        self.data = NULL

    def __init__(self, points, row_splits, cell, int threads):
        """A grid of cells that wide, or a kd-tree if `cell` is None."""
        cdef IndexPoints args
        args.kind = IndexKind.tree if cell is None else IndexKind.grid
        args.points = view(points)
        args.row_splits = view(row_splits)
        args.cell = 0 if cell is None else cell
        args.threads = threads
        self.num_points = len(points)
        self.dtype = points.dtype
        cdef Status status
        with nogil:
            status = kernels().build_index(args, &self.data)
        raise_for(status)

    @property
    def crowding(self):
        """Points in the cell of a point, on average; infinity for a tree, of which it is not known."""
        return kernels().crowding(self.data)

    def __dealloc__(self):
        if self.data != NULL:
            kernels().free_index(self.data)


cdef Search search_arguments(Index index, queries, queries_row_splits, radius, int64_t most, int sort, int metric,
                             int ignore, int threads) except *:
    cdef Search args
    args.index = index.data
    args.queries = view(queries)
    args.queries_row_splits = view(queries_row_splits)
    if isinstance(radius, np.ndarray):
        args.radii = view(radius)
        args.radius = 0
    else:
        args.radii = view(None)
        args.radius = radius
    args.most = most
    args.sort = <Sort>sort
    args.metric = <Metric>metric
    args.ignore = <Ignore>ignore
    args.threads = threads
    return args


def radius_search(Index index, queries, queries_row_splits, radius, max_neighbors, int sort, int metric, int ignore,
                  bint return_distances, bint count_only, check_room, int threads):
    """(row_splits, index or None, distance or None); `check_room` is told how many neighbours and bytes there will be."""
    cdef Search args = search_arguments(index, queries, queries_row_splits, radius,
                                        -1 if max_neighbors is None else max_neighbors, sort, metric, ignore, threads)
    cdef void* plan = NULL
    cdef Status status
    row_splits = np.empty((index.num_points if queries is None else len(queries)) + 1, np.int64)
    cdef int64_t* splits = <int64_t*>cnp.PyArray_DATA(row_splits)
    cdef int32_t* to_index
    cdef void* to_distance
    try:
        with nogil:
            status = kernels().radius_search_count(args, splits, &plan)
        raise_for(status)
        if count_only:
            return row_splits, None, None
        check_room(int(row_splits[-1]), int(row_splits[-1]) * (4 + return_distances * index.dtype.itemsize))
        found = np.empty(row_splits[-1], np.int32)
        distance = np.empty(row_splits[-1], index.dtype) if return_distances else None
        to_index = <int32_t*>view(found).data
        to_distance = view(distance).data
        with nogil:
            status = kernels().radius_search_fill(plan, to_index, to_distance)
        raise_for(status)
        return row_splits, found, distance
    finally:
        if plan != NULL:
            with nogil:
                kernels().radius_search_free(plan)


def knn_search(Index index, queries, queries_row_splits, radius, int64_t k, int sort, int metric, int ignore,
               bint return_distances, check_room, int threads):
    """(row_splits, index, distance or None): the k nearest within the radius, which may be infinite"""
    cdef Search args = search_arguments(index, queries, queries_row_splits, radius, k, sort, metric, ignore, threads)
    num_queries = index.num_points if queries is None else len(queries)
    check_room(num_queries * k, num_queries * k * (4 + return_distances * index.dtype.itemsize))
    counts = np.empty(num_queries, np.int64)
    found = np.empty((num_queries, k), np.int32)
    distance = np.empty((num_queries, k), index.dtype) if return_distances else None
    cdef int64_t* to_counts = <int64_t*>view(counts).data
    cdef int32_t* to_index = <int32_t*>view(found).data
    cdef void* to_distance = view(distance).data
    cdef Status status
    with nogil:
        status = kernels().knn_search(args, to_index, to_distance, to_counts)
    raise_for(status)
    row_splits = np.zeros(num_queries + 1, np.int64)
    np.cumsum(counts, out=row_splits[1:])
    if row_splits[num_queries] == num_queries * k:
        return row_splits, found.reshape(-1), None if distance is None else distance.reshape(-1)
    there = np.arange(k) < counts[:, None]
    return row_splits, found[there], None if distance is None else distance[there]


def transpose(index, row_splits, distance, int64_t num_points, int threads):
    """(index, row_splits, distance or None) of the columns"""
    out_index = np.empty(row_splits[-1], np.int32)
    out_row_splits = np.empty(num_points + 1, np.int64)
    out_distance = None if distance is None else np.empty(row_splits[-1], distance.dtype)
    cdef Transpose args
    args.index = view(index)
    args.row_splits = view(row_splits)
    args.distance = view(distance)
    args.out_index = view(out_index)
    args.out_row_splits = view(out_row_splits)
    args.out_distance = view(out_distance)
    args.threads = threads
    cdef Status status
    with nogil:
        status = kernels().transpose(args)
    raise_for(status)
    return out_index, out_row_splits, out_distance


cdef class Memory:
    """What a read-only array lies in. It offers no buffer, so that NumPy never makes such an array writable again."""

    cdef object array

    def __init__(self, array):
        self.array = array


def frozen(cnp.ndarray array not None):
    """Another array in the same memory, which cannot be written to or made writable."""
    cdef cnp.ndarray same = cnp.PyArray_SimpleNewFromData(array.ndim, array.shape, cnp.PyArray_TYPE(array),
                                                          cnp.PyArray_DATA(array))
    cnp.set_array_base(same, Memory(array))
    cnp.PyArray_CLEARFLAGS(same, cnp.NPY_ARRAY_WRITEABLE)
    return same


def checked_list(index, row_splits, int64_t num_points, bint copy, int threads):
    """(index int32, row_splits int64) of a list from outside; with `copy` the index is always a new array"""
    out_index = np.empty(len(index), np.int32) if copy or index.dtype != np.int32 else None
    out_row_splits = np.empty(len(row_splits), np.int64)
    cdef CheckList args
    args.index = view(index)
    args.row_splits = view(row_splits)
    args.num_points = num_points
    args.out_index = view(out_index)
    args.out_row_splits = view(out_row_splits)
    args.threads = threads
    cdef Status status
    with nogil:
        status = kernels().check_list(args)
    raise_for(status)
    return index if out_index is None else out_index, out_row_splits


def longest_row(row_splits, int threads):
    """An int; 0 without rows"""
    cdef Array bounds = view(row_splits)
    cdef int64_t longest
    with nogil:
        longest = kernels().longest_row(bounds, threads)
    return longest


def padded(index, row_splits, int64_t width, int64_t fill, dtype, int threads):
    """(M, width) of that dtype"""
    out = np.empty((len(row_splits) - 1, width), dtype)
    cdef Array pairs = view(index), bounds = view(row_splits), to = view(out)
    cdef Status status
    with nogil:
        status = kernels().pad_list(pairs, bounds, fill, to, threads)
    raise_for(status)
    return out


def unpadded(matrix, int64_t num_points, int threads):
    """(index, row_splits) of a matrix (M, width) in which -1 and num_points are none"""
    row_splits = np.empty(len(matrix) + 1, np.int64)
    cdef Array padded_rows = view(matrix), bounds = view(row_splits), to
    padded_rows.cols = matrix.shape[1]
    padded_rows.rows = len(matrix)
    cdef Status status
    with nogil:
        status = kernels().count_padded(padded_rows, num_points, bounds, threads)
    raise_for(status)
    index = np.empty(row_splits[-1], np.int32)
    to = view(index)
    with nogil:
        status = kernels().unpad(padded_rows, num_points, bounds, to, threads)
    raise_for(status)
    return index, row_splits


def grid_subsample(points, features, labels, row_splits, voxel_size, origin, int position, int feature,
                   bint return_nearest, ignore_label, int threads):
    """(points, features or None, labels or None, row_splits, inverse, counts, nearest or None)"""
    cdef GridSubsample args
    args.points = view(points)
    args.features = view(features)
    args.labels = view(labels)
    args.row_splits = view(row_splits)
    args.voxel_size = view(voxel_size)
    args.origin = view(origin)
    args.position = <VoxelPoint>position
    args.feature = <VoxelFeature>feature
    args.has_ignore_label = ignore_label is not None
    args.ignore_label = 0 if ignore_label is None else ignore_label
    args.threads = threads
    cdef Subsampled out
    cdef void* plan = NULL
    cdef Status status
    out_row_splits = np.empty(len(row_splits), np.int64)
    cdef int64_t* splits = <int64_t*>cnp.PyArray_DATA(out_row_splits)
    try:
        with nogil:
            status = kernels().grid_subsample_count(args, splits, &plan)
        raise_for(status)
        voxels = out_row_splits[-1]
        out_points = np.empty((voxels, points.shape[1]), points.dtype)
        out_features = None if features is None else np.empty((voxels, *features.shape[1:]), features.dtype)
        out_labels = None if labels is None else np.empty(voxels, labels.dtype)
        inverse = np.empty(len(points), np.int32)
        counts = np.empty(voxels, np.int32)
        nearest = np.empty(voxels, np.int32) if return_nearest else None
        out.points = view(out_points)
        out.features = view(out_features)
        out.labels = view(out_labels)
        out.inverse = view(inverse)
        out.counts = view(counts)
        out.nearest = view(nearest)
        with nogil:
            status = kernels().grid_subsample_fill(plan, out)
        raise_for(status)
        return out_points, out_features, out_labels, out_row_splits, inverse, counts, nearest
    finally:
        if plan != NULL:
            with nogil:
                kernels().grid_subsample_free(plan)


def grid_subsample_grad(features, inverse, counts, nearest, int feature, grad_out, int threads):
    """(N, C)"""
    cdef GridSubsampleGrad args
    args.features = view(features)
    args.inverse = view(inverse)
    args.counts = view(counts)
    args.nearest = view(nearest)
    args.grad_out = view(grad_out)
    args.feature = <VoxelFeature>feature
    args.threads = threads
    grad_features = np.empty_like(features)
    cdef Array to = view(grad_features)
    cdef Status status
    with nogil:
        status = kernels().grid_subsample_grad(args, to)
    raise_for(status)
    return grad_features


def farthest_points(points, row_splits, start, out_row_splits, int64_t total, int method, int threads):
    """(S,) of the stacked points"""
    cdef FarthestPoints args
    args.points = view(points)
    args.row_splits = view(row_splits)
    args.start = view(start)
    args.out_row_splits = view(out_row_splits)
    args.method = <Sampling>method
    args.threads = threads
    index = np.empty(total, np.int32)
    cdef int32_t* to = <int32_t*>cnp.PyArray_DATA(index)
    cdef Status status
    with nogil:
        status = kernels().farthest_points(args, to)
    raise_for(status)
    return index


def neighbor_reduce(features, index, row_splits, weights, shared, int reduction, double empty, double pad_value,
                    int64_t width, bint return_choice, int threads):
    """(M, C) and, if asked for, the chosen rows (M, C) or None"""
    cdef NeighborReduce args
    args.features = view(features)
    args.index = view(index)
    args.row_splits = view(row_splits)
    args.weights = view(weights)
    args.shared = view(shared)
    args.reduction = <Reduction>reduction
    args.empty = empty
    args.pad_value = pad_value
    args.width = width
    args.threads = threads
    out = np.empty((len(row_splits) - 1, features.shape[1]), features.dtype)
    choice = np.empty(out.shape, np.int32) if return_choice else None
    cdef Array to = view(out)
    cdef int32_t* to_choice = <int32_t*>view(choice).data
    cdef Status status
    with nogil:
        status = kernels().neighbor_reduce(args, to, to_choice)
    raise_for(status)
    return out, choice


def neighbor_reduce_grad_weights(features, index, row_splits, int reduction, grad_out, int threads):
    """(E,)"""
    cdef NeighborReduce args
    args.features = view(features)
    args.index = view(index)
    args.row_splits = view(row_splits)
    args.weights = args.shared = view(None)
    args.reduction = <Reduction>reduction
    args.empty = args.pad_value = args.width = 0
    args.threads = threads
    grad_weights = np.empty(len(index), features.dtype)
    grad_weights[row_splits[-1]:] = 0
    cdef Array given = view(grad_out), to = view(grad_weights)
    cdef Status status
    with nogil:
        status = kernels().neighbor_reduce_grad_weights(args, given, to)
    raise_for(status)
    return grad_weights


cdef SegmentReduce segment_arguments(features, row_splits, int reduction, double empty, int threads) except *:
    cdef SegmentReduce args
    args.features = view(features)
    args.row_splits = view(row_splits)
    args.reduction = <Reduction>reduction
    args.empty = empty
    args.threads = threads
    return args


def segment_reduce(features, row_splits, int reduction, double empty, bint return_choice, int threads):
    """(B, C) and, if asked for, the chosen rows (B, C) or None"""
    cdef SegmentReduce args = segment_arguments(features, row_splits, reduction, empty, threads)
    out = np.empty((len(row_splits) - 1, features.shape[1]), features.dtype)
    choice = np.empty(out.shape, np.int32) if return_choice else None
    cdef Array to = view(out)
    cdef int32_t* to_choice = <int32_t*>view(choice).data
    cdef Status status
    with nogil:
        status = kernels().segment_reduce(args, to, to_choice)
    raise_for(status)
    return out, choice


def segment_reduce_grad(grad_out, row_splits, int reduction, int64_t num_rows, int threads):
    """(N, C) of a sum or mean"""
    cdef SegmentReduce args = segment_arguments(grad_out, row_splits, reduction, 0, threads)
    grad_features = np.empty((num_rows, grad_out.shape[1]), grad_out.dtype)
    cdef Array to = view(grad_features)
    cdef Status status
    with nogil:
        status = kernels().segment_reduce_grad(args, to)
    raise_for(status)
    return grad_features


def unpool(choice, grad_out, int64_t num_rows, int threads):
    """(num_rows, C): every value of the gradient at the row that was chosen for it"""
    grad_features = np.empty((num_rows, grad_out.shape[1]), grad_out.dtype)
    cdef Array chosen = view(choice), given = view(grad_out), to = view(grad_features)
    cdef Status status
    with nogil:
        status = kernels().unpool(chosen, given, to, threads)
    raise_for(status)
    return grad_features


def gather_rows(features, index, row_splits, int threads):
    """(M, C): the rows of the index or, with row_splits, of the first entry of each range, zeros where it is empty"""
    num_rows = len(index) if row_splits is None else len(row_splits) - 1
    out = np.empty((num_rows, features.shape[1]), features.dtype)
    cdef Array rows = view(features), numbers = view(index), splits = view(row_splits), to = view(out)
    cdef Status status
    with nogil:
        status = kernels().gather_rows(rows, numbers, splits, to, threads)
    raise_for(status)
    return out


def inverse_distance_weights(distance, row_splits, double power, dtype, int threads):
    """(E,) of that dtype; every row sums to one"""
    weights = np.empty(len(distance), dtype)
    cdef Array given = view(distance), splits = view(row_splits), to = view(weights)
    cdef Status status
    with nogil:
        status = kernels().inverse_distance_weights(given, splits, power, to, threads)
    raise_for(status)
    return weights


def kernel_points(int num, int dimension, int fixed, radii, uint64_t seed, int threads):
    """(num, dimension) float64, before any scaling"""
    cdef KernelPoints args
    args.num = num
    args.dimension = dimension
    args.fixed = fixed
    args.radii = view(radii)
    args.seed = seed
    args.threads = threads
    out = np.empty((num, dimension), np.float64)
    cdef double* to = <double*>cnp.PyArray_DATA(out)
    cdef Status status
    with nogil:
        status = kernels().kernel_points(args, to)
    raise_for(status)
    return out


def lloyd(int num, int dimension, int fixed, uint64_t seed, int threads):
    """(num, dimension) float64, in the unit ball"""
    cdef KernelPoints args
    args.num = num
    args.dimension = dimension
    args.fixed = fixed
    args.radii = view(None)
    args.seed = seed
    args.threads = threads
    out = np.empty((num, dimension), np.float64)
    cdef double* to = <double*>cnp.PyArray_DATA(out)
    cdef Status status
    with nogil:
        status = kernels().lloyd(args, to)
    raise_for(status)
    return out


cdef KPConv kpconv_arguments(problem) except *:
    """Of kpcore.kpconv.Problem."""
    cdef KPConv args
    args.points = view(problem.points)
    args.queries = view(problem.queries)
    args.index = view(problem.index)
    args.row_splits = view(problem.row_splits)
    args.features = view(problem.features)
    args.weights = view(problem.weights)
    args.kernel_points = view(problem.kernel_points)
    args.offsets = view(problem.offsets)
    args.modulations = view(problem.modulations)
    args.transposed_index = args.transposed_row_splits = view(None)
    args.extent = problem.extent
    args.influence = <Influence><int>problem.influence
    args.aggregation = <Aggregation><int>problem.aggregation
    args.normalization = <Normalization><int>problem.normalization
    args.groups = problem.groups
    args.factors = problem.factors
    args.depthwise = problem.weights.ndim == 2
    args.threads = problem.threads
    return args


def kpconv(problem):
    """(M, Cout)"""
    cdef KPConv args = kpconv_arguments(problem)
    out = np.empty((len(problem.queries), problem.weights.shape[problem.weights.ndim - 1]), problem.weights.dtype)
    cdef Array to = view(out)
    cdef Status status
    with nogil:
        status = kernels().kpconv(args, to)
    raise_for(status)
    return out


def kpconv_grad_features(problem, transposed_index, transposed_row_splits, grad_out):
    """(N, Cin)"""
    cdef KPConv args = kpconv_arguments(problem)
    args.transposed_index = view(transposed_index)
    args.transposed_row_splits = view(transposed_row_splits)
    grad_features = np.empty_like(problem.features)
    cdef Array given = view(grad_out), to = view(grad_features)
    cdef Status status
    with nogil:
        status = kernels().kpconv_grad_features(args, given, to)
    raise_for(status)
    return grad_features


def kpconv_grads(problem, grad_out, needs):
    """{name: gradient} of those of all but the features that are in `needs`"""
    cdef KPConv args = kpconv_arguments(problem)
    names = ("weights", "points", "queries", "kernel_points", "offsets", "modulations")
    grads = {name: np.empty_like(getattr(problem, name)) if name in needs else None for name in names}
    cdef KPConvGrads to
    to.weights = view(grads["weights"])
    to.points = view(grads["points"])
    to.queries = view(grads["queries"])
    to.kernel_points = view(grads["kernel_points"])
    to.offsets = view(grads["offsets"])
    to.modulations = view(grads["modulations"])
    cdef Array given = view(grad_out)
    cdef Status status
    with nogil:
        status = kernels().kpconv_grads(args, given, to)
    raise_for(status)
    return {name: grad for name, grad in grads.items() if grad is not None}


cdef Deformation deformation_arguments(kernel_points, offsets, double extent, double repulse_extent, double weight,
                                       int threads) except *:
    cdef Deformation args
    args.points = args.queries = args.index = args.row_splits = view(None)
    args.kernel_points = view(kernel_points)
    args.offsets = view(offsets)
    args.extent = extent
    args.repulse_extent = repulse_extent
    args.weight = weight
    args.threads = threads
    return args


def fitting_loss(points, queries, index, row_splits, kernel_points, offsets, double extent, double weight, int threads):
    """(loss (), nearest (M, K))"""
    cdef Deformation args = deformation_arguments(kernel_points, offsets, extent, 0, weight, threads)
    args.points = view(points)
    args.queries = view(queries)
    args.index = view(index)
    args.row_splits = view(row_splits)
    loss = np.empty((), offsets.dtype)
    nearest = np.empty(offsets.shape[:2], np.int32)
    cdef Array to_loss = view(loss), to_nearest = view(nearest)
    cdef Status status
    with nogil:
        status = kernels().fitting_loss(args, to_loss, to_nearest)
    raise_for(status)
    return loss, nearest


def fitting_loss_grad(points, queries, index, row_splits, kernel_points, offsets, double extent, double weight, nearest,
                      double grad_out, bint return_offsets, bint return_kernel_points, int threads):
    """(grad_offsets (M, K, D) or None, grad_kernel_points (K, D) or None)"""
    cdef Deformation args = deformation_arguments(kernel_points, offsets, extent, 0, weight * grad_out, threads)
    args.points = view(points)
    args.queries = view(queries)
    args.index = view(index)
    args.row_splits = view(row_splits)
    grad_offsets = np.empty_like(offsets) if return_offsets else None
    grad_kernel_points = np.empty_like(kernel_points) if return_kernel_points else None
    cdef Array given = view(nearest)
    cdef DeformationGrads to
    to.offsets = view(grad_offsets)
    to.kernel_points = view(grad_kernel_points)
    cdef Status status
    with nogil:
        status = kernels().fitting_loss_grad(args, given, to)
    raise_for(status)
    return grad_offsets, grad_kernel_points


def repulsion_loss(kernel_points, offsets, double extent, double repulse_extent, double weight, int threads):
    """()"""
    cdef Deformation args = deformation_arguments(kernel_points, offsets, extent, repulse_extent, weight, threads)
    loss = np.empty((), offsets.dtype)
    cdef Array to = view(loss)
    cdef Status status
    with nogil:
        status = kernels().repulsion_loss(args, to)
    raise_for(status)
    return loss


def repulsion_loss_grad(kernel_points, offsets, double extent, double repulse_extent, double weight,
                        double grad_out, bint return_offsets, bint return_kernel_points, int threads):
    """(grad_offsets (M, K, D) or None, grad_kernel_points (K, D) or None), the other kernel points held fixed"""
    cdef Deformation args = deformation_arguments(kernel_points, offsets, extent, repulse_extent, weight * grad_out,
                                                  threads)
    grad_offsets = np.empty_like(offsets) if return_offsets else None
    grad_kernel_points = np.empty_like(kernel_points) if return_kernel_points else None
    cdef DeformationGrads to
    to.offsets = view(grad_offsets)
    to.kernel_points = view(grad_kernel_points)
    cdef Status status
    with nogil:
        status = kernels().repulsion_loss_grad(args, to)
    raise_for(status)
    return grad_offsets, grad_kernel_points


def linear(features, weights, bias, int threads):
    """(N, Cout)"""
    out = np.empty((len(features), weights.shape[1]), features.dtype)
    cdef Array left = view(features), right = view(weights), start = view(bias), to = view(out)
    cdef Status status
    with nogil:
        status = kernels().linear(left, right, start, to, threads)
    raise_for(status)
    return out


def linear_grad_features(weights, grad_out, int threads):
    """(N, Cin)"""
    grad_features = np.empty((len(grad_out), weights.shape[0]), grad_out.dtype)
    cdef Array right = view(weights), given = view(grad_out), to = view(grad_features)
    cdef Status status
    with nogil:
        status = kernels().linear_grad_features(right, given, to, threads)
    raise_for(status)
    return grad_features


def linear_grad_weights(features, grad_out, int threads):
    """(Cin, Cout)"""
    grad_weights = np.empty((features.shape[1], grad_out.shape[1]), grad_out.dtype)
    cdef Array left = view(features), given = view(grad_out), to = view(grad_weights)
    cdef Status status
    with nogil:
        status = kernels().linear_grad_weights(left, given, to, threads)
    raise_for(status)
    return grad_weights


def sum_rows(rows, int threads):
    """(C,)"""
    sums = np.empty(rows.shape[1], rows.dtype)
    cdef Array given = view(rows), to = view(sums)
    cdef Status status
    with nogil:
        status = kernels().sum_rows(given, to, threads)
    raise_for(status)
    return sums


def moments(features, row_splits, int64_t groups, int threads):
    """(mean, variance) (B, groups) float64, of all values of an item and group; 0 of none"""
    cdef Normalize args
    args.features = view(features)
    args.row_splits = view(row_splits)
    args.scale = args.shift = args.mean = args.inverse_std = view(None)
    args.is_given = False
    args.negative_slope = 1
    args.threads = threads
    mean = np.empty((len(row_splits) - 1, groups), np.float64)
    variance = np.empty_like(mean)
    cdef Array to_mean = view(mean), to_variance = view(variance)
    cdef Status status
    with nogil:
        status = kernels().moments(args, to_mean, to_variance)
    raise_for(status)
    return mean, variance


cdef Normalize normalize_arguments(features, row_splits, scale, shift, mean, inverse_std, bint is_given,
                                   double negative_slope, int threads) except *:
    cdef Normalize args
    args.features = view(features)
    args.row_splits = view(row_splits)
    args.scale = view(scale)
    args.shift = view(shift)
    args.mean = view(mean)
    args.inverse_std = view(inverse_std)
    args.is_given = is_given
    args.negative_slope = negative_slope
    args.threads = threads
    return args


def normalize(features, row_splits, scale, shift, mean, inverse_std, double negative_slope, int threads):
    """(N, C)"""
    cdef Normalize args = normalize_arguments(features, row_splits, scale, shift, mean, inverse_std, False,
                                              negative_slope, threads)
    out = np.empty_like(features)
    cdef Array to = view(out)
    cdef Status status
    with nogil:
        status = kernels().normalize(args, to)
    raise_for(status)
    return out


def normalize_grad(features, row_splits, scale, shift, mean, inverse_std, bint is_given, double negative_slope,
                   grad_out, bint features_needed, bint scale_needed, bint shift_needed, int threads):
    """(grad_features (N, C), grad_scale (C,), grad_shift (C,)), None for those that are not needed"""
    cdef Normalize args = normalize_arguments(features, row_splits, scale, shift, mean, inverse_std, is_given,
                                              negative_slope, threads)
    grad_features = np.empty_like(features) if features_needed else None
    grad_scale = np.empty_like(scale) if scale_needed else None
    grad_shift = np.empty_like(shift) if shift_needed else None
    cdef NormalizeGrad to
    to.grad_features = view(grad_features)
    to.grad_scale = view(grad_scale)
    to.grad_shift = view(grad_shift)
    cdef Array given = view(grad_out)
    cdef Status status
    with nogil:
        status = kernels().normalize_grad(args, given, to)
    raise_for(status)
    return grad_features, grad_scale, grad_shift


def activate(features, int activation, double negative_slope, int threads):
    """an array like the features"""
    cdef Activate args
    args.features = view(features)
    args.activation = <Activation>activation
    args.negative_slope = negative_slope
    args.threads = threads
    out = np.empty_like(features)
    cdef Array to = view(out)
    cdef Status status
    with nogil:
        status = kernels().activate(args, to)
    raise_for(status)
    return out


def activate_grad(features, int activation, double negative_slope, grad_out, int threads):
    """an array like the features"""
    cdef Activate args
    args.features = view(features)
    args.activation = <Activation>activation
    args.negative_slope = negative_slope
    args.threads = threads
    grad_features = np.empty_like(features)
    cdef Array given = view(grad_out), to = view(grad_features)
    cdef Status status
    with nogil:
        status = kernels().activate_grad(args, given, to)
    raise_for(status)
    return grad_features


def add(first, second, int threads):
    """an array like both"""
    out = np.empty_like(first)
    cdef Array a = view(first), b = view(second), to = view(out)
    cdef Status status
    with nogil:
        status = kernels().add(a, b, to, threads)
    raise_for(status)
    return out


def sum_squares(values, int threads):
    """A float, of an array of any shape"""
    cdef Array numbers = view(values)
    cdef double total = 0
    cdef Status status
    with nogil:
        status = kernels().sum_squares(numbers, &total, threads)
    raise_for(status)
    return total


def sgd(value, grad, moment, double lr, double momentum, double weight_decay, int threads):
    """None: changes value and moment"""
    cdef Sgd args
    args.value, args.grad, args.moment = view(value), view(grad), view(moment)
    args.lr, args.momentum, args.weight_decay = lr, momentum, weight_decay
    args.threads = threads
    cdef Status status
    with nogil:
        status = kernels().sgd(args)
    raise_for(status)


def adamw(value, grad, mean, square, double keep, double first, double second, double rate, double inverse_root,
          double eps, int threads):
    """None: changes value, mean and square"""
    cdef AdamW args
    args.value, args.grad, args.mean, args.square = view(value), view(grad), view(mean), view(square)
    args.keep, args.first, args.second, args.rate = keep, first, second, rate
    args.inverse_root, args.eps = inverse_root, eps
    args.threads = threads
    cdef Status status
    with nogil:
        status = kernels().adamw(args)
    raise_for(status)


def dropout(features, double rate, uint64_t seed, int threads):
    """an array like the features"""
    cdef Dropout args
    args.features = view(features)
    args.rate = rate
    args.seed = seed
    args.threads = threads
    out = np.empty_like(features)
    cdef Array to = view(out)
    cdef Status status
    with nogil:
        status = kernels().dropout(args, to)
    raise_for(status)
    return out


def softmax(features, int threads):
    """(N, C)"""
    out = np.empty_like(features)
    cdef Array given = view(features), to = view(out)
    cdef Status status
    with nogil:
        status = kernels().softmax(given, to, threads)
    raise_for(status)
    return out


def softmax_grad(features, grad_out, int threads):
    """(N, C)"""
    grad_features = np.empty_like(features)
    cdef Array rows = view(features), given = view(grad_out), to = view(grad_features)
    cdef Status status
    with nogil:
        status = kernels().softmax_grad(rows, given, to, threads)
    raise_for(status)
    return grad_features


cdef CrossEntropy cross_entropy_arguments(logits, labels, ignore_index, class_weights, int reduction,
                                          int threads) except *:
    cdef CrossEntropy args
    args.logits = view(logits)
    args.labels = view(labels)
    args.class_weights = view(class_weights)
    args.has_ignore_index = ignore_index is not None
    args.ignore_index = 0 if ignore_index is None else ignore_index
    args.reduction = <CrossEntropyReduction>reduction
    args.threads = threads
    return args


def cross_entropy(logits, labels, ignore_index, class_weights, int reduction, bint each, int threads):
    """(N,) of `each` row, or 0-d"""
    cdef CrossEntropy args = cross_entropy_arguments(logits, labels, ignore_index, class_weights, reduction, threads)
    out = np.empty(len(logits) if each else (), logits.dtype)
    cdef Array to = view(out)
    cdef Status status
    with nogil:
        status = kernels().cross_entropy(args, to)
    raise_for(status)
    return out


def cross_entropy_grad(logits, labels, ignore_index, class_weights, int reduction, grad_out, int threads):
    """(N, C)"""
    cdef CrossEntropy args = cross_entropy_arguments(logits, labels, ignore_index, class_weights, reduction, threads)
    grad_logits = np.empty_like(logits)
    cdef Array given = view(grad_out), to = view(grad_logits)
    cdef Status status
    with nogil:
        status = kernels().cross_entropy_grad(args, given, to)
    raise_for(status)
    return grad_logits


def concatenate(features, int threads):
    """(N, channels of all), of four arrays at most"""
    cdef Columns args
    for i in range(4):
        args.parts[i] = view(features[i] if i < len(features) else None)
    args.threads = threads
    out = np.empty((len(features[0]), sum([f.shape[1] for f in features])), features[0].dtype)
    cdef Array whole = view(out)
    cdef Status status
    with nogil:
        status = kernels().concatenate(args, whole)
    raise_for(status)
    return out


def split(whole, channels, needed, int threads):
    """a list of (N, channels[i]), None where it is not needed; four at most"""
    cdef Columns args
    parts = [np.empty((len(whole), c), whole.dtype) if n else None for c, n in zip(channels, needed, strict=True)]
    for i in range(4):
        args.parts[i] = view(parts[i] if i < len(parts) else None)
        args.parts[i].cols = channels[i] if i < len(channels) else 0
    args.threads = threads
    cdef Array given = view(whole)
    cdef Status status
    with nogil:
        status = kernels().split(args, given)
    raise_for(status)
    return parts


def fma_rate(str dtype):
    """Floating-point operations per second that one core reaches in fused multiply-adds; for benchmarks."""
    cdef DType code = <DType><int>DTYPES[np.dtype(dtype)]
    cdef double rate
    with nogil:
        rate = kernels().fma_rate(code)
    return rate


# What XLA hands to kpcore.jax, named as in XLA's C interface; up to the last field used.
cdef struct XlaBuffer:
    size_t struct_size
    void* extension_start
    int dtype
    void* data
    int64_t rank
    int64_t* dims


cdef struct XlaBuffers:  # XLA_FFI_Args and XLA_FFI_Rets
    size_t struct_size
    void* extension_start
    int64_t size
    void* types
    XlaBuffer** buffers


def xla_arrays(size_t address, dict dtypes, bint writeable):
    """The arrays of a call from XLA, in its memory; `dtypes` by their numbers in XLA."""
    cdef XlaBuffers* given = <XlaBuffers*>address
    cdef XlaBuffer* buffer
    cdef cnp.ndarray array
    arrays = []
    for i in range(given.size):
        buffer = given.buffers[i]
        dtype = dtypes.get(buffer.dtype)
        if dtype is None:
            raise TypeError(f"argument {i + 1}: expected a dtype of NumPy's, got number {buffer.dtype} of XLA's")
        array = cnp.PyArray_SimpleNewFromData(
            <int>buffer.rank, <cnp.npy_intp*>buffer.dims, (<cnp.dtype>dtype).type_num, buffer.data
        )
        if not writeable:
            cnp.PyArray_CLEARFLAGS(array, cnp.NPY_ARRAY_WRITEABLE)
        arrays.append(array)
    return arrays


def array_at(size_t address, shape, strides, cnp.dtype dtype, owner):
    """The array in memory that `owner` keeps, for as long as the array is there; strides in numbers, not bytes."""
    cdef cnp.npy_intp dims[32]
    cdef cnp.npy_intp steps[32]
    cdef int ndim = len(shape)
    if ndim > 32:
        raise ValueError(f"expected at most 32 axes, got {ndim}")
    for axis in range(ndim):
        dims[axis] = shape[axis]
        steps[axis] = <cnp.npy_intp>strides[axis] * dtype.itemsize
    array = cnp.PyArray_New(np.ndarray, ndim, dims, dtype.type_num, steps, <void*>address, 0,
                            cnp.NPY_ARRAY_WRITEABLE, None)
    cnp.set_array_base(array, owner)
    return array


def version():
    return c_version.decode()


def isas():
    """The instruction sets this machine can run, best last."""
    cdef const char* const* names = c_isas()
    found = []
    while names[len(found)] != NULL:
        found.append(names[len(found)].decode())
    return tuple(found)


def isa():
    return kernels().isa.decode()


def set_isa(str name):
    if not c_set_isa(name.encode()):
        raise ValueError(f"KPCORE_ISA: expected one of {', '.join(isas())} on this machine, got {name!r}")


def has_openmp():
    return c_has_openmp()


def openmp_library():
    cdef const char* path = c_openmp_library()
    return None if path is NULL else path.decode()


def pause_threads():
    c_pause_threads()
