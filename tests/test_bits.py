"""The same bits whatever the batch, the order of rows, the threads and the layout. [n]: a line of docs/PITFALLS.md."""

import contextlib

import numba
import numpy as np
import pytest
from common import (
    BFLOAT16,
    CLASSES,
    DTYPES,
    LAYOUTS,
    assert_same_bits,
    flat_results,
    layouts_for,
    make_labels,
    make_logits,
    none,
)

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("one_thread")
MOST = numba.config.NUMBA_NUM_THREADS


def soft_labels(x):
    """Labels that depend on the class alone, so that rows may move; some are 0."""
    return (np.arange(x.shape[-1]) % 4).astype(np.float32) / 4


# One result per row, or per logit: f(logits, labels).
FUNCTIONS = {
    "cross_entropy": none,
    "score_tokens": lambda x, y: nl.score_tokens(x, y, rank=True, entropy=True),
    "softmax": lambda x, y: nl.softmax(x),
    "log_softmax": lambda x, y: nl.log_softmax(x),
    "logsumexp": lambda x, y: nl.logsumexp(x),
    "softmax_cross_entropy_with_logits": lambda x, y: nl.softmax_cross_entropy_with_logits(soft_labels(x), x),
    "sigmoid_cross_entropy_with_logits": lambda x, y: nl.sigmoid_cross_entropy_with_logits(
        np.broadcast_to(soft_labels(x), x.shape), x
    ),
    "weighted_cross_entropy_with_logits": lambda x, y: nl.weighted_cross_entropy_with_logits(
        np.broadcast_to(soft_labels(x), x.shape), x, 3.0
    ),
    "focal derivatives": lambda x, y: nl.value_grad_hess(nl.sigmoid_focal_cross_entropy_with_logits)(
        np.broadcast_to(soft_labels(x), x.shape), x, alpha=0.25
    )[::2],  # the gradient is of the logits' dtype
}


