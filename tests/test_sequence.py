"""sequence_loss against reference.py: flags, divisors, rows that do not count. [n]: a line of docs/PITFALLS.md."""

import itertools

import numpy as np
import pytest
import reference
from common import BAR, DTYPES, assert_close, assert_same_bits, layouts_for, make_labels, make_logits, result_dtype
from hypothesis import given, settings
from hypothesis import strategies as st

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("average_across_timesteps", "average_across_batch", "sum_over_timesteps", "sum_over_batch")
LEGAL = {"TTFF": (), "FFTT": (), "TFFF": ("B",), "FTFF": ("T",), "FFTF": ("B",), "FFFT": ("T",), "FFFF": ("B", "T")}
ALL = ["".join(flags) for flags in itertools.product("TF", repeat=4)]


def flags(code):
    return {name: letter == "T" for name, letter in zip(NAMES, code, strict=True)}


@st.composite
def problems(draw):
    batch, time = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    classes = draw(st.sampled_from([1, 2, 5, 97, 300]))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    seed = draw(st.integers(0, 999))
    logits = make_logits(batch * time, classes, dtype, seed)
    layout = draw(st.sampled_from(["as is", *layouts_for(dtype)]))
    if logits.size and layout != "as is":
        logits = layouts_for(dtype)[layout](logits)
    logits = logits.reshape(batch, time, classes)
    if draw(st.booleans()):
        targets = make_labels(batch * time, classes, seed).reshape(batch, time)
    else:
        targets = np.random.default_rng(seed).integers(0, 5, logits.shape) / np.float32(4)
    weights = np.random.default_rng([seed, 2]).integers(draw(st.sampled_from([-3, 0])), 4, (batch, time))
    if draw(st.booleans()):
        weights = weights / np.float32(2)
    if draw(st.booleans()) and weights.size:
        weights[0] = 0
    return logits, targets, weights


@given(problems(), st.sampled_from(sorted(LEGAL)))
@settings(max_examples=200)
def test_against_reference(problem, code):
    logits, targets, weights = problem
    exact, size = (reference.sequence_loss(*problem, **flags(code), magnitude=m) for m in (False, True))
    got = nl.sequence_loss(logits, targets, weights, **flags(code))
    assert got.dtype == result_dtype(logits.dtype)
    shape = {"B": logits.shape[0], "T": logits.shape[1]}
    assert np.shape(got) == tuple(shape[letter] for letter in LEGAL[code])
    assert_close(got, exact, 2 * BAR, size)


@pytest.mark.parametrize("code", [code for code in ALL if code not in LEGAL])
def test_illegal_flags(code):
    f = flags(code)
    with pytest.raises(ValueError) as error:
        nl.sequence_loss(np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), int), np.ones((2, 3)), **f)
    assert sum(name in str(error.value) for name, on in f.items() if on) >= 2  # it names the two that clash


