"""The emulator: correct kernels run in any order of threads, and each kind of bug is reported with its line."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emu"))

from emulator import EmulatorError, Module

N, BLOCK = 256, 128
PARAMETERS = "float* y, const float* x, int n"
NUMBERS = "const int i = blockIdx.x * blockDim.x + threadIdx.x, t = threadIdx.x, lane = t % 32;\n"


def kernel(body, parameters=PARAMETERS):
    """The source of a kernel named k; `body` begins at line 3."""
    return f'extern "C" __global__ void k({parameters}) {{\n{NUMBERS}{body}\n}}\n'


def run(source, *more, shared_mem=0, uninitialized=(0,), grid=N // BLOCK, block=BLOCK, **mode):
    """Run the kernel with x = 0, 1, 2, ... and y filled with -7; -> y"""
    y, x = np.full(N, -7, np.float32), np.arange(N, dtype=np.float32)
    call = Module(source, **mode).get_function("k")
    call((grid,), (block,), (y, x, np.int32(N), *more), shared_mem=shared_mem, uninitialized=uninitialized)
    return y


MODES = {
    "forward": {},
    "reverse": {"order": "reverse"},
    "random": {"order": "random", "seed": 5, "preempt": 30},
    "fast": {"check": False, "order": "random"},
}


@pytest.fixture(params=MODES, ids=MODES)
def mode(request):
    return MODES[request.param]


# ---- correct kernels


def test_a_tree_of_sums_in_shared_memory(mode):
    y = run(
        kernel("""
__shared__ float s[128];
s[t] = x[i];
__syncthreads();
for (int half = 64; half; half /= 2) {
  if (t < half) s[t] += s[t + half];
  __syncthreads();
}
y[i] = s[0];"""),
        **mode,
    )
    assert y.tolist() == [sum(range(128))] * 128 + [sum(range(128, 256))] * 128


def test_words_of_a_warp(mode):
    y = run(
        kernel("""
float v = x[i];
for (int bit = 16; bit; bit /= 2) v += __shfl_xor_sync(0xffffffffu, v, bit);
const unsigned odd = __ballot_sync(0xffffffffu, i & 1);
const float before = __shfl_up_sync(0xffffffffu, x[i], 1), after = __shfl_down_sync(0xffffffffu, x[i], 1);
const unsigned same = __match_any_sync(0xffffffffu, i / 8);
y[i] = lane == 0 ? v : lane == 1 ? (odd == 0xaaaaaaaau) : lane == 2 ? before : lane == 3 ? after
     : lane == 4 ? __popc(same) : lane == 5 ? __any_sync(0x20u, 1) : lane == 6 ? __all_sync(0x40u, 0) : -1;"""),
        **mode,
    ).reshape(-1, 32)
    x = np.arange(N).reshape(-1, 32)
    assert np.array_equal(y[:, 0], x.sum(1))
    assert np.array_equal(
        y[:, 1:7], np.stack([x[:, 0] * 0 + 1, x[:, 1], x[:, 4], x[:, 0] * 0 + 8, x[:, 0] * 0 + 1, x[:, 0] * 0], 1)
    )


def test_half_a_warp_may_synchronize_without_the_other(mode):
    y = run(kernel("float v = 0;\nif (lane < 16) v = __shfl_xor_sync(0xffffu, x[i], 1);\ny[i] = v;"), **mode)
    x = np.arange(N).reshape(-1, 2)[:, ::-1].reshape(-1, 32)
    x[:, 16:] = 0
    assert np.array_equal(y, x.ravel())


def test_atomics_from_all_blocks(mode):
    sums = np.zeros(3, np.float32)
    run(kernel("y[i] = x[i];\natomicAdd(c, 1.f);\natomicMax(c + 1, x[i]);\natomicCAS((int*)(c + 2), 0, 7);",
               PARAMETERS + ", float* c"), sums, **mode)  # fmt: skip
    assert sums[:2].tolist() == [N, N - 1] and sums[2:].view(np.int32) == 7


def test_dynamic_shared_memory_and_a_count_at_the_barrier(mode):
    y = run(kernel("""
