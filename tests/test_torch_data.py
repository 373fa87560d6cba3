"""kpcore.torch with torch.utils.data: pyramids of batches built and stacked in workers, saved and moved."""

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

import kpcore as kp

torch = pytest.importorskip("torch")

from torch.utils.data import default_collate  # noqa: E402

import kpcore.torch as kpt  # noqa: E402

SETTINGS = {"voxel_size": 0.1, "num_levels": 3}
NETS = {
    "settings": SETTINGS,
    "kpfcnn": kp.nn.kpfcnn(2, 4, 0.1, levels=2, convs=2, width=16),
    "kpnext": kp.nn.KPNeXt(num_features=2, num_classes=4, voxel_size=0.1, depths=(1, 1), width=16),
}


def clouds(lengths=(300, 0, 1, 200), num_features=2):
    rng = np.random.default_rng(0)
    return [(rng.random((n, 3), np.float32), rng.random((n, num_features), np.float32), rng.integers(0, 4, n))
            for n in lengths]  # fmt: skip


def arrays(value):
    """The numbers and arrays of a pyramid, a level or a list, with their dtypes, in order."""
    if isinstance(value, kp.Neighbors):
        pairs = value.num_pairs
        distance = None if value.distance is None else value.distance[:pairs]
        return [("list", value.num_points, value.width), *arrays((value.index[:pairs], value.row_splits, distance))]
    if isinstance(value, (tuple, list)):
        return [(type(value).__name__, len(value)), *(part for each in value for part in arrays(each))]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [(type(value).__name__, str(value.dtype), np.asarray(value).shape, np.asarray(value).tobytes())]
    return [value]


# ---- functions on tensors


def test_bounds_and_lengths():
    splits = kpt.row_splits(torch.tensor([3, 0, 2], dtype=torch.int32))
    assert splits.dtype == torch.int64 and splits.tolist() == [0, 3, 3, 5]
    assert kpt.lengths(splits).tolist() == [3, 0, 2]
    assert torch.is_tensor(kpt.row_splits([1, 2]))
    with pytest.raises(ValueError, match=r"^lengths: expected numbers of at least 0, got -1"):
        kpt.row_splits(torch.tensor([1, -1]))


def test_limits_of_an_iterable_of_tensors():
    points = [points for points, _, _ in clouds((300, 200, 250))]
    expected = kp.calibrate_neighbor_limits(points, **SETTINGS)
    tensors = [torch.from_numpy(each) for each in points]
    taken = []

    def one_by_one():
        for each in tensors:
            taken.append(len(each))
            yield each

    assert kpt.calibrate_neighbor_limits(one_by_one(), **SETTINGS) == expected and taken == [300, 200, 250]
    assert kpt.calibrate_neighbor_limits(clouds=tuple(tensors), **SETTINGS) == expected
    with pytest.raises(TypeError, match=r"^clouds: expected a torch tensor, got ndarray; convert it"):
        kpt.calibrate_neighbor_limits(points, **SETTINGS)
    with pytest.raises(ValueError, match=r"^clouds: expected at least one point, got none"):
        kpt.calibrate_neighbor_limits([], **SETTINGS)


# ---- batches


LIMITS = {"settings": [7, 6, 5], "kpfcnn": [7, 6]}
OPTIONS = [(net, options) for net in NETS for options in ({}, {"subsampled": True})]
OPTIONS += [(net, {"neighbor_limits": limits}) for net, limits in LIMITS.items()]


@pytest.mark.parametrize(("net", "options"), OPTIONS)
def test_stacked_pyramids_are_the_pyramid_of_the_batch(net, options):
    batch = clouds()
    dataset = kpt.PyramidDataset(batch, NETS[net], **options)
    stacked = default_collate([dataset[number] for number in range(len(dataset))])
    whole = kpt.PyramidCollate(NETS[net], **options)(batch)
    assert arrays(stacked) == arrays(whole) and isinstance(stacked, kp.Pyramid)
    assert whole[0].row_splits.tolist()[:2] != [0, 0] and len(whole[0].row_splits) == 5
    points, features, labels = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*batch, strict=True))
    rows = {"features": features, "labels": labels, "row_splits": kpt.row_splits([len(part[0]) for part in batch])}
    expected = kpt.build_pyramid(points, **rows, **SETTINGS, **options) if net == "settings" else NETS[net].pyramid(
        points, **rows, **options, F=kpt)  # fmt: skip
    assert arrays(whole) == arrays(expected)


