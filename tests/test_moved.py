"""Imports that worked before the modules moved, and where each leads now."""

import importlib
import pickle

import numpy as np
import pytest

import kpcore as kp
from kpcore import moved


@pytest.mark.parametrize("name", moved.MODULES)
def test_a_module_by_its_earlier_name_is_the_module_itself(name):
    assert importlib.import_module(name) is importlib.import_module(moved.MODULES[name])


@pytest.mark.parametrize(
    "name, attributes",
    [
        ("kpcore.rows", ("linear", "batch_norm", "BatchNormed", "softmax_cross_entropy", "dropout", "concatenate")),
        ("kpcore.neighbors", ("Neighbors", "KDTree", "GridIndex", "radius_search", "knn_search", "row_splits")),
        ("kpcore.scenes", ("read", "ReadError", "Cloud", "indoor")),
        ("kpcore.scenes.segmentation", ("write_labels",)),
        ("kpcore.scenes.settings", ("read_settings",)),
        ("kpcore.scenes.training", ("Training",)),
        ("kpcore.nn", ("save", "load", "checkpoints")),
    ],
)
def test_names_that_scripts_import(name, attributes):
    module = importlib.import_module(name)
    for attribute in attributes:
        assert hasattr(module, attribute), attribute


@pytest.mark.parametrize("statement", ["import kpcore.scenes.settings as s", "from kpcore.scenes import settings as s"])
def test_in_a_fresh_process(statement, python):
    assert python(f"{statement}\nprint(s.__name__)").stdout == "kpcore.pipeline.settings\n"


@pytest.mark.parametrize("module, name", [(m, name) for m, names in moved.ATTRIBUTES.items() for name in names])
def test_an_attribute_by_its_earlier_name_is_the_one_of_today(module, name):
    new_module, new_name = moved.ATTRIBUTES[module][name]
    assert getattr(importlib.import_module(module), name) is getattr(importlib.import_module(new_module), new_name)


def test_a_name_that_never_was():
    with pytest.raises(AttributeError, match=r"^module 'kpcore.neighbors' has no attribute 'octree'$"):
        importlib.import_module("kpcore.neighbors").octree  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"kpcore\.scenes\.octree"):
        importlib.import_module("kpcore.scenes.octree")


def test_what_was_pickled_before_is_read():
    tree = kp.KDTree(np.random.default_rng(0).random((20, 3)))
    text = pickle.dumps(tree, 0).replace(b"kpcore.search", b"kpcore.neighbors")
    assert pickle.loads(text).knn_search(None, 2).num_pairs == 40
