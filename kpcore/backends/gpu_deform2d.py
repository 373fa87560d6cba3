"""Launchers of the convolutions of images. Depthwise, one kernel sums over the taps; otherwise a kernel samples the
images at the taps, and cuBLAS multiplies the samples of some thousand positions at a time by the kernel."""

from __future__ import annotations

import math

import cupy
import numpy as np

from kpcore.backends import gpu_sources
from kpcore.backends.gpu_launch import (
    BLOCK,
    BLOCK_OF_ROWS,
    WARP,
    computed,
    ctype,
    kernels_of,
    launch,
    launcher,
    product,
)
from kpcore.backends.gpu_layers import sum_columns
from kpcore.backends.gpu_lists import sort_by_key

_SAMPLES_BYTES = 32 << 20  # samples computed at a time: they fit the second-level cache of an H100 or H200
_PAIR_BYTES = 40  # of a pair of a pixel and a sample: key, source, factor, and what sorting them takes
_TILE_BYTES = gpu_sources.constant("deform2d.cu", "tile_bytes")
_FEWEST_PIXELS = 4  # of a tile
_KERNEL_BLOCK = 1024  # positions of an image: their gradients of the kernel are summed together
_MAX_KERNEL_BLOCKS = 256  # in an image


def _launch(name, threads, fields, **values):
    """Launch a kernel of deform2d.cu."""
    launch(kernels_of("deform2d.cu", KP_F=ctype(fields.x.dtype))[name], threads, fields, **values)


# ---- sizes


def _taps(fields):
    return fields.kernel_height * fields.kernel_width


def _cells(fields):
    return fields.scope_height * fields.scope_width


def _in_pixels(fields):
    return fields.height * fields.width


def _out_pixels(fields):
    return fields.out_height * fields.out_width


def _channels(fields, array):
    """Of an array of images."""
    return array.shape[3 if fields.channels_last else 1]


def _samples_images(fields):
    """Whether taps are interpolated between pixels or scaled. Otherwise each is one pixel."""
    return fields.data_offsets is not None or fields.modulations is not None


def _has_item_kernels(fields):
    """Whether the kernels of the images differ."""
    return fields.routing is not None or (fields.kernel_offsets is not None and not fields.is_local)


def _groups(fields):
    """The number of matrices of a kernel, with which as many parts of the channels are multiplied."""
    return 1 if fields.depthwise else fields.groups


