"""Launchers of the losses of deformed kernel points."""

from __future__ import annotations

import cupy
import numpy as np

from kpcore.backends.gpu_launch import ctype, kernels_of, launch, launcher
from kpcore.backends.gpu_layers import sum_columns, total


def _launch(name, fields, threads, **values):
    """Launch a kernel of deformation.cu."""
    queries, kernels, dimension = fields.offsets.shape
    file = kernels_of("deformation.cu", KP_T=ctype(fields.offsets.dtype), KP_DIM=dimension)
    launch(file[name], threads, fields, num_queries=queries, num_kernels=kernels, **values)


def _inverse(extent, dtype):
    """1 / extent, computed in the dtype of the offsets as on the CPU."""
    return dtype.type(1) / dtype.type(extent)


def _write_loss(terms, weight, loss):
    """loss = weight times the sum of all terms, in float64."""
    np.multiply(total(terms), weight, out=loss.reshape(1))


def _loss_gradients(name, fields, threads, **values):
    """Write the gradient of the offsets and, as its sum over the queries, the gradient of the kernel points."""
    queries, kernels, dimension = fields.offsets.shape
    grads = fields.grad_offsets
    if grads is None:
        grads = cupy.empty(fields.offsets.shape, fields.offsets.dtype)
    _launch(name, fields, threads, grad_offsets=grads, **values)
    if fields.grad_kernel_points is not None:
        sum_columns(grads.reshape(queries, kernels * dimension), fields.grad_kernel_points.reshape(-1))


@launcher
def fitting_loss(fields):
    smallest = cupy.empty(fields.nearest.shape, fields.points.dtype)
    _launch("fit", fields, smallest.size, smallest=smallest)
    _write_loss(smallest, fields.weight / (fields.extent * fields.extent), fields.loss)


@launcher
def fitting_loss_grad(fields):
    scale = 2 * fields.weight / (fields.extent * fields.extent)
    _loss_gradients("fit_gradient", fields, fields.nearest.size, scale=scale)


@launcher
def repulsion_loss(fields):
    terms = cupy.empty(fields.offsets.shape[:2], fields.offsets.dtype)
    _launch("repel", fields, terms.size, inverse_extent=_inverse(fields.extent, terms.dtype), losses=terms)
    _write_loss(terms, 2 * fields.weight, fields.loss)  # each pair of kernel points was counted once


@launcher
def repulsion_loss_grad(fields):
    queries, kernels, _ = fields.offsets.shape
    inverse = _inverse(fields.extent, fields.offsets.dtype)
    _loss_gradients("repel_gradient", fields, queries * kernels, inverse_extent=inverse)
