# Calls the CPU kernels of src/cpu. `run` calls any kernel by its name; radius search, k nearest neighbors and grid
# subsampling, whose output sizes are known only after counting, have functions of their own. No arithmetic and no
# checks here: kpcore/*.py passes contiguous NumPy arrays with matching shapes and dtypes. The GIL is released during a
# call; a status other than ok becomes an exception.
from cpython.dict cimport PyDict_GetItem
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memset

import sys

import numpy as np

cimport numpy as cnp

cnp.import_array()

cdef extern from "cpu/fields.h" namespace "kp" nogil:
    enum class DType(int):
        float32
        float64
        int32
        int64
        uint8
        int8
        int16
        uint16
        uint32
        uint64

    struct Array:
        void* data
        int64_t rows, cols
        DType dtype

    struct OptionalInt:
        int64_t value
        bint is_set

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

    cdef struct IndexArguments:
        IndexKind kind
        Array points, row_splits
        double cell
        int threads

    cdef struct Search:
        const void* index
        Array queries, queries_row_splits, radii
        double radius
        bint is_inclusive
        int64_t max_neighbors
        Sort sort
        Metric metric
        Ignore ignore
        int threads

    cdef struct FeatureSearch:
        Array points, row_splits, queries, queries_row_splits
        int64_t k
        Ignore ignore
        int threads

    cdef struct GridSubsample:
        Array points, features, labels, row_splits
        Array voxel_size, origin
        VoxelPoint position
        VoxelFeature feature
        OptionalInt ignore_label
        int threads

    cdef struct Subsampled:
        Array points, features, labels, inverse, counts
        Array nearest

    enum class Kind(int):
        array
        optional_array
        int32
        int64
        uint64
        float64
        boolean
        optional_int

    cdef struct Field:
        const char* name
        Kind kind
        int64_t offset

    cdef struct KernelRow:
        const char* name
        const Field* fields
        int num_fields
        int64_t threads

    const KernelRow* kernel_rows
    int num_kernels

    cdef struct Functions:
        const char* isa
        Status (**kernels)(const void*) noexcept nogil
        Status (*build_index)(const IndexArguments&, void**) noexcept nogil
        double (*crowding)(const void*) noexcept nogil
        void (*free_index)(void*) noexcept nogil
        Status (*radius_search_count)(const Search&, int64_t*, void**) noexcept nogil
        Status (*radius_search_fill)(void*, int32_t*, void*) noexcept nogil
        void (*radius_search_free)(void*) noexcept nogil
        Status (*knn_search)(const Search&, int32_t*, void*, int64_t*) noexcept nogil
        Status (*feature_search)(const FeatureSearch&, int32_t*, void*, int64_t*) noexcept nogil
        Status (*grid_subsample_count)(const GridSubsample&, int64_t*, void**) noexcept nogil
        Status (*grid_subsample_fill)(void*, const Subsampled&) noexcept nogil
        void (*grid_subsample_free)(void*) noexcept nogil
        double (*fma_rate)(DType) noexcept nogil

    const Functions& functions() noexcept
    bint c_set_isa "kp::set_isa"(const char*) noexcept
    const char* const* c_isas "kp::isas"() noexcept
    bint c_has_openmp "kp::has_openmp"() noexcept
    const char* c_openmp_library "kp::openmp_library"() noexcept
    int c_bound_processors "kp::bound_processors"() noexcept
    int c_thread_limit "kp::thread_limit"() noexcept
    bint c_pause_threads "kp::pause_threads"() noexcept
    const char* c_version "KP_VERSION"


class NotFinite(Exception):
    """A coordinate is NaN or infinite, or distances overflow or underflow; the caller finds out which."""


class OutOfRange(Exception):
    """Too many voxels along an axis, a label that is not a class, or an index past the rows; the caller finds out which."""


cdef int NO_DTYPE = -1
cdef int DTYPES[64]  # DType by NumPy type number; two type numbers (l and q) may both be int64
for number in range(64):
    DTYPES[number] = NO_DTYPE
NAMES = ("float32", "float64", "int32", "int64", "uint8", "int8", "int16", "uint16", "uint32", "uint64")
for character in "fdbBhHiIlLqQ":
    DTYPES[np.dtype(character).num] = NAMES.index(np.dtype(character).name)


cdef Array view(cnp.ndarray a) except *:
    """The array's pointer, rows, columns and dtype; a null pointer for None."""
    cdef Array v
    cdef int i, number
    v.data = NULL
    v.rows = v.cols = 0
    v.dtype = <DType>0
    if a is None:
        return v
    number = cnp.PyArray_TYPE(a)
    if number >= 64 or DTYPES[number] == NO_DTYPE:
        raise TypeError(f"expected an array of {', '.join(NAMES)}, got {a.dtype}")
    v.data = cnp.PyArray_DATA(a)
    v.dtype = <DType>DTYPES[number]
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


