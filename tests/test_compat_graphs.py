"""kpcore.compat.torch_cluster, pointops and frnn against torch_cluster 1.6.3 and against brute force."""

import inspect
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.autograd.gradcheck import gradcheck  # noqa: E402

import kpcore as kp  # noqa: E402
from kpcore.compat import frnn, pointops, torch_cluster  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
LENGTHS = np.array([40, 0, 30, 20]), np.array([15, 5, 0, 20])  # of points and queries; two items miss one of them
with np.load(Path(__file__).parent / "golden" / "clients_torch_cluster.npz") as data:
    GOLDEN = dict(data)
CASES = sorted({name.split("/in/")[0].split("/out/")[0] for name in GOLDEN})


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def batch_vector(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


def ends(lengths, dtype=torch.int32):
    return torch.tensor(np.cumsum(lengths)).to(dtype)


def lattice(num, seed, dtype=np.float32, spacing=0.25):
    """Points at multiples of the spacing, many of them equal, or at exactly the radius from each other."""
    return (np.random.default_rng(seed).integers(0, 5, (num, 3)) * spacing).astype(dtype)


def cloud(num, seed, dtype=np.float32, dimension=3):
    return np.random.default_rng(seed).random((num, dimension)).astype(dtype)


def squares(points, queries):
    """(M, N) squared distances, summed in the order of the axes in the dtype of the points."""
    d = (points[None] - queries[:, None]).transpose(2, 0, 1)
    total = d[0] * d[0]
    for axis in d[1:]:
        total = total + axis * axis
    return total


def same_item(lengths=LENGTHS):
    """(M, N) bool: whether a query and a point are of one batch item."""
    return batch_vector(lengths[1])[:, None] == batch_vector(lengths[0])[None]


def nearest_rows(measured, allowed, k):
    """For each query up to k points by (distance, index)."""
    order = np.argsort(np.where(allowed, measured, np.inf), axis=1, kind="stable")
    return [row[: min(k, a.sum())] for row, a in zip(order, allowed, strict=True)]


def edges(rows, by_index=False):
    """(2, E) int64 (queries, points)."""
    rows = [np.sort(row) if by_index else row for row in rows]
    queries = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return np.stack([queries, np.concatenate([*rows, np.empty(0, np.int64)])]).astype(np.int64)


def assert_equal(got, expected):
    expected = torch.as_tensor(expected)
    assert got.dtype == expected.dtype and torch.equal(got, expected)


# ---- torch_cluster


@pytest.mark.parametrize("case", CASES)
def test_the_results_of_torch_cluster(case):
    stored = {name.rpartition("/")[2]: value for name, value in GOLDEN.items() if name.startswith(f"{case}/in/")}
    arguments = {name: value.item() if not value.ndim else torch.from_numpy(value) for name, value in stored.items()}
    function = case.partition("/")[0]
    if function.startswith("radius"):
        arguments["max_num_neighbors"] = 10**6
    if function == "radius_graph":
        arguments["flow"] = "target_to_source"
    if function == "knn_graph":
        arguments["flow"] = ("source_to_target", "target_to_source")[arguments.pop("swapped")]
    if function == "fps":
        arguments["random_start"] = False
    assert_equal(getattr(torch_cluster, function)(**arguments), GOLDEN[f"{case}/out/result"])


@DTYPES
@pytest.mark.parametrize("most", [0, 1, 3, 32])
def test_radius_is_strict_and_keeps_the_nearest(dtype, most):
    points, queries = lattice(90, 0, dtype), lattice(40, 1, dtype)
    measured, allowed = squares(points, queries), same_item()
    assert ((measured == 0.25) & allowed).sum() > 20, "the test needs pairs at exactly the radius"
    within = allowed & (measured < 0.25)
    assert most == 32 or within.sum(1).max() > 3
    p, q, bp, bq = tensors(points, queries, *map(batch_vector, LENGTHS))
    got = torch_cluster.radius(p, q, 0.5, bp, bq, most)
    assert_equal(got, edges(nearest_rows(measured, within, most), by_index=True))


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_radius_graph(loop, flow):
    points, lengths = lattice(60, 2), (np.array([25, 35]),) * 2
    within = same_item(lengths) & (squares(points, points) < 0.25) & (loop | ~np.eye(60, dtype=bool))
    expected = edges(nearest_rows(squares(points, points), within, 4), by_index=True)
    (p, b) = tensors(points, batch_vector(lengths[0]))
    assert_equal(torch_cluster.radius_graph(p, 0.5, b, loop, 4, flow),
                 expected[::-1].copy() if flow == "source_to_target" else expected)  # fmt: skip
    same = torch_cluster.radius(p, p, 0.5, b, b, 4, ignore_same_index=not loop)
    assert_equal(same, expected)


@pytest.mark.parametrize("dimension", [1, 3, 40])
@pytest.mark.parametrize("cosine", [False, True])
def test_knn(dimension, cosine):
    points, queries = (cloud(num, seed, np.float64, dimension) - 0.4 for num, seed in ((90, 3), (40, 4)))
    measured = squares(points, queries)
    if cosine:
        measured = (
            1
            - (queries / np.linalg.norm(queries, axis=1)[:, None])
            @ (points / np.linalg.norm(points, axis=1)[:, None]).T
        )
        if dimension == 1:
            measured = np.round(measured)
    p, q, bp, bq = tensors(points, queries, *map(batch_vector, LENGTHS))
    got = torch_cluster.knn(p, q, 25, bp, bq, cosine)
    assert_equal(got, edges(nearest_rows(measured, same_item(), 25)))


@pytest.mark.parametrize("loop", [False, True])
def test_knn_graph_of_equal_points(loop):
    """pytorch_cluster#40, #51: with more than k equal points the point itself was among the k, or was not."""
    points, k = torch.zeros(7, 3), 3
    got = torch_cluster.knn_graph(points, k, loop=loop)
    assert torch.bincount(got[1], minlength=7).tolist() == [k] * 7
    assert bool((got[0] == got[1]).any()) == loop


def test_numbers_are_points_of_one_coordinate():
    x = torch.tensor([0.0, 1.0, 3.0])
    assert torch_cluster.knn(x, x[:1], 2).tolist() == [[0, 0], [0, 1]]
    assert torch_cluster.radius_graph(x, 1.5).tolist() == [[1, 0], [0, 1]]
    assert torch_cluster.grid_cluster(x, torch.tensor([2.0])).tolist() == [0, 0, 1]


def test_batches_of_other_numbers_of_items():
    x, y = torch.zeros(4, 2), torch.zeros(3, 2)
    batch_x, batch_y = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 1], dtype=torch.int32)
    expected = [[0, 0], [0, 1]]
    assert torch_cluster.knn(x, y, 5, batch_x, batch_y).tolist() == expected
    assert torch_cluster.radius(x, y, 1.0, batch_x, batch_y).tolist() == expected
    assert torch_cluster.radius(x, y, 1.0, batch_x, batch_y, batch_size=9).tolist() == expected
    assert torch_cluster.knn(x, y, 1, None, torch.zeros(3, dtype=torch.int64)).shape == (2, 3)
    for points, queries in ((x[:0], y), (x, y[:0]), (x[:0], y[:0])):
        for edge_index in (torch_cluster.knn(points, queries, 2), torch_cluster.radius(points, queries, 1.0)):
            assert_equal(edge_index, np.empty((2, 0), np.int64))
    assert torch_cluster.knn_graph(x[:0], 2, batch_x[:0]).shape == (2, 0)
    assert torch_cluster.fps(x[:0]).shape == torch_cluster.grid_cluster(x[:0], torch.ones(2)).shape == (0,)


