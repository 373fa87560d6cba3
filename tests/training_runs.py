"""Training runs that are stopped and resumed."""

import pytest
from reference import assert_same_bits

from kpcore.nn import checkpoints
from kpcore.pipeline import training


def assert_same_checkpoints(one, other):
    (groups, about), (others, about_other) = one, other
    assert about == about_other and groups.keys() == others.keys()
    for group, values in groups.items():
        assert values.keys() == others[group].keys()
        for name, value in values.items():
            assert_same_bits(value, others[group][name])


class Stop(Exception):
    pass


def check_resumed(config, folder, stops, monkeypatch):
    """Check that a run stopped after each of some steps (epoch, step) and resumed ends as one that was never stopped.

    The runs are in the folders `whole` and `part`.
    """
    training.Training(config, folder / "whole", ".", seed=5).run()
    monkeypatch.setattr(training, "_BETWEEN_CHECKPOINTS", 0)  # seconds: after every step

    def stop_at(when):
        def watch(entry):
            if "loss" in entry and (entry["epoch"], entry["step"]) == when:
                raise Stop

        return watch

    part = training.Training(config, folder / "part", ".", seed=5)
    for when in stops:
        with pytest.raises(Stop):
            part.run(stop_at(when))
        part = training.Training(config, folder / "part", ".", seed=5, resume=True)
        assert (part.epoch, part.step) == when  # of the checkpoint before that step
    part.run()
    for name in ("last", "best"):
        assert_same_checkpoints(*(checkpoints.read(folder / run / f"{name}.safetensors") for run in ("whole", "part")))