# ---- kernels called by name

KINDS = ("array", "optional_array", "int32", "int64", "uint64", "float64", "boolean", "optional_int")


cdef class Kernel:
    """A kernel: its number in the function tables, and its fields."""

    cdef const KernelRow* row
    cdef int number
    cdef tuple names


cdef Kernel kernel_of(int number):
    cdef Kernel kernel = Kernel.__new__(Kernel)
    kernel.row, kernel.number = &kernel_rows[number], number
    kernel.names = tuple([sys.intern(kernel.row.fields[i].name.decode()) for i in range(kernel.row.num_fields)])
    return kernel


cdef dict KERNELS = {kernel_rows[number].name.decode(): kernel_of(number) for number in range(num_kernels)}
cdef object get_num_threads = None  # imported from kpcore.config at the first call, because config imports this module


def fields():
    """{kernel: {field: its kind, one of KINDS}}"""
    cdef Kernel kernel
    kinds = {}
    for name in KERNELS:
        kernel = KERNELS[name]
        kinds[name] = {
            field: KINDS[<int>kernel.row.fields[i].kind] for i, field in enumerate(kernel.names)
        }
    return kinds


def run(str name, call=None, **more):
    """Call a kernel. Each field is taken from `more`, else from the attributes of `call`."""
    global get_num_threads
    cdef Kernel kernel = KERNELS[name]
    cdef dict attributes = None if call is None else call.__dict__
    cdef int64_t buffer[128]  # 1024 bytes; fields.h asserts that every struct fits
    cdef char* place = <char*>buffer
    cdef const Field* field
    cdef PyObject* item
    cdef int i, taken = 0
    for i in range(kernel.row.num_fields):
        field = &kernel.row.fields[i]
        item = PyDict_GetItem(more, kernel.names[i])
        if item != NULL:
            taken += 1
        elif attributes is not None:
            item = PyDict_GetItem(attributes, kernel.names[i])
        if item == NULL:
            if field.kind == Kind.optional_array:
                (<Array*>(place + field.offset))[0] = view(None)
                continue
            raise TypeError(f"{name}: expected a field {kernel.names[i]}, got none")
        set_field(place + field.offset, field.kind, <object>item, kernel.names[i])
    if taken != len(more):
        raise TypeError(f"{name}: expected no fields but {', '.join(kernel.names)}, got {', '.join(more)}")
    if get_num_threads is None:
        from kpcore.config import get_num_threads
    (<int*>(place + kernel.row.threads))[0] = get_num_threads()
    cdef Status status
    with nogil:
        status = functions().kernels[kernel.number](place)
    if status != Status.ok:
        raise_for(status)


cdef int set_field(char* place, Kind kind, value, name) except -1:
    if kind == Kind.array or kind == Kind.optional_array:
        if isinstance(value, np.ndarray):
            (<Array*>place)[0] = view(value)
        elif kind == Kind.array:
            raise TypeError(f"{name}: expected an array, got {type(value).__name__}")
        else:
            (<Array*>place)[0] = view(None)
            if value is not None:  # an output that is not wanted: only its shape is passed
                (<Array*>place).rows, (<Array*>place).cols = value.shape
    elif kind == Kind.float64:
        (<double*>place)[0] = value
    elif kind == Kind.int32:
        (<int*>place)[0] = value
    elif kind == Kind.int64:
        (<int64_t*>place)[0] = value
    elif kind == Kind.uint64:
        (<uint64_t*>place)[0] = value
    elif kind == Kind.boolean:
        place[0] = 1 if value else 0
    else:
        (<OptionalInt*>place).is_set = value is not None
        (<OptionalInt*>place).value = 0 if value is None else value
    return 0


# ---- searches

cdef class Index:
    """A search index over points: a grid of cells or a kd-tree. It is immutable, so any thread may search it."""

    cdef void* data
    cdef readonly int64_t num_points
    cdef readonly object dtype

    def __cinit__(self):
        self.data = NULL

    def __init__(self, points, row_splits, cell, int threads):
        """A grid of cells of width `cell`, or a kd-tree if `cell` is None."""
        cdef IndexArguments args
        args.kind = IndexKind.tree if cell is None else IndexKind.grid
        args.points = view(points)
        args.row_splits = view(row_splits)
        args.cell = 0 if cell is None else cell
        args.threads = threads
        self.num_points = len(points)
        self.dtype = points.dtype
        cdef Status status
        with nogil:
            status = functions().build_index(args, &self.data)
        raise_for(status)

    @property
    def crowding(self):
        """Mean over the points of how many points share their cell; infinity for a kd-tree, which has no cells."""
        return functions().crowding(self.data)

    def __dealloc__(self):
        if self.data != NULL:
            functions().free_index(self.data)


