"""linear_cross_entropy on CUDA: the bits of the CPU, but for the matmul, which is NumPy's here."""

from unittest import mock

import numpy as np
import pytest
from common import DTYPES, assert_same_bits, make_labels, make_logits, result_dtype

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host  # noqa: E402

import numbaloss as nl  # noqa: E402
from numbaloss import linear  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
if not host.ON_DEVICE:
    pytest.importorskip("greenlet", reason="greenlet is not installed")

NAMES = "hidden", "weight", "bias"
GRAD = nl.value_and_grad(nl.linear_cross_entropy, NAMES)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    if host.ON_DEVICE:
        pytest.skip("cuBLAS has bits of its own")
    for limits, value in ((linear.TILE, 8), (linear.CHUNK, 10_000), (linear.BLOCK, 600)):
        for backend in ("numpy", "cupy"):
            monkeypatch.setitem(limits, backend, value)
    with (
        host.on_host(),
        mock.patch.object(cupy, "matmul", host.by_numpy(np.matmul)),
        mock.patch.object(cupy, "add", host.by_numpy(np.add)),
        mock.patch.object(cupy, "ones", lambda shape, dtype: host.to_cupy(np.ones(shape, dtype))),
    ):
        yield


def on_cupy(*args, **options):
    args = [host.to_cupy(a) if isinstance(a, np.ndarray) else a for a in args]
    options = {k: host.to_cupy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    value, grads = GRAD(*args, **options)
    return host.results((value, *grads))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "reduction": "none"}])
def test_same_bits(dtype, options):
    hidden, weight, y = make_logits(21, 12, dtype), make_logits(40, 12, dtype, 1, 1.0), make_labels(21, 40)
    bias, weights = make_logits(1, 40, result_dtype(dtype))[0], np.arange(21) % 5.0
    hidden[[0, 6]], y[6] = np.nan, -100
    value, grads = GRAD(hidden, weight, y, bias, weights=weights, **options)
    assert_same_bits(on_cupy(hidden, weight, y, bias, weights=weights, **options), host.results((value, *grads)))
    hidden, weight, y, bias, weights = map(host.to_cupy, (hidden, weight, y, bias, weights))
    alone = nl.linear_cross_entropy(hidden, weight, y, bias, weights=weights, **options)
    assert_same_bits(host.results(alone), host.results(value))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_hidden_and_weight_in_16_bits_and_strided(dtype):
    hidden, weight, y = make_logits(30, 26, dtype), make_logits(40, 13, dtype, 1, 1.0), make_labels(30, 40)
    hidden = hidden.reshape(5, 6, 26)[:, 1:4, ::2]
    run, y = nl.value_and_grad(nl.linear_cross_entropy, "hidden"), y[:15].reshape(5, 3)
    want = host.results(run(hidden, weight[::-1], y))
    got = host.results(run(host.to_cupy(hidden), host.to_cupy(weight[::-1]), host.to_cupy(y)))
    assert_same_bits(got, want)