def test_forms_of_clouds():
    points, features, labels = map(torch.from_numpy, clouds((50,))[0])
    collate = kpt.PyramidCollate(SETTINGS)
    whole = arrays(collate([(points, features, labels)]))
    assert arrays(collate([{"labels": labels, "points": points.numpy(), "features": features}])) == whole
    bare = collate([points, points])
    assert (
        bare[0].features is None and bare[0].labels is None and arrays(collate([[points], (points,)])) == arrays(bare)
    )
    pyramid, classes = collate([(points, None, 3), (points, None, np.int64(1))])
    assert arrays(pyramid) == arrays(bare) and classes.dtype == torch.int64 and classes.tolist() == [3, 1]
    dataset = kpt.PyramidDataset([(points, features, number) for number in range(3)], SETTINGS)
    assert dataset[2][1] == 2 and len(dataset) == 3
    pyramids, classes = default_collate([dataset[0], dataset[1]])
    assert len(pyramids[0].row_splits) == 3 and classes.tolist() == [0, 1]
    assert kpt.PyramidCollate(kpt.Network(NETS["kpfcnn"])).net is NETS["kpfcnn"]


def test_stacked_lists():
    lists = [kp.radius_search(points, None, 0.2, return_distances=True) for points, _, _ in clouds((30, 0, 20))]
    lists[0] = pickle.loads(pickle.dumps(lists[0]))
    stacked = default_collate([{"list": each} for each in lists])["list"]
    assert stacked.num_points == 50 and stacked.num_pairs == sum(each.num_pairs for each in lists)
    expected = [lists[0].index, lists[2].index + 30]
    assert stacked.index.tolist() == np.concatenate(expected).tolist()
    assert stacked.counts.tolist() == [*lists[0].counts, *lists[2].counts]
    assert stacked.distance.tolist() == [*lists[0].distance, *lists[2].distance]
    padded = [kp.Neighbors.from_padded(each.to_padded(), each.num_points) for each in lists]
    assert default_collate(padded).width == max(each.width for each in padded)
    assert (
        default_collate([padded[0], lists[1]]).width is None and default_collate([padded[0], lists[2]]).distance is None
    )


def test_a_dataloader_without_batches():
    """torch makes a list of any tuple; networks take it, and kpcore.Pyramid is a collate_fn that keeps the pyramid."""
    net = NETS["kpfcnn"]
    dataset, module = kpt.PyramidDataset(clouds((300, 200)), net), kpt.Network(net).eval()
    for levels, expected in zip(torch.utils.data.DataLoader(dataset, batch_size=None), dataset, strict=True):
        logits = module(levels, levels[0].features)[0]
        assert torch.equal(logits, module(expected, expected[0].features)[0])
    for kept in torch.utils.data.DataLoader(dataset, batch_size=None, collate_fn=kp.Pyramid):
        assert type(kept) is kp.Pyramid


SAMPLES = clouds((40, 30))
WRONG = {
    "net": (lambda: kpt.PyramidCollate(3), "net: expected a network of kpcore.nn or a dict, got int"),
    "key": (lambda: collate({"points": SAMPLES[0][0], "colors": 1}), "clouds: expected the keys points, features"),
    "parts": (lambda: collate((1, 2, 3, 4)), "clouds: expected points, features and labels, got 4 parts"),
    "pair": (lambda: collate((SAMPLES[0][0], 3)), r"features: expected one row .* is \(points, None, class\)"),
    "features": (lambda: collate(SAMPLES[0], SAMPLES[1][:1]), "features: expected those of every cloud"),
    "labels": (lambda: collate(SAMPLES[0], (*SAMPLES[1][:2], 3)), "labels: expected rows of one dtype and"),
    "classes": (lambda: collate((*SAMPLES[1][:2], 3), SAMPLES[0]), "labels: expected one class for each cloud"),
    "widths": (lambda: collate(SAMPLES[0], clouds((9,), 5)[0]), r"features: expected rows .* \(40, 2\) and .*9, 5"),
    "rows": (lambda: collate((SAMPLES[0][0], SAMPLES[1][1])), "features: expected"),
    "voxels": (lambda: default_collate([pyramid(0.1), pyramid(0.2)]), r"voxel_size: expected the same in all pyramids"),
    "levels": (lambda: default_collate([pyramid(0.1), pyramid(0.1)[:1]]), "pyramids: expected as many levels in all"),
}  # fmt: skip


def collate(*samples):
    return kpt.PyramidCollate(SETTINGS)(samples)


def pyramid(voxel_size):
    return kp.build_pyramid(SAMPLES[0][0], voxel_size=voxel_size, num_levels=2)


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_batches(name):
    call, message = WRONG[name]
    if name == "levels":
        first = pyramid(0.1)
        call = lambda: default_collate([first, kp.Pyramid(first[:1])])  # noqa: E731
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