cdef Search search_arguments(Index index, queries, queries_row_splits, radius, bint inclusive, int64_t max_neighbors,
                             int sort, int metric, int ignore, int threads) except *:
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
    args.is_inclusive = inclusive
    args.max_neighbors = max_neighbors
    args.sort = <Sort>sort
    args.metric = <Metric>metric
    args.ignore = <Ignore>ignore
    args.threads = threads
    return args


def radius_search(Index index, queries, queries_row_splits, radius, bint inclusive, max_neighbors, int sort, int metric,
                  int ignore, bint return_distances, bint count_only, check_room, int threads):
    """(row_splits, index or None, distance or None). check_room(number of pairs, bytes) is called before allocating."""
    cdef Search args = search_arguments(index, queries, queries_row_splits, radius, inclusive,
                                        -1 if max_neighbors is None else max_neighbors, sort, metric, ignore, threads)
    cdef void* plan = NULL
    cdef Status status
    row_splits = np.empty((index.num_points if queries is None else len(queries)) + 1, np.int64)
    cdef int64_t* splits = <int64_t*>cnp.PyArray_DATA(row_splits)
    cdef int32_t* to_index
    cdef void* to_distance
    try:
        with nogil:
            status = functions().radius_search_count(args, splits, &plan)
        raise_for(status)
        if count_only:
            return row_splits, None, None
        check_room(int(row_splits[-1]), int(row_splits[-1]) * (4 + return_distances * index.dtype.itemsize))
        neighbors = np.empty(row_splits[-1], np.int32)
        distance = np.empty(row_splits[-1], index.dtype) if return_distances else None
        to_index = <int32_t*>view(neighbors).data
        to_distance = view(distance).data
        with nogil:
            status = functions().radius_search_fill(plan, to_index, to_distance)
        raise_for(status)
        return row_splits, neighbors, distance
    finally:
        if plan != NULL:
            with nogil:
                functions().radius_search_free(plan)


def knn_search(Index index, queries, queries_row_splits, radius, bint inclusive, int64_t k, int sort, int metric,
               int ignore, bint return_distances, check_room, int threads):
    """(row_splits, index, distance or None): the k nearest within the radius, which may be infinite"""
    cdef Search args = search_arguments(index, queries, queries_row_splits, radius, inclusive, k, sort, metric, ignore,
                                        threads)
    num_queries = index.num_points if queries is None else len(queries)
    counts, neighbors, distance = empty_rows(num_queries, k, index.dtype, return_distances, check_room)
    cdef int64_t* to_counts = <int64_t*>view(counts).data
    cdef int32_t* to_index = <int32_t*>view(neighbors).data
    cdef void* to_distance = view(distance).data
    cdef Status status
    with nogil:
        status = functions().knn_search(args, to_index, to_distance, to_counts)
    raise_for(status)
    return packed_rows(counts, neighbors, distance)


cdef tuple empty_rows(num_queries, k, dtype, return_distances, check_room):
    """(counts, index, distance or None) for rows of up to k entries"""
    check_room(num_queries * k, num_queries * k * (4 + return_distances * dtype.itemsize))
    distance = np.empty((num_queries, k), dtype) if return_distances else None
    return np.empty(num_queries, np.int64), np.empty((num_queries, k), np.int32), distance


cdef tuple packed_rows(counts, neighbors, distance):
    """(row_splits, index, distance) of rows of which `counts` entries are used"""
    num_queries, k = neighbors.shape
    row_splits = np.zeros(num_queries + 1, np.int64)
    np.cumsum(counts, out=row_splits[1:])
    if row_splits[num_queries] == num_queries * k:
        return row_splits, neighbors.reshape(-1), None if distance is None else distance.reshape(-1)
    used = np.arange(k) < counts[:, None]
    return row_splits, neighbors[used], None if distance is None else distance[used]


def feature_search(points, row_splits, queries, queries_row_splits, int64_t k, int ignore, bint return_distances,
                   check_room, int threads):
    """(row_splits, index, distance or None): the k nearest by L2 in any number of dimensions"""
    cdef FeatureSearch args
    args.points = view(points)
    args.row_splits = view(row_splits)
    args.queries = view(points if queries is None else queries)
    args.queries_row_splits = view(row_splits if queries is None else queries_row_splits)
    args.k = k
    args.ignore = <Ignore>ignore
    args.threads = threads
    counts, neighbors, distance = empty_rows(args.queries.rows, k, points.dtype, return_distances, check_room)
    cdef int64_t* to_counts = <int64_t*>view(counts).data
    cdef int32_t* to_index = <int32_t*>view(neighbors).data
    cdef void* to_distance = view(distance).data
    cdef Status status
    with nogil:
        status = functions().feature_search(args, to_index, to_distance, to_counts)
    raise_for(status)
    return packed_rows(counts, neighbors, distance)


