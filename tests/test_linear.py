"""linear_cross_entropy: against the logits as a whole, chunks, gradients, memory. [n]: a line of docs/PITFALLS.md."""

import tracemalloc

import numpy as np
import pytest
from common import BFLOAT16, DTYPES, EPS, LAYOUTS, assert_same_bits, layouts_for, make_labels, make_logits, result_dtype

import numbaloss as nl
from numbaloss import linear

LOSS = nl.linear_cross_entropy
NAMES = "hidden", "weight", "bias"
GRAD = nl.value_and_grad(LOSS, NAMES)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, chunks and blocks of classes in little arrays."""
    monkeypatch.setitem(linear.TILE, "numpy", 16)
    monkeypatch.setitem(linear.BLOCK, "numpy", 4000)


def make(rows=75, features=12, classes=200, dtype=np.float32):
    hidden, weight = make_logits(rows, features, dtype, 1, 1.0), make_logits(classes, features, dtype, 2, 1.0)
    return hidden, weight, make_labels(rows, classes), make_logits(1, classes, result_dtype(dtype), 3, 1.0)[0]


def whole(hidden, weight, bias):
    """(logits, what each may be off): two products of n terms, each within n / 2 eps of the sum of their magnitudes."""
    h, w = hidden.astype(result_dtype(hidden.dtype)), weight.astype(result_dtype(hidden.dtype))
    size = np.abs(h) @ np.abs(w).T + np.abs(bias)
    return h @ w.T + bias, (h.shape[-1] + 1) * EPS[h.dtype] * size.max()


OPTIONS = {
    "none": {},
    "sum": {"reduction": "sum"},
    "each": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 1.7},
    "class weights": {"class_weights": np.linspace(0.5, 2, 200)},
    "weights": {"weights": np.linspace(0, 3, 75)},
    "ignore": {"ignore_index": 7},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0, "class_weights": np.linspace(1, 2, 200)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_value_and_gradients(dtype, options):
    """A loss moves by at most twice what a logit does, and by 2 z lse times it for a z-loss."""
    hidden, weight, y, bias = make(dtype=dtype)
    y[3] = 7
    logits, off = whole(hidden, weight, bias)
    want, slopes = nl.value_and_grad(nl.cross_entropy)(logits, y, **options)
    value, grads = GRAD(hidden, weight, y, bias, **options)
    assert_same_bits(value, LOSS(hidden, weight, y, bias, **options))
    rows = len(y) * options.get("weights", np.ones(1)).max() if options.get("reduction") == "sum" else 1
    limit = 2 * (1 + 20 * options.get("z_loss", 0)) * off * max(1, np.max(options.get("weights", 1))) * rows
    assert value.dtype == dtype
    np.testing.assert_allclose(value, want, rtol=8 * EPS[np.dtype(dtype)], atol=limit)
    # an entry p moves by at most 2 off p (plain), and the sums have up to 200 terms
    bound = np.abs(slopes).astype(np.float64)
    expected = slopes @ weight, slopes.T @ hidden, slopes.sum(0)
    sizes = bound @ np.abs(weight), bound.T @ np.abs(hidden), bound.sum(0)
    for name, got, exact, size in zip(NAMES, grads, expected, sizes):
        assert got.dtype == dtype
        tolerance = 8 * off + 200 * EPS[np.dtype(dtype)]
        assert (np.abs(got - exact) <= tolerance * size.max()).all(), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_give_the_same_bits(options):
    for dtype in (BFLOAT16, np.float32, np.float64):
        hidden, weight, y, bias = make(dtype=dtype)
        want = GRAD(hidden, weight, y, bias, **options)
        for chunk in (1, 30_000, 60_000, 1 << 40):
            assert_same_bits(LOSS(hidden, weight, y, bias, chunk=chunk, **options), want[0], chunk)
            value, grads = GRAD(hidden, weight, y, bias, chunk=chunk, **options)
            assert_same_bits((value, *grads), (want[0], *want[1]), chunk)


def test_chunks_of_whole_tiles(monkeypatch):
    """As they are outside of tests."""
    monkeypatch.undo()
    hidden, weight, y, bias = make(1100, 70, 1003)
    want = GRAD(hidden, weight, y, bias)
    for chunk in (1, 1 << 22):
        got = GRAD(hidden, weight, y, bias, chunk=chunk)
        assert_same_bits((got[0], *got[1]), (want[0], *want[1]))
    assert LOSS(hidden, weight, y, bias, chunk=1) == want[0]


def test_central_differences():
    hidden, weight, y, bias = make(20, 5, 30, np.float64)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "weights": np.linspace(0, 2, 20)}
    grads, step = GRAD(hidden, weight, y, bias, **options)[1], 1e-5
    for name, x, grad in zip(NAMES, (hidden, weight, bias), grads):
        for k in range(0, x.size, 7):
            both = []
            for sign in (1, -1):
                args = {"hidden": hidden, "weight": weight, "targets": y, "bias": bias}
                args[name] = x.copy()
                args[name].flat[k] += sign * step
                both.append(LOSS(**args, **options))
            # the error of a central difference: step^2 times a third derivative below 100, and rounding
            assert abs((both[0] - both[1]) / (2 * step) - grad.flat[k]) <= 100 * step**2 + 1e-15 / step, (name, k)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_16_bits_are_widened(dtype):
    hidden, weight, y, bias = make(dtype=dtype)
    value, grads = GRAD(hidden, weight, y, bias)
    want, wide = GRAD(hidden.astype(np.float32), weight.astype(np.float32), y, bias)
    assert_same_bits(value, want)
    assert_same_bits(grads, (wide[0].astype(dtype), wide[1].astype(dtype), wide[2]))
    out = np.empty(hidden.shape, np.float32)
    assert nl.value_and_grad(LOSS, "hidden")(hidden, weight, y, bias, out=out)[1] is out
    assert_same_bits(out, wide[0])
    assert_same_bits(LOSS(hidden.astype(np.float32), weight, y, bias), want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_that_do_not_count(dtype, reduction):
    """[9] Their hidden states are not looked at, and their gradients are exactly 0."""
    hidden, weight, y, bias = make(dtype=dtype)
    weights = np.ones(75)
    weights[[4, 70]], y[5], y[4] = 0, -100, 10**6
    want = GRAD(hidden, weight, y, bias, weights=weights, reduction=reduction)
    hidden[[4, 5]], hidden[70, 3] = np.nan, np.inf
    value, grads = GRAD(hidden, weight, y, bias, weights=weights, reduction=reduction)
    assert_same_bits((value, *grads), (want[0], *want[1]))
    assert_same_bits(grads[0][[4, 5, 70]], np.zeros((3, 12), dtype))
    weight[3] = np.nan
    lost = GRAD(hidden, weight, y, bias, weights=weights, reduction=reduction)[1][0]
    assert_same_bits(lost[[4, 5, 70]], np.zeros((3, 12), dtype))
    assert np.isnan(lost[0].astype(np.float32)).all()
    assert np.isnan(GRAD(np.full_like(hidden, np.nan), weight, np.full(75, -100), bias)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """[12] Views give the bits of a copy."""
    for dtype in (np.float32, np.float16):
        if layout in layouts_for(dtype):
            hidden, weight, y, bias = make(dtype=dtype)
            change = LAYOUTS[layout]
            got = GRAD(change(hidden), change(weight), y, bias, reduction="none")
            want = GRAD(hidden, weight, y, bias, reduction="none")
            assert_same_bits((got[0], *got[1]), (want[0], *want[1]), layout)


def test_shapes():
    """One row, three dimensions, a shifted view, upstream, no bias."""
    hidden, weight, y, bias = make(72)
    hidden, y = hidden.reshape(8, 9, 12), y.reshape(8, 9)
    one = LOSS(hidden[0, 0], weight, y[0, 0], bias)
    assert np.shape(one) == () and one.dtype == np.float32
    g = make_logits(8, 8)
    got = GRAD(hidden[:, :-1], weight, y[:, 1:], bias, reduction="none", upstream=g)
    flat = np.ascontiguousarray(hidden[:, :-1]).reshape(64, 12), weight, y[:, 1:].ravel(), bias
    want = GRAD(*flat, reduction="none", upstream=g.ravel())
    assert_same_bits(got[0].ravel(), want[0])
    assert_same_bits((got[1][0].reshape(64, 12), *got[1][1:]), want[1])
    wide = np.zeros((8, 18, 12), np.float32)
    run = nl.value_and_grad(LOSS, ("hidden", "weight"))
    outs = wide[:, ::2], np.ones_like(weight)
    got = run(hidden, weight, y, out=outs)
    assert got[1][0] is outs[0] and got[1][1] is outs[1]
    want = run(hidden, weight, y)
    assert_same_bits(tuple(np.ascontiguousarray(x) for x in got[1]), want[1])
    assert (wide[:, 1::2] == 0).all()
    assert_same_bits(LOSS(hidden, weight, y), LOSS(hidden, weight, y, np.zeros(200)))


def test_nothing():
    hidden, weight, y, bias = make(0)
    value, grads = GRAD(hidden, weight, y, bias)
    assert np.isnan(value) and [g.shape for g in grads] == [(0, 12), (200, 12), (200,)]
    assert not grads[1].any() and not grads[2].any()
    assert LOSS(hidden, weight, y, reduction="none").shape == (0,)
    assert LOSS(*make(3, 4, 1)[:3], reduction="sum") == 0


def test_errors():
    hidden, weight, y, bias = make(4, 8, 20)

    def raises(error, message, *args, **options):
        with pytest.raises(error, match=message):
            LOSS(*args, **options)

    match = r"weight: expected shape \(classes, 8\) to match hidden \(4, 8\), got "
    raises(ValueError, match + r"\(20, 7\)", hidden, weight[:, :7], y)
    raises(ValueError, match + r"\(8,\)", hidden, weight[0], y)
    raises(ValueError, match + r"\(0, 8\)", hidden, weight[:0], y)
    raises(ValueError, r"hidden: expected shape \(\.\.\., features\), got \(4, 0\)", hidden[:, :0], weight, y)
    raises(
        ValueError,
        r"bias: expected shape \(20,\) to match weight \(20, 8\), got \(19,\)",
        *make(4, 8, 20)[:3],
        bias[1:],
    )
    raises(TypeError, "weight: expected a dtype as hidden's float32, got float64", hidden, weight.astype(float), y)
    raises(TypeError, "hidden: expected dtype float16, bfloat16", hidden.astype(int), weight, y)
    raises(TypeError, "targets: expected integers, got dtype float64", hidden, weight, np.ones((4, 20)))
    raises(ValueError, r"targets: expected shape \(4,\)", hidden, weight, y[:3])
    raises(
        ValueError, r"targets: expected values in \[0, 20\), got 20 at position \(2,\)", hidden, weight, [0, 1, 20, 3]
    )
    raises(ValueError, "chunk: expected a number of bytes from 1 on, got 0", hidden, weight, y, chunk=0)
    raises(TypeError, "chunk: expected an integer", hidden, weight, y, chunk=1.5)
    raises(ValueError, "reduction: expected one of", hidden, weight, y, reduction="max")
    with pytest.raises(ValueError, match="bias: expected an argument to differentiate by, got None"):
        nl.value_and_grad(LOSS, "bias")(hidden, weight, y)
    with pytest.raises(ValueError, match=r"out: expected shape \(4, 8\) to match hidden, got \(8, 4\)"):
        nl.value_and_grad(LOSS, "hidden")(hidden, weight, y, out=np.empty((8, 4), np.float32))
    lost = LOSS(hidden, weight, [0, 1, 20, 3], reduction="none", check_labels="nan")
    assert np.isnan(lost).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_memory(monkeypatch, dtype):
    """A chunk, two blocks of the weight, and what comes back (the gradient of a 16-bit weight in float32 too)."""
    monkeypatch.undo()
    hidden, weight, y, _ = make(8192, 8, 20_000, dtype)
    run = nl.value_and_grad(LOSS, ("hidden", "weight"))
    run(hidden[:300], weight, y[:300])
    tracemalloc.start()
    try:
        run(hidden, weight, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= (1 << 27) + 2 * (1 << 24) + hidden.nbytes + 3 * 4 * weight.size < 4 * 8192 * 20_000 / 2
