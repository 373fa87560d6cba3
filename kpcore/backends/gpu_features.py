"""Launcher of features of the local surface."""

from __future__ import annotations

from kpcore.backends.gpu_launch import ctype, kernels_of, launch, launcher


@launcher
def fit_planes(fields):
    queries, viewpoints = len(fields.queries), fields.viewpoints
    kernel = kernels_of("features.cu", KP_T=ctype(fields.points.dtype))["fit_planes"]
    launch(kernel, queries, fields, num_queries=queries, num_viewpoints=0 if viewpoints is None else len(viewpoints))