extern __shared__ float s[];
s[t] = x[i];
const int many = __syncthreads_count(t % 4 == 0);
y[i] = s[127 - t] + many;"""), shared_mem=512, **mode)  # fmt: skip
    x = np.arange(N).reshape(2, -1)[:, ::-1].ravel()
    assert np.array_equal(y, x + 32)


def test_a_null_pointer(mode):
    y = run(kernel("y[i] = c ? c[0] : 3;", PARAMETERS + ", const float* c"), np.uint64(0), **mode)
    assert y.tolist() == [3] * N


def test_blocks_and_grids_of_three_axes(mode):
    y = np.zeros(24, np.int32)
    source = (
        'extern "C" __global__ void k(int* y) {\n'
        "y[((blockIdx.y * 3 + threadIdx.z) * 2 + threadIdx.y) * 2 + threadIdx.x] = "
        "blockIdx.y * 100 + threadIdx.z * 10 + threadIdx.y; }"
    )
    Module(source, **mode).get_function("k")((1, 2), (2, 2, 3), (y,))
    assert y.reshape(2, 3, 2, 2).tolist() == [
        [[[b * 100 + z * 10 + r] * 2 for r in range(2)] for z in range(3)] for b in range(2)
    ]


# ---- kernels with a bug

# name: (body, regular expression of the report, line that it names or None, options of `run`)
BUGS = {
    "race in shared memory, a barrier missing": (
        "__shared__ float s[128];\ns[t] = x[i];\ny[i] = s[127 - t];",
        "race|nothing in this block",
        5,
        {},
    ),
    "race of a warp, __syncwarp missing": (
        "__shared__ float s[128];\ns[t] = 0;\n__syncthreads();\ns[t] = x[i];\ny[i] = s[t ^ 1];",
        "race",
        None,
        {},
    ),
    "race of reader and writer": (
        "__shared__ float s[128];\ns[t] = x[i];\n__syncthreads();\nconst float v = s[(t + 32) % 128];\ns[t] = v;\n"
        "y[i] = v;",
        "race",
        None,
        {},
    ),
    "race between blocks": ("y[t] = x[i];", "race: written, byte .* with thread .* of block", 3, {}),
    "race between blocks, read": ("y[i] = x[i];\nif (i >= 128) y[i] = y[i - 128];", "race|nothing has written", 4, {}),
    "no atomic": ("y[i] = x[i];\nc[0] += 1;", "race", 4, {"more": "c"}),
    "a barrier for some": (
        "if (t < 64)\n__syncthreads();\ny[i] = x[i];",
        "wait at __syncthreads|have returned",
        None,
        {},
    ),
    "barriers at two places": (
        "if (t < 64)\n__syncthreads();\nelse\n__syncthreads();\ny[i] = x[i];",
        "__syncthreads at line 4 .* line 6",
        None,
        {},
    ),
    "return before a barrier": (
        "if (t >= 100) return;\n__syncthreads();\ny[i] = x[i];",
        "have returned|wait at",
        None,
        {},
    ),
    "a shuffle of lanes that are elsewhere": (
        "float v = x[i];\nif (lane < 16)\nv = __shfl_xor_sync(0xffffffffu, v, 1);\ny[i] = v;",
        "waits for it at line 5|have returned|deadlock",
        None,
        {},
    ),
    "a shuffle from outside its mask": (
        "float v = x[i];\nif (lane < 16)\nv = __shfl_sync(0xffffu, v, 20);\ny[i] = v;",
        "line 5: a shuffle reads lane 20",
        None,
        {},
    ),
    "a mask without oneself": ("y[i] = __shfl_sync(0xffffu, x[i], 3);", "not in the mask it gives", 3, {}),
    "write past the end": ("y[i + 1] = x[i];", "outside|no memory", 3, {}),
    "write before the begin": ("y[i - 1] = x[i];", "outside|wrote before", None, {}),
    "read past the end": ("y[i] = x[i + 64];", "outside|no memory", 3, {}),
    "shared memory past its end": (
        "__shared__ float s[128];\ns[t + 1] = x[i];\n__syncthreads();\ny[i] = s[t];",
        "undefined behaviour|outside|nothing",
        4,
        {},
    ),
    "too little dynamic shared memory": (
        "extern __shared__ float s[];\ns[t] = x[i];\ny[i] = s[t];",
        "outside|no memory",
        4,
        {"shared_mem": 256},
    ),
    "shared memory nobody wrote": (
        "__shared__ float s[128];\nif (t) s[t] = x[i];\n__syncthreads();\ny[i] = s[t] > 1e30f ? 0 : x[i];",
        "read of what nothing in this block has written",
        6,
        {},
    ),
    "an output that is read": ("y[i] += x[i];", "read of what nothing has written", 3, {}),
    "misaligned float4": (
        "if (i < 32) {\nconst float4 v = *(const float4*)(x + 4 * i + 1);\ny[i] = v.x + v.w;\n}",
        "misaligned|undefined",
        4,
        {},
    ),
    "a shift by 32": ("y[i] = float(1u << n / 8);", "undefined behaviour", 3, {}),
    "a number no int holds": ("y[i] = float(int(x[i] * 1e12f));", "undefined behaviour", 3, {}),
    "division by zero": ("y[i] = float(n / (n - 256));", "division by zero|undefined behaviour", 3, {}),
}


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_reported(bug, order):
    body, says, line, options = BUGS[bug]
    options, more, parameters = dict(options), [], PARAMETERS
    if options.pop("more", None):
        more, parameters = [np.zeros(1, np.float32)], PARAMETERS + ", float* c"
    with pytest.raises(EmulatorError, match=says) as caught:
        run(kernel(body, parameters), *more, order=order, seed=3, **options)
    text = str(caught.value)
    assert text.startswith("k: block (") and "thread (" in text
    if line is not None:
        assert f":{line}:" in text or f"line {line}" in text, text


@pytest.mark.parametrize("arguments, error, says", [
    (lambda y, x, n: (y, x.astype(np.float64), n), TypeError, "argument 1: expected f4, got an array of float64"),
    (lambda y, x, n: (y, x, 256), TypeError, "argument 2: expected a NumPy scalar i4, got int"),
    (lambda y, x, n: (y, x, np.int64(256)), TypeError, "argument 2: expected a NumPy scalar i4, got int64"),
    (lambda y, x, n: (y, x), TypeError, "expected 3 arguments, got 2"),
    (lambda y, x, n: (x, x, n), ValueError, "argument 1 shares memory with argument 0"),
    (lambda y, x, n: (y, np.repeat(x, 2)[::2], n), ValueError, "argument 1: expected a contiguous array"),
    (lambda y, x, n: (np.broadcast_to(y[:1], 256), x, n), ValueError, "argument 0: expected a contiguous array"),
])  # fmt: skip
def test_wrong_arguments(arguments, error, says):
    y, x = np.zeros((2, N), np.float32)
    with pytest.raises(error, match=says):
        Module(kernel("y[i] = x[i];")).get_function("k")((2,), (128,), arguments(y, x, np.int32(N)))


@pytest.mark.parametrize("grid, block", [((1,), (2048,)), ((0,), (32,)), ((1, 70000), (32,)), ((1,), (32, 32, 2))])
def test_no_gpu_has_such_a_grid(grid, block):
    y, x = np.zeros((2, N), np.float32)
    with pytest.raises(ValueError, match="no GPU has a grid"):
        Module(kernel("y[i] = x[i];")).get_function("k")(grid, block, (y, x, np.int32(N)))


def test_what_does_not_compile_says_where():
    with pytest.raises(EmulatorError, match="<stdin>:3"):
        Module(kernel("y[i] = z;"))