def problem(rows, classes, dtype=np.float32, seed=0):
    """Rows with and without -inf, wide and narrow ones. Every second target leads: its loss is small, and shows every
    bit of the sum over the others, which rounding would hide behind a large loss."""
    x, y = make_logits(rows, classes, dtype, seed), make_labels(rows, classes, seed)
    x[1::5] = (x[1::5].astype(np.float32) * 16).astype(dtype)
    if classes > 2:
        x[2::7, : classes // 2] = -np.inf
    leading = np.arange(0, rows, 2)
    x[leading, y[leading]] = (x[leading].astype(np.float32).max(axis=1) + 4 + leading % 9).astype(dtype)
    return x, y


def rows_of(result, chosen):
    return tuple(r[chosen] for r in result if r is not None) if isinstance(result, tuple) else result[chosen]


@contextlib.contextmanager
def threads(n):
    before = numba.get_num_threads()
    numba.set_num_threads(n)
    try:
        yield
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_alone_or_among_others(name, dtype):
    """[14, 16] Every class count: all rows together, permuted, in two halves, and each alone."""
    function = FUNCTIONS[name]
    for classes in CLASSES:
        rows = 70 if classes < 130 else 9 if classes < 9000 else 3
        x, y = problem(rows, classes, dtype, seed=classes)
        expected, what = function(x, y), f"{name}, {classes} classes"
        assert_same_bits(function(x, y), expected, what + ", twice")
        order = np.random.default_rng(0).permutation(rows)
        assert_same_bits(function(x[order], y[order]), rows_of(expected, order), what + ", permuted")
        for part in (slice(0, rows // 2), slice(rows // 2, None), slice(1, None)):
            assert_same_bits(function(x[part], y[part]), rows_of(expected, part), f"{what}, {part}")
        for row in {0, 1, 2, rows - 1}:
            part = slice(row, row + 1)
            assert_same_bits(function(x[part], y[part]), rows_of(expected, part), f"{what}, row {row} alone")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_of_many(name):
    """[16] Enough rows for every way of going parallel: few and many rows, few and many classes. One thread or many."""
    function = FUNCTIONS[name]
    for rows, classes in ((20_000, 10), (3000, 96), (3000, 97), (300, 1025), (70, 8193), (63, 8193), (5, 65537)):
        x, y = problem(rows, classes, seed=rows)
        expected, what = function(x, y), f"{name} {rows} x {classes}"
        for n in range(2, MOST + 1):
            with threads(n):
                assert_same_bits(function(x, y), expected, f"{what}, {n} threads")
        for row in (0, rows // 3, rows - 1):
            part = slice(row, row + 1)
            assert_same_bits(function(x[part], y[part]), rows_of(expected, part), f"{what}, row {row} alone")


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32])
def test_chunks_on_threads_or_rows_on_threads(dtype):
    """[16] A few rows of many classes among many such rows; the target in each chunk and at its ends."""
    x, y = problem(80, 20_011, dtype)
    y[:8] = [0, 8191, 8192, 16383, 16384, 20_010, 8193, 12_000]
    expected = none(x, y)
    with threads(MOST):
        for rows in (2, 3, 8, 63, 64, 65, 80):
            assert_same_bits(none(x[:rows], y[:rows]), expected[:rows], f"{rows} rows")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_layouts(name, dtype):
    """[12] Views equal their contiguous copy, and are not written to."""
    function = FUNCTIONS[name]
    for rows, classes in ((6, 1), (5, 9), (40, 33), (7, 97), (5, 1025), (3, 8195)):
        x, y = problem(rows, classes, dtype, seed=classes)
        expected = function(x, y)
        for layout, make in layouts_for(dtype).items():
            view = make(x)
            before = view.tobytes()
            assert_same_bits(function(view, y), expected, f"{name} {rows} x {classes}, {layout}")
            assert view.tobytes() == before
        repeated = np.broadcast_to(x[:1], x.shape)
        same = np.broadcast_to(y[:1], y.shape)
        assert_same_bits(function(repeated, same), function(repeated.copy(), same.copy()), f"{name}, zero row stride")
        repeated = np.broadcast_to(x[:, :1], x.shape)
        assert_same_bits(function(repeated, y), function(repeated.copy(), y), f"{name}, zero class stride")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_odd_classes_in_16_bits(name):
    """[12] 50257 classes of two bytes: every second row begins between two vectors' boundaries."""
    for dtype in (np.float16, BFLOAT16):
        x, y = problem(4, 50257, dtype)
        expected = FUNCTIONS[name](x, y)
        for row in range(4):
            part = slice(row, row + 1)
            assert_same_bits(FUNCTIONS[name](x[part].copy(), y[part]), rows_of(expected, part), f"{name}, row {row}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_higher_ranks(dtype):
    """Rows that are no multiple of one stride: [B, T, C] from [T, B, C], a slice of it, and the class axis first."""
    x, y = problem(60, 37, dtype)
    for name, function in FUNCTIONS.items():
        cube, labels = x.reshape(5, 12, 37), y.reshape(5, 12)
        expected = function(cube, labels)
        flat = function(x, y)
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (expected, flat)), strict=True):
            assert_same_bits(a.reshape(b.shape), b, name)
        swapped = np.ascontiguousarray(cube.swapaxes(0, 1)).swapaxes(0, 1)
        assert_same_bits(function(swapped, labels), expected, f"{name}, swapped")
        first = np.moveaxis(np.ascontiguousarray(np.moveaxis(cube, -1, 0)), 0, -1)
        assert_same_bits(function(first, labels), expected, f"{name}, class axis first")
        assert_same_bits(function(cube[::2, 1::3], labels[::2, 1::3]), rows_of(expected, np.s_[::2, 1::3]), name)
        assert_same_bits(function(cube[::-1, ::-1], labels[::-1, ::-1]), rows_of(expected, np.s_[::-1, ::-1]), name)
        deep = x.reshape(1, 5, 3, 1, 4, 37)
        got = function(deep.transpose(3, 2, 0, 4, 1, 5), y.reshape(1, 5, 3, 1, 4).transpose(3, 2, 0, 4, 1))
        again = function(deep, y.reshape(1, 5, 3, 1, 4))
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, again)), strict=True):
            axes = (3, 2, 0, 4, 1, 5)[: b.ndim]
            assert_same_bits(a, b.transpose(axes), f"{name}, five row axes")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_copied_in_pieces(name):
    """What cannot be read where it lies is copied a few MiB at a time: more than one such piece."""
    x, y = problem(2200, 600)
    expected = FUNCTIONS[name](x, y)
    assert x.nbytes > 5 * 2**20
    assert_same_bits(FUNCTIONS[name](LAYOUTS["big-endian"](x), y), expected, name)
    deep = np.ascontiguousarray(x.reshape(10, 4, 55, 600).transpose(2, 1, 0, 3)).transpose(2, 1, 0, 3)
    for a, b in zip(flat_results(FUNCTIONS[name](deep, y.reshape(10, 4, 55))), flat_results(expected), strict=True):
        assert_same_bits(a.reshape(b.shape), b, f"{name}, three row axes")


def test_copied_in_pieces_with_weights():
    x, y = problem(2200, 600)
    weights, by_class = np.arange(2200) % 5 / 4, np.arange(600) % 7 / 4
    y[::9], x[4::5] = -100, np.nan
    weights[4::5] = 0
    other = LAYOUTS["big-endian"](x)
    for options in ({"weights": weights}, {"weights": weights, "class_weights": by_class}):
        for reduction in ("none", "mean"):
            expected = nl.cross_entropy(x, y, **options, reduction=reduction)
            assert_same_bits(nl.cross_entropy(other, y, **options, reduction=reduction), expected)
            soft = np.zeros(x.shape) + by_class
            soft[4::5] = 0
            expected = nl.cross_entropy(x, soft.astype(np.float32), **options, reduction=reduction)
            assert_same_bits(nl.cross_entropy(other, soft.astype(">f4"), **options, reduction=reduction), expected)
    cube, steps, w = x.reshape(44, 50, 600), np.maximum(y, 0).reshape(44, 50), weights.reshape(44, 50)
    expected = nl.sequence_loss(cube, steps, w, average_across_batch=False)
    assert_same_bits(nl.sequence_loss(other.reshape(44, 50, 600), steps, w, average_across_batch=False), expected)
    assert repr(nl.Evaluation().update(x, y, weights)) == repr(nl.Evaluation().update(other, y, weights))


