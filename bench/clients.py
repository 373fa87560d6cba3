"""The case `compat` of ``python bench/run.py cpu``: code of other projects, before and after it imports kpcore.compat.

Before, their layers are the dense formulation in PyTorch. Their compiled functions are represented by kd-trees of SciPy
and pykdtree, which search in the same way (one tree for each batch item, neighbours by distance, padded rows), and by
grids of NumPy; the names of the rows say so. Both sides have the same parameters and the same padded matrices.
"""

from functools import partial

import numpy as np
import peers

import kpcore as kp

VOXEL, RADIUS, EXTENT = 0.04, 0.1, 0.048
# Client: (its module of kpcore.compat, batch items, levels, groups of its norm; None stands for batch statistics, 0 for
# a group for each channel). Predator's network is its encoder and decoder, without the attention between them.
CLIENTS = {
    "KPConv-PyTorch": ("kpconv_pytorch", 3, 5, None),
    "GeoTransformer": ("geotransformer", 2, 4, 32),
    "OverlapPredator": ("predator", 2, 4, 0),
}
TASKS = [{"what": "calls"}, {"what": "pipeline"}, *({"what": client} for client in CLIENTS)]


def compat(bench, what):
    """Calls of ten points over those of the core, the lists of a pair of scans, and training steps."""
    bench.label(order="", size="10")
    if what in CLIENTS:
        step(bench, what)
    else:
        {"calls": calls, "pipeline": pipeline}[what](bench)


