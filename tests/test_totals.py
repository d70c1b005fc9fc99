"""Totals are exact: math.fsum of the float64 products of weights and losses, in any order and splitting.

The quotient is taken in float64 and rounded once. Losses are those that reduction="none" returns.
[n]: a line of docs/PITFALLS.md.
"""

import itertools
import json
import math
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np
import pytest
from common import DTYPES, assert_same_bits, make_labels, make_logits, result_dtype
from hypothesis import given, settings
from hypothesis import strategies as st

import numbaloss as nl
from numbaloss._check import NOTHING
from numbaloss._exact import WORDS, carry, round_sum
from numbaloss.cpu import totals
from numbaloss.totals import exp

pytestmark = pytest.mark.usefixtures("one_thread")
DECIMAL = Context(prec=40, traps=[])


def total(values, scale):
    """The kernel that every reduction ends in."""
    return totals.total(values, None, scale, None, totals.NO_LABEL, NOTHING)


def products(losses, weights=None, class_weights=None, labels=None):
    """(weight * class weight) * loss, and the weights, in float64."""
    w = np.ones(losses.shape) if weights is None else np.asarray(weights, np.float64)
    w = w if class_weights is None else w * np.asarray(class_weights, np.float64)[labels]
    keep = w != 0
    return (w[keep] * losses[keep].astype(np.float64)).ravel().tolist(), w.ravel().tolist()


def assert_reductions(logits, labels, **options):
    losses = nl.cross_entropy(logits, labels, reduction="none")
    terms, w = products(losses, labels=labels, **options)
    top, divisor, kind = math.fsum(terms), math.fsum(w), losses.dtype.type
    assert_same_bits(nl.cross_entropy(logits, labels, reduction="sum", **options), kind(top))
    assert_same_bits(nl.cross_entropy(logits, labels, **options), kind(top / divisor))
    assert_same_bits(nl.cross_entropy(logits[::-1], labels[::-1], **reversed_weights(options)), kind(top / divisor))


def reversed_weights(options):
    return options | ({"weights": options["weights"][::-1]} if "weights" in options else {})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 63, 1000, 40_000])
