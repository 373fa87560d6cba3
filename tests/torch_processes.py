"""Processes that test_torch.py starts: ``python torch_processes.py workers METHOD`` or ``ranks FOLDER``.

`ranks` compares training on two processes, each with half of the batch items, with training on one process. `workers`
runs searches in the workers of a DataLoader.
"""

import copy
import subprocess
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import kpcore as kp
import kpcore.torch as kpt


class Clouds(Dataset):
    """Random clouds, each with its neighbour list and pyramid."""

    def __len__(self):
        return 4

    def __getitem__(self, number):
        points = np.random.default_rng(number).random((200, 3), np.float32)
        return points, kp.radius_search(points, None, 0.2), kp.build_pyramid(points, voxel_size=0.1, num_levels=2)


def first(items):
    return items[0]


def workers(method):
    """Two passes over a loader with persistent workers; compares its items with those computed in this process."""
    expected = [Clouds()[number] for number in range(4)]  # starts threads, which forked workers do not have
    loader = DataLoader(
        Clouds(), num_workers=1, persistent_workers=True, multiprocessing_context=method, collate_fn=first
    )
    for _ in range(2):
        for (points, neighbors, pyramid), (_, other, other_pyramid) in zip(loader, expected, strict=True):
            assert np.array_equal(neighbors.index, other.index)
            assert np.array_equal(pyramid[0].pools.index, other_pyramid[0].pools.index)
            assert kpt.neighbor_reduce(torch.from_numpy(points), neighbors).shape == (200, 3)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = kpt.KPConv(4, 8, 5, radius=0.16, extent=0.12)
        self.second = kpt.DeformableKPConv(8, 3, 5, radius=0.16, extent=0.12, modulated=True)

    def forward(self, points, neighbors, features):
        hidden = kpt.leaky_relu(self.first(points, None, neighbors, features))
        return self.second(points, None, neighbors, hidden)


def item(number):
    points = torch.from_numpy(np.random.default_rng(number).random((300, 3), np.float32))
    return points, kpt.radius_search(points, None, 0.25), torch.sin(10 * points.repeat(1, 2)[:, :4])


def loss(model, number):
    return model(*item(number)).square().mean()


def assert_close(name, got, expected):
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6), (name, got, expected)


def rank(folder, number):
    """What one of the two processes of `ranks` does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=number, world_size=2)
    torch.manual_seed(0)
    one = Layers()
    several, sharded = DistributedDataParallel(copy.deepcopy(one)), copy.deepcopy(one)
    mesh = init_device_mesh("cpu", (2,))
    for part in (sharded.first, sharded.second, sharded):
        fully_shard(part, mesh=mesh)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (one, several, sharded)]
    for _ in range(2):
        for model, optimizer in zip((one, several, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            total = (loss(model, 0) + loss(model, 1)) / 2 if model is one else loss(model, number)
            total.backward()
            optimizer.step()
    for (name, expected), got in zip(one.named_parameters(), several.parameters(), strict=True):
        assert_close(f"DDP, {name}", got, expected)
    for (name, expected), got in zip(one.named_parameters(), sharded.parameters(), strict=True):
        assert_close(f"fully_shard, {name}", got.full_tensor(), expected)

    # torch's recipe for models that are too large for one process: made on "meta", sharded, then initialised.
    net = kp.nn.kpfcnn(1, 3, 0.15, levels=2, convs=2, width=8, norm="group")
    whole = kpt.Network(net)
    with torch.device("meta"):
        late, layers = kpt.Network(net), Layers()
    for model in (late, layers):
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
    late.reset_parameters()
    for (name, expected), got in zip(whole.named_parameters(), late.parameters(), strict=True):
        assert_close(f"reset, {name}", got.full_tensor(), expected)
    torch.manual_seed(0)
    layers.first.reset_parameters(), layers.second.reset_parameters()
    assert all(state.isfinite().all() for state in (*layers.buffers(), *(p.full_tensor() for p in layers.parameters())))
    levels = net.pyramid(item(0)[0], F=kpt)
    inputs = levels, torch.ones(len(levels[0].points), 1)
    assert_close("reset, logits", late.eval()(*inputs)[0], whole.eval()(*inputs)[0])
    dist.destroy_process_group()


def ranks(folder):
    processes = [subprocess.Popen([sys.executable, __file__, "rank", folder, str(number)]) for number in range(2)]
    assert [process.wait() for process in processes] == [0, 0]


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "rank":
        rank(arguments[0], int(arguments[1]))
    else:
        {"workers": workers, "ranks": ranks}[command](*arguments)
