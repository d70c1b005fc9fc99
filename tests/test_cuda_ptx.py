"""What Numba and NVVM make of the kernels gives NumPy's bits: their PTX for sm_90, inline assembly included, by ptx.py.

All functions and dtypes: pytest -m architectures tests/test_cuda_ptx.py
"""

import contextlib
from functools import cache
from unittest import mock

import pytest
from common import assert_same_bits

pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("greenlet", reason="greenlet is not installed")

import cuda_on_host as host
import ptx
from test_cuda_device import inputs
from test_cuda_races import EVALUATION, IN_PLACE, NAMES, UNDEFINED, call
from test_cuda_sass import LIKE, Case, cases, entries, on_disk, ptx_of, whole_ptx

from numbaloss.cuda import _launch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(host.ON_DEVICE, reason="a GPU runs the machine code"),
]


@cache
def program_of(kernel, signature):
    """The ptx.Program of a kernel for these Numba types: one of those whose machine code is looked at, or its own."""
    for dtype in LIKE:
        for i, case in enumerate(cases(dtype)):
            if case.function is kernel.py_func and case.signature == signature:
                text = whole_ptx(dtype, "sm_90", "close")
                return ptx.Program(text, list(entries(text))[i])
    text = ptx_alone(kernel, signature)
    return ptx.Program(text, *entries(text))


def ptx_alone(kernel, signature):
    @on_disk
    def alone(name, arguments):
        return ptx_of(Case(name, "", "", kernel.py_func, signature, (kernel.threads, 1)), "sm_90")

    return alone(f"{kernel.py_func.__module__}.{kernel.py_func.__name__}", str(signature))


@contextlib.contextmanager
def on_ptx():
    """As cuda_on_host.on_host, with the PTX of the kernels in place of their sources."""

    def compiled(kernel, first, number):
        program = program_of(kernel, _launch.signature(first))

        def start(blocks, threads, stream, numbers):
            ptx.run(program, blocks, threads, kernel.room * threads // 32, numbers)

        return start

    with host.on_host(), mock.patch.object(_launch, "Compiled", compiled):
        yield


def run(name, rows, classes, dtype):
    arrays = inputs(rows, classes, dtype)
    want = host.results(call(name, *(x.copy() for x in arrays)))
    with on_ptx():
        got = host.results(call(name, *map(host.to_cupy, arrays)))
    assert_same_bits(got, want, f"{name} {rows}x{classes} {dtype}")


SLOW = pytest.mark.architectures  # as their PTX is compiled and translated
ORDINARY = [("none", "bfloat16"), ("gradient none", "bfloat16")]
OTHERS = [(name, dtype) for dtype in LIKE for name in (*NAMES, *IN_PLACE, EVALUATION, UNDEFINED)]


@pytest.mark.parametrize(
    "name, dtype", [*ORDINARY, *(pytest.param(*x, marks=SLOW) for x in OTHERS if x not in ORDINARY)]
)
def test_same_bits(name, dtype):
    """Of few classes, of one round, of more, of two chunks and of some."""
    for shape in ((40, 10), (5, 1000), (5, 1030), (3, 8200), (2, 20_000)):
        run(name, *shape, dtype)


def test_a_copy_that_is_not_awaited_shows():
    with mock.patch.object(ptx.Block, "await_groups", lambda *_: None), pytest.raises(AssertionError):
        run("none", 3, 8200, "bfloat16")
