"""The network of docs/dynamic_graph.py."""

from pathlib import Path

import numpy as np
import pytest
from gradcheck import check_vjp

import kpcore as kp
from kpcore.nn import blocks


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    import dynamic_graph

    for name, value in {"EPOCHS": 10, "BATCH": 8, "NUM_POINTS": 24, "K": 6, "DTYPE": np.float64}.items():
        monkeypatch.setattr(dynamic_graph, name, value)
    return dynamic_graph


def figures(number):
    """(images (N, 28, 28), labels): bars that rise or fall, of different lengths and at different places."""
    rng, labels = np.random.default_rng(0), np.arange(number) % 2
    images = np.zeros((number, 28, 28))
    for image, label in zip(images, labels, strict=True):
        length, (row, column) = rng.integers(10, 20), rng.integers(0, 7, 2)
        image[row : row + length, column : column + length] = np.eye(length)[:: 1 - 2 * label]
    return images, labels


def edge_weights(example, features, width):
    run = blocks.Run(kp, {}, {}, new={"seed": 0, "dtype": np.float64})
    return run, example.edge_weights(run, "edge", features.shape[1], width)


def test_clouds(example):
    images, _ = figures(3)
    points = example.clouds(images, 0).reshape(3, 24, 2)
    pixels = np.floor(14 * (points + 1)).astype(int)
    for image, chosen in zip(images, pixels, strict=True):
        assert image[tuple(chosen.T)].all()
        assert len(np.unique(chosen, axis=0)) <= image.sum()
    assert not np.array_equal(points, example.clouds(images, 1).reshape(3, 24, 2))


def test_an_edge_conv_is_the_maximum_over_edges(example):
    features, row_splits = np.random.default_rng(0).normal(size=(48, 3)), np.array([0, 24, 48])
    run, (of_point, of_difference) = edge_weights(example, features, 5)
    out = example.edge_conv(run, "edge", features, 5, row_splits)
    point, query = kp.knn_graph(features, 6, row_splits=row_splits, loop=True)
    edges = np.concatenate([features[query], features[point] - features[query]], 1)
    expected = (edges @ np.concatenate([of_point, of_difference])).reshape(48, 6, 5).max(1)
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    of_edges = kp.leaky_relu(edges @ np.concatenate([of_point, of_difference])).reshape(48, 6, 5).max(1)
    np.testing.assert_allclose(kp.leaky_relu(out), of_edges, rtol=1e-12)  # an activation that rises may come first


def test_the_dense_form_and_its_gradients(example):
    torch = pytest.importorskip("torch")
    features, row_splits = np.random.default_rng(0).normal(size=(48, 3)), np.array([0, 24, 48])
    run, weights = edge_weights(example, features, 5)

    def convolved(features, *weights):
        params = dict(zip(run.params, weights, strict=True))
        return example.edge_conv(blocks.Run(kp, params, {}), "edge", features, 5, row_splits)

    primals = features, *weights
    tensors = [torch.tensor(p, requires_grad=True) for p in primals]
    torch_run = blocks.Run(kp.torch, dict(zip(run.params, tensors[1:], strict=True)), {})
    for form in (example.edge_conv, example.dense_edge_conv):
        out = form(torch_run, "edge", tensors[0], 5, torch.from_numpy(row_splits))
        np.testing.assert_allclose(out.detach().numpy(), convolved(*primals), rtol=1e-12)
        check_vjp(convolved, lambda grad, out=out: [g.numpy() for g in torch.autograd.grad(
            out, tensors, torch.tensor(grad))], primals, step=1e-7)  # fmt: skip


def test_the_graph_of_a_layer_is_that_of_the_features_before(example, monkeypatch):
    searched, search = [], kp.knn_search

    def knn_search(points, *arguments, **options):
        searched.append(points.shape)
        return search(points, *arguments, **options)

    monkeypatch.setattr(kp, "knn_search", knn_search)
    params, state = example.initial()
    searched.clear()
    points = example.clouds(figures(2)[0], 0)
    example.network(blocks.Run(kp, params, state), points, example.bounds(2))
    assert searched == [(48, 2), (48, 16), (48, 16)]


def test_it_learns_in_all_forms(example):
    pytest.importorskip("torch")
    images, labels = figures(80)
    curves, accuracies = {}, {}
    for name, training in example.TRAININGS.items():
        curves[name], *values = training(example.steps(images[:48], labels[:48]))
        accuracies[name] = example.accuracy(*values, images[48:], labels[48:])
    curve = curves["the tape"]
    assert len(curve) == 60 and np.mean(curve[-6:]) < curve[0] / 5
    assert accuracies["the tape"] > 90
    for name, other in curves.items():
        np.testing.assert_allclose(other, curve, rtol=1e-6, err_msg=name)
        assert accuracies[name] == accuracies["the tape"]
