"""Divergences on CuPy arrays: the bits of NumPy's. See test_cuda.py."""

import numpy as np
import pytest
from common import DTYPES, assert_same_bits, make_logits

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host  # noqa: E402

import numbaloss as nl  # noqa: E402
from numbaloss import divergence  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy tells of infinities without a GPU
]
if not host.ON_DEVICE:
    pytest.importorskip("greenlet", reason="greenlet is not installed")

INF, NAN = np.inf, np.nan


@pytest.fixture(autouse=True)
def device():
    with host.on_host():
        yield


def two(rows, classes, dtype, seed=0):
    """Rows that differ by much, by little and not at all, and some that are not finite."""
    p = make_logits(rows, classes, dtype, seed)
    by = np.array([3, 1e-2, 1e-5, 0])[np.arange(rows) % 4, None]
    q = (p.astype(np.float64) + by * np.random.default_rng(seed).standard_normal(p.shape)).astype(dtype)
    return p, q


def check(function, *args, **options):
    """function gives the same bits for NumPy and CuPy arrays."""
    expected = host.results(function(*args, **options))
    args = [host.to_cupy(a) if isinstance(a, np.ndarray) else a for a in args]
    options = {k: host.to_cupy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    assert_same_bits(host.results(function(*args, **options)), expected)


def all_three(p, q, weights=None):
    return tuple(divergence._divergences(p, q, weights, -1, kl=True, reverse=True, js=True))


def gradients(loss):
    run = nl.value_and_grad(loss, ("logits_p", "logits_q"))

    def call(*args, **options):
        value, grads = run(*args, reduction="none", **options)
        return (value, *grads)

    return call


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 9, 33, 1025, 8193])
def test_classes(classes, dtype):
    p, q = two(4 if classes < 2000 else 2, classes, dtype)
    check(all_three, p, q)
    for loss in (nl.kl_divergence, nl.js_divergence):
        check(gradients(loss), p, q)


@pytest.mark.parametrize("classes", [37, 1030])
def test_rows_that_lie_apart(classes):
    """Views whose rows begin at other places within 16 bytes, strides, weights, NaN, infinities."""
    p, q = two(4, classes + 3, np.float32)
    p[0, 5] = q[1, 6] = p[2, 7] = q[2, 7] = -INF
    p[3, 8] = NAN
    for x, y in ((p[:, 3:], q[:, :-3]), (p[:, :-3], np.asfortranarray(q[:, 3:])), (p[:, ::-1], q)):
        check(all_three, x, y)
        for loss in (nl.kl_divergence, nl.js_divergence):
            check(gradients(loss), x, y, weights=np.array([1, 2, 0.5, 0]))
    check(nl.js_divergence, p, q, weights=np.array([1, 2, 0.5, 0]))


def test_mixed_arrays():
    p = make_logits(2, 5)
    with pytest.raises(TypeError, match="logits_q: expected a CuPy array as logits_p is, got a NumPy array"):
        nl.kl_divergence(host.to_cupy(p), p)