@DTYPES
def test_nearest(dtype):
    """pytorch_cluster#82: there the points are scaled to one unit in float32, which merges those that are close."""
    points, queries = 1000 + cloud(50, 5, dtype), 1000 + cloud(30, 6, dtype)
    lengths = np.array([20, 0, 30]), np.array([10, 0, 20])
    expected = edges(nearest_rows(squares(points, queries), same_item(lengths), 1))[1]
    p, q, bp, bq = tensors(points, queries, *map(batch_vector, lengths))
    assert_equal(torch_cluster.nearest(q, p, bq, bp), expected)
    assert_equal(torch_cluster.nearest(q, p), squares(points, queries).argmin(1))
    assert torch_cluster.nearest(q[:0], p).shape == (0,)


def test_fps_draws_its_starts_from_the_generator_of_torch():
    src, batch = torch.rand(60, 3), torch.arange(3).repeat_interleave(20)
    torch.manual_seed(3)
    first = torch_cluster.fps(src, batch, 0.2)
    torch.manual_seed(3)
    assert torch.equal(torch_cluster.fps(src, batch, 0.2), first)
    starts = {tuple(torch_cluster.fps(src, batch, 0.05).tolist()) for _ in range(60)}
    assert {number // 20 for row in starts for number in row} == {0, 1, 2}
    assert all(row[0] < 20 <= row[1] < 40 <= row[2] for row in starts) and len(starts) > 30


def test_fps_chooses_no_point_twice_and_takes_empty_items():
    """pytorch_geometric#666, and the number of points in pytorch_geometric#1190 and pytorch_cluster#174."""
    src = torch.from_numpy(lattice(60, 7))
    index = torch_cluster.fps(src, ptr=[0, 20, 20, 60], ratio=1.0)
    assert index[:20].sort()[0].tolist() == list(range(20)) and index[20:].sort()[0].tolist() == list(range(20, 60))
    assert len(torch_cluster.fps(torch.rand(732, 3), ratio=100 / 732)) == 101
    assert len(torch_cluster.fps(torch.rand(20000, 3), ratio=768 / 20000)) == 769
    each = torch_cluster.fps(src, torch.arange(3).repeat_interleave(20), torch.tensor([0.1, 1.0, 0.5]), False)
    assert torch.bincount(each // 20).tolist() == [2, 20, 10]
    expected = kp.farthest_point_sampling(src.numpy(), 20, row_splits=np.array([0, 20, 40, 60])).index
    assert each.tolist() == [*expected[:2], *expected[20:40], *expected[40:50]]


def test_issues_of_torch_cluster():
    x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    y = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert torch_cluster.radius(x, y, 10, None, None, 1).tolist() == [[0, 1], [0, 2]]  # 79: all were returned
    assert torch_cluster.radius_graph(x, r=100, max_num_neighbors=1)[1].tolist() == [0, 1, 2, 3]  # 219: two each
    line = torch.tensor([[0.0], [1.0], [2.0]])
    assert torch_cluster.radius_graph(line, r=2.5, max_num_neighbors=1).tolist() == [[1, 0, 1], [0, 1, 2]]  # 128
    crowd = torch.from_numpy(cloud(100, 8, np.float64))
    turned = crowd @ torch.linalg.qr(torch.from_numpy(cloud(3, 9, np.float64)))[0]
    assert torch.equal(torch_cluster.radius_graph(crowd, 2.0), torch_cluster.radius_graph(turned, 2.0))  # 106, 72


def test_voxels_of_integers_are_exact():
    """torch divides integers in float32, and the difference of two int8 may not fit int8."""
    pos = torch.tensor([[0], [2**25 + 1], [2**26 + 3]])
    assert torch_cluster.grid_cluster(pos, torch.tensor([1])).tolist() == pos[:, 0].tolist()
    pos = torch.tensor([[-120], [119], [0]], dtype=torch.int8)
    assert torch_cluster.grid_cluster(pos, torch.tensor([10], dtype=torch.int8)).tolist() == [0, 23, 12]
    end = torch.tensor([127], dtype=torch.int8)
    assert torch_cluster.grid_cluster(pos[1:], end // 10, pos[0], end).tolist() == [19, 10]


WRONG = torch.tensor([0, 1, 0])
ERRORS = [
    (lambda x, i: torch_cluster.knn(x.numpy(), x, 1), "x: expected a torch tensor, got ndarray"),
    (lambda x, i: torch_cluster.knn(x, i, 1), "y: expected float32 or float64, got int64"),
    (lambda x, i: torch_cluster.knn(x, x.double(), 1), r"y: expected float32 to match x, .* x.to\(y.dtype"),
    (lambda x, i: torch_cluster.knn(x, x[:, :2], 1), r"y: expected \(M, 3\) to match x, got \(3, 2\)"),
    (lambda x, i: torch_cluster.knn(x, x, 0), "k: expected at least 1, got 0"),
    (lambda x, i: torch_cluster.knn(x, x, 1, WRONG, i), "batch_x: expected numbers that never decrease, got 1 then 0"),
    (lambda x, i: torch_cluster.knn(x, x, 1, i, i[:2]), r"batch_y: expected \(3,\) to match y, got \(2,\)"),
    (lambda x, i: torch_cluster.knn(x, x, 1, None, i), "batch_x: expected a batch vector, because there are 3 batch"),
    (lambda x, i: torch_cluster.knn(x, x, 1, i, i, batch_size=2), "batch_x: expected .* to match batch_size, got 2"),
    (lambda x, i: torch_cluster.knn(x, 0 * x, 1, cosine=True), "y: expected no rows of zeros with"),
    (lambda x, i: torch_cluster.knn(x.half(), x.half(), 1, cosine=True), "x: expected float32 or float64, got float16"),
    (lambda x, i: torch_cluster.knn(x, x, 1, cosine=1), "cosine: expected True or False, got int"),
    (lambda x, i: torch_cluster.radius(x, x, 0.0), "r: expected a finite number above zero, got 0.0"),
    (lambda x, i: torch_cluster.radius(x, x, x[0, 0]), r"r: expected a number, got Tensor; convert it with r.item\(\)"),
    (lambda x, i: torch_cluster.radius(x, x, 1.0, max_num_neighbors=-1), "max_num_neighbors: expected at least 0"),
    (lambda x, i: torch_cluster.radius(x / 0, x, 1.0), "x: expected finite coordinates, got .* in row 0"),
    (lambda x, i: torch_cluster.radius(x, x[:2], 1.0, ignore_same_index=True), "ignore_same_index: expected as many"),
    (lambda x, i: torch_cluster.radius(torch.ones(3, 17), x, 1.0), r"x: expected \(N, D\) with D = 1 to 16"),
    (lambda x, i: torch_cluster.radius_graph(x, 1.0, batch_size=2), "batch: expected a batch vector, because"),
    (lambda x, i: torch_cluster.radius_graph(x, 1.0, flow="up"), "flow: expected 'source_to_target' or"),
    (lambda x, i: torch_cluster.nearest(x, x[:1], i, i[:1]), "y: expected at least one point in the batch"),
    (lambda x, i: torch_cluster.nearest(x, x[:0]), "y: expected at least one point, got none"),
    (lambda x, i: torch_cluster.fps(x, ratio=1.5), "ratio: expected numbers above 0 and at most 1, got 1.5"),
    (lambda x, i: torch_cluster.fps(x, i, torch.ones(2)), r"ratio: expected a number, or \(3,\) to match the batch"),
    (lambda x, i: torch_cluster.fps(x, i, torch.ones(3, device="meta")), "ratio: expected a tensor on the CPU or"),
    (lambda x, i: torch_cluster.fps(x, i, torch.ones(3).bfloat16()), "ratio: expected float32 or float64"),
    (lambda x, i: torch_cluster.fps(x, ptr=i.to("meta")), "ptr: expected a tensor on the CPU or"),
    (lambda x, i: torch_cluster.fps(x, i, ptr=[0, 3]), "ptr: expected None, because batch is passed"),
    (lambda x, i: torch_cluster.fps(x, ptr=[0, 2]), "ptr: expected values from 0 to 3 to match src, got from 0 to 2"),
    (lambda x, i: torch_cluster.fps(x, WRONG), "batch: expected numbers that never decrease"),
    (lambda x, i: torch_cluster.fps(torch.ones(3, 17)), r"src: expected \(N, D\) with D = 1 to 16"),
    (lambda x, i: torch_cluster.grid_cluster(x, torch.ones(2)), r"size: expected \(3,\) to match pos, got \(2,\)"),
    (lambda x, i: torch_cluster.grid_cluster(x, torch.zeros(3)), "size: expected numbers above zero"),
    (lambda x, i: torch_cluster.grid_cluster(x, torch.ones(3).double()), "size: expected float32 on cpu to match pos"),
    (lambda x, i: torch_cluster.grid_cluster(x, torch.ones(3), 1.5 + 0 * x[0]), "pos: expected points from start"),
    (lambda x, i: torch_cluster.grid_cluster(x, torch.ones(3), None, x[1]), "pos: expected points .* in row 2"),
    (lambda x, i: torch_cluster.grid_cluster(1e30 * x, torch.ones(3), 0 * x[0], x[0]), "pos: expected points from sta"),
    (lambda x, i: torch_cluster.grid_cluster(1e30 * x, torch.ones(3)), "size: expected a grid of at most"),
    (lambda x, i: torch_cluster.grid_cluster(x / 0, torch.ones(3)), "pos: expected points from start"),
    (lambda x, i: torch_cluster.grid_cluster(x.double(), 0 * x[0].double() + 1e-9), "size: expected a grid of at"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_errors_of_torch_cluster(number):
    call, message = ERRORS[number]
    with pytest.raises((ValueError, TypeError), match=f"^({message})"):
        call(torch.arange(9.0).reshape(3, 3), torch.arange(3))


def test_what_is_not_available():
    cases = {torch_cluster: ("graclus_cluster", "random_walk", "neighbor_sampler"),
             pointops: ("subtraction", "aggregation", "attention_relation_step", "attention_fusion_step")}  # fmt: skip
    for module, names in cases.items():
        for name in names:
            arguments = range(4 if name == "random_walk" else 3)
            with pytest.raises(NotImplementedError, match=f"^{name}: .*not in kpcore"):
                getattr(module, name)(*arguments)
    assert "batch_size" in torch_cluster.knn.__doc__, "by which PyTorch Geometric knows that it may pass it"


SIGNATURES = {
    torch_cluster.radius: "x y r batch_x batch_y max_num_neighbors=32 num_workers=1 batch_size ignore_same_index",
    torch_cluster.radius_graph: "x r batch loop=False max_num_neighbors=32 flow=source_to_target num_workers=1",
    torch_cluster.knn: "x y k batch_x batch_y cosine=False num_workers=1 batch_size",
    torch_cluster.knn_graph: "x k batch loop=False flow=source_to_target cosine=False num_workers=1 batch_size",
    torch_cluster.nearest: "x y batch_x batch_y",
    torch_cluster.fps: "src batch ratio random_start=True batch_size ptr",
    torch_cluster.grid_cluster: "pos size start end",
    pointops.knn_query: "nsample xyz offset new_xyz new_offset",
    pointops.ball_query: "nsample max_radius min_radius xyz offset new_xyz new_offset",
    pointops.random_ball_query: "nsample max_radius min_radius xyz offset new_xyz new_offset",
    pointops.farthest_point_sampling: "xyz offset new_offset",
    pointops.grouping: "idx feat xyz new_xyz with_xyz=False",
    pointops.grouping2: "input idx",
    pointops.interpolation: "xyz new_xyz feat offset new_offset k=3",
    pointops.knn_query_and_group: "feat xyz offset new_xyz new_offset idx nsample with_xyz=False",
    pointops.ball_query_and_group: "feat xyz offset new_xyz new_offset idx max_radio min_radio=0 nsample",
    pointops.query_and_group: "nsample xyz new_xyz feat idx offset new_offset dilation=0 with_feat=True",
    pointops.knnquery: "nsample xyz new_xyz offset new_offset",
    pointops.queryandgroup: "nsample xyz new_xyz feat idx offset new_offset use_xyz=True",
    frnn.frnn_grid_points: "points1 points2 lengths1 lengths2 K=-1 r=-1 grid return_nn=False return_sorted=True",
    frnn.frnn_gather: "x idxs lengths",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures(function):
    """Names, order and defaults of arguments are those of the libraries; what follows here has a default too."""
    parameters = list(inspect.signature(function).parameters.values())
    for expected, parameter in zip(SIGNATURES[function].split(), parameters, strict=False):
        name, _, default = expected.partition("=")
        assert parameter.name == name
        assert not default or str(parameter.default) == default


# ---- pointops


def test_knn_query():
    points, queries = lattice(90, 10), lattice(40, 11)
    rows = nearest_rows(squares(points, queries), same_item(), 25)
    p, q = tensors(points, queries)
    idx, dist = pointops.knn_query(25, p, ends(LENGTHS[0]), q, ends(LENGTHS[1], torch.int64))
    expected = np.full((40, 25), -1, np.int32)
    far = np.full((40, 25), 1e5, np.float32)
    for query, row in enumerate(rows):
        expected[query, : len(row)], far[query, : len(row)] = row, np.sqrt(squares(points, queries)[query, row])
    assert (expected == -1).sum() == 15 * 0 + 5 * 25 + 20 * 5
    assert_equal(idx, expected)
    assert_equal(dist, far)
    old, old_dist = pointops.knnquery(25, p, q, ends(LENGTHS[0]), ends(LENGTHS[1]))
    first = np.array([0, 40, 40, 70])[batch_vector(LENGTHS[1])][:, None]
    assert_equal(old, np.where(expected == -1, first, expected).astype(np.int32))
    assert torch.equal(old_dist, dist)
    itself, offset = pointops.knn_query(3, p, ends(LENGTHS[0])), ends(LENGTHS[0])
    assert torch.equal(itself[0], pointops.knn_query(3, p, offset, p, offset)[0])


def candidates(points, queries, inner, outer):
    """For each query the points of a ball query by (distance, index)."""
    measured = squares(points, queries)
    radii = np.array([inner, outer], points.dtype)
    between = (measured >= radii[0] * radii[0]) & (measured < radii[1] * radii[1])
    within = (between | (measured.astype(np.float64) <= 1e-5)) & same_item()
    return nearest_rows(measured, within, len(points)), measured


@DTYPES
@pytest.mark.parametrize(("inner", "outer"), [(0.0, 0.5), (0.25, 0.75), (0.0, 0.002)])
@pytest.mark.parametrize("nsample", [4, 40])
def test_ball_query(dtype, inner, outer, nsample):
    points, queries = lattice(90, 12, dtype), lattice(40, 13, dtype)
    queries[::3] += dtype(0.0015)  # 0.0026 from a point, nearer than 0.00316
    rows, measured = candidates(points, queries, inner, outer)
    p, q = tensors(points, queries)
    idx, dist = pointops.ball_query(nsample, outer, inner, p, ends(LENGTHS[0]), q, ends(LENGTHS[1]))
    for query, row in enumerate(rows):
        if len(row) > nsample:
            row = row[(np.float32(len(row)) / np.float32(nsample) * np.arange(nsample, dtype=np.float32)).astype(int)]
        missing = nsample - len(row)
        assert idx[query].tolist() == [*row, *[-1] * missing]
        assert dist[query].tolist() == [*np.sqrt(measured[query, row]), *[dtype(1e5)] * missing]
    assert idx.dtype == torch.int32 and dist.dtype == p.dtype


def test_random_ball_query():
    points, queries = lattice(90, 14), lattice(40, 15)
    rows, measured = candidates(points, queries, 0.0, 0.75)
    p, q = tensors(points, queries)

    def query():
        return pointops.random_ball_query(6, 0.75, 0.0, p, ends(LENGTHS[0]), q, ends(LENGTHS[1]))

    torch.manual_seed(0)
    idx, dist = query()
    for number, row in enumerate(rows):
        chosen = idx[number][idx[number] >= 0].tolist()
        assert len(chosen) == len(set(chosen)) == min(6, len(row)) and set(chosen) <= set(row.tolist())
        assert dist[number].tolist() == [*np.sqrt(measured[number, chosen]), *[1e5] * (6 - len(chosen))]
    torch.manual_seed(0)
    assert torch.equal(query()[0], idx) and not torch.equal(query()[0], idx)


def test_farthest_point_sampling_of_another_number_in_each_item():
    points, lengths, counts = lattice(90, 16), np.array([40, 0, 30, 20]), np.array([7, 0, 30, 0])
    (p,) = tensors(points)
    index = pointops.farthest_point_sampling(p, ends(lengths), ends(counts))
    whole = kp.farthest_point_sampling(points, 40, row_splits=kp.row_splits(lengths)).index
    assert_equal(index, np.concatenate([whole[:7], whole[40:70]]))
    assert torch.equal(pointops.furthestsampling(p, ends(lengths), ends(counts)), index)
    assert pointops.farthest_point_sampling(p, ends(lengths), ends(0 * counts)).shape == (0,)


def test_grouping():
    generator = torch.Generator().manual_seed(0)
    feat, xyz, new_xyz = (torch.rand(num, 3, generator=generator, dtype=torch.float64) for num in (9, 9, 4))
    idx = torch.randint(0, 9, (4, 5), generator=generator, dtype=torch.int32)
    idx[1, 2:], idx[3] = -1, -1
    kept = (idx >= 0)[..., None]
    there = idx.clamp(min=0).long()
    expected = torch.where(kept, torch.cat([xyz[there] - new_xyz[:, None], feat[there]], -1), 0)
    assert_equal(pointops.grouping(idx, feat, xyz, new_xyz, True), expected)
    assert_equal(pointops.grouping(idx, feat, xyz), expected[..., 3:])
    assert_equal(pointops.grouping2(feat, idx.long()), expected[..., 3:])
    for tensor in (feat, xyz, new_xyz):
        tensor.requires_grad_()
    assert gradcheck(lambda *inputs: pointops.grouping(idx, *inputs, True), (feat, xyz, new_xyz))
    assert pointops.grouping(torch.full((2, 3), -1), feat[:0], xyz[:0]).tolist() == torch.zeros(2, 3, 3).tolist()
    got, same = pointops.knn_query_and_group(feat, xyz, torch.tensor([9]), nsample=4, with_xyz=True)
    assert torch.equal(same, pointops.knn_query(4, xyz, torch.tensor([9]))[0])
    assert torch.equal(got, pointops.grouping(same, feat, xyz, with_xyz=True))
    old = pointops.queryandgroup(4, xyz, None, feat, None, torch.tensor([9]), None)
    assert torch.equal(old, got)
    ball, ball_idx = pointops.ball_query_and_group(feat, xyz, torch.tensor([9]), max_radio=0.5, nsample=4)
    assert torch.equal(ball_idx, pointops.ball_query(4, 0.5, 0, xyz, torch.tensor([9]))[0]) and ball.shape == (9, 4, 3)
    assert torch.equal(pointops.ball_query_and_group(feat, xyz, idx=ball_idx)[0], ball)


@pytest.mark.parametrize("dilation", [0, 1, 5])
def test_query_and_group(dilation):
    points, queries = lattice(90, 17), lattice(40, 18)
    lengths = np.array([40, 3, 27, 20]), np.array([15, 5, 0, 20])
    p, q = tensors(points, queries)
    nsample, total = 5, 1 + 4 * (dilation + 1)
    offsets = ends(lengths[0]), ends(lengths[1])
    idx = pointops.query_and_group(nsample, p, q, p, None, *offsets, dilation, with_feat=False)
    rows = nearest_rows(squares(points, queries), same_item(lengths), total)
    for query, item in enumerate(batch_vector(lengths[1])):
        soft = dilation if lengths[0][item] >= total else (lengths[0][item] - 1) / (nsample - 1) - 1
        assert idx[query].tolist() == rows[query][[int((soft + 1) * i) for i in range(nsample)]].tolist()
    feat, same = pointops.query_and_group(nsample, p, q, p, idx, *offsets)
    assert same is idx and torch.equal(feat, pointops.grouping(idx, p, p, q, True))


def test_interpolation():
    points, queries, feat = cloud(90, 19, np.float64), cloud(40, 20, np.float64), cloud(90, 21, np.float64, 4)
    lengths = np.array([40, 2, 0, 48]), np.array([15, 5, 3, 17])
    queries[4] = points[7]
    measured = np.sqrt(squares(points, queries))
    expected = np.zeros((40, 4))
    for query, row in enumerate(nearest_rows(measured, same_item(lengths), 3)):
        weights = 1 / (measured[query, row] + 1e-8)
        expected[query] = weights @ feat[row] / weights.sum() if len(row) else 0
    p, q, f = tensors(points, queries, feat)
    arguments = p, q, f.requires_grad_(), ends(lengths[0]), ends(lengths[1])
    np.testing.assert_allclose(pointops.interpolation(*arguments).detach().numpy(), expected, rtol=1e-12, atol=0)
    assert gradcheck(lambda feat: pointops.interpolation2(p, q, feat, *arguments[3:], 3), f)
    single = pointops.interpolation(p.float(), q.float(), f.detach().float(), *arguments[3:])
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-5)


def test_pointops_under_autocast():
    """As in training with AMP: layers give features of 16 bits, coordinates stay in float32."""
    xyz, feat = torch.from_numpy(cloud(30, 23)), torch.from_numpy(cloud(30, 24)).bfloat16().requires_grad_()
    offset, idx = torch.tensor([30]), torch.arange(30).view(10, 3)
    with torch.autocast("cpu", torch.bfloat16):
        grouped = pointops.grouping(idx, feat, xyz, xyz[:10], True)
        between = pointops.interpolation(xyz, xyz[:10] + 0.01, feat, offset, torch.tensor([10]))
    assert torch.equal(grouped, pointops.grouping(idx, feat.float(), xyz, xyz[:10], True))
    exact = pointops.interpolation(xyz, xyz[:10] + 0.01, feat.float(), offset, torch.tensor([10]))
    assert torch.equal(between, exact) and between.dtype == torch.float32
    (grouped.sum() + between.sum()).backward()
    assert feat.grad.dtype == torch.bfloat16 and feat.grad.all()
    with pytest.raises(TypeError, match=r"^feat: expected float32 to match xyz, got bfloat16"):
        pointops.grouping(idx, feat, xyz, xyz[:10], True)


def test_offsets():
    offset = torch.tensor([2, 2, 5, 9], dtype=torch.int32)
    batch = pointops.offset2batch(offset)
    assert_equal(batch, np.array([0, 0, 2, 2, 2, 3, 3, 3, 3]))
    assert_equal(pointops.batch2offset(batch), offset)
    # Pointcept#351: clouds (B, N, 3)
    rows = torch.rand(4, 100, 3).view(-1, 3)
    offset, new_offset = (torch.arange(1, 5) * num for num in (100, 16))
    index = pointops.farthest_point_sampling(rows, offset, new_offset)
    grouped, idx = pointops.query_and_group(8, rows, rows[index.long()], rows, None, offset, new_offset)
    assert grouped.shape == (64, 8, 6) and torch.equal(idx[:, 0], index)


POINTOPS_ERRORS = [
    (lambda x, o: pointops.knn_query(2, x, o - 1), "offset: expected values from 0 to 6 to match xyz, got from 0 to 5"),
    (lambda x, o: pointops.knn_query(2, x, o.flip(0)), "offset: expected values from 0 to 6 to match"),
    (lambda x, o: pointops.knn_query(2, x, o.float()), r"offset: expected int32 or int64 \(B,\), got float32 \(2,\)"),
    (lambda x, o: pointops.knn_query(2, x, o, x), "new_offset: expected a tensor, because new_xyz is one, got None"),
    (lambda x, o: pointops.knn_query(2, x, o, None, o), "new_xyz: expected a tensor, because new_offset"),
    (lambda x, o: pointops.knn_query(2, x, o, x, [2, 6]), "new_offset: expected a torch tensor, got list"),
    (lambda x, o: pointops.interpolation(x, x, x.numpy(), o, o), "feat: expected a torch tensor, got ndarray; convert"),
    (lambda x, o: pointops.knn_query(2, x, o, x, o[1:]), r"new_offset: expected \(2,\) to match offset, got \(1,\)"),
    (lambda x, o: pointops.knn_query(2, x, o, x.double(), o), "new_xyz: expected float32 to match xyz, got float64"),
    (lambda x, o: pointops.knn_query(0, x, o), "nsample: expected at least 1, got 0"),
    (lambda x, o: pointops.knn_query(2, x / 0, o), "xyz: expected finite coordinates"),
    (lambda x, o: pointops.ball_query(2, 0.5, 0.5, x, o), "min_radius: expected less than max_radius = 0.5, got 0.5"),
    (lambda x, o: pointops.ball_query(2, 0.0, 0.0, x, o), "max_radius: expected a finite number above zero"),
    (lambda x, o: pointops.ball_query(2, 0.5, -1.0, x, o), "min_radius: expected a number of at least zero"),
    (lambda x, o: pointops.farthest_point_sampling(x, o, o + 1), "new_offset: expected 0 to 2 points in item 0"),
    (lambda x, o: pointops.farthest_point_sampling(x, o, o[:1]), r"new_offset: expected \(2,\) to match offset"),
    (lambda x, o: pointops.farthest_point_sampling(x, o, o.flip(0) - 4), "new_offset: expected 0 to 4 points in"),
    (lambda x, o: pointops.grouping(x, o[:, None], x), r"idx: expected int32 or int64, got features first; grouping"),
    (lambda x, o: pointops.grouping(o, x, x), r"idx: expected int32 or int64 \(M, nsample\), got int32 \(2,\)"),
    (lambda x, o: pointops.grouping(o[:, None], x, x), "idx: expected values from 0 to 5 to match feat, got 6"),
    (lambda x, o: pointops.grouping(0 * o[:, None] - 2, x, x), "idx: expected values from 0 to 5 .* got -2"),
    (lambda x, o: pointops.grouping(0 * o[:, None], x, x, with_xyz=True), r"new_xyz: expected \(2, 3\) to match idx"),
    (lambda x, o: pointops.grouping(0 * o[:, None], x[:4], x, x[:2], True), "feat: expected .* to match xyz"),
    (lambda x, o: pointops.grouping(0 * o[:, None], x, x, x[:2].double(), True), "new_xyz: expected float32 to match"),
    (lambda x, o: pointops.interpolation(x, x, x[:4], o, o), r"feat: expected \(6, C\) to match"),
    (lambda x, o: pointops.interpolation(x, x, x, o, o, 0), "k: expected at least 1, got 0"),
    (lambda x, o: pointops.knn_query_and_group(x, x, o), "nsample: expected a value, because idx is None, got None"),
    (lambda x, o: pointops.batch2offset(o.flip(0)), "batch: expected numbers that never decrease"),
    (lambda x, o: pointops.offset2batch(o.flip(0)), "offset: expected values that never decrease"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(POINTOPS_ERRORS)))
def test_errors_of_pointops(number):
    call, message = POINTOPS_ERRORS[number]
    with pytest.raises((ValueError, TypeError), match=f"^({message})"):
        call(torch.rand(6, 3), torch.tensor([2, 6], dtype=torch.int32))


# ---- frnn


def frnn_reference(points1, points2, lengths1, lengths2, K, r):
    """(dists, idxs, the mask of those that are there) in NumPy."""
    dists = np.full((*points1.shape[:2], K), -1, points1.dtype)
    idxs = np.full(dists.shape, -1)
    for item, (first, second) in enumerate(zip(lengths1, lengths2, strict=True)):
        measured = squares(points2[item, :second], points1[item, :first])
        radius = points1.dtype.type(r[item])
        for query, row in enumerate(nearest_rows(measured, measured <= radius * radius, K)):
            dists[item, query, : len(row)], idxs[item, query, : len(row)] = measured[query, row], row
    return dists, idxs


@DTYPES
@pytest.mark.parametrize("dimension", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("ragged", [False, True])
def test_frnn(dtype, dimension, ragged):
    rng = np.random.default_rng(22)
    points1, points2 = ((rng.integers(0, 5, (3, num, dimension)) * 0.25).astype(dtype) for num in (12, 30))
    lengths = ([12, 0, 7], [5, 9, 0]) if ragged else ([12] * 3, [30] * 3)
    radii = [0.5, 0.75, 0.25] if dimension < 5 else [1.0, 0.75, 2.0]
    dists, idxs = frnn_reference(points1, points2, *lengths, 6, radii)
    exactly = [(dists[item, :first] == radii[item] ** 2).sum() for item, first in enumerate(lengths[0])]
    assert dimension == 20 or sum(exactly) > 0, "the test needs pairs at exactly the radius"
    p1, p2 = tensors(points1, points2)
    numbers = [torch.tensor(each) for each in lengths] if ragged else [None, None]
    got = frnn.frnn_grid_points(p1, p2, *numbers, 6, torch.tensor(radii), return_nn=True)
    assert_equal(got[0], dists)
    assert_equal(got[1], idxs)
    expected_nn = np.where(idxs[..., None] >= 0, np.take_along_axis(points2[:, None], idxs[..., None].clip(0), 2), 0)
    assert_equal(got[2], expected_nn)
    again = frnn.frnn_grid_points(p1, p2, *numbers, 6, max(radii), got[3])
    one = frnn_reference(points1, points2, *lengths, 6, [max(radii)] * 3)
    assert_equal(again[0], one[0])
    assert_equal(again[1], one[1])
    assert again[2] is None and (again[3] is got[3]) and (got[3] is None) == (dimension > 16)


def test_frnn_is_differentiable():
    torch.manual_seed(0)
    points1 = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    points2 = torch.rand(2, 6, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 2]), torch.tensor([6, 3])

    def distances(points1, points2):
        dists, idxs, nn, _ = frnn.frnn_grid_points(points1, points2, *lengths, 3, 0.6, return_nn=True)
        assert (idxs >= 0).sum() > 6 and (idxs < 0).any()
        return dists, nn

    assert gradcheck(distances, (points1, points2))
    dists, idxs, *_ = frnn.frnn_grid_points(points1, points2, *lengths, 3, 0.6)
    assert dists.requires_grad and not idxs.requires_grad
    assert frnn.frnn_grid_points(points1.detach()[:0], points2.detach()[:0], K=2, r=0.5)[0].shape == (0, 4, 2)
    assert frnn.frnn_grid_points(points1.detach(), points2.detach()[:, :0], K=2, r=0.5)[1].unique().tolist() == [-1]
    empty = frnn.frnn_gather(points2[:, :0], torch.full((2, 1, 1), -1))
    assert empty.shape == (2, 1, 1, 3) and not empty.any()


@pytest.mark.parametrize("num_points", [0, 5])
def test_gradients_of_frnn_without_points(num_points):
    """torch.autograd.grad raises an error for an input from which no output is computed."""
    points1, points2 = torch.rand(2, 4, 3, requires_grad=True), torch.rand(2, num_points, 3, requires_grad=True)
    lengths2 = torch.tensor([0, 0])
    dists, idxs, nn, _ = frnn.frnn_grid_points(points1, points2, None, lengths2, 2, 0.5, return_nn=True)
    assert (dists == -1).all() and (idxs == -1).all()
    for result in (dists, nn):
        gradients = torch.autograd.grad(result.sum(), points2, retain_graph=True)
        assert gradients[0].shape == points2.shape and not gradients[0].any()
    assert frnn.frnn_gather(points2[..., :0], idxs).shape == (2, 4, 2, 0)


def test_a_radius_in_a_tensor():
    points = torch.from_numpy(cloud(40, 25)).view(2, 20, 3)
    expected = frnn.frnn_grid_points(points, points, K=4, r=0.3)[1]
    for r in (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([0.3, 0.3])):
        assert torch.equal(frnn.frnn_grid_points(points, points, K=4, r=r)[1], expected)
    assert frnn.frnn_grid_points(points[:0], points[:0], K=4, r=torch.ones(0))[1].shape == (0, 20, 4)


FRNN_ERRORS = [
    (lambda p: frnn.frnn_grid_points(p, p, r=1.0), "K: expected at least 1, got -1"),
    (lambda p: frnn.frnn_grid_points(p, p, K=2), "r: expected a finite number above zero, got -1"),
    (lambda p: frnn.frnn_grid_points(p, p[:1], K=2, r=1.0), r"points2: invalid shape, expected \(2, P2, 3\)"),
    (lambda p: frnn.frnn_grid_points(p, p.double(), K=2, r=1.0), "points2: expected float32, got float64"),
    (lambda p: frnn.frnn_grid_points(p, p, torch.tensor([5, 3]), K=2, r=1.0), "lengths1: expected 0 to 4, the padded"),
    (lambda p: frnn.frnn_grid_points(p, p, None, torch.ones(3).long(), 2, 1.0), r"lengths2: invalid shape, expected"),
    (lambda p: frnn.frnn_grid_points(p, p, K=2, r=torch.ones(3)), r"r: expected a number, \(1,\) or \(2,\) to match"),
    (lambda p: frnn.frnn_grid_points(p, p, K=2, r=torch.tensor([1.0, 0.0])), "r: expected numbers above zero, got 0.0"),
    (lambda p: frnn.frnn_grid_points(p, p, K=2, r=torch.ones(2, device="meta")), "r: expected a tensor on the CPU or"),
    (lambda p: frnn.frnn_grid_points(p, p, K=2, r=torch.tensor([1, 1e30])), "r: expected a number with a square"),
    (lambda p: frnn.frnn_grid_points(p[..., :0], p[..., :0], K=2, r=1.0), r"points2: expected \(N, D\) with D = 1 to"),
    (lambda p: frnn.frnn_grid_points(p, p, K=2, r=1.0, grid=(p, p)), "grid: expected what frnn_grid_points"),
    (lambda p: frnn.frnn_grid_points(p, p[:, :3], K=2, r=1.0, grid=frnn.frnn_grid_points(p, p, K=1, r=1.0)[3]),
     r"grid: expected one .* that end at \[3, 6\], got one with items that end at \[4, 8\]"),
    (lambda p: frnn.frnn_grid_points(p, p / 0, K=2, r=1.0), "points2: expected finite coordinates"),
    (lambda p: frnn.frnn_gather(p, torch.tensor([[[4]], [[0]]])), "idxs: expected -1, or 0 to 3 to match x, got 4"),
    (lambda p: frnn.frnn_gather(p, torch.zeros(2, 3).long()), r"idxs: invalid shape, expected \(2, P1, K\) to match x"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FRNN_ERRORS)))
def test_errors_of_frnn(number):
    call, message = FRNN_ERRORS[number]
    with pytest.raises((ValueError, TypeError), match=f"^({message})"):
        call(torch.rand(2, 4, 3))
