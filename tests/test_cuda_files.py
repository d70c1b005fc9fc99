"""Files scored on CuPy arrays: NumPy's bits, also where the device's memory does not suffice for a block."""

import numpy as np
import pytest
from common import make_labels, make_logits

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host  # noqa: E402

from numbaloss.files import compare, device, score  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy tells of infinities without a GPU
]
if not host.ON_DEVICE:
    pytest.importorskip("greenlet", reason="greenlet is not installed")

MEMORY = 6000  # blocks of some rows


@pytest.fixture(params=[0, 2], ids=["enough", "two rows"])
def rows_that_fit(request, monkeypatch):
    """A device with memory for this many rows; 0 for any."""
    import cupyx

    class Small(device.Cuda):
        def run(self, function, *arrays):
            def limited(*given):
                if request.param and len(given[0]) > request.param:
                    raise cupy.cuda.memory.OutOfMemoryError(1, 1, 1)
                return function(*given)

            return super().run(limited, *arrays)

    monkeypatch.setattr(device, "Cuda", Small)
    if not host.ON_DEVICE:
        monkeypatch.setattr(cupyx, "empty_pinned", np.empty)
        monkeypatch.setattr(cupy, "asnumpy", host.to_numpy)
    with host.on_host():
        yield request.param


@pytest.fixture
def files(tmp_path):
    x = make_logits(12, 40)
    arrays = {"x": x, "q": (x * np.float32(0.75)).astype(np.float16), "t": make_labels(12, 40)}
    for name, array in arrays.items():
        np.save(tmp_path / name, array)
    return [tmp_path / f"{name}.npy" for name in arrays]


def without_time(result):
    return result._replace(seconds=0)


def test_same_bits(files, rows_that_fit):
    x, q, t = files
    options = {"memory": MEMORY, "details": True}
    for run in (
        lambda **on: score(x, t, top_k=(1, 3), **options, **on),
        lambda **on: compare(x, q, t, **options, **on),
    ):
        assert without_time(run(device="cuda")) == without_time(run())


def test_a_row_that_does_not_fit(files, rows_that_fit, monkeypatch):
    def never(*_):
        raise cupy.cuda.memory.OutOfMemoryError(1, 1, 1)

    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        device.Cuda().run(never, np.zeros((4, 3)))


def test_unknown(files):
    with pytest.raises(ValueError, match="device: expected one of 'cpu', 'cuda', got 'gpu'"):
        score(files[0], files[2], device="gpu")