def test_divisors():
    """Sums of weights where averaged, counts of nonzero weights where summed; the mean of one step is over the batch's
    weights there, not over its size."""
    logits = np.zeros((2, 3, 4))
    targets = np.zeros((2, 3), int)
    w = np.array([[2.0, 0, 0.5], [1, 0, -1]])
    ln4 = np.log(4)
    for code, expected in {
        "TTFF": ln4,
        "FFTT": ln4 * 2.5 / 4,
        "TFFF": [ln4, 0],
        "FTFF": [ln4, 0, ln4],
        "FFTF": [ln4 * 2.5 / 2, 0],
        "FFFT": [ln4 * 1.5, 0, ln4 * -0.25],
        "FFFF": ln4 * w,
    }.items():
        assert_close(nl.sequence_loss(logits, targets, w, **flags(code)), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("code", LEGAL)
def test_weight_zero_hides_a_row(code, dtype):
    """NaN, infinities and labels out of range behind a weight of 0, or -0, do not leak. [9] All weights 0: 0."""
    logits, targets = make_logits(6, 5, dtype).reshape(2, 3, 5), make_labels(6, 5).reshape(2, 3)
    weights = np.array([[1, 0, 0.5], [-0.0, 2, 0]], np.float32)
    expected = nl.sequence_loss(logits, targets, weights, **flags(code))
    spoilt, wrong = logits.copy(), targets.copy()
    spoilt[0, 1], spoilt[1, 0], spoilt[1, 2, 3] = np.nan, -np.inf, np.inf
    wrong[0, 1], wrong[1, 0], wrong[1, 2] = -1, 2**40, 5
    assert_same_bits(nl.sequence_loss(spoilt, wrong, weights, **flags(code)), expected)
    soft = reference.softmax(logits).astype(np.float32)
    expected = nl.sequence_loss(logits, soft, weights, **flags(code))
    assert_same_bits(nl.sequence_loss(spoilt, soft, weights, **flags(code)), expected)
    nothing = nl.sequence_loss(spoilt, wrong, np.zeros((2, 3)), **flags(code))
    assert np.all(nothing == 0)


@pytest.mark.parametrize("code", LEGAL)
def test_a_bad_row_reaches_its_own_results_only(code):
    logits, targets, weights = make_logits(6, 5).reshape(2, 3, 5), make_labels(6, 5).reshape(2, 3), np.ones((2, 3))
    good = nl.sequence_loss(logits, targets, weights, **flags(code))
    logits[1, 2, 0] = np.nan
    got = nl.sequence_loss(logits, targets, weights, **flags(code))
    touched = {(): (), ("B",): (1,), ("T",): (2,), ("B", "T"): (1, 2)}[LEGAL[code]]
    assert np.isnan(got[touched])
    assert np.isnan(got).sum() == 1
    keep = ~np.isnan(got)
    assert_same_bits(np.asarray(got)[keep], np.asarray(good)[keep])


def test_none_is_loss_times_weight():
    """[6] Products in float64, rounded once."""
    logits, targets = make_logits(12, 9).reshape(3, 4, 9), make_labels(12, 9).reshape(3, 4)
    weights = np.random.default_rng(0).integers(-8, 8, (3, 4)) / np.float32(3)
    losses = nl.cross_entropy(logits, targets, reduction="none")
    got = nl.sequence_loss(logits, targets, weights, **flags("FFFF"))
    assert_same_bits(got, (losses.astype(np.float64) * weights).astype(np.float32))


def test_softmax_loss_function():
    """Called with keywords, flat; what it returns is weighted and reduced."""
    logits, targets = make_logits(6, 5).reshape(2, 3, 5), make_labels(6, 5).reshape(2, 3)
    weights = np.array([[1, 0, 0.5], [1, 2, 0]], np.float32)
    calls = []

    def doubled(*, labels, logits):
        calls.append((labels, logits))
        return 2 * nl.sparse_softmax_cross_entropy_with_logits(labels, logits)

    for code in LEGAL:
        got = nl.sequence_loss(logits, targets, weights, **flags(code), softmax_loss_function=doubled)
        expected = np.float32(2) * nl.sequence_loss(logits, targets, weights, **flags(code))
        assert_same_bits(got, expected)
    labels, flat = calls[0]
    assert labels.shape == (6,) and flat.shape == (6, 5)
    assert np.array_equal(labels, targets.ravel()) and np.array_equal(flat, logits.reshape(6, 5))


def test_softmax_loss_function_behind_weight_zero():
    logits, targets = np.zeros((1, 2, 3), np.float32), np.zeros((1, 2), int)
    got = nl.sequence_loss(
        logits, targets, [[1, 0]], softmax_loss_function=lambda *, labels, logits: np.array([3, np.nan], np.float32)
    )
    assert got == 3


@pytest.mark.parametrize("kind", ["float16", "float64", "int8", "int64", "uint8", "bool", "list"])
def test_weights_of_any_kind(kind):
    logits, targets = make_logits(6, 5).reshape(2, 3, 5), make_labels(6, 5).reshape(2, 3)
    weights = np.array([[1, 0, 1], [1, 1, 0]], np.float32)
    typed = weights.tolist() if kind == "list" else weights.astype(kind)
    expected = nl.sequence_loss(logits, targets, weights)
    assert_same_bits(nl.sequence_loss(logits, targets, typed), expected)
    if kind != "list":
        assert_same_bits(nl.sequence_loss(logits, targets, np.asfortranarray(typed)), expected)
        assert_same_bits(nl.sequence_loss(logits, targets.astype(np.int16).tolist(), typed), expected)


def test_odd_weights():
    """A sum of exactly 0 gives 0; tiny, huge and undefined weights are plain arithmetic."""
    logits, targets = make_logits(2, 5, np.float64).reshape(1, 2, 5), np.array([[1, 2]])
    a, b = nl.sequence_loss(logits, targets, [[1, 1]], **flags("FFFF"))[0]
    assert nl.sequence_loss(logits, targets, [[1, -1]]) == 0
    assert nl.sequence_loss(logits, targets, [[1e-13, 0]]) == a
    assert_close(nl.sequence_loss(logits, targets, [[1e300, 1e300]]), (a + b) / 2)
    assert_close(nl.sequence_loss(logits, targets, [[1e-300, 3e-300]]), (a + 3 * b) / 4)
    assert np.isnan(nl.sequence_loss(logits, targets, [[np.nan, 1]]))
    assert np.isnan(nl.sequence_loss(logits, targets, [[np.inf, 1]]))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0, 4)])
def test_empty(shape):
    """[9] Zero rows, zero time steps."""
    for code, letters in LEGAL.items():
        got = nl.sequence_loss(np.zeros(shape, np.float32), np.zeros(shape[:2], int), np.ones(shape[:2]), **flags(code))
        expected = tuple({"B": shape[0], "T": shape[1]}[letter] for letter in letters)
        assert np.shape(got) == expected and got.dtype == np.float32 and np.all(got == 0)
    with pytest.raises(ValueError, match="logits"):
        nl.sequence_loss(np.zeros((2, 3, 0), np.float32), np.zeros((2, 3), int), np.ones((2, 3)))


def test_shapes_that_do_not_fit():
    """TensorFlow flattens before it compares, and silently misreads [T, B]."""
    good = {"logits": (2, 3, 4), "targets": (2, 3), "weights": (2, 3)}
    bad = [("logits", (6, 4)), ("logits", (1, 2, 3, 4)), ("logits", (2, 3))]
    bad += [("targets", s) for s in ((3, 2), (6,), (1, 6), (1, 3), (2, 3, 1), (2, 3, 5), (3, 2, 4), (1, 1, 4), ())]
    bad += [("weights", s) for s in ((3, 2), (6,), (1, 6), (1, 3), (1, 1), (2, 3, 1), ())]
    for name, shape in bad:
        shapes = {**good, name: shape}
        targets = np.ones(shapes["targets"], np.float32 if len(shapes["targets"]) == 3 else int)
        with pytest.raises(ValueError, match=name):
            nl.sequence_loss(np.zeros(shapes["logits"], np.float32), targets, np.ones(shapes["weights"]))


def test_a_bad_label_is_named():
    targets = np.array([[0, 1, 2], [3, 4, 0]])
    with pytest.raises(ValueError, match=r"targets: .*\[0, 4\), got 4 at position \(1, 1\)"):
        nl.sequence_loss(np.zeros((2, 3, 4), np.float32), targets, np.ones((2, 3)))