def rooms(num_points, num_items):
    """(points, lengths): pieces of a labelled flat, subsampled at VOXEL, stacked."""
    sub = kp.grid_subsample(kp.scenes.indoor(60 * num_points).points, VOXEL).points
    rng = np.random.default_rng(0)
    centers = sub[rng.integers(len(sub), size=num_items)]
    rows = kp.knn_search(sub, centers, min(num_points, len(sub))).index
    return sub[rows], np.full(num_items, len(rows) // num_items, np.int32)


# Ten points: what compat adds to a call of the core.


def calls(bench):
    from kpcore import compat

    rng = np.random.default_rng(0)
    points, lengths = rng.random((10, 3), np.float32), np.array([6, 4], np.int32)
    splits = kp.row_splits(lengths)
    splits_of = {"points_row_splits": splits, "queries_row_splits": splits}

    def search():
        return kp.radius_search(points, points, 0.4, sort="distance", inclusive=False, **splits_of).to_padded()

    def grid():
        return kp.grid_subsample(points, 0.2, row_splits=splits, origin="published", labels=labels[:, None])

    labels = np.arange(10, dtype=np.int32)
    query = partial(compat.batch_query, points, points, lengths, lengths, radius=0.4)
    subsample = partial(compat.subsample_batch, points, lengths, classes=labels, sampleDl=0.2)
    assert np.array_equal(query(), search())
    assert np.array_equal(subsample()[0], grid().points)
    bench.beyond("batch_query", query, "the calls alone", search)
    bench.beyond("subsample_batch", subsample, "the calls alone", grid)
    if reason := peers.missing(peers.TORCH):
        bench.absent("layers", "the calls alone", reason)
        return
    import torch

    import kpcore.torch as kpt
    from kpcore.compat.kpconv_pytorch import KPConv

    layer = KPConv(15, 3, 4, 8, 0.3, 0.4)
    tensor, features = torch.from_numpy(points), torch.rand(10, 4)
    matrix = torch.from_numpy(search()).long()
    neighbors = kp.Neighbors.from_padded(matrix.numpy(), 10)

    def core():
        return kpt.kpconv(tensor, tensor, neighbors, features, layer.weights, layer.kernel_points, 0.3)

    def gradients(call):
        call().sum().backward()

    def forward():
        return layer(tensor, tensor, matrix, features)

    torch.testing.assert_close(forward(), core())
    bench.beyond("KPConv, forward", forward, "the calls alone", core)
    bench.beyond("KPConv, forward + backward", partial(gradients, forward), "the calls alone", partial(gradients, core))


# The lists of a pair of scans, as GeoTransformer's loader makes them.


def pipeline(bench):
    from kpcore import compat

    points, lengths = rooms(bench.sizes["patch"], 2)
    lengths = lengths.astype(np.int64)
    limits, stages = (38, 36, 36, 38), 4
    bench.label(order="", size=f"2 x {lengths[0]:,}")

    def lists(subsample, search):
        levels = [(points, lengths)]
        for stage in range(1, stages):
            levels.append(subsample(*levels[-1], VOXEL * 2**stage))
        matrices = []
        for stage, (p, n) in enumerate(levels):
            radius = RADIUS * 2**stage
            matrices.append(search(p, p, n, n, radius, limits[stage]))
            if stage + 1 < stages:
                coarse, m = levels[stage + 1]
                matrices.append(search(coarse, p, m, n, radius, limits[stage]))
                matrices.append(search(p, coarse, n, m, 2 * radius, limits[stage + 1]))
        return levels, matrices

    after = partial(lists, compat.grid_subsampling, compat.radius_neighbors)
    levels, matrices = bench.first(after)
    for name, tree in (("SciPy cKDTree", scipy_tree), ("pykdtree", pykdtree_tree)):
        peer = peers.Peer(f"GeoTransformer's steps, {name}", peers.imports(f"{tree.module}"), None, None)
        if reason := peers.missing(peer):
            bench.absent("lists of a pair", peer.name, reason)
            continue
        before = partial(lists, numpy_grid, partial(search_of_trees, tree))
        other_levels, others = before()
        for (p, n), (q, m) in zip(levels, other_levels, strict=True):
            order, other_order = (np.lexsort(each.T.round(4)) for each in (p, q))
            assert np.array_equal(n, m), (n, m)
            np.testing.assert_allclose(p[order], q[other_order], atol=2e-4)
        for matrix, other in zip(matrices, others, strict=True):
            assert abs((matrix < len(points)).sum() / (other < len(points)).sum() - 1) < 1e-2
        bench.compare("lists of a pair", after, peer.name, before)


def numpy_grid(points, lengths, voxel):
    """Barycentres of the voxels of each item, in a grid that begins where the published one does."""
    out, counts = [], []
    for item in np.split(points, np.cumsum(lengths)[:-1]):
        origin = np.floor(item.min(0) / voxel) * voxel
        cell = np.floor((item - origin) / voxel).astype(np.int64)
        key = (cell[:, 2] << 42) | (cell[:, 1] << 21) | cell[:, 0]
        _, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
        sums = [np.bincount(inverse, item[:, axis], len(count)) for axis in range(3)]
        out.append((np.stack(sums, 1) / count[:, None]).astype(np.float32))
        counts.append(len(count))
    return np.concatenate(out), np.array(counts, np.int64)


def scipy_tree(points):
    from scipy.spatial import cKDTree

    return partial(cKDTree(points).query, workers=-1)


def pykdtree_tree(points):
    from pykdtree.kdtree import KDTree

    return KDTree(points).query


scipy_tree.module, pykdtree_tree.module = "scipy.spatial", "pykdtree.kdtree"


def search_of_trees(tree, queries, points, query_lengths, lengths, radius, limit):
    """Rows of the `limit` nearest points within a radius, by distance, padded with the number of points."""
    out, begin = [], 0
    items = [np.split(a, np.cumsum(n)[:-1]) for a, n in ((queries, query_lengths), (points, lengths))]
    for some_queries, some_points in zip(*items, strict=True):
        query = tree(np.ascontiguousarray(some_points))
        _, index = query(np.ascontiguousarray(some_queries), k=limit, distance_upper_bound=radius)
        out.append(np.where(index < len(some_points), index.astype(np.int64) + begin, len(points)))
        begin += len(some_points)
    return np.concatenate(out)


# A training step of the networks of three clients: torch modules over padded matrices.


def step(bench, client):
    what = f"{client}, training step"
    if reason := peers.missing(peers.DENSE_NETWORK):
        bench.absent(what, peers.DENSE_NETWORK.name, reason)
        return
    import torch

    module, num_items, num_levels, groups = CLIENTS[client]
    width = 128
    if bench.sizes["patch"] < 10_000:
        width, num_levels, groups = 16, 3, min(groups, 4) if groups else groups
    points, lengths = rooms(bench.sizes["patch"] // 4, num_items)
    bench.label(order="", size=f"{len(points):,}")
    batch = published_batch(points, lengths, num_levels)
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 13, len(points)))
    steps, losses, states = [], [], []
    for dense in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - from which the clients draw their kernel points
        network = client_network(layers_of(module, dense), width, num_levels, groups)
        if states:
            network.load_state_dict(states[0])  # strict: names and shapes are the client's on both sides
        states.append({name: value.clone() for name, value in network.state_dict().items()})
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-9, momentum=0.98, weight_decay=1e-3)

        def train(network=network, optimizer=optimizer):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(batch), labels)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        steps.append(train)
        losses.append(bench.first(train))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    bench.compare(what, steps[0], peers.DENSE_NETWORK.name, steps[1])


def published_batch(points, lengths, num_levels):
    """The lists of points, neighbors, pools and upsamples of each level as the client's loader returns them."""
    import torch

    from kpcore import compat

    batch = {"points": [], "neighbors": [], "pools": [], "upsamples": []}
    for level in range(num_levels):
        radius = RADIUS * 2**level
        lists = {"neighbors": (points, points, lengths, lengths, radius)}
        if level + 1 < num_levels:
            coarse, counts = compat.subsample_batch(points, lengths, sampleDl=VOXEL * 2 ** (level + 1))
            lists["pools"] = coarse, points, counts, lengths, radius
            lists["upsamples"] = points, coarse, lengths, counts, 2 * radius
        batch["points"].append(torch.from_numpy(points))
        for name, (queries, supports, some, others, reach) in lists.items():
            matrix = compat.batch_query(queries, supports, some, others, radius=reach)
            limit = int(np.percentile((matrix < len(supports)).sum(1), 90))
            batch[name].append(torch.from_numpy(matrix[:, :limit].astype(np.int64)))
        if level + 1 < num_levels:
            points, lengths = coarse, counts
    return batch


