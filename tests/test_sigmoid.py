"""Sigmoid and weighted cross entropy against reference.py and exact arithmetic. [n]: a line of docs/PITFALLS.md."""

import mpmath
import numpy as np
import pytest
import reference
from common import BAR, DTYPES, assert_close, assert_same_bits, layouts_for, make_logits, result_dtype
from hypothesis import given, settings
from hypothesis import strategies as st

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = [np.float32, np.float64]
INF, NAN = np.inf, np.nan


def both(labels, logits):
    """The two functions, which agree for a pos_weight of 1."""
    yield nl.sigmoid_cross_entropy_with_logits(labels, logits), "sigmoid"
    yield nl.weighted_cross_entropy_with_logits(labels, logits, 1.0), "weighted"


@st.composite
def problems(draw):
    shape = draw(st.sampled_from([(0, 3), (1, 1), (3, 5), (7, 130), (2, 1025), (40, 900)]))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    seed = draw(st.integers(0, 999))
    x = make_logits(*shape, dtype, seed, draw(st.sampled_from([0.1, 4.0, 60.0, 1000.0])))
    labels = np.random.default_rng(seed).integers(0, 5, shape) / 4
    labels = labels.astype(draw(st.sampled_from([np.float32, dtype])))
    for _ in range(draw(st.integers(0, 4)) if x.size else 0):
        at = draw(st.integers(0, x.size - 1))
        x.flat[at] = draw(st.sampled_from([NAN, INF, -INF, 6e4, -6e4, 0.0, -0.0, 5e-8]))
    layout = draw(st.sampled_from(["as is", *layouts_for(dtype)]))
    return labels, x if layout == "as is" else layouts_for(dtype)[layout](x)


@given(problems(), st.sampled_from([None, 0.0, 0.25, 3.0, "class", "element"]))
@settings(max_examples=150)
def test_losses(problem, pos_weight):
    labels, logits = problem
    before = logits.copy()
    if pos_weight is None:
        got, exact = nl.sigmoid_cross_entropy_with_logits(labels, logits), reference.sigmoid_losses(labels, logits)
    else:
        if isinstance(pos_weight, str):
            shape = logits.shape[-1:] if pos_weight == "class" else logits.shape
            pos_weight = np.random.default_rng(0).integers(0, 9, shape) / np.float32(4)
        got = nl.weighted_cross_entropy_with_logits(labels, logits, pos_weight)
        exact = reference.weighted_losses(labels, logits, pos_weight)
    assert got.dtype == result_dtype(logits.dtype)
    assert not np.any(got < 0)
    assert_close(got, exact, BAR)
    assert logits.tobytes() == before.tobytes()


def exact_losses(labels, logits, pos_weight=1.0):
    out = []
    with mpmath.workprec(200):
        for z, x, q in np.broadcast(labels, logits, pos_weight):
            z, x, q = (mpmath.mpf(float(v)) for v in (z, x, q))
            positive, negative = mpmath.log1p(mpmath.exp(-x)), mpmath.log1p(mpmath.exp(x))
            out.append(float(q * z * positive + (1 - z) * negative))
    return np.array(out).reshape(np.shape(logits))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_exact(dtype, record_property):
    """Hard and soft labels, down to losses of 1e-38 and into the subnormal ones."""
    depth = np.concatenate([np.arange(0, 20, 0.17), np.arange(20, 87, 1.3), [1e2, 103, 1e3, 2e4]])
    logits = np.concatenate([depth, -depth]).astype(dtype)
    for z in (0.0, 1.0, 0.5, 0.125, 2.0**-20):
        labels = np.full(logits.shape, z)
        exact = exact_losses(labels, logits)
        for got, name in both(labels, logits):
            record_property(f"worst_eps {name} {z}", assert_close(got, exact, what=f"{name} {z}"))
        for q in (0.0, 0.3, 7.25):
            got = nl.weighted_cross_entropy_with_logits(labels, logits, q)
            used = np.float64(np.float32(q)) if result_dtype(dtype) == np.float32 else q
            assert_close(got, exact_losses(labels, logits, used), what=f"pos_weight {q}, label {z}")


@pytest.mark.parametrize("dtype", BOTH)
def test_labels_outside_0_1(dtype):
    """Plain arithmetic: two terms of different sign."""
    logits = make_logits(5, 40, dtype)
    labels = np.random.default_rng(0).integers(-9, 10, logits.shape) / 2
    for q in (1.0, 3.0, -2.0):
        exact, size = (reference.weighted_losses(labels, logits, q, magnitude=m) for m in (False, True))
        assert_close(nl.weighted_cross_entropy_with_logits(labels, logits, q), exact, 2 * BAR, size)
    exact, size = (reference.sigmoid_losses(labels, logits, magnitude=m) for m in (False, True))
    assert_close(nl.sigmoid_cross_entropy_with_logits(labels, logits), exact, 2 * BAR, size)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_limits(dtype):
    """[2] At an infinite logit the limit, for a NaN NaN: alone, and inside a vector of others."""
    x = np.array([-INF, INF, -INF, INF, -INF, INF, NAN, NAN, NAN, 0], dtype)
    z = np.array([0, 1, 1, 0, 0.5, 0.5, 0, 1, 0.5, 0])
    expected = np.array([0, 0, INF, INF, INF, INF, NAN, NAN, NAN, np.log(2)])
    for got, name in both(z, x):
        assert_close(got, expected, what=name)
    for size in (1, 7, 8, 33, 1000):
        many, at = make_logits(1, size, dtype)[0], size // 2
        for value, label, limit in zip(x, z, expected, strict=True):
            many[at] = value
            labels = np.zeros(size)
            labels[at] = label
            for got, name in both(labels, many):
                assert_close(got[at], np.float64(limit), what=name)
                assert np.isfinite(np.delete(got, at)).all()
    assert nl.weighted_cross_entropy_with_logits(np.ones(1), np.array([-INF], dtype), 0.0)[0] == 0  # a factor of 0


