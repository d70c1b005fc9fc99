"""The softmax family against reference.py: shapes, dtypes, layouts, options, arguments, size.

[n]: a line of docs/PITFALLS.md. Accuracy is in test_exact.py, special values and labels in test_special.py.
"""

import itertools
import sys

import numpy as np
import pytest
import reference
from common import (
    BAR,
    DTYPES,
    Exporter,
    assert_close,
    assert_losses,
    assert_same_bits,
    layouts_for,
    loss_limit,
    make_labels,
    make_logits,
    none,
    result_dtype,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = [np.float32, np.float64]
INF, NAN = np.inf, np.nan


# -- random shapes, dtypes, layouts and special values ---------------------------------------------------------------


@st.composite
def problems(draw):
    """(logits, labels): logits in some layout, some of them special."""
    rows, classes = draw(st.integers(0, 5)), draw(st.sampled_from([5, 1, 2, 33, 130, 257, 300, 1025, 2100]))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    x = make_logits(rows, classes, dtype, draw(st.integers(0, 999)), draw(st.sampled_from([0.1, 4.0, 60.0, 1000.0])))
    labels = make_labels(rows, classes, draw(st.integers(0, 999)))
    for _ in range(draw(st.integers(0, 3)) if rows else 0):
        row = draw(st.integers(0, rows - 1))
        at = draw(
            st.sampled_from([0, classes - 1, int(labels[row]), slice(None, classes // 2), slice(classes // 2, None)])
        )
        x[row, at] = draw(st.sampled_from([NAN, INF, -INF, 6e4, -6e4, 0.0, -0.0]))
    layout = draw(st.sampled_from(["as is", *layouts_for(dtype)]))
    return x if layout == "as is" else layouts_for(dtype)[layout](x), labels


@given(problems())
@settings(max_examples=150)
def test_losses(problem):
    logits, labels = problem
    before = logits.copy()
    exact = reference.sparse_losses(logits, labels)
    losses = none(logits, labels)
    assert_losses(losses, logits, exact)
    assert_same_bits(nl.sparse_softmax_cross_entropy_with_logits(labels, logits), losses)
    assert_same_bits(nl.token_logprobs(logits, labels), 0 - losses)  # 0, not -0
    assert logits.tobytes() == before.tobytes()  # inputs are never written


@given(problems(), st.integers(0, 999), st.booleans())
@settings(max_examples=100)
def test_soft_labels(problem, seed, signed):
    logits, labels = problem
    soft = np.random.default_rng(seed).integers(-3 if signed else 0, 5, logits.shape) / 8
    soft = soft.astype(result_dtype(logits.dtype))
    exact, size = (reference.dense_losses(logits, soft, magnitude=m) for m in (False, True))
    got = nl.softmax_cross_entropy_with_logits(soft, logits)
    assert got.dtype == result_dtype(logits.dtype)
    assert_close(got, exact, np.max(loss_limit(size, logits.dtype), initial=BAR), size)


@given(problems())
@settings(max_examples=100)
def test_softmax_functions(problem):
    logits, _ = problem
    exact = reference.log_softmax(logits)
    limit = loss_limit(-exact, logits.dtype)
    assert_close(nl.log_softmax(logits), exact, limit, what="log_softmax")
    with np.errstate(invalid="ignore"):
        # half an ulp of a log-probability l moves exp(l) by |l| / 2 eps
        p, spread = np.exp(exact), np.where(np.isfinite(exact), np.abs(exact), 0)
    assert_close(nl.softmax(logits), p, limit + spread, what="softmax")
    lse = reference.logsumexp(logits)
    top = np.abs(reference.f64(logits)).max(axis=-1, initial=0)
    assert_close(nl.logsumexp(logits), lse, 2 * BAR, np.maximum(top, np.abs(lse)), what="logsumexp")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [3, 300, 1100, 9000])
def test_losses_that_are_too_small(classes, dtype):
    """A log-probability is 0 minus the loss as it is returned, which may be 0: it is never -0."""
    x = np.full((2, classes), -800 if dtype == np.float64 else -200, dtype)
    x[:, 1] = 0
    assert_same_bits(nl.score_tokens(x, [1, 1]).logprob, np.zeros(2, result_dtype(dtype)))
    assert_same_bits(nl.token_logprobs(x, [1, 1]), np.zeros(2, result_dtype(dtype)))


@given(problems())
@settings(max_examples=100)
def test_score_tokens(problem):
    logits, labels = problem
    got = nl.score_tokens(logits, labels, rank=True, entropy=True)
    logprob, lse, argmax, rank, entropy = reference.score_tokens(logits, labels)
    assert_same_bits(got.logprob, nl.token_logprobs(logits, labels))
    assert_same_bits(got.argmax, argmax)
    finite = ~np.isnan(logprob)  # a row with NaN has no order
    assert got.rank.dtype == np.int64
    assert_same_bits(got.rank[finite], rank[finite])
    top = np.abs(reference.f64(logits)).max(axis=-1, initial=0)
    assert_close(got.logsumexp, lse, 2 * BAR, np.maximum(top, np.abs(lse)), what="logsumexp")
    assert not np.any(got.entropy < 0)
    assert_close(got.entropy, entropy, loss_limit(entropy, logits.dtype) + BAR, what="entropy")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [3, 96, 300, 9000, 20_000])
def test_argmax_of_equal_logits(classes, dtype):
    """The first of equal ones, as np.argmax: -0 equals 0. The rank counts those strictly above."""
    for first, second in ((0, classes - 1), (1, 2), (classes // 2, classes - 1)):
        for a, b in ((0.0, -0.0), (-0.0, 0.0), (5.0, 5.0), (-np.inf, -np.inf)):
            x = np.full((1, classes), min(a, -1), dtype)
            x[0, first], x[0, second] = a, b
            score = nl.score_tokens(x, [second], rank=True)
            assert score.argmax[0] == np.argmax(x[0].astype(np.float64))
            assert score.rank[0] == 0


WEIGHTED = list(itertools.product([False, True], [False, True], [False, True], ["mean", "sum", "none"]))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("weighted, by_class, ignoring, reduction", WEIGHTED)
def test_weights_combined(weighted, by_class, ignoring, reduction, dtype):
    """[7] Class weights, token weights and ignore_index, alone and together."""
    logits, targets = make_logits(24, 7, dtype).reshape(4, 6, 7), make_labels(24, 7).reshape(4, 6)
    options = {}
    if weighted:
        options["weights"] = np.arange(24).reshape(4, 6) % 5 / 4
    if by_class:
        options["class_weights"] = np.array([0.5, 2, 0, 1.25, 1, 3, 0.75])
    if ignoring:
        options["ignore_index"] = 3
    exact, size = (
        reference.cross_entropy(logits, targets, **options, reduction=reduction, magnitude=m) for m in (False, True)
    )
    got = nl.cross_entropy(logits, targets, **options, reduction=reduction)
    assert got.dtype == dtype
    assert_close(got, exact, 2 * BAR, size)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted, by_class", list(itertools.product([False, True], repeat=2)))
def test_probability_targets(weighted, by_class, reduction, dtype):
    logits = make_logits(12, 7, dtype)
    targets = reference.softmax(make_logits(12, 7, dtype, seed=1)).astype(dtype)
    options = {}
    if weighted:
        options["weights"] = np.arange(12) % 5 / 4
    if by_class:
        options["class_weights"] = np.array([0.5, 2, 0, 1.25, 1, 3, 0.75])
    exact = reference.cross_entropy(logits, targets, **options, reduction=reduction)
    assert_close(nl.cross_entropy(logits, targets, **options, reduction=reduction), exact, 2 * BAR)


# -- arguments -------------------------------------------------------------------------------------------------------

KINDS = ["uint16", "int16", "int32", "int64", "bool", "complex64", "V2", "O", "longdouble", "U1", "M8[s]"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_wrong_kind(kind):
    """[15] bfloat16 that arrives as uint16 or two raw bytes is refused, never read as float16."""
    if kind == "longdouble" and np.dtype(kind) == np.float64:
        pytest.skip("long double is float64 here")
    logits = np.zeros((2, 3), kind)
    for call in (
        lambda: none(logits, [0, 1]),
        lambda: nl.sparse_softmax_cross_entropy_with_logits([0, 1], logits),
        lambda: nl.softmax_cross_entropy_with_logits(np.ones((2, 3)), logits),
        lambda: nl.token_logprobs(logits, [0, 1]),
        lambda: nl.score_tokens(logits, [0, 1]),
        lambda: nl.softmax(logits),
        lambda: nl.log_softmax(logits),
        lambda: nl.logsumexp(logits),
    ):
        with pytest.raises(TypeError, match="logits"):
            call()


def test_lists_of_logits_are_refused():
    with pytest.raises(TypeError, match="logits"):
        none([[1.0, 2.0]], [0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dlpack(dtype):
    x, y = make_logits(4, 6, dtype), make_labels(4, 6)
    assert_same_bits(none(Exporter(x), Exporter(y)), none(x, y))
    assert_same_bits(nl.softmax(Exporter(x.T), axis=0), nl.softmax(x.T, axis=0))
    with pytest.raises(TypeError, match="logits"):
        none(Exporter(y), y)


def test_one_weight_for_all():
    x, y = make_logits(40, 6), make_labels(40, 6)
    for reduction in ("none", "sum", "mean"):
        every = nl.cross_entropy(x, y, weights=np.full(40, 0.3), reduction=reduction)
        assert_same_bits(nl.cross_entropy(x, y, weights=0.3, reduction=reduction), every)
    assert nl.cross_entropy(x, y, weights=0, reduction="sum") == 0


def test_dtypes_and_scalars():
    for dtype in DTYPES.values():
        kind = result_dtype(dtype).type
        logits = make_logits(2, 3, dtype)
        for value in (
            nl.cross_entropy(logits, [0, 1]),
            nl.cross_entropy(logits, [0, 1], reduction="sum"),
            nl.sparse_softmax_cross_entropy_with_logits(1, logits[0]),
            nl.softmax_cross_entropy_with_logits([0, 0, 1], logits[0]),
            nl.token_logprobs(logits[0], np.int8(2)),
            nl.logsumexp(logits[0]),
            none(logits[0], 2),
        ):
            assert type(value) is kind
        assert nl.softmax(logits).dtype == kind and nl.log_softmax(logits).dtype == kind
        score = nl.score_tokens(logits, [0, 1])
        assert score.rank is None and score.entropy is None
        assert score.argmax.dtype == np.int64 and score.logprob.dtype == score.logsumexp.dtype == kind


@pytest.mark.parametrize("axis", [-1, -2, -3, 0, 1, 2])
def test_axis(axis):
    logits = make_logits(6, 4).reshape(2, 3, 4)
    labels = make_labels(24, min(logits.shape)).reshape(2, 3, 4).take(0, axis)
    last = np.ascontiguousarray(np.moveaxis(logits, axis, -1))
    assert_same_bits(none(logits, labels, axis=axis), none(last, labels))
    assert_same_bits(nl.token_logprobs(logits, labels, axis=axis), nl.token_logprobs(last, labels))
    assert_same_bits(nl.score_tokens(logits, labels, axis=axis), nl.score_tokens(last, labels))
    assert_same_bits(nl.softmax(logits, axis=axis), np.moveaxis(nl.softmax(last), -1, axis))
    assert_same_bits(nl.log_softmax(logits, axis=axis), np.moveaxis(nl.log_softmax(last), -1, axis))
    assert_same_bits(nl.logsumexp(logits, axis=axis), nl.logsumexp(last))
    kept = nl.logsumexp(logits, axis=axis, keepdims=True)
    assert_same_bits(kept, np.expand_dims(nl.logsumexp(last), axis))
    dense = nl.softmax_cross_entropy_with_logits(logits, logits, axis=axis)
    assert_same_bits(dense, nl.softmax_cross_entropy_with_logits(last, last))
    assert_same_bits(nl.softmax_cross_entropy_with_logits(logits, logits, dim=axis), dense)
    for bad in (3, -4):
        with pytest.raises(ValueError, match="axis"):
            nl.softmax(logits, axis=bad)


def test_shapes_that_do_not_fit():
    logits = np.zeros((2, 3, 4), np.float32)
    for shape in ((3, 2), (6,), (2, 1), (1, 3), (2, 3, 1), ()):
        labels = np.zeros(shape, int)
        with pytest.raises(ValueError, match="labels"):
            nl.sparse_softmax_cross_entropy_with_logits(labels, logits)
        with pytest.raises(ValueError, match="targets"):
            none(logits, labels)
    for name, shape in (("weights", (3, 2)), ("weights", (1, 3)), ("class_weights", (3,)), ("class_weights", (1,))):
        with pytest.raises(ValueError, match=name):
            none(logits, np.zeros((2, 3), int), **{name: np.ones(shape)})
    with pytest.raises(ValueError, match="reduction"):
        nl.cross_entropy(logits, np.zeros((2, 3), int), reduction="average")
    with pytest.raises(ValueError, match="check_labels"):
        nl.cross_entropy(logits, np.zeros((2, 3), int), check_labels="wrap")
    for ignored in (1, -100):
        with pytest.raises(ValueError, match="ignore_index"):
            nl.cross_entropy(logits, np.ones((2, 3, 4), np.float32), ignore_index=ignored)


# -- size and compilation --------------------------------------------------------------------------------------------


def test_more_than_two_to_the_31_logits():
    """[13] One row seen 50,000 times."""
    row = make_logits(1, 50257)
    rows = 50_000
    logits = np.broadcast_to(row, (rows, 50257))
    assert logits.size > 2**31 and logits.size * 4 > 2**32
    labels = np.arange(rows) % 50257
    got = none(logits, labels)
    some = np.concatenate([np.arange(9), np.arange(42_700, 42_750), np.arange(rows - 9, rows)])  # 2^31 / 50257 = 42,730
    assert_same_bits(got[some], none(np.repeat(row, len(some), axis=0), labels[some]))


@pytest.mark.skipif(sys.platform == "win32", reason="needs memory that is promised but never touched")
@pytest.mark.parametrize("classes, apart, along", [(6, 2**28, 0), (6, 2**28, 1), (300, 2**28, 0), (300, 2**22, 1)])
def test_strides_beyond_32_bits(classes, apart, along):
    """[13] Rows, or classes, so far apart that offsets need more than 32 bits."""
    values = make_logits(6, classes)
    try:
        store = np.zeros(apart * (values.shape[along] - 1) + 300, np.float32)  # pages of zeros until they are written
    except MemoryError:
        pytest.skip("no 5 GiB of address space")
    strides = (4 * apart, 4) if along == 0 else (4, 4 * apart)
    view = np.lib.stride_tricks.as_strided(store, values.shape, strides)
    view[...] = values
    assert strides[along] * (values.shape[along] - 1) > 2**32
    labels = make_labels(6, classes)
    assert_same_bits(none(view, labels), none(values, labels))
    assert_same_bits(nl.score_tokens(view, labels), nl.score_tokens(values, labels))
    assert_same_bits(nl.softmax(view), nl.softmax(values))


def test_no_compilation_for_a_shape():
    """[17] What is compiled depends on dtypes alone."""

    def run(rows, classes):
        for x in (make_logits(rows, classes), make_logits(rows, classes)[:, ::-1], make_logits(classes, rows).T):
            labels = make_labels(rows, classes)
            nl.cross_entropy(x, labels)
            nl.sparse_softmax_cross_entropy_with_logits(labels.astype(np.int32), x)
            nl.softmax_cross_entropy_with_logits(x, x)
            nl.score_tokens(x, labels, rank=True, entropy=True)
            nl.softmax(x), nl.log_softmax(x), nl.logsumexp(x)

    run(3, 5), run(40, 5), run(2, 9000), run(40, 9000), run(5000, 10)  # serial and parallel, by chunks and by rows
    before = signatures()
    assert before
    for shape in ((1, 1), (7, 130), (100, 1000), (3, 20_000), (70, 8193), (20_000, 3)):
        run(*shape)
    assert signatures() == before


def signatures():
    """How many times each kernel has been compiled in this process."""
    found = {}
    for module in [m for name, m in sys.modules.items() if name.startswith("numbaloss.cpu.")]:
        for name, kernel in vars(module).items():
            for form in ("serial", "parallel"):
                if hasattr(getattr(kernel, form, None), "signatures"):
                    found[module.__name__, name, form] = len(getattr(kernel, form).signatures)
    return found
