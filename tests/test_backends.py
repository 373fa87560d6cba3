"""The way into the kernels: fields by their names, and what is wrong with them."""

from types import SimpleNamespace

import numpy as np
import pytest

import kpcore as kp
from kpcore.backends import cpu
from kpcore.ops import OPS, Call

ROWS = np.arange(6.0).reshape(3, 2)


def test_fields_come_by_name_and_from_a_call():
    for fields in (
        {"call": None, "rows": ROWS},
        {"call": Call(rows=ROWS)},
        {"call": SimpleNamespace(rows=1), "rows": ROWS},
    ):
        sums = np.empty(2)
        cpu.run("sum_rows", sums=sums, **fields)
        np.testing.assert_array_equal(sums, ROWS.sum(0))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "sum_rows: expected a field sums, got none"),
        ({"sums": None}, "sums: expected an array, got NoneType"),
        ({"sums": [0.0, 0.0]}, "sums: expected an array, got list"),
        ({"sums": np.empty(2, np.float16)}, "expected an array of float32, .* uint64, got float16"),
        ({"sums": np.empty(2), "sum": 1}, "sum_rows: expected no fields but rows, sums, got rows, sums, sum"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        cpu.run("sum_rows", rows=ROWS, **fields)


def test_an_unknown_kernel():
    with pytest.raises(KeyError, match="sum_columns"):
        cpu.run("sum_columns", rows=ROWS)


def test_numbers_that_their_fields_cannot_hold():
    with pytest.raises(OverflowError):
        cpu.run("dropout", features=ROWS, rate=0.5, seed=2**64, out=np.empty_like(ROWS))
    with pytest.raises(OverflowError):
        cpu.run("activate", features=ROWS, activation=2**31, negative_slope=0.0, out=np.empty_like(ROWS))


def test_an_optional_integer():
    logits, labels, out = np.zeros((2, 2)), np.array([0, 9]), np.empty(2)
    call = Call(logits=logits, labels=labels, reduction=2, out=out)
    cpu.run("cross_entropy", call, ignore_index=9)
    assert out.tolist() == [pytest.approx(np.log(2)), 0]
    with pytest.raises(cpu.OutOfRange):
        cpu.run("cross_entropy", call, ignore_index=None)


def test_fields_say_their_kinds():
    assert cpu.fields()["cross_entropy"] == {
        "logits": "array", "labels": "array", "ignore_index": "optional_int", "class_weights": "optional_array",
        "reduction": "int32", "out": "optional_array", "grad_out": "optional_array", "grad_logits": "optional_array",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.forward is None])
def test_operators_name_fields_of_their_kernels(name):
    op, fields = OPS[name], cpu.fields()[OPS[name].kernel]
    assert set(op.outputs) <= set(fields)
    assert callable(getattr(kp, name))