def test_reductions(rows, dtype):
    logits, labels = make_logits(rows, 5, dtype, seed=rows, scale=12), make_labels(rows, 5)
    assert_reductions(logits, labels)
    weights = np.random.default_rng(0).standard_normal(rows)
    weights[:: max(2, rows // 7)] = 0
    weights[-1] = 0.1
    assert_reductions(logits, labels, weights=weights)
    assert_reductions(logits, labels, weights=weights.astype(np.float32), class_weights=[0.1, 0, 2.5, 1e-3, 7])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reductions_of_a_wide_range(dtype):
    """What a float64 sum would lose: losses of 1e-38 beside 1e4, weights of 1e-30 beside 1e30 that cancel."""
    lead = np.linspace(-1e4, 87, 999)
    logits = np.stack([lead, np.zeros(999)], axis=1).astype(dtype)
    labels = np.zeros(999, int)
    assert_reductions(logits, labels)
    weights = 10.0 ** np.random.default_rng(0).uniform(-30, 30, 999)
    assert_reductions(logits, labels, weights=weights)
    logits, labels = np.concatenate([logits, logits, logits[:3]]), np.zeros(2001, int)
    weights = np.concatenate([weights, -weights, [1e-20, 3, -2.0]])
    assert_reductions(logits, labels, weights=weights)


def test_a_sum_rounds_once():
    """Half-way cases, decided by a term far below."""
    for tail, expected in ((0.0, 1.0), (2.0**-140, 1 + 2.0**-52), (2.0**-1074, 1 + 2.0**-52)):
        for order in itertools.permutations([1.0, 2.0**-53, tail]):
            assert nl.Evaluation().update(np.zeros((3, 2)), np.zeros(3, int), order).result().weight == expected
            assert total(np.array(order), None) == expected
            assert total(-np.array(order), None) == -expected
    for e in range(54, 1075):
        assert total(np.array([1.0, 2.0**-53, 2.0**-e]), None) == 1 + 2.0**-52
        assert total(np.array([1.0, 2.0**-53, -(2.0**-e)]), None) == 1
        assert total(np.array([1.0, 3 * 2.0**-53, -(2.0**-e)]), None) == 1 + 2.0**-52
    assert total(np.array([2.0**-1074] * 3), None) == 3 * 2.0**-1074
    assert total(np.array([1e308, 1e308, -1e308]), None) == 1e308
    assert total(np.array([1e308, 1e308]), None) == np.inf


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(st.lists(FLOATS, max_size=40), st.lists(FLOATS, min_size=40, max_size=40), st.booleans())
@settings(max_examples=300)
def test_total(values, scale, scaled):
    """Any numbers: math.fsum, which overflows earlier than the sum itself does."""
    scale = np.array(scale[: len(values)]) if scaled else None
    with np.errstate(over="ignore", under="ignore"):
        terms = np.array(values, np.float64) * (1.0 if scale is None else scale)
    exact = sum(map(Fraction, terms.tolist())) if np.isfinite(terms).all() else None
    got = total(np.array(values, np.float64), scale)
    if exact is None:
        assert not np.isfinite(got)
    else:
        try:
            assert got == float(exact)
        except OverflowError:
            assert got == (math.inf if exact > 0 else -math.inf)


def test_round_sum():
    """Any words, also with carries to move, negative ones, and sums below the normal and beyond the largest number."""
    rng = np.random.default_rng(0)
    for trial in range(3000):
        words, count = np.zeros(WORDS, np.int64), rng.integers(1, 7)
        at = rng.integers(0, 66) + rng.integers(0, rng.choice([3, 66]), count)
        words[at[at < 66]] = (rng.integers(-(2**62), 2**62, count) >> rng.integers(0, 62, count))[at < 66]
        if trial % 3 == 0:  # half-way between two numbers, or next to it
            i = rng.integers(4, 62)
            words[:] = 0
            words[i : i + 2] = rng.integers(0, 2**32) << 11 | 1 << 10, 1 << 31
            words[i - 4] = rng.integers(-1, 2)
            words *= rng.choice([-1, 1])
        exact = sum(int(word) << (32 * i) for i, word in enumerate(words))
        try:
            expected = exact / 2**1074
        except OverflowError:
            expected = math.inf if exact > 0 else -math.inf
        assert_same_bits(np.float64(round_sum(words.copy())), np.float64(expected), f"{trial}")
        carry(words)
        assert sum(int(word) << (32 * i) for i, word in enumerate(words)) == exact
        assert np.all((words[:67] >= 0) & (words[:67] < 2**32))


@pytest.mark.parametrize("counts, expected", [((1, 0, 0), math.nan), ((0, 3, 0), math.inf), ((0, 0, 2), -math.inf)])
def test_round_sum_of_what_is_not_finite(counts, expected):
    words = np.arange(WORDS)
    words[-5:] = *counts, 0, 0
    assert_same_bits(np.float64(round_sum(words)), np.float64(expected))
    words[-4:-2] = 1, 1
    assert np.isnan(round_sum(words))


def test_infinite_and_undefined_losses():
    logits = np.array([[-np.inf, 0], [0, 0], [np.nan, 0], [-np.inf, 0]], np.float32)
    labels = np.zeros(4, int)

    def summed(*rows, weights=None):
        rows = list(rows)
        return nl.cross_entropy(logits[rows], labels[rows], weights=weights, reduction="sum")

    assert summed(0, 1) == np.inf
    assert summed(0, 1, weights=[-1, 1]) == -np.inf
    assert np.isnan(summed(1, 2))
    assert np.isnan(summed(0, 2))
    assert np.isnan(summed(0, 3, weights=[1, -1]))
    assert nl.cross_entropy(logits[:2], labels[:2]) == np.inf
    result = nl.Evaluation().update(logits[:2], labels[:2]).result()
    assert result.loss == math.inf and result.perplexity == math.inf
    assert math.isnan(nl.Evaluation().update(logits, labels).result().loss)


def test_a_total_beyond_the_dtype():
    logits = np.array([[0, 3e38], [0, 3e38]], np.float32)
    assert nl.cross_entropy(logits, [0, 0], reduction="sum") == np.inf  # float32 ends at 3.4e38
    assert nl.cross_entropy(logits, [0, 0]) == np.float32(3e38)  # the quotient is taken before it is rounded


def test_many_equal_losses():
    """[6] 2^24 + 1 of them: a float32 total would stop at 2^24."""
    rows = 2**24 + 1
    logits = np.broadcast_to(np.zeros((1, 2), np.float32), (rows, 2))
    labels = np.broadcast_to(np.int8(0), (rows,))
    loss = np.float32(np.log(2))
    exact = float(Fraction(float(loss)) * rows)
    assert nl.cross_entropy(logits, labels) == loss
    assert nl.cross_entropy(logits, labels, reduction="sum") == np.float32(exact)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_many_half_precision_tokens(name):
    """[6] 1e5 of them; no loss or total is ever kept in half precision."""
    logits, labels = make_logits(100_000, 7, DTYPES[name]), make_labels(100_000, 7)
    assert_reductions(logits, labels)
    losses = nl.cross_entropy(logits, labels, reduction="none")
    assert np.unique(losses).size > 2**13  # more than half precision can tell apart in this range


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sequence_loss(dtype):
    logits, targets = make_logits(60, 9, dtype, scale=9).reshape(4, 15, 9), make_labels(60, 9).reshape(4, 15)
    weights = np.random.default_rng(0).standard_normal((4, 15))
    weights[1], weights[:, 3] = 0, 0
    terms = weights * nl.cross_entropy(logits, targets, reduction="none").astype(np.float64)

    def quotient(t, w):
        return math.fsum(t.ravel()) / math.fsum(w.ravel()) if np.any(w) else 0.0

    count = weights != 0
    off = {"average_across_timesteps": False, "average_across_batch": False}
    rows, steps = range(4), range(15)
    assert_same_bits(nl.sequence_loss(logits, targets, weights), dtype(quotient(terms, weights)))
    got = nl.sequence_loss(logits, targets, weights, average_across_batch=False)
    assert_same_bits(got, np.array([quotient(terms[b], weights[b]) for b in rows], dtype))
    got = nl.sequence_loss(logits, targets, weights, average_across_timesteps=False)
    assert_same_bits(got, np.array([quotient(terms[:, t], weights[:, t]) for t in steps], dtype))
    got = nl.sequence_loss(logits, targets, weights, **off, sum_over_timesteps=True, sum_over_batch=True)
    assert_same_bits(got, dtype(quotient(terms, count)))
    got = nl.sequence_loss(logits, targets, weights, **off, sum_over_timesteps=True)
    assert_same_bits(got, np.array([quotient(terms[b], count[b]) for b in rows], dtype))
    got = nl.sequence_loss(logits, targets, weights, **off, sum_over_batch=True)
    assert_same_bits(got, np.array([quotient(terms[:, t], count[:, t]) for t in steps], dtype))


# -- Evaluation ----------------------------------------------------------------------------------------------------


def expected_result(logits, labels, weights=None, ignore_index=-100):
    labels = np.asarray(labels)
    w = np.ones(labels.shape) if weights is None else np.asarray(weights, np.float64)
    keep = (labels != ignore_index) & (w != 0)
    w, x, y = w[keep], logits[keep], labels[keep]
    losses = nl.cross_entropy(x, y, reduction="none").astype(np.float64)
    hits = w[np.argmax(x, axis=-1) == y]
    weight = math.fsum(w)
    loss = math.fsum(w * losses) / weight
    return int(keep.sum()), weight, loss, math.fsum(hits) / weight, w, losses


def test_exponentials():
    """NumPy's differ between its releases and between processors."""
    x = np.random.default_rng(3).uniform(-745, 709.7, 4000)
    x[:2000] = np.linspace(-3, 12, 2000)
    exact = np.array([float(DECIMAL.exp(Decimal(v))) for v in x])
    got = exp(x)
    ulps = np.abs(got.view(np.int64) - exact.view(np.int64))
    assert ulps[x <= 660].max() <= 1 and ulps.max() <= 3
    assert_same_bits(exp(x[7]), got[7])
    special = [np.nan, np.inf, -np.inf, -0.0, 709.9, 1e9, -746]
    assert_same_bits(exp(special), np.array([np.nan, np.inf, 0, 1, np.inf, np.inf, 0]))


def assert_result(result, logits, labels, weights=None, ignore_index=-100):
    tokens, weight, loss, accuracy, w, losses = expected_result(logits, labels, weights, ignore_index)
    assert (result.tokens, result.weight, result.loss, result.accuracy) == (tokens, weight, loss, accuracy)
    assert all(type(value) is float for value in result[1:]) and type(result.tokens) is int
    assert result.perplexity == exp(loss)
    assert math.isclose(result.bits_per_token, loss / math.log(2), rel_tol=2 * 2.0**-52)
    if tokens > 1:
        squares = [Fraction(a) ** 2 * (Fraction(b) - Fraction(loss)) ** 2 for a, b in zip(w, losses, strict=True)]
        error = math.sqrt(sum(squares)) / weight * math.sqrt(tokens / (tokens - 1))
        # from exact sums of w^2 l^2, w^2 l and w^2, whose terms were rounded: they cancel when losses are alike
        scale = math.fsum(w * w * (losses * losses + loss * loss)) / weight**2 * tokens / (tokens - 1)
        assert abs(result.standard_error**2 - error**2) <= 8 * 2.0**-52 * (scale + error**2)
    else:
        assert math.isnan(result.standard_error)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_evaluation(dtype):
    logits, labels = make_logits(3000, 11, dtype), make_labels(3000, 11)
    assert_result(nl.Evaluation().update(logits, labels).result(), logits, labels)
    labels[::7] = -100
    assert_result(nl.Evaluation().update(logits, labels).result(), logits, labels)
    weights = np.random.default_rng(0).uniform(0, 3, 3000)
    weights[::5] = 0
    logits[::5] = np.nan  # not looked at
    assert_result(nl.Evaluation().update(logits, labels, weights).result(), logits, labels, weights)
    labels[::7] = 4
    result = nl.Evaluation(ignore_index=4).update(logits, labels, weights.astype(np.float32)).result()
    assert_result(result, logits, labels, weights.astype(np.float32), ignore_index=4)


@given(
    st.lists(st.integers(0, 60), max_size=6), st.permutations(range(7)), st.sampled_from(sorted(DTYPES)), st.booleans()
)
@settings(max_examples=60)
def test_any_split_order_and_merge(cuts, order, dtype, weighted):
    """[16] The same bits, and the same JSON."""
    logits, labels = make_logits(60, 5, DTYPES[dtype], scale=20), make_labels(60, 5)
    labels[::9] = -100
    weights = np.random.default_rng(0).exponential(size=60) if weighted else None
    whole = nl.Evaluation().update(logits, labels, weights)
    edges = [0, *sorted(cuts), 60]
    parts = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    parts = [parts[k] for k in order if k < len(parts)]
    streamed, merged = nl.Evaluation(), nl.Evaluation()
    for part in parts:
        arguments = logits[part], labels[part], None if weights is None else weights[part]
        assert streamed.update(*arguments) is streamed
        one = nl.Evaluation.from_json(nl.Evaluation().update(*arguments).to_json())
        assert merged.merge(one) is merged
    for other in (streamed, merged, nl.Evaluation.from_json(whole.to_json())):
        assert repr(other.result()) == repr(whole.result())
        assert json.loads(other.to_json()) == json.loads(whole.to_json())


def test_shapes_of_an_update():
    """Any shape, and dtypes may change between updates."""
    logits, labels = make_logits(24, 7), make_labels(24, 7)
    flat = nl.Evaluation().update(logits, labels)
    assert repr(nl.Evaluation().update(logits.reshape(2, 3, 4, 7), labels.reshape(2, 3, 4)).result()) == repr(
        flat.result()
    )
    single = nl.Evaluation()
    for x, y in zip(logits, labels.tolist(), strict=True):
        single.update(x, y)
    assert repr(single.result()) == repr(flat.result())
    mixed = nl.Evaluation().update(logits, labels).update(logits.astype(np.float64), labels)
    losses = [nl.cross_entropy(x, labels, reduction="none").tolist() for x in (logits, logits.astype(np.float64))]
    assert mixed.result().loss == math.fsum(losses[0] + losses[1]) / 48
    with pytest.raises(ValueError, match="targets"):
        flat.update(logits, labels[:-1])
    for bad in (np.ones(23), np.ones((24, 1)), -np.ones(24), np.full(24, np.nan), np.full(24, np.inf)):
        with pytest.raises(ValueError, match="weights"):
            flat.update(logits, labels, bad)


def test_a_failed_update_changes_nothing():
    logits, labels = make_logits(6, 4), make_labels(6, 4)
    state = nl.Evaluation().update(logits, labels)
    before = state.to_json()
    for bad in (4, -1, 2**40):
        with pytest.raises(ValueError):
            state.update(logits, np.array([0, 1, 2, 3, 0, bad]))
    assert state.to_json() == before


def test_no_tokens():
    for state in (nl.Evaluation(), nl.Evaluation().update(np.zeros((3, 2)), np.full(3, -100))):
        result = state.result()
        assert result.tokens == 0 and result.weight == 0
        for value in (result.loss, result.perplexity, result.bits_per_token, result.accuracy, result.standard_error):
            assert math.isnan(value)
    one = nl.Evaluation().update(np.zeros((1, 2)), [0]).result()
    assert one.tokens == 1 and one.loss == math.log(2) and math.isnan(one.standard_error)


def test_accuracy():
    """The first index of the maximum, as np.argmax; weighted."""
    logits = np.array([[1, 1, 0], [0, 2, 2], [3, 3, 3], [0, 0, 1]], np.float32)
    assert nl.Evaluation().update(logits, [0, 2, 0, 2]).result().accuracy == 0.75
    assert nl.Evaluation().update(logits, [0, 2, 0, 2], [1, 2, 1, 0]).result().accuracy == 0.5
    assert nl.Evaluation().update(logits, [1, 1, 1, 1]).result().accuracy == 0.25


def test_large_counts():
    """Merged with itself 40 times: sums of 2^40 times the size."""
    logits, labels = make_logits(50, 5), make_labels(50, 5)
    weights = np.random.default_rng(0).uniform(0.1, 9, 50)
    state = nl.Evaluation().update(logits, labels, weights)
    first = state.result()
    for _ in range(40):
        state.merge(nl.Evaluation.from_json(state.to_json()))
    result = state.result()
    assert result.tokens == 50 * 2**40
    assert result.weight == first.weight * 2**40
    assert (result.loss, result.accuracy) == (first.loss, first.accuracy)


def test_merge_leaves_the_other_alone():
    a, b = (nl.Evaluation().update(make_logits(5, 4, seed=k), make_labels(5, 4)) for k in (1, 2))
    before = b.to_json()
    a.merge(b)
    a.update(make_logits(5, 4), make_labels(5, 4))
    assert b.to_json() == before
    alone = nl.Evaluation().update(make_logits(5, 4), make_labels(5, 4))
    doubled = nl.Evaluation.from_json(alone.to_json()).merge(alone)
    assert repr(alone.merge(alone).result()) == repr(doubled.result())  # with itself


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"tokens": 1}', "not json", "1"])
def test_json_that_is_no_state(text):
    with pytest.raises(ValueError):
        nl.Evaluation.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(tokens=-1),
        lambda state: state.update(tokens="3"),
        lambda state: state.update({"numbaloss.Evaluation": 2}),
        lambda state: state["sums"].pop("weight"),
        lambda state: state["sums"]["loss"].update({"-1": 5}),
        lambda state: state["sums"]["loss"].update({"10000": 5}),
        lambda state: state["sums"]["loss"].update({"3": 1.5}),
        lambda state: state["sums"]["loss"].update({"3": 2**64}),
    ],
)
def test_json_that_was_changed(change):
    state = json.loads(nl.Evaluation().update(make_logits(3, 4), [0, 1, 2]).to_json())
    change(state)
    with pytest.raises(ValueError):
        nl.Evaluation.from_json(json.dumps(state))


def test_result_dtype_of_totals():
    for dtype in DTYPES.values():
        assert nl.cross_entropy(make_logits(3, 4, dtype), [0, 1, 2]).dtype == result_dtype(dtype)


def test_losses_whose_squares_overflow():
    x = np.array([[0.0, -1e300], [0.0, -3e300], [0.0, -1.0]])
    result = nl.Evaluation().update(x, [1, 1, 0]).result()
    assert result.loss == np.mean([1e300, 3e300, np.log1p(np.exp(-1))])
    assert result.standard_error == np.inf
