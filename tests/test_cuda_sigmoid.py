"""The sigmoid family's derivatives and the focal loss on CUDA: the bits of the CPU (see test_cuda.py)."""

import numpy as np
import pytest
from common import DTYPES, assert_same_bits, make_logits, result_dtype

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host  # noqa: E402

import numbaloss as nl  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy tells of infinities without a GPU
]

INF, NAN = np.inf, np.nan
SIGMOID, WEIGHTED = nl.sigmoid_cross_entropy_with_logits, nl.weighted_cross_entropy_with_logits
FOCAL = nl.sigmoid_focal_cross_entropy_with_logits
if not host.ON_DEVICE:
    pytest.importorskip("greenlet", reason="greenlet is not installed")


@pytest.fixture(autouse=True)
def device():
    """CuPy arrays can be made and kernels run."""
    with host.on_host():
        yield


def on_cupy(function, *args, **options):
    """function on CuPy arrays in place of NumPy's, its results as NumPy arrays, NaN made one."""
    args = [host.to_cupy(a) if isinstance(a, np.ndarray) else a for a in args]
    options = {k: host.to_cupy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    return host.results(function(*args, **options))


def check(function, *args, **options):
    """function gives the same bits for NumPy and CuPy arrays."""
    for got, expected in zip(
        on_cupy(function, *args, **options), host.results(function(*args, **options)), strict=True
    ):
        assert_same_bits(got, expected)


def operands(dtype, rows=3, columns=1100):
    x = make_logits(rows, columns, dtype, scale=20)
    x[0, :3], x[1, :2] = [INF, -INF, NAN], [INF, -INF]
    z, q = ((np.arange(x.size) % k / 4).reshape(x.shape).astype(result_dtype(dtype)) for k in (5, 7))
    return z, x, q


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_derivatives(dtype):
    """Whole, transposed and strided, with an upstream of 0 for a NaN."""
    z, x, q = operands(dtype)
    g = make_logits(3, 1100, seed=1)
    g[0, 2] = 0
    cut = slice(None), slice(0, 300)
    for take in (lambda a: a, lambda a: a[cut].T, lambda a: a[:, 600:1100:2], lambda a: a[0, :40]):
        args = take(z), take(x), take(q)
        check(nl.value_and_grad(WEIGHTED, ("logits", "labels", "pos_weight")), *args, upstream=take(g))
        check(nl.value_grad_hess(SIGMOID), *args[:2], upstream=take(g))
    for upstream in (None, 2.5, g[:1]):
        check(nl.value_and_grad(SIGMOID, ("logits", "labels")), z, x, upstream=upstream)
    check(nl.value_grad_hess(WEIGHTED), z, x, 3.0)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_focal(dtype, gamma):
    z, x, _ = operands(dtype, columns=400)
    z[1] = z[1] > 0.5
    check(lambda *args: (FOCAL(*args, alpha=0.25, gamma=gamma),), z, x)
    check(nl.value_grad_hess(FOCAL), z, x, gamma=gamma, upstream=make_logits(1, 400, seed=1))
    check(nl.value_and_grad(FOCAL, ("logits", "labels")), z, x, alpha=0.25, gamma=gamma)


@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (3, 1, 1), (3, 4, 5)])
def test_pos_weight_is_summed_exactly(shape):
    x = make_logits(12, 5, scale=9.0).reshape(3, 4, 5)
    z, q = (np.arange(60) % 5 / 4).reshape(x.shape).astype(np.float32), np.full(shape, 1.75, np.float32)
    check(nl.value_and_grad(WEIGHTED, ("pos_weight",)), z, x, q, upstream=make_logits(4, 5, seed=1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_in_place(dtype):
    z, x, q = operands(dtype, columns=50)
    want = host.results(nl.value_and_grad(WEIGHTED)(z, x, q))
    wide = host.to_cupy(np.repeat(x, 2, axis=1))
    out = wide[:, ::2]
    got = nl.value_and_grad(WEIGHTED)(host.to_cupy(z), out, host.to_cupy(q), out=out)
    assert got[1] is out
    assert_same_bits(host.results(got), want)
    assert_same_bits(host.results(wide[:, 1::2]), host.results(x))


def test_order_of_threads_and_launches():
    """[16] Which thread comes first does not matter; one kernel gives all."""
    if host.ON_DEVICE:
        pytest.skip("a device has an order of its own")
    z, x, q = operands(np.float32, columns=40)
    launches = []
    with host.on_host(1, launches):
        check(nl.value_and_grad(WEIGHTED, ("logits", "labels", "pos_weight")), z, x, q, out=None)
    assert [name for name, _, _ in launches] == ["_binary_grad"]


def test_arrays_do_not_mix():
    z, x, q = (host.to_cupy(a) for a in operands(np.float32, columns=4))
    for options in ({"upstream": np.ones((3, 4))}, {"out": np.ones((3, 4), np.float32)}):
        with pytest.raises(TypeError, match="expected a CuPy array as logits is"):
            nl.value_and_grad(SIGMOID)(z, x, **options)
    assert nl.value_and_grad(SIGMOID)(z, x, upstream=2)[1].shape == (3, 4)
