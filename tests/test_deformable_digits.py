"""The experiment of docs/deformable_digits.py."""

import re
from pathlib import Path

import numpy as np
import pytest
from reference import assert_same_bits

import kpcore as kp


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    import deformable_digits

    monkeypatch.setattr(deformable_digits, "EPOCHS", 3)
    monkeypatch.setattr(deformable_digits, "BATCH", 10)
    return deformable_digits


@pytest.fixture
def digits(shared, experiment):
    """(images, labels)"""
    folder = shared / "data" / "mnist_t10k"
    if not folder.is_dir():
        pytest.skip(f"no digits in {folder}")
    return experiment.load(folder)


def random_images(number):
    return np.random.default_rng(0).random((number, 28, 28), np.float32)


def test_the_digits(digits):
    images, labels = digits
    assert images.shape == (10000, 28, 28) and images.min() == 0 and images.max() == 1
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    middle = (images.mean(0)[:, :, None] * np.indices((28, 28)).transpose(1, 2, 0)).sum((0, 1)) / images.mean(0).sum()
    np.testing.assert_allclose(middle, 14, atol=0.1)


def test_poses(experiment):
    """Upright digits are the images; others are enlarged and turned to the left about their pixel (14, 14)."""
    images = random_images(3)
    upright, left, larger = (
        experiment.posed(images, np.full(3, s), np.full(3, a)) for s, a in ((1, 0), (1, np.pi / 2), (2, 0))
    )
    assert upright.shape == (3, 32, 32, 1) and upright.dtype == np.float32
    np.testing.assert_array_equal(upright[..., 0], np.pad(images, ((0, 0), (2, 2), (2, 2))))
    np.testing.assert_allclose(left[:, 1:, 1:], np.rot90(upright[:, 1:, 1:], 1, (1, 2)), atol=1e-5)
    np.testing.assert_array_equal(larger[:, ::2, ::2, 0], images[:, 6:22, 6:22])


GENERATORS = {
    "kernel_offsets": ("stage.2.1.depthwise.conv.offset_generator", np.arange(18) / 100),
    "data_offsets": ("stage.2.1.depthwise.conv.data_offset_generator", np.arange(18) / 50),
    "routing": ("stage.2.1.depthwise.conv.routing", np.arange(8) / 10),
}
ADAPTED_BY = {
    "rigid": [],
    "wide": [],
    "SCC": ["routing"],
    "DCN": ["data_offsets"],
    "DK": ["kernel_offsets"],
    "DK + DCN": ["kernel_offsets", "data_offsets"],
    "DK + SCC": ["kernel_offsets", "routing"],
}


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-3), (np.float64, 1e-9)])
@pytest.mark.parametrize("variant", ADAPTED_BY)
def test_the_same_training_in_both_frameworks(experiment, monkeypatch, variant, dtype, tolerance):
    """Step by step; with a small learning rate, since at 0.1 differences grow a thousandfold in five steps."""
    pytest.importorskip("torch")
    monkeypatch.setattr(experiment, "DTYPE", dtype)
    monkeypatch.setattr(experiment, "RATE", 0.01)
    images, labels = random_images(20).astype(dtype), np.arange(20) % 10
    net = experiment.network(variant)
    (by_torch, *_), (by_tape, params, _) = (
        training(net, 3, experiment.steps(images, labels, 3)) for training in experiment.TRAININGS.values()
    )
    assert len(by_tape) == 6
    np.testing.assert_allclose(by_torch, by_tape, rtol=tolerance)
    assert all(np.abs(value - net.init(3, dtype)[0][name]).max() > 0 for name, value in params.items())


def test_steps(experiment):
    """Each epoch has every digit once, in other poses; the learning rate rises for one epoch and then falls."""
    images, labels = np.repeat(random_images(1), 20, axis=0), np.arange(20)
    rates, batches, numbers = zip(*experiment.steps(images, labels, 0), strict=True)
    assert all(sorted(np.concatenate(numbers[epoch : epoch + 2])) == [*range(20)] for epoch in range(0, 6, 2))
    assert len(np.unique(np.concatenate(batches).reshape(60, -1), axis=0)) == 60
    np.testing.assert_allclose(rates, [0, 0.05, *0.05 * (1 + np.cos(np.pi * np.arange(4) / 4))], rtol=1e-12)