# ---- subsampling

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
    args.ignore_label.is_set = ignore_label is not None
    args.ignore_label.value = 0 if ignore_label is None else ignore_label
    args.threads = threads
    cdef Subsampled out
    cdef void* plan = NULL
    cdef Status status
    out_row_splits = np.empty(len(row_splits), np.int64)
    cdef int64_t* splits = <int64_t*>cnp.PyArray_DATA(out_row_splits)
    try:
        with nogil:
            status = functions().grid_subsample_count(args, splits, &plan)
        raise_for(status)
        voxels = out_row_splits[-1]
        out_points = np.empty((voxels, points.shape[1]), points.dtype)
        out_features = None if features is None else np.empty((voxels, *features.shape[1:]), features.dtype)
        out_labels = None if labels is None else np.empty((voxels, *labels.shape[1:]), labels.dtype)
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
            status = functions().grid_subsample_fill(plan, out)
        raise_for(status)
        return out_points, out_features, out_labels, out_row_splits, inverse, counts, nearest
    finally:
        if plan != NULL:
            with nogil:
                functions().grid_subsample_free(plan)


# ---- arrays over memory that someone else owns

cdef class Memory:
    """Owner of a read-only array's memory. It has no buffer interface, so NumPy refuses to make the array writable."""

    cdef object array

    def __init__(self, array):
        self.array = array


def frozen(cnp.ndarray array not None):
    """A view of `array` that cannot be written to or made writable."""
    cdef cnp.ndarray same = cnp.PyArray_SimpleNewFromData(array.ndim, array.shape, cnp.PyArray_TYPE(array),
                                                          cnp.PyArray_DATA(array))
    cnp.set_array_base(same, Memory(array))
    cnp.PyArray_CLEARFLAGS(same, cnp.NPY_ARRAY_WRITEABLE)
    return same


# The structs with which XLA calls kpcore.jax, named as in XLA's C interface and cut after the last field used here.
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
    """NumPy arrays over the buffers of a call from XLA. `dtypes`: {number in XLA: NumPy dtype}."""
    cdef XlaBuffers* buffers = <XlaBuffers*>address
    cdef XlaBuffer* buffer
    cdef cnp.ndarray array
    arrays = []
    for i in range(buffers.size):
        buffer = buffers.buffers[i]
        dtype = dtypes.get(buffer.dtype)
        if dtype is None:
            raise TypeError(f"argument {i + 1}: expected a dtype that NumPy has, got XLA dtype number {buffer.dtype}")
        array = cnp.PyArray_SimpleNewFromData(
            <int>buffer.rank, <cnp.npy_intp*>buffer.dims, (<cnp.dtype>dtype).type_num, buffer.data
        )
        if not writeable:
            cnp.PyArray_CLEARFLAGS(array, cnp.NPY_ARRAY_WRITEABLE)
        arrays.append(array)
    return arrays


def array_at(size_t address, shape, strides, cnp.dtype dtype, owner):
    """An array over memory at `address`, which keeps `owner` alive. Strides count elements, not bytes."""
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


# ---- the build and the machine: version, instruction sets, OpenMP

def version():
    return c_version.decode()


def isas():
    """The instruction sets that this machine runs, best last."""
    cdef const char* const* c_names = c_isas()
    names = []
    while c_names[len(names)] != NULL:
        names.append(c_names[len(names)].decode())
    return tuple(names)


def isa():
    return functions().isa.decode()


def set_isa(str name):
    if not c_set_isa(name.encode()):
        raise ValueError(f"KPCORE_ISA: expected one of {', '.join(isas())} on this machine, got {name!r}")


def fma_rate(str dtype):
    """Peak floating-point operations per second of one core, measured with fused multiply-adds; for benchmarks."""
    cdef DType code = <DType>DTYPES[np.dtype(dtype).num]
    cdef double rate
    with nogil:
        rate = functions().fma_rate(code)
    return rate


def has_openmp():
    return c_has_openmp()


def openmp_library():
    cdef const char* path = c_openmp_library()
    return None if path is NULL else path.decode()


def bound_processors():
    return c_bound_processors()


def thread_limit():
    return c_thread_limit()


def pause_threads():
    return c_pause_threads()