def test_tensorflow_cancels_here():
    """x = -17, z = 0: TensorFlow's weighted form gives 0."""
    got = nl.weighted_cross_entropy_with_logits(np.float32([0]), np.float32([-17]), 3.0)
    assert_close(got, [4.1399375e-08], 2.0**23 * 1e-8)  # as printed: eight digits
    assert_close(got, exact_losses([0], [-17], 3.0))


@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (3, 1), (2, 1, 1), (2, 3, 4), (1,)])
def test_pos_weight_broadcasts(shape):
    logits = make_logits(6, 4).reshape(2, 3, 4)
    labels = np.random.default_rng(0).integers(0, 2, logits.shape)
    q = np.random.default_rng(1).integers(1, 9, shape) / 4
    expected = reference.weighted_losses(labels, logits, q)
    assert_close(nl.weighted_cross_entropy_with_logits(labels, logits, q), expected)
    assert_close(nl.weighted_cross_entropy_with_logits(labels, logits, q.tolist()), expected)
    assert_same_bits(
        nl.weighted_cross_entropy_with_logits(labels, logits, q),
        nl.weighted_cross_entropy_with_logits(labels, logits, np.broadcast_to(q, logits.shape).copy()),
    )


def test_shapes_that_do_not_fit():
    logits = np.zeros((2, 3), np.float32)
    for shape in ((3,), (1, 3), (2, 1), (), (6,), (3, 2)):
        with pytest.raises(ValueError, match="labels"):
            nl.sigmoid_cross_entropy_with_logits(np.zeros(shape), logits)
        with pytest.raises(ValueError, match="labels"):
            nl.weighted_cross_entropy_with_logits(np.zeros(shape), logits, 2.0)
    for shape in ((4, 1, 1), (1, 2, 3), (4, 2, 3), (2,), (5,)):
        with pytest.raises(ValueError, match="pos_weight"):
            nl.weighted_cross_entropy_with_logits(np.zeros((2, 3)), logits, np.ones(shape))


def test_arguments():
    """`targets` is the old name of `labels`; labels may be of any real dtype, and lists; logits are an array."""
    logits, labels = make_logits(2, 3), np.array([[0, 1, 1], [1, 0, 0]])
    expected = nl.weighted_cross_entropy_with_logits(labels.astype(np.float32), logits, 2.0)
    assert_same_bits(nl.weighted_cross_entropy_with_logits(targets=labels, logits=logits, pos_weight=2.0), expected)
    for typed in (labels, labels.astype(bool), labels.astype(np.uint8), labels.astype(np.float64), labels.tolist()):
        assert_same_bits(nl.weighted_cross_entropy_with_logits(typed, logits, 2.0, name="ignored"), expected)
        assert_same_bits(
            nl.sigmoid_cross_entropy_with_logits(typed, logits),
            nl.sigmoid_cross_entropy_with_logits(labels.astype(np.float32), logits),
        )
    with pytest.raises(ValueError, match="targets"):
        nl.weighted_cross_entropy_with_logits(labels, logits, 2.0, targets=labels)
    for call in (
        lambda: nl.sigmoid_cross_entropy_with_logits(labels),
        lambda: nl.sigmoid_cross_entropy_with_logits(logits=logits),
        lambda: nl.weighted_cross_entropy_with_logits(labels, logits),
        lambda: nl.sigmoid_cross_entropy_with_logits(labels.astype(complex), logits),
        lambda: nl.sigmoid_cross_entropy_with_logits(labels, labels),
        lambda: nl.sigmoid_cross_entropy_with_logits(labels, logits.tolist()),
        lambda: nl.weighted_cross_entropy_with_logits(labels, logits, "2"),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_dtypes_and_scalars():
    for dtype in DTYPES.values():
        kind = result_dtype(dtype).type
        x = np.array(0.5, dtype)
        for got, _ in both(np.array(1.0), x):
            assert type(got) is kind
            assert_close(got, np.float64(np.log1p(np.exp(-0.5))))
        for got, _ in both(np.zeros((0, 3)), np.zeros((0, 3), dtype)):
            assert got.shape == (0, 3) and got.dtype == kind
