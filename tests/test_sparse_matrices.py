"""Neighbour lists as sparse matrices of torch and JAX, and the functions for graphs on their arrays."""

import numpy as np
import pytest
from gradcheck import check_vjp
from reference import assert_same_bits

import kpcore as kp

# Pairs (query, point) of 4 queries and 5 points. torch's own gradients are those of the first list only.
LISTS = {
    "sorted": [(0, 1), (0, 4), (2, 0), (2, 3), (3, 3)],
    "by distance": [(0, 4), (0, 1), (2, 3), (2, 0), (3, 3)],
    "equal pairs": [(0, 1), (0, 1), (2, 3), (2, 0), (2, 3)],
    "equal pairs in order": [(0, 1), (0, 1), (2, 3)],
    "none": [],
}
each_list = pytest.mark.parametrize("pairs", LISTS.values(), ids=LISTS)


def neighbors_of(pairs, longer=0):
    """(list, values, dense matrix as a function of the values); the index is longer than the pairs by `longer`."""
    query, point = np.array(pairs, np.int64).reshape(-1, 2).T
    neighbors = kp.Neighbors.from_coo(query, point, 4, 5)
    if longer:
        neighbors = kp.Neighbors(np.append(neighbors.index, [3] * longer), neighbors.row_splits, 5)

    def dense(values):
        matrix = np.zeros((4, 5))
        np.add.at(matrix, (query, point), values[: len(pairs)])
        return matrix

    return neighbors, np.random.default_rng(0).normal(size=len(pairs)), dense


FEATURES = np.random.default_rng(1).normal(size=(5, 3))

# ---- torch


def sparse_mm(*arguments):
    return pytest.importorskip("torch").sparse.mm(*arguments)


PRODUCTS = {  # {name: (of torch, of NumPy)}
    "@": (lambda a, x: a @ x, np.matmul),
    "sparse.mm": (sparse_mm, np.matmul),
    "sparse.mm of sums": (lambda a, x: sparse_mm(a, x, "sum"), np.matmul),
    "a vector": (lambda a, x: a @ x[:, 0], lambda a, x: a @ x[:, 0]),
    "the transpose": (lambda a, x: a.t() @ x[:4], lambda a, x: a.T @ x[:4]),
    "multiples": (lambda a, x: (2 * a) @ x, lambda a, x: 2 * a @ x),
    "to_dense": (lambda a, x: a.to_dense() @ x, np.matmul),
    "to_sparse_coo": (lambda a, x: a.to_sparse_coo() @ x, np.matmul),
    "sum": (lambda a, x: a.sum() * x, lambda a, x: a.sum() * x),
}


@pytest.mark.parametrize(("product", "expected"), PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("longer", [0, 2])
@each_list
def test_gradients_of_a_torch_matrix(pairs, longer, product, expected):
    torch = pytest.importorskip("torch")
    neighbors, values, dense = neighbors_of(pairs, longer)
    tensors = torch.tensor(values, requires_grad=True), torch.tensor(FEATURES, requires_grad=True)
    matrix = kp.torch.to_sparse(neighbors, tensors[0])
    assert matrix.layout is torch.sparse_csr and matrix.shape == (4, 5)
    out = product(matrix, tensors[1])

    def in_numpy(values, features):
        return expected(dense(values), features)

    np.testing.assert_allclose(out.detach().numpy(), in_numpy(values, FEATURES), rtol=1e-12, atol=1e-14)

    def pullback(grad):
        return [g.numpy() for g in torch.autograd.grad(out, tensors, torch.tensor(grad), retain_graph=True)]

    check_vjp(in_numpy, pullback, (values, FEATURES))


def test_gradients_of_a_torch_matrix_of_more_than_2_31_places():
    torch = pytest.importorskip("torch")
    num = 50_000
    place = np.arange(num)
    index = np.stack([place, (place + 1) % num], 1).ravel()
    neighbors = kp.Neighbors(index, np.arange(0, 2 * num + 1, 2), num)
    rng = np.random.default_rng(0)
    values, features, grad = rng.normal(size=2 * num), rng.normal(size=(num, 2)), rng.normal(size=(num, 2))
    tensors = [torch.tensor(array, requires_grad=True) for array in (values, features)]
    out = sparse_mm(kp.torch.to_sparse(neighbors, tensors[0]), tensors[1], "sum")
    grad_values, grad_features = torch.autograd.grad(out, tensors, torch.tensor(grad))
    np.testing.assert_allclose(grad_features.numpy(), neighbors.to_sparse(values).T @ grad, atol=1e-12)
    expected = (features[index] * np.repeat(grad, 2, axis=0)).sum(axis=1)
    np.testing.assert_allclose(grad_values.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_torch_matrix_is_the_matrix_of_scipy(dtype):
    torch = pytest.importorskip("torch")
    neighbors, values, _ = neighbors_of(LISTS["by distance"], longer=2)
    values = values.astype(dtype)
    for got, expected in (
        (kp.torch.to_sparse(neighbors), neighbors.to_sparse()),
        (kp.torch.to_sparse(neighbors, torch.from_numpy(values)), neighbors.to_sparse(values)),
    ):
        for name, part in (("crow_indices", "indptr"), ("col_indices", "indices"), ("values", "data")):
            assert getattr(got, name)().tolist() == getattr(expected, part).tolist()
        assert got.values().numpy().dtype == expected.dtype
        got.col_indices()[0] = 0
        assert neighbors.index[0] == 4  # the list has another memory


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda torch: torch.ones(4), ValueError, r"values: expected \(5,\) to match neighbors, got \(4,\)"),
        (lambda torch: torch.ones(5, dtype=torch.int32), TypeError, "values: expected float32 or float64, got int32"),
        (lambda torch: np.ones(5), TypeError, "values: expected a torch tensor or None, got ndarray"),
    ],
)
def test_errors_of_a_torch_matrix(change, error, message):
    torch = pytest.importorskip("torch")
    neighbors, _, _ = neighbors_of(LISTS["sorted"])
    with pytest.raises(error, match=message):
        kp.torch.to_sparse(neighbors, change(torch))
    with pytest.raises(TypeError, match=r"neighbors: expected kpcore\.Neighbors"):
        kp.torch.to_sparse(neighbors.index)