LOADERS = """
import hashlib, sys, torch
import kpcore as kp, kpcore.torch as kpt

def clouds():
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(n, 3, generator=generator), torch.rand(n, 2, generator=generator), torch.arange(n) % 4)
            for n in (300, 200, 100, 50)]

def digest(pyramid):
    parts = [part for level in pyramid for part in (level.points, level.features, level.labels, level.row_splits)]
    parts += [torch.tensor(array) for level in pyramid for array in (level.neighbors.index, level.neighbors.row_splits)]
    return hashlib.sha1(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

if __name__ == "__main__":
    net = kp.nn.kpfcnn(2, 4, 0.1, levels=2, convs=2, width=16)
    kpt.radius_search(torch.rand(100000, 3), None, 0.05)  # so that there are threads
    module, digests = kpt.Network(net), []
    for options in ({}, {"num_workers": 2, "multiprocessing_context": "fork"}):
        loaders = (torch.utils.data.DataLoader(kpt.PyramidDataset(clouds(), net), batch_size=2, **options),
                   torch.utils.data.DataLoader(clouds(), batch_size=2, collate_fn=kpt.PyramidCollate(net), **options))
        digests += [[digest(pyramid) for pyramid in loader] for loader in loaders]
    for pyramid in loaders[1]:
        logits, _ = module(pyramid, pyramid[0].features)
        kpt.softmax_cross_entropy(logits, pyramid[0].labels).backward()
    print(len(digests[0]), len(set(map(tuple, digests))))
"""


def test_workers_of_a_dataloader(tmp_path):
    """Batches from two forked processes are those of this process, and a network trains on them."""
    script = tmp_path / "main.py"
    script.write_text(LOADERS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "2 1", done.stderr


def test_what_a_spawned_worker_gets():
    for net in NETS.values():
        dataset, collate = kpt.PyramidDataset(clouds(), net), kpt.PyramidCollate(net)
        dataset, collate = pickle.loads(pickle.dumps((dataset, collate)))
        assert arrays(default_collate([dataset[0], dataset[3]])) == arrays(collate([clouds()[0], clouds()[3]]))


# ---- files and devices


def test_what_weights_only_loads():
    pyramid = kpt.PyramidCollate(NETS["kpfcnn"])(clouds())
    lists = kp.radius_search(np.random.default_rng(0).random((50, 3)), None, 0.3, return_distances=True)
    loaded = saved_and_loaded({"pyramid": pyramid, "list": lists, "arrays": kp.Pyramid([pyramid[0]])})
    assert arrays(loaded["pyramid"]) == arrays(pyramid) and arrays(loaded["list"]) == arrays(lists)
    assert type(loaded["pyramid"]) is kp.Pyramid and loaded["list"].transpose().num_pairs == lists.num_pairs
    wrong = pickle.loads(pickle.dumps(lists))
    object.__setattr__(wrong, "stored_index", lists.index + 50)
    loaded = saved_and_loaded(wrong)
    with pytest.raises(ValueError, match=r"^neighbors.index: expected values from 0 to 49 to match num_points, got"):
        loaded.counts  # noqa: B018
    with pytest.raises(pickle.UnpicklingError, match=r"kpcore.kernel_map.KernelMap"):
        saved_and_loaded(kp.kernel_map(np.zeros((1, 3), np.int32), kernel_size=3))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_copies_of_an_index(again):
    points, row_splits = torch.from_numpy(clouds((50,))[0][0]), torch.tensor([0, 20, 50])
    for index in (kpt.KDTree(points, row_splits=row_splits), kpt.GridIndex(points, 0.3, row_splits=row_splits)):
        copied = again(index)
        lists = copied.radius_search(points, 0.3, queries_row_splits=row_splits)
        assert type(copied) is type(index)
        assert arrays(lists) == arrays(index.radius_search(points, 0.3, queries_row_splits=row_splits))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "uint64", "int64"])
def test_labels_of_pyramids_in_files(dtype):
    labels = np.arange(40, dtype=dtype).reshape(20, 2)
    pyramid = kp.build_pyramid(np.random.default_rng(0).random((20, 3)), labels=labels, voxel_size=0.2, num_levels=2)
    for level, expected in zip(saved_and_loaded(pyramid), pyramid, strict=True):
        assert level.labels.dtype == expected.labels.dtype and np.array_equal(level.labels, expected.labels)


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_to_device():
    pyramid = kpt.PyramidCollate(NETS["kpfcnn"])(clouds())
    batch = {"pyramid": pyramid, "more": [torch.ones(2), "name", None]}
    moved = kpt.to_device(batch, "cpu")
    assert arrays(moved["pyramid"]) == arrays(pyramid) and type(moved["pyramid"]) is kp.Pyramid
    assert moved["pyramid"][0].neighbors is pyramid[0].neighbors and moved["more"][1:] == ["name", None]
    with pytest.raises(ValueError, match=r"^device: expected the CPU or a CUDA GPU, got meta"):
        kpt.to_device(pyramid[0].neighbors, "meta")
    with pytest.raises(RuntimeError, match="nosuch"):
        kpt.to_device(pyramid, "nosuch")