def test_axis_first():
    """axis=0 and axis=1 give the bits of the last axis of a contiguous copy."""
    x, y = problem(60, 37)
    cube, labels = x.reshape(5, 12, 37), y.reshape(5, 12)
    for axis in (0, 1):
        moved = np.ascontiguousarray(np.moveaxis(cube, -1, axis))
        got = nl.cross_entropy(moved, labels, axis=axis, reduction="none")
        assert_same_bits(got, none(cube, labels))
        assert_same_bits(nl.score_tokens(moved, labels, axis=axis), nl.score_tokens(cube, labels))
        assert_same_bits(nl.softmax(moved, axis=axis), np.moveaxis(nl.softmax(cube), -1, axis))
        assert_same_bits(nl.logsumexp(moved, axis=axis), nl.logsumexp(cube))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_is_widened(name):
    """float16 and bfloat16 logits give the bits of their float32 copy."""
    for dtype in (np.float16, BFLOAT16):
        for classes in (1, 2, 9, 33, 97, 1025, 8195):
            x, y = problem(9, classes, dtype, seed=classes)
            x[0, 0] = 6e4
            x[-1, -1] = 6e-8  # subnormal in float16
            assert_same_bits(FUNCTIONS[name](x, y), FUNCTIONS[name](x.astype(np.float32), y), f"{name} {dtype}")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_half_is_widened(name):
    """All 65536 bit patterns, as the target of a row of two."""
    x = np.zeros((2**16, 2), DTYPES[name])
    x[:, 0] = np.arange(2**16, dtype=np.uint16).view(DTYPES[name])
    labels = np.zeros(2**16, int)
    got, expected = none(x, labels), none(x.astype(np.float32), labels)
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    assert np.isnan(got).sum() > 0
    assert_same_bits(np.nan_to_num(got, nan=-1), np.nan_to_num(expected, nan=-1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction):
    """[16] Order, layout and threads."""
    x, y = problem(5000, 37)
    y[::6] = -100
    weights = np.random.default_rng(0).standard_normal(5000)

    def run(x, y, w):
        return nl.cross_entropy(x, y, weights=w, reduction=reduction)

    expected = run(x, y, weights)
    order = np.random.default_rng(1).permutation(5000)
    assert_same_bits(run(x[order], y[order], weights[order]), expected)
    assert_same_bits(run(LAYOUTS["transposed"](x), y, weights), expected)
    cube = x.reshape(50, 100, 37).swapaxes(0, 1)
    assert_same_bits(run(cube, y.reshape(50, 100).T, weights.reshape(50, 100).T), expected)
    for n in range(2, MOST + 1):
        with threads(n):
            assert_same_bits(run(x, y, weights), expected, f"{n} threads")


def test_evaluation():
    """[16] Threads; test_totals.py has order, splits and merges."""
    x, y = problem(40_000, 5)
    weights = np.random.default_rng(0).uniform(0, 2, 40_000)
    expected = nl.Evaluation().update(x, y, weights).to_json()
    for n in range(2, MOST + 1):
        with threads(n):
            assert nl.Evaluation().update(x, y, weights).to_json() == expected


def test_sequence_loss():
    """[16] Batch of one or all, order of the batch, layout, threads, and cross_entropy's bits."""
    x, y = problem(480, 70)
    x, y = x.reshape(40, 12, 70), y.reshape(40, 12)
    weights = np.random.default_rng(0).uniform(0, 2, (40, 12)).astype(np.float32)
    weights[:, 9:] = 0
    total = nl.sequence_loss(x, y, weights)
    each = nl.sequence_loss(x, y, weights, average_across_batch=False)
    assert_same_bits(total, nl.cross_entropy(x, y, weights=weights))
    order = np.random.default_rng(1).permutation(40)
    assert_same_bits(nl.sequence_loss(x[order], y[order], weights[order]), total)
    assert_same_bits(nl.sequence_loss(x[order], y[order], weights[order], average_across_batch=False), each[order])
    for b in (0, 17, 39):
        assert_same_bits(nl.sequence_loss(x[b : b + 1], y[b : b + 1], weights[b : b + 1]), each[b])
    time_major = (np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1) for a in (x, y, weights))
    assert_same_bits(nl.sequence_loss(*time_major), total)
    for n in range(2, MOST + 1):
        with threads(n):
            assert_same_bits(nl.sequence_loss(x, y, weights), total, f"{n} threads")
            assert_same_bits(nl.sequence_loss(x, y, weights, average_across_batch=False), each, f"{n} threads")