# ---- JAX


@pytest.fixture
def jax():
    """JAX with float64."""
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("longer", [0, 2])
@each_list
def test_gradients_of_a_jax_matrix(jax, pairs, longer, traced):
    neighbors, values, dense = neighbors_of(pairs, longer)
    if traced:  # where the values of the list are not known, a value for each entry of its index
        values = np.append(values, np.ones(longer))

    def product(neighbors, values, features):
        return kp.jax.to_bcoo(neighbors, values) @ features

    if traced:
        product = jax.jit(product)
    out, pullback = jax.vjp(lambda *primals: product(neighbors, *primals), values, FEATURES)
    np.testing.assert_allclose(out, dense(values) @ FEATURES, rtol=1e-12, atol=1e-14)
    check_vjp(lambda v, f: dense(v) @ f, lambda grad: map(np.asarray, pullback(grad)), (values, FEATURES))


@each_list
def test_a_jax_matrix(jax, pairs):
    neighbors, _, dense = neighbors_of(pairs, longer=2)
    matrix = kp.jax.to_bcoo(neighbors)
    assert matrix.dtype == np.float32 and matrix.shape == (4, 5) and matrix.nse == len(pairs)
    assert matrix.todense().tolist() == dense(np.ones(len(pairs))).tolist()
    assert matrix.indices_sorted == (pairs == sorted(pairs))
    assert matrix.unique_indices == (len(set(pairs)) == len(pairs))


def test_a_matrix_of_32_bits():
    jax = pytest.importorskip("jax")
    assert not jax.config.jax_enable_x64
    neighbors, values, dense = neighbors_of(LISTS["by distance"])
    matrix = kp.jax.to_bcoo(neighbors, values.astype(np.float32))
    assert matrix.dtype == np.float32 and matrix.indices.dtype == np.int32
    assert matrix.todense().tolist() == dense(values.astype(np.float32)).tolist()


def test_errors_of_a_jax_matrix():
    jax = pytest.importorskip("jax")
    neighbors, values, _ = neighbors_of(LISTS["sorted"])
    with pytest.raises(ValueError, match=r"values: expected \(5,\) to match neighbors, got \(4,\)"):
        kp.jax.to_bcoo(neighbors, jax.numpy.ones(4))
    with pytest.raises(TypeError, match="values: expected float32 or float64, got int32"):
        kp.jax.to_bcoo(neighbors, jax.numpy.ones(5, np.int32))
    with pytest.raises(TypeError, match="values: expected float32, because jax_enable_x64 is off, got float64"):
        kp.jax.to_bcoo(neighbors, values)
    with pytest.raises(TypeError, match=r"neighbors: expected kpcore\.Neighbors, got list"):
        kp.jax.to_bcoo([0, 1])


# ---- graphs


def test_graphs_of_tensors():
    torch, points = pytest.importorskip("torch"), np.random.default_rng(0).random((20, 3))
    batch = torch.tensor([0] * 8 + [2] * 12)
    row_splits = kp.torch.batch_to_row_splits(batch, 4)
    assert row_splits.tolist() == [0, 8, 8, 20, 20]
    assert torch.equal(kp.torch.row_splits_to_batch(row_splits), batch)
    with pytest.raises(TypeError, match="batch: expected integers, got bfloat16"):
        kp.torch.batch_to_row_splits(batch.to(torch.bfloat16))
    edges = kp.torch.knn_graph(torch.from_numpy(points), 3, row_splits=row_splits, flow="target_to_source")
    assert_same_bits(edges.numpy(), kp.knn_graph(points, 3, row_splits=row_splits.numpy())[::-1])


def test_graphs_of_jax_arrays():
    jax, points = pytest.importorskip("jax"), np.random.default_rng(0).random((20, 3), np.float32)
    batch = jax.numpy.array([0] * 8 + [2] * 12)
    row_splits = kp.jax.batch_to_row_splits(batch, 4)
    assert row_splits.tolist() == [0, 8, 8, 20, 20]
    assert kp.jax.row_splits_to_batch(row_splits).tolist() == batch.tolist()
    edges = kp.jax.knn_graph(jax.numpy.asarray(points), 3, row_splits=row_splits, flow="target_to_source")
    assert edges.tolist() == kp.knn_graph(points, 3, row_splits=np.array([0, 8, 8, 20, 20]))[::-1].tolist()