def test_recorded(experiment):
    rng = np.random.default_rng(0)
    x, weight, routing = rng.random((2, 5, 4, 6)), rng.random((3, 6, 1, 4, 4)), rng.random((2, 3))
    kernel_offsets, data_offsets = rng.random((2, 2, 5, 4, 18))
    options = {"kernel_offsets": kernel_offsets, "data_offsets": data_offsets, "kernel_size": 3, "padding": 1,
               "groups": 6, "layout": "NHWC"}  # fmt: skip
    recorded = experiment.Recorded()
    assert_same_bits(
        recorded.conditional_conv2d(x, weight, routing, **options), kp.conditional_conv2d(x, weight, routing, **options)
    )
    assert recorded.means.keys() == {"kernel_offsets", "data_offsets", "routing"}
    for name, expected in (("kernel_offsets", kernel_offsets), ("data_offsets", data_offsets)):
        np.testing.assert_allclose(recorded.means[name], expected.mean((1, 2)), rtol=1e-12)
    assert_same_bits(recorded.means["routing"], routing)
    recorded.deformable_kernel_conv2d(x, weight[0], **options | {"kernel_offsets": 2 * kernel_offsets})
    np.testing.assert_allclose(recorded.means["kernel_offsets"], 2 * kernel_offsets.mean((1, 2)), rtol=1e-12)


