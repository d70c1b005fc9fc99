"""How a kernel is started, up to the driver, which is not asked."""

import ctypes
import struct
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numbaloss.cuda import _launch, softmax, totals


def test_launch():
    """What Numba compiles without a driver is what the driver is asked to start, with the arguments in their places."""
    loaded, started, asked = [], [], mock.Mock()

    def load(code, *_):
        loaded.append(bytes(code.code))
        return mock.Mock(get_function=lambda name: mock.MagicMock(handle=77))

    def start(*args):
        extra = (ctypes.c_void_p * 5).from_address(args[-1])
        assert [extra[i] for i in (0, 2, 4)] == [1, 2, None]
        size = ctypes.c_size_t.from_address(extra[3]).value
        started.append((args[:-1], ctypes.string_at(extra[1], size)))

    card = SimpleNamespace(compute_capability=(9, 0), id=0)
    context = SimpleNamespace(device=card, create_module_image=load)
    with (
        mock.patch.multiple("numba.cuda.cudadrv.devices", get_context=lambda *_: context),
        mock.patch.multiple("numba.cuda.dispatcher", get_current_device=lambda: card),
        mock.patch.object(_launch.driver, "launchKernel", start),
        mock.patch.object(_launch, "numba_driver", SimpleNamespace(cuKernelSetAttribute=asked)),
        mock.patch.object(_launch, "_multiprocessor", lambda number: (228 << 10, 32)),
    ):
        kernel = _launch.Kernel(totals._negate.py_func, 256, (1, 1, 1)).of(np.float32(0))
        args = 5, np.float32(0), 2**40
        compiled = _launch.Compiled(kernel, args, 0)
        for blocks in (3, 4):
            compiled(blocks, 256, 99, args)
        asked.assert_not_called()
        large = _launch.Kernel(totals._negate.py_func, 256, (1, 1, 1), room=8192).of(np.float32(0))
        _launch.Compiled(large, args, 0)(5, 64, 99, args)
        assert asked.call_args.args[:3] == (_launch.MOST_ROOM, 8 * 8192, 77)
        assert started.pop()[0] == (77, 5, 1, 1, 64, 1, 1, 2 * 8192, 99, 0)
    assert len(loaded) == 2 and b"_negate" in loaded[0]
    packed = struct.pack("@qfq", *args)
    assert started == [((77, n, 1, 1, 256, 1, 1, 0, 99, 0), packed) for n in (3, 4)]


@pytest.mark.parametrize(
    "kilobytes, most, blocks", [(228, 32, 16), (164, 32, 11), (100, 16, 7), (100, 6, 6), (8, 16, 1)]
)
def test_blocks_of_a_multiprocessor(kilobytes, most, blocks):
    """As many as its shared memory holds, and no more than were asked for or than it takes."""
    kernel = softmax._sparse_xent.of(np.float32(0))
    with mock.patch.object(_launch, "_multiprocessor", lambda number: (kilobytes << 10, most)):
        form = _launch.Bounded(kernel.py_func, 32, 16, 0, kernel.shared)
        assert form.blocks(0) == blocks
        assert form.jit(0).targetoptions["launch_bounds"] == (32, blocks)
        assert _launch.Bounded(kernel.py_func, 32, 16, 0, 0).blocks(0) == min(16, most)


def test_numpy_without_row_stack():
    """numba-cuda 0.30 asks NumPy for row_stack, which 2.5 no longer has."""
    code = """if True:
        import cupy, numpy as np
        if hasattr(np, "row_stack"):
            del np.row_stack
            np.__all__.remove("row_stack")
        from numbaloss.cuda import _launch
        from numba.cuda.target import CUDATargetContext, CUDATypingContext
        CUDATargetContext(CUDATypingContext()).refresh()  # loads all that Numba has for CUDA
        assert not hasattr(np, "row_stack")
    """
    subprocess.run([sys.executable, "-c", code], check=True)
