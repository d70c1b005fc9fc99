"""All functions by the PTX of their kernels, those too that other tests run as they are written (see compiled.py).

Slow, as these are compiled one by one: pytest -m architectures tests/test_cuda_ptx.py
"""

from functools import cache, partial
from unittest import mock

import pytest
from common import assert_same_bits

pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("greenlet", reason="greenlet is not installed")

import compiled
import cuda_on_host as host
import ptx
from test_cuda_device import inputs
from test_cuda_races import EVALUATION, IN_PLACE, NAMES, UNDEFINED, call

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(host.ON_DEVICE, reason="a GPU runs the machine code"),
]


@cache
def program(arch, function, signature):
    """compiled.program, or one of its own."""

    @compiled.on_disk
    def alone(name, arguments, arch):
        return compiled.ptx_of(compiled.Case(name, "", "", function, signature, (256, 1)), arch)

    def of_its_own():
        text = alone(f"{function.__module__}.{function.__name__}", str(signature), arch)
        return ptx.Program(text, *compiled.entries(text))

    return compiled.program(function, signature, arch) or of_its_own()


def run(name, rows, classes, dtype, arch="sm_90"):
    arrays = inputs(rows, classes, dtype)
    want = host.results(call(name, *(x.copy() for x in arrays)))
    with host.on_host(), mock.patch.object(host, "program_of", partial(program, arch)):
        got = host.results(call(name, *map(host.to_cupy, arrays)))
    assert_same_bits(got, want, f"{name} {rows}x{classes} {dtype}")


@pytest.mark.architectures
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", compiled.LIKE)
@pytest.mark.parametrize("name", (*NAMES, *IN_PLACE, EVALUATION, UNDEFINED))
def test_same_bits(name, dtype, arch):
    """Of few classes, of one round, of more, of two chunks and of some."""
    for shape in ((40, 10), (5, 1000), (5, 1030), (3, 8200), (2, 20_000)):
        run(name, *shape, dtype, arch)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_usual_calls_run_what_is_compiled(dtype):
    """Were the arguments of a kernel to change and not those in compiled.py, its source would be run in silence."""
    found = {}

    def note(function, signature):
        found[function.__name__, signature] = compiled.program(function, signature)
        return found[function.__name__, signature]

    with host.on_host(), mock.patch.object(host, "program_of", note):
        for shape in ((40, 10), (5, 1000), (5, 1030), (2, 20_000)):
            x, y, w, c, z = map(host.to_cupy, inputs(*shape, dtype))
            for name in (*NAMES, *IN_PLACE, EVALUATION, UNDEFINED):
                call(name, x, y, w, c, z)
    assert len(found) >= 30
    assert sorted({name for (name, _), program in found.items() if program is None}) == []


def test_a_copy_that_is_not_awaited_shows():
    with mock.patch.object(ptx.Blocks, "await_groups", lambda *_: None), pytest.raises(AssertionError):
        run("none", 3, 8200, "bfloat16")