@pytest.mark.parametrize("variant", ADAPTED_BY)
def test_what_convolutions_adapt_by(experiment, variant):
    net, images = experiment.network(variant), experiment.posed(random_images(4), np.ones(4), np.zeros(4))
    params, state = net.init(0)
    for name in ADAPTED_BY[variant]:  # what generators without weights compute is their bias
        generator, bias = GENERATORS[name]
        params.update({key: 0 * value for key, value in params.items() if key.startswith(generator)})
        params[f"{generator}.bias"] += bias.astype(np.float32)
    means = experiment.dynamics(net, params, state, images)
    assert means.keys() == {*ADAPTED_BY[variant], "features"}
    for name in ADAPTED_BY[variant]:
        bias = GENERATORS[name][1]
        expected = 1 / (1 + np.exp(-bias)) if name == "routing" else bias
        np.testing.assert_allclose(means[name], np.tile(expected, (4, 1)), atol=1e-6)
    features = net.compute_features(net.new_run(kp, params, state), images)
    np.testing.assert_allclose(means["features"], features.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_told(experiment):
    rng = np.random.default_rng(0)
    scales, labels, noise = rng.uniform(0.6, 1.6, 2000), rng.integers(0, 10, 2000), rng.standard_normal((2000, 8))
    scale = np.insert(noise, 0, 7 - 3 * np.log(scales), axis=1)
    r2, right = experiment.told(scale, scales, labels)
    assert r2 > 1 - 1e-9 and right < 20
    r2, right = experiment.told(np.eye(10)[labels] + 0.01 * noise[:, :1], scales, labels)
    assert r2 < 0.1 and right == 100
    scale[1000:, 0] = 0  # the half that is measured
    assert experiment.told(scale, scales, labels)[0] < 0


def test_fields(experiment, monkeypatch):
    """How much all channels of the output at the centre change with each pixel; the field is around the centre."""
    monkeypatch.setattr(experiment, "DTYPE", np.float64)
    images = experiment.posed(random_images(2).astype(np.float64), np.ones(2), np.zeros(2))
    net = experiment.network("rigid")
    values = net.init(0, np.float64)
    fields = experiment.fields(net, *values, images)
    assert fields.shape == (2, 32, 32)
    for row, column in ((16, 16), (11, 20)):
        outputs = []
        for change in (-1e-6, 1e-6):
            changed = images.copy()
            changed[1, row, column] += change
            outputs.append(net.compute_features(net.new_run(kp, *values), changed)[1, 2, 2])
        np.testing.assert_allclose(fields[1, row, column], np.abs(outputs[1] - outputs[0]).sum() / 2e-6, rtol=1e-6)
    centroid = (fields[..., None] * np.indices((32, 32)).transpose(1, 2, 0)).sum((0, 1, 2)) / fields.sum()
    np.testing.assert_allclose(centroid, 16, atol=1.5)


def test_fields_keep_the_offsets_constant(experiment):
    net, rng = experiment.network("DK"), np.random.default_rng(0)
    params, state = net.init(0)
    images = experiment.posed(random_images(1), np.ones(1), np.zeros(1))
    for name, value in params.items():
        if "offset_generator.weight" in name:
            value[...] = 0.1 * rng.standard_normal(value.shape)

    def field(detach_offsets):
        def features(x):
            return net.compute_features(net.new_run(kp, params, state, detach_offsets=detach_offsets), x)

        return sum(kp.effective_receptive_field(features, images, [(0, 2, 2)], layout="NHWC", channels=[channel])
                   for channel in range(64))  # fmt: skip

    fields = experiment.fields(net, params, state, images)
    assert_same_bits(fields, field(True))
    assert np.abs(fields - field(False)).max() > 0.1 * fields.max()


def test_field_changes(experiment, monkeypatch):
    """Fields that are the digits follow them; a field that is always the same does not."""
    image = np.zeros((2, 28, 28), np.float32)
    image[:, 8:20, 11:14] = 1
    monkeypatch.setattr(experiment, "fields", lambda net, params, state, images: images[..., 0].astype(float))
    similarity, enlargement = experiment.field_changes(None, None, None, image)
    assert similarity > 0.999 and abs(enlargement - 1.5) < 0.03
    monkeypatch.setattr(
        experiment, "fields", lambda net, params, state, images: np.pad(image, ((0, 0), (2, 2), (2, 2)))
    )
    similarity, enlargement = experiment.field_changes(None, None, None, image)
    assert similarity < 0.5 and enlargement == 1


def test_the_picture(experiment, tmp_path):
    figures = pytest.importorskip("matplotlib.image")
    networks = {variant: (net := experiment.network(variant), *net.init(0)) for variant in experiment.SHOWN}
    experiment.draw(tmp_path / "fields.png", networks, random_images(1)[0])
    picture = figures.imread(tmp_path / "fields.png")
    assert picture.shape[:2] == (734, 921) and picture[..., :3].std() > 0.1


def test_the_experiment(experiment, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(experiment, "load", lambda folder: (random_images(40), np.arange(40) % 10))
    shown = ("rigid", "DK + SCC")
    variants = {variant: experiment.VARIANTS[variant] for variant in shown}
    small = {"VARIANTS": variants, "SHOWN": shown, "NUM_TRAIN": 20, "SEEDS": (0,), "NUM_FIELDS": 1}
    for name, value in small.items():
        monkeypatch.setattr(experiment, name, value)
    experiment.main(None, tmp_path)
    _, _, *trained, _, rigid, offsets, routing, features, _, _, last = capsys.readouterr().out.splitlines()
    counts = {variant: kp.nn.count(experiment.network(variant).init()[0]) for variant in shown}
    assert [line[:18] for line in trained] == [f"{variant:10} {count:7,}" for variant, count in counts.items()]
    assert all(len(re.findall(r" \d+\.\d\d, +\d+\.\d s", line)) == 2 for line in trained)
    for line, name in ((rigid, "features"), (offsets, "kernel_offsets"), (routing, "routing"), (features, "features")):
        assert line[11:27].strip() == name
    assert re.fullmatch(r"DK \+ SCC +\d\.\d\d +\d\.\d\d", last)
    assert (tmp_path / "deformable_digits.png").exists()