def _pairs(fields):
    """The number of pairs of an output channel with an input channel of its group."""
    return fields.channels if fields.depthwise else fields.out_channels * (fields.channels // fields.groups)


def _kernel_rows(fields):
    """The values of a kernel for each pair: one for each cell of the scope if positions interpolate them, or tap."""
    return _cells(fields) if fields.is_local else _taps(fields)


def _tile_pixels(fields):
    """The pixels with taps that fit in the shared memory of a block."""
    taps = _TILE_BYTES // (2 * (8 + 4 * computed(fields.x.dtype).itemsize))
    pixels = WARP
    while pixels > _FEWEST_PIXELS and pixels * _taps(fields) > taps:
        pixels //= 2
    return pixels


def _tiles(fields, pixels):
    return -(-pixels // _tile_pixels(fields))


# ---- kernels of images


def _image_kernels(fields, first, count):
    """(count, pairs, values) the kernels of images, or (1, pairs, values) if all have the same. Depthwise and with the
    channels last (count, values, channels)."""
    kernels, pairs, rows = count if _has_item_kernels(fields) else 1, _pairs(fields), _kernel_rows(fields)
    pairs_last = fields.depthwise and fields.channels_last
    has_taps = (fields.scope_height, fields.scope_width) == (fields.kernel_height, fields.kernel_width)
    if (fields.is_local or has_taps) and not _has_item_kernels(fields):
        weight = fields.weight.reshape(1, pairs, rows)
        return cupy.ascontiguousarray(weight.transpose(0, 2, 1)) if pairs_last else weight
    made = cupy.empty((kernels, rows, pairs) if pairs_last else (kernels, pairs, rows), fields.x.dtype)
    _launch("make_kernels", made.size, fields, pairs=pairs, first=first, count=kernels, pairs_last=pairs_last,
            kernels=made)  # fmt: skip
    return made


def _kernel_step(fields, kernels):
    """The number of values from the kernel of one image to that of the next."""
    return kernels.shape[1] * kernels.shape[2] if _has_item_kernels(fields) else 0


# The axes of the kernels (image, group, output, input, tap) as matrices, which multiply samples of x, or of the
# gradient of the output, or the latter to the gradients of samples of x: with the channels first, and last.
_SAMPLES, _GRAD_SAMPLES, _GRADS = range(3)
_AXES = {
    _SAMPLES: ((0, 1, 2, 3, 4), (0, 1, 4, 3, 2)),
    _GRAD_SAMPLES: ((0, 1, 3, 2, 4), (0, 1, 4, 2, 3)),
    _GRADS: ((0, 1, 3, 4, 2), (0, 1, 2, 4, 3)),
}


def _kernel_matrices(fields, kernels, what):
    """(images * groups, rows, columns)"""
    groups, taps = fields.groups, _taps(fields)
    outputs, inputs = fields.out_channels // groups, fields.channels // groups
    by_axis = kernels.reshape(len(kernels), groups, outputs, inputs, taps).transpose(*_AXES[what][fields.channels_last])
    rows = {
        _SAMPLES: (outputs, taps * inputs),
        _GRAD_SAMPLES: (inputs, taps * outputs),
        _GRADS: (inputs * taps, outputs),
    }[what]
    rows = rows[::-1] if fields.channels_last else rows
    return cupy.ascontiguousarray(by_axis).reshape(len(kernels) * groups, *rows)


# ---- samples of some positions


def _chunks(fields, pixels, position_bytes, image_bytes=0):
    """Yield (first image, number of images, first pixel, number of pixels): some images, or a part of one."""
    images = _SAMPLES_BYTES // max(pixels * position_bytes, image_bytes)
    if images:
        for first in range(0, fields.batch, images):
            yield first, min(images, fields.batch - first), 0, pixels
        return
    at_once = max(1, _SAMPLES_BYTES // position_bytes)
    for first in range(fields.batch):
        for begin in range(0, pixels, at_once):
            yield first, 1, begin, min(at_once, pixels - begin)


def _rows_of_matrix(fields, count, pixels):
    """The positions of a matrix of samples: those of one image if each has a kernel, else of all images."""
    return pixels if _has_item_kernels(fields) else count * pixels


def _matrices(fields, channels, count, pixels):
    """(shape, steps) of the samples of all taps: matrices with a row for each position, where channels are last, or
    a column for each."""
    taps, groups = _taps(fields), _groups(fields)
    rows, width = _rows_of_matrix(fields, count, pixels), channels // groups
    by_item = _has_item_kernels(fields)
    channel, tap, pixel = (1, width, taps * width) if fields.channels_last else (taps * rows, rows, 1)
    steps = {"item_step": channels * taps * pixels if by_item else pixels * pixel, "group_step": width * taps * rows,
             "group_channels": width, "channel_step": channel, "tap_step": tap, "pixel_step": pixel}  # fmt: skip
    shape = (rows, taps * width) if fields.channels_last else (taps * width, rows)
    return (groups * (count if by_item else 1), *shape), steps


def _by_chunk(fields, channels, pixels, pair_bytes=0, image_bytes=0):
    """Yield (chunk, array for the samples of its positions, steps of the array) for some positions at a time.

    All arrays share one buffer: launch what uses them before the next iteration. `pair_bytes` and `image_bytes`: what
    each tap and each image take in addition. The kernels of images take no more than the samples, either.
    """
    buffer, dtype, taps = None, fields.x.dtype, _taps(fields)
    kernel_bytes = _pairs(fields) * taps * computed(dtype).itemsize if _has_item_kernels(fields) else 0
    position_bytes = taps * (channels * dtype.itemsize + pair_bytes)
    for chunk in _chunks(fields, pixels, position_bytes, max(image_bytes, kernel_bytes)):
        shape, steps = _matrices(fields, channels, chunk[1], chunk[3])
        size = math.prod(shape)
        if buffer is None:  # the first is the largest
            buffer = cupy.empty(size, dtype)
        yield chunk, buffer[:size].reshape(shape), steps


def _part(fields, array, chunk):
    """The positions of a chunk in an array of images, (images, pixels, channels) in any order, with the axes of the
    samples' products: image and group, first the image if each has a kernel; then channels and positions."""
    first, count, begin, pixels = chunk
    groups, last = fields.groups, fields.channels_last
    channels, all_pixels = _channels(fields, array) // groups, array[0].size // _channels(fields, array)
    by_axis = array.reshape(len(array), *((all_pixels, groups, channels) if last else (groups, channels, all_pixels)))
    positions, images = slice(begin, begin + pixels), slice(first, first + count)
    if last:
        part = by_axis[images, positions]
        return part.transpose(0, 2, 1, 3) if _has_item_kernels(fields) else part.transpose(2, 0, 1, 3)
    part = by_axis[images, :, :, positions]
    return part if _has_item_kernels(fields) else part.transpose(1, 2, 0, 3)


def _product_shape(fields, channels, count, pixels):
    """The shape of a part as matrices."""
    rows, matrices = _rows_of_matrix(fields, count, pixels), fields.groups * (count if _has_item_kernels(fields) else 1)
    width = channels // fields.groups
    return (matrices, rows, width) if fields.channels_last else (matrices, width, rows)


def _multiply(a, b, out):
    """out[i] = ``a[i] @ b[i]``"""
    if len(out) == 1:
        product(a[0], b[0], out[0])  # which CUPY_TF32 applies to
    else:
        product(a, b, out)


def _ordered(fields, kernels, others):
    return (others, kernels) if fields.channels_last else (kernels, others)


def _sample(fields, samples, chunk, source, steps, backward):
    first, count, begin, pixels = chunk
    tiles = count * fields.data_groups * _tiles(fields, pixels)
    values = {"from": source, "first": first, "count": count, "first_pixel": begin, "num_pixels": pixels}
    _launch("sample_taps", tiles * BLOCK, fields, tile_pixels=_tile_pixels(fields), backward=backward, samples=samples,
            **values, **steps)  # fmt: skip


# ---- forward, and the gradient of images that are not sampled


def _convolve_depthwise(fields, source, out, bias, backward):
    kernels, pixels = _image_kernels(fields, 0, fields.batch), _in_pixels(fields) if backward else _out_pixels(fields)
    tiles = fields.batch * fields.kernel_groups * fields.data_groups * _tiles(fields, pixels)
    name = "convolve_samples" if _samples_images(fields) else "convolve_pixels"
    values = {"from": source, "to": out, "bias": bias, "kernels": kernels, "kernel_step": _kernel_step(fields, kernels)}
    _launch(name + "_locally" * fields.is_local, tiles * BLOCK, fields, backward=backward,
            tile_pixels=_tile_pixels(fields), **values)  # fmt: skip


def _convolve_dense(fields, source, out, bias, backward):
    channels, out_channels = _channels(fields, source), _channels(fields, out)
    pixels = _in_pixels(fields) if backward else _out_pixels(fields)
    kernels = None
    for chunk, samples, steps in _by_chunk(fields, channels, pixels):
        first, count, begin, size = chunk
        if kernels is None or (_has_item_kernels(fields) and begin == 0):
            what = _GRAD_SAMPLES if backward else _SAMPLES
            kernels = _kernel_matrices(fields, _image_kernels(fields, first, count), what)
        _sample(fields, samples, chunk, source, steps, backward)
        part, shape = _part(fields, out, chunk), _product_shape(fields, out_channels, count, size)
        if bias is None and part.flags.c_contiguous:
            _multiply(*_ordered(fields, kernels, samples), part.reshape(shape))
            continue
        products = cupy.empty(shape, out.dtype)
        _multiply(*_ordered(fields, kernels, samples), products)
        products = products.reshape(part.shape)
        if bias is None:
            part[...] = products
        else:  # an image of one pixel
            pixel = bias.reshape(1, 1, 1, -1) if fields.channels_last else bias.reshape(1, -1, 1, 1)
            np.add(products, _part(fields, pixel, (0, 1, 0, 1)), out=part)


def _convolve(fields, source, out, bias=None, backward=False):
    (_convolve_depthwise if fields.depthwise else _convolve_dense)(fields, source, out, bias, backward)


@launcher
def deform2d(fields):
    _convolve(fields, fields.x, fields.out, fields.bias)


@launcher
def deform2d_grad_x(fields):
    _convolve(fields, fields.grad_out, fields.grad_x, backward=True)


# ---- gradients


@launcher
def deform2d_grads(fields):
    """All gradients, that of x only if images are sampled."""
    if fields.grad_bias is not None:
        _bias_gradient(fields)
    if fields.grad_kernel_offsets is not None and fields.is_local:
        _kernel_offset_gradients(fields)
    if any(grads is not None for grads in (fields.grad_x, fields.grad_data_offsets, fields.grad_modulations)):
        _sample_gradients(fields)
    offsets = None if fields.is_local else fields.grad_kernel_offsets
    if any(grads is not None for grads in (fields.grad_weight, fields.grad_routing, offsets)):
        _weight_gradients(fields)


def _bias_gradient(fields):
    grad_out = fields.grad_out
    if fields.channels_last:
        sum_columns(grad_out.reshape(-1, fields.out_channels), fields.grad_bias)
        return
    sums = cupy.empty((fields.batch, fields.out_channels), np.float64)
    _launch("sum_planes", sums.size * WARP, fields, values=grad_out, planes=sums.size, pixels=_out_pixels(fields),
            sums=sums)  # fmt: skip
    sum_columns(sums, fields.grad_bias)


def _kernel_offset_gradients(fields):
    kernels = _image_kernels(fields, 0, fields.batch)
    jobs = fields.batch * fields.kernel_groups * _taps(fields) * _out_pixels(fields)
    name = "kernel_offset_grads_of_samples" if _samples_images(fields) else "kernel_offset_grads"
    _launch(name, jobs * (WARP if fields.channels_last else 1), fields, kernels=kernels,
            kernel_step=_kernel_step(fields, kernels))  # fmt: skip


# ---- gradients of samples: of x, data offsets and modulations


def _sample_gradients(fields):
    x, grad_x, taps, groups = fields.x, fields.grad_x, _taps(fields), fields.data_groups
    summed = grad_x is not None and computed(x.dtype) != x.dtype
    if summed:
        grad_x = cupy.empty(x.shape, computed(x.dtype))
    bytes_of_pairs = (4 * _PAIR_BYTES * groups, 8 * groups * _in_pixels(fields)) if grad_x is not None else ()
    kernels = None
    for chunk, products, steps in _by_chunk(fields, fields.channels, _out_pixels(fields), *bytes_of_pairs):
        first, count, begin, size = chunk
        if kernels is None or (_has_item_kernels(fields) and not fields.depthwise and begin == 0):
            images = (0, fields.batch) if fields.depthwise else (first, count)
            kernels = _image_kernels(fields, *images)
            if not fields.depthwise:
                kernels = _kernel_matrices(fields, kernels, _GRADS)
        positions = {"first": first, "count": count, "first_pixel": begin, "num_pixels": size}
        if fields.depthwise:
            tiles = count * fields.kernel_groups * groups * _tiles(fields, size)
            _launch("weigh_taps", tiles * BLOCK, fields, tile_pixels=_tile_pixels(fields), kernels=kernels,
                    kernel_step=_kernel_step(fields, kernels), products=products, **positions, **steps)  # fmt: skip
        else:
            _multiply(*_ordered(fields, kernels, _grads_of_part(fields, chunk)), products)
        if fields.grad_data_offsets is not None or fields.grad_modulations is not None:
            jobs = count * groups * taps * size
            _launch("data_grads", jobs * (WARP if fields.channels_last else 1), fields, products=products, **positions,
                    **steps)  # fmt: skip
        if grad_x is not None:
            _sum_pairs(fields, products, positions, steps, grad_x)
    if summed:
        fields.grad_x[...] = grad_x


def _grads_of_part(fields, chunk):
    """The gradient of the output at the positions of a chunk, as matrices."""
    _, count, _, size = chunk
    part = _part(fields, fields.grad_out, chunk)
    return cupy.ascontiguousarray(part).reshape(_product_shape(fields, fields.out_channels, count, size))


def _sum_pairs(fields, products, positions, steps, grad_x):
    """Write to grad_x the sums over the pairs of each pixel; add them if the positions are not an image's first."""
    count, size, in_pixels = positions["count"], positions["num_pixels"], _in_pixels(fields)
    samples, dtype = count * fields.data_groups * _taps(fields) * size, grad_x.dtype
    keys, sources, factors = (cupy.empty(4 * samples, kind) for kind in (np.int32, np.int64, dtype))
    _launch("find_pairs", samples, fields, keys=keys, sources=sources, factors=factors, tap_step=steps["tap_step"],
            pixel_step=steps["pixel_step"], **positions)  # fmt: skip
    begins = cupy.empty(count * fields.data_groups * in_pixels + 1, np.int64)
    order = sort_by_key(keys, begins)
    _launch("sum_pixel_pairs", count * fields.channels * in_pixels, fields, first=positions["first"], count=count,
            products=products, begins=begins, sources=cupy.take(sources, order), factors=cupy.take(factors, order),
            adds=positions["first_pixel"] > 0, grad_x=grad_x, **steps)  # fmt: skip


# ---- gradients of kernels: of the weight, the routing and global kernel offsets


def _weight_gradients(fields):
    grad_weight, total = fields.grad_weight, fields.grad_weight
    if grad_weight is not None:
        if computed(grad_weight.dtype) != grad_weight.dtype:
            total = cupy.empty(grad_weight.shape, computed(grad_weight.dtype))
        total.fill(0)
    for first, grads in (_depthwise_kernel_gradients if fields.depthwise else _dense_kernel_gradients)(fields):
        _add_kernel_gradients(fields, first, grads, total)
    if total is not grad_weight:
        grad_weight[...] = total


def _depthwise_kernel_gradients(fields):
    """Yield (first image, gradients (images or 1, channels, values) of the kernels)."""
    batch, channels, rows, pixels = fields.batch, fields.channels, _kernel_rows(fields), _out_pixels(fields)
    size = max(_KERNEL_BLOCK, -(-pixels // (_MAX_KERNEL_BLOCKS * WARP)) * WARP)
    blocks, dtype = -(-pixels // size), computed(fields.x.dtype)
    partial = cupy.empty((batch, blocks, channels, rows), dtype)
    classes = fields.kernel_groups * fields.data_groups
    jobs = batch * blocks * classes * -(-channels // (classes * (WARP if fields.channels_last else BLOCK // WARP)))
    _launch("kernel_blocks", jobs * BLOCK, fields, blocks=blocks, block_size=size, partial=partial)
    items, blocks = (batch, blocks) if _has_item_kernels(fields) else (1, batch * blocks)
    grads = cupy.empty((items, channels, rows), dtype)
    _launch("join_blocks", grads.size, fields, partial=partial, items=items, blocks=blocks, columns=channels * rows,
            sums=grads)  # fmt: skip
    yield 0, grads


def _dense_kernel_gradients(fields):
    """Yield (first image, gradients (images or 1, pairs, taps) of the kernels)."""
    x, taps, pixels, by_item = fields.x, _taps(fields), _out_pixels(fields), _has_item_kernels(fields)
    dtype, groups, totals = computed(x.dtype), fields.groups, None
    outputs, inputs = fields.out_channels // groups, fields.channels // groups
    shape = (taps * inputs, outputs) if fields.channels_last else (outputs, inputs * taps)
    for chunk, samples, steps in _by_chunk(fields, fields.channels, pixels):
        first, _, begin, size = chunk
        grads = _grads_of_part(fields, chunk)
        _sample(fields, samples, chunk, x, steps, False)
        if totals is None or (by_item and begin == 0):
            totals = cupy.zeros((len(grads), *shape), dtype)
        for total, a, b in zip(totals, samples, grads, strict=True):
            total += a.T @ b if fields.channels_last else b @ a.T
        if by_item and begin + size == pixels:
            yield first, _by_pair(fields, totals)
    if totals is not None and not by_item:
        yield 0, _by_pair(fields, totals)


def _by_pair(fields, matrices):
    """Matrices of kernels as (images, pairs, taps)."""
    if fields.channels_last:
        taps, outputs = _taps(fields), matrices.shape[2]
        matrices = matrices.reshape(len(matrices), taps, -1, outputs).transpose(0, 3, 2, 1)
    return cupy.ascontiguousarray(matrices).reshape(-1, _pairs(fields), _taps(fields))


def _add_kernel_gradients(fields, first, grads, grad_weight):
    """Carry the gradients of kernels on: add those of the weight, write those of routing and global offsets."""
    count, pairs, rows = grads.shape
    kernels = {"pairs": pairs, "first": first, "count": count, "grad_kernels": grads}
    if grad_weight is not None:
        _launch("add_weight_grads", fields.weight.size, fields, grad_weight=grad_weight, **kernels)
    if fields.grad_routing is not None:
        partial = cupy.empty((-(-pairs * rows // BLOCK_OF_ROWS), count * fields.experts), np.float64)
        _launch("routing_blocks", partial.size * WARP, fields, partial=partial, **kernels)
        sum_columns(partial, fields.grad_routing[first : first + count].reshape(-1))
    if fields.grad_kernel_offsets is not None and not fields.is_local:
        partial = cupy.empty((-(-pairs // BLOCK_OF_ROWS), count * rows * 2), np.float64)
        _launch("global_offset_blocks", partial.size // 2 * WARP, fields, partial=partial, **kernels)
        sum_columns(partial, fields.grad_kernel_offsets[first : first + count].reshape(-1))
