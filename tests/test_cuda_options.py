"""Options of cross_entropy, dense labels, gradients and Hessians on CUDA: the bits of the CPU (see test_cuda.py)."""

import itertools

import numpy as np
import pytest
from common import DTYPES, assert_same_bits, make_labels, make_logits, result_dtype

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host  # noqa: E402

import numbaloss as nl  # noqa: E402
from numbaloss import _check  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy tells of infinities without a GPU
]
if not host.ON_DEVICE:
    pytest.importorskip("greenlet", reason="greenlet is not installed")


@pytest.fixture(autouse=True)
def device():
    """CuPy arrays can be made and kernels run."""
    with host.on_host():
        yield


def check(function, *args, **options):
    """function gives the same bits for NumPy and CuPy arrays."""
    on_cupy = [host.to_cupy(a) if isinstance(a, np.ndarray) else a for a in args]
    there = {k: host.to_cupy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    got, expected = host.results(function(*on_cupy, **there)), host.results(function(*args, **options))
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


def problem(dtype, rows, classes, dense):
    x, y = make_logits(rows, classes, dtype), make_labels(rows, classes)
    if dense:
        y = np.random.default_rng(1).random(x.shape).astype(result_dtype(dtype))
        y[0, :3], y[:, -1] = 0, 0
        x[0, 1] = -np.inf
        return x, y
    y[1] = -100
    return x, y


def arguments(rows, classes, dtype):
    kind = result_dtype(dtype)
    weights = (np.arange(rows) % 3 / 2).astype(kind)
    return [{}, {"weights": weights}, {"weights": weights, "class_weights": (np.arange(classes) % 4 / 2).astype(kind)}]


@pytest.mark.parametrize("dtype, dense", [("float32", False), ("bfloat16", True), ("float64", True)])
def test_every_combination(dtype, dense):
    dtype = DTYPES[dtype]
    x, y = problem(dtype, 5, 67, dense)
    names = ("logits", "weights", "targets") if dense else ("logits", "weights")
    reductions = itertools.cycle(["mean", "sum", "none"])
    for smoothing, z_loss, cap, temperature in itertools.product((0.0, 0.1), (0.0, 0.01), (None, 2.5), (1.0, 0.7)):
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": cap, "temperature": temperature}
        options |= arguments(5, 67, dtype)[1 + (z_loss > 0)] | {"reduction": next(reductions)}
        check(nl.value_and_grad(nl.cross_entropy, names), x, y, **options)
        if cap is None:
            check(nl.value_grad_hess(nl.cross_entropy), x, y, **options)


SOME = [("float32", False), ("bfloat16", False), ("float16", True), ("float32", True), ("float64", True)]


@pytest.mark.parametrize("dtype, dense", SOME)
@pytest.mark.parametrize("classes", [3, 1025, 8200])
def test_classes(classes, dtype, dense):
    """A warp's and a block's row; unaligned, strided, in place."""
    dtype = DTYPES[dtype]
    x, y = (
        problem(dtype, 3, classes, dense) if classes > 3 else (make_logits(3, classes, dtype), make_labels(3, classes))
    )
    if classes <= 3 and dense:
        y = np.random.default_rng(1).random(x.shape).astype(result_dtype(dtype))
    options = {
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "class_weights": arguments(3, classes, dtype)[2]["class_weights"],
    }
    check(nl.value_and_grad(nl.cross_entropy), x, y, **options)
    wide = np.zeros((3, classes + 3), x.dtype)
    wide[:, 1:-2] = x
    if classes < 8200:
        check(lambda x, y, **more: nl.value_and_grad(nl.cross_entropy)(x[:, 1:-2], y, **more), wide, y, **options)
    if dtype == np.float32 or classes < 8200:
        check(lambda x, y: nl.value_and_grad(nl.cross_entropy)(x, y, z_loss=0.1, out=x), x.copy(), y)
    if classes < 8200:
        check(nl.value_and_grad(nl.cross_entropy), np.asfortranarray(x), y, z_loss=0.1)


@pytest.mark.parametrize("order", [1, 2])
def test_in_place_of_chunks(order):
    """No warp writes a logit that another one has not read."""
    if host.ON_DEVICE:
        pytest.skip("a device has an order of its own")
    x, y = make_logits(3, 8200), np.array([8195, 5, 1200])
    expected = nl.value_and_grad(nl.cross_entropy)(x, y, z_loss=0.1)
    with host.on_host(order):
        place = host.to_cupy(x)
        got = nl.value_and_grad(nl.cross_entropy)(place, host.to_cupy(y), z_loss=0.1, out=place)
        for a, b in zip(host.results(got), host.results(expected), strict=True):
            assert_same_bits(a, b)


def test_pieces(monkeypatch):
    """Capped logits piece by piece."""
    monkeypatch.setitem(_check.PIECE, "cupy", 3000)
    x, y = make_logits(9, 100).reshape(3, 3, 100), make_labels(9, 100).reshape(3, 3)
    check(nl.value_and_grad(nl.cross_entropy), x, y, softcap=3.0, temperature=0.5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal(gamma):
    x, y = problem(np.float32, 6, 40, False)
    x[2, y[2]], x[3, y[3]] = 30, -200
    check(
        nl.value_and_grad(nl.focal_loss, ("logits", "weights")),
        x,
        y,
        gamma=gamma,
        weights=arguments(6, 40, x.dtype)[1]["weights"],
    )


def test_softmax_cross_entropy():
    x, y = problem(np.float32, 4, 130, True)
    for derivative in ("tensorflow", "true"):
        run = nl.value_and_grad(nl.softmax_cross_entropy_with_logits, ("logits", "labels"), derivative=derivative)
        check(run, y, x)
    check(nl.value_and_grad(nl.softmax_cross_entropy_with_logits), y[0], x)
    check(nl.value_grad_hess(nl.softmax_cross_entropy_with_logits), y, x)


@pytest.mark.parametrize("flags", ["TTFF", "FFTT", "TFFF", "FTFF", "FFTF", "FFFT", "FFFF"])
def test_sequence_loss(flags):
    x, y = make_logits(6, 40).reshape(2, 3, 40), make_labels(6, 40).reshape(2, 3)
    w = np.array([[1, 0.5, 0], [0, 0, 0]], np.float32)
    names = "average_across_timesteps", "average_across_batch", "sum_over_timesteps", "sum_over_batch"
    options = {name: flag == "T" for name, flag in zip(names, flags)}
    check(nl.value_and_grad(nl.sequence_loss, ("logits", "weights")), x, y, w, **options)


def test_labels_out_of_range():
    """NaN rows, the others as they are; or an error if asked for."""
    x, y = make_logits(4, 30), np.array([1, 30, -1, 2])
    check(nl.value_and_grad(nl.cross_entropy), x, y, z_loss=0.1, reduction="none", check_labels="nan")
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, 30\), got 30"):
        nl.value_and_grad(nl.cross_entropy)(host.to_cupy(x), host.to_cupy(y), z_loss=0.1, check_labels="raise")