def layers_of(module, dense):
    """KPConv, max_pool and closest_pool of a module of kpcore.compat, or the same ones in the dense formulation.

    Both have the names and the state of the client; their arguments are in one order.
    """
    from importlib import import_module
    from types import SimpleNamespace

    import torch

    client, formulas = import_module(f"kpcore.compat.{module}"), peers.dense_module()
    geotransformer = module == "geotransformer"
    divides = module != "kpconv_pytorch"

    def with_zeros(x):
        return torch.cat([x, torch.zeros_like(x[:1])])

    class KPConv(client.KPConv):
        def __init__(self, channels, out, extent, radius):
            first = (channels, out, 15, radius, extent) if geotransformer else (15, 3, channels, out, extent, radius)
            super().__init__(*first)
            self.reach = extent

        def forward(self, q_points, s_points, inds, x):
            if not dense:
                order = (x, q_points, s_points, inds) if geotransformer else (q_points, s_points, inds, x)
                return super().forward(*order)
            out = formulas.kpconv(s_points, q_points, inds, x, self.weights, self.kernel_points, self.reach)
            if not divides:
                return out
            return out / (with_zeros(x.sum(1)) > 0)[inds].sum(1, keepdim=True).clamp(min=1)

    def max_pool(x, inds):
        return formulas._gather(with_zeros(x), inds).amax(1)

    def closest_pool(x, inds):
        return with_zeros(x)[inds[:, 0]]

    if not dense:
        max_pool = client.maxpool if geotransformer else client.max_pool
        closest_pool = client.nearest_upsample if geotransformer else client.closest_pool
    return SimpleNamespace(KPConv=KPConv, max_pool=max_pool, closest_pool=closest_pool)


def client_network(layers, width, num_levels, groups):
    """KP-FCNN as torch modules, over the KPConv, max_pool and closest_pool of `layers`."""
    import torch
    from torch import nn

    class GroupNorm(nn.GroupNorm):  # over all points of the batch, as the clients have it
        def forward(self, x):
            return super().forward(x.T[None])[0].T

    def norm(channels):
        if groups is None:
            return nn.BatchNorm1d(channels, momentum=0.02)
        return GroupNorm(groups or channels, channels, affine=groups > 0)

    def unary(channels, out):
        return nn.Sequential(nn.Linear(channels, out, bias=False), norm(out), nn.LeakyReLU(0.1))

    class Residual(nn.Module):
        def __init__(self, channels, out, level, strided=False):
            super().__init__()
            self.level, self.strided = level, strided
            self.first = unary(channels, out // 4)
            scale = 2**level
            self.conv = layers.KPConv(out // 4, out // 4, EXTENT * scale, RADIUS * scale)
            self.norm, self.last = norm(out // 4), unary(out // 4, out)[:2]
            self.shortcut = unary(channels, out)[:2] if channels != out else nn.Identity()

        def forward(self, x, batch):
            s_points = batch["points"][self.level]
            q_points = batch["points"][self.level + self.strided]
            inds = batch["pools" if self.strided else "neighbors"][self.level]
            skip = layers.max_pool(x, inds) if self.strided else x
            x = nn.functional.leaky_relu(self.norm(self.conv(q_points, s_points, inds, self.first(x))), 0.1)
            return nn.functional.leaky_relu(self.last(x) + self.shortcut(skip), 0.1)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = layers.KPConv(1, width // 2, EXTENT, RADIUS), norm(width // 2)
            self.encoder, self.decoder, channels = nn.ModuleList(), nn.ModuleList(), width // 2
            for level in range(num_levels):
                out = width * 2**level
                self.encoder.append(Residual(channels, out, level))
                self.encoder.append(Residual(out, out, level))
                if level + 1 < num_levels:
                    self.encoder.append(Residual(out, out, level, strided=True))
                channels = out
            for level in reversed(range(num_levels - 1)):
                out = width * 2**level
                self.decoder.append(unary(channels + out, out))
                channels = out
            self.head = nn.Sequential(unary(channels, width), nn.Linear(width, 13))

        def forward(self, batch):
            points, skips = batch["points"][0], []
            x = self.stem(points, points, batch["neighbors"][0], torch.ones_like(points[:, :1]))
            x = nn.functional.leaky_relu(self.norm(x), 0.1)
            for block in self.encoder:
                if block.strided:
                    skips.append(x)
                x = block(x, batch)
            for level, block in zip(reversed(range(num_levels - 1)), self.decoder, strict=True):
                x = block(torch.cat([layers.closest_pool(x, batch["upsamples"][level]), skips.pop()], 1))
            return self.head(x)

    return Network()
