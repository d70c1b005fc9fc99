"""Special values, labels of every kind, rows that do not count, empty shapes: the softmax family.

[n]: a line of docs/PITFALLS.md; what a special value means is docs/NUMERICS.md, section 5.
"""

import itertools

import numpy as np
import pytest
import reference
from common import (
    BAR,
    DTYPES,
    assert_close,
    assert_losses,
    assert_same_bits,
    loss_limit,
    make_labels,
    make_logits,
    none,
    positive_zero,
    result_dtype,
)

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = [np.float32, np.float64]
INF, NAN = np.inf, np.nan


# -- special values --------------------------------------------------------------------------------------------------

BOUNDARIES = [1, 2, 7, 8, 9, 16, 31, 32, 33, 64, 96, 97, 128, 1023, 1024, 1025, 2048, 3072, 4096, 8191, 8192, 8193]
BOUNDARIES += [9216, 16384]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [10, 90, 130, 1100, 8200, 17000])
def test_blocks_of_minus_infinity(classes, dtype):
    """[1] -inf in [0, k) and in [k, V): a whole vector, lane, tile or chunk."""
    edges = [k for k in BOUNDARIES if k < classes] + [classes - 1]
    base = make_logits(1, classes, dtype, seed=classes)[0]
    rows, labels = [], []
    for k in edges:
        for left in (True, False):
            row = base.copy()
            row[slice(0, k) if left else slice(k, None)] = -INF
            finite = (k, classes - 1) if left else (0, k - 1)
            for label in (*finite, 0 if left else classes - 1):  # the last one is at -inf
                rows.append(row)
                labels.append(label)
    rows, labels = np.array(rows), np.array(labels)
    exact = reference.sparse_losses(rows, labels)
    assert np.isinf(exact).sum() == len(rows) // 3 and not np.isnan(exact).any()
    assert_losses(none(rows, labels), rows, exact)
    assert_close(nl.logsumexp(rows), reference.logsumexp(rows), 2 * BAR, np.abs(reference.f64(base)).max() + 10)
    soft = np.where(np.arange(classes) == labels[:, None], 1, 0).astype(np.float32)
    assert_close(nl.softmax_cross_entropy_with_logits(soft, rows), exact, loss_limit(exact, dtype), what="soft labels")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [1, 5, 96, 97, 1100, 8200])
def test_rows_without_a_softmax(classes, dtype):
    """[1, 2] All -inf, one NaN, one +inf: NaN, whatever the target; the rows around them keep their bits."""
    good = make_logits(2, classes, dtype)
    spots = sorted({0, 1 % classes, 3 % classes, classes // 2, classes - 1})
    bad = [np.full(classes, -INF, dtype)]
    for spot, value in itertools.product(spots, (NAN, -NAN, INF)):
        bad.append(good[0].copy())
        bad[-1][spot] = value
        bad.append(np.full(classes, -INF, dtype))
        bad[-1][spot] = value
        bad.append(bad[-1].copy())
        bad[-1][spots[0] if spot else spots[-1]] = value if classes == 1 else 5  # one number beside it
    for label in spots:
        rows = np.array([good[0], *bad, good[1]])
        labels = np.full(len(rows), label)
        losses = none(rows, labels)
        assert np.isnan(losses[1:-1]).all(), f"label {label}: rows {np.flatnonzero(~np.isnan(losses[1:-1]))} of {bad}"
        assert_same_bits(losses[[0, -1]], none(good, labels[:2]))
        soft = np.where(np.arange(classes) == labels[:, None], 1, 0).astype(np.float32)
        dense = nl.softmax_cross_entropy_with_logits(soft, rows)
        assert np.isnan(dense[1:-1]).all() and np.isfinite(dense[[0, -1]]).all()
        score = nl.score_tokens(rows, labels, rank=True, entropy=True)
        assert np.isnan(score.logprob[1:-1]).all() and np.isnan(score.entropy[1:-1]).all()
        assert score.argmax.tolist() == [int(np.argmax(row.astype(np.float64))) for row in rows]
    assert np.isnan(nl.softmax(np.array(bad))).all()
    assert np.isnan(nl.log_softmax(np.array(bad))).all()


def test_soft_labels_at_minus_infinity():
    """[5] A label of exactly 0 adds 0, also at -inf; any other there is infinite."""
    logits = np.array([[1, -INF, 2], [1, -INF, 2], [1, -INF, 2], [-INF, -INF, 5]], np.float32)
    labels = np.array([[1, 0, 0], [0.5, 0.25, 0.25], [0, -1, 0.5], [-0.0, 0, 1]], np.float32)
    got = nl.softmax_cross_entropy_with_logits(labels, logits)
    assert_close(got, [np.log1p(np.exp(1)), INF, -INF, 0])
    assert_close(nl.cross_entropy(logits[[0, 3]], labels[[0, 3]], reduction="none"), [np.log1p(np.exp(1)), 0])


def test_soft_labels_of_any_sum():
    """[5] TensorFlow's definition: sum of l (lse - x)."""
    logits = np.array([[1, 2, 3]], np.float32)
    for labels in ([1.0, 1, 1], [0, 0, 0], [-1, 0, 2.5], [0.1, 0.1, 0.1]):
        labels = np.array([labels], np.float32)
        exact, size = (reference.dense_losses(logits, labels, magnitude=m) for m in (False, True))
        assert_close(nl.softmax_cross_entropy_with_logits(labels, logits), exact, BAR, size)


@pytest.mark.parametrize("labels_shape", [(4,), (1, 4), (3, 1), (1, 1), (3, 4), (2, 1, 4), (2, 3, 1), ()])
def test_soft_labels_broadcast(labels_shape):
    logits = make_logits(6, 4).reshape(2, 3, 4)
    labels = np.random.default_rng(0).integers(0, 5, labels_shape) / np.float32(4)
    assert_close(nl.softmax_cross_entropy_with_logits(labels, logits), reference.dense_losses(logits, labels))
    for bad in ((5,), (2, 4), (1, 2, 3, 4), (5, 2, 3, 4)):
        with pytest.raises(ValueError, match="labels"):
            nl.softmax_cross_entropy_with_logits(np.ones(bad, np.float32), logits)


# -- labels ----------------------------------------------------------------------------------------------------------

BAD = {
    "int8": [5, -1, -101, 127, -128],
    "uint8": [5, 255],
    "int16": [5, -1, 2**15 - 1],
    "uint16": [5, 2**16 - 1],
    "int32": [5, -1, 2**31 - 1, -(2**31)],
    "uint32": [5, 2**31, 2**32 - 1],
    "int64": [5, -1, -101, 2**31, 2**32, 2**32 + 3, 2**63 - 1, -(2**63)],
    "uint64": [5, 2**31, 2**32 + 3, 2**63, 2**63 + 3, 2**64 - 100, 2**64 - 1],
}


@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("label_dtype", BAD)
def test_labels_out_of_range(label_dtype, classes):
    """[8] 2^32 + 3 is 3 in int32, 2^64 - 100 is -100 in int64: neither is read, nor ignored."""
    logits = make_logits(4, classes)
    for value in BAD[label_dtype]:
        value = classes if value == 5 else value
        if not 0 <= value < classes:
            labels = np.array([1, 2, 0, 4]).astype(label_dtype)
            good = none(logits, labels)
            labels[2] = np.array(value).astype(label_dtype) if value <= np.iinfo(label_dtype).max else labels[2]
            if labels[2] == 0:
                continue
            for call in (
                lambda y, **o: none(logits, y, **o),
                lambda y, **o: nl.sparse_softmax_cross_entropy_with_logits(y, logits, **o),
                lambda y, **o: nl.token_logprobs(logits, y, **o),
                lambda y, **o: nl.score_tokens(logits, y, **o).logprob,
            ):
                for check in ({}, {"check_labels": "raise"}):
                    with pytest.raises(ValueError, match=rf"\[0, {classes}\), got {int(value)} at position \(2,\)"):
                        call(labels, **check)
                got = call(labels, check_labels="nan")
                assert np.isnan(got[2])
                assert_same_bits(np.abs(got[[0, 1, 3]]), good[[0, 1, 3]], f"beside {value}")
            score = nl.score_tokens(logits, labels, rank=True, entropy=True, check_labels="nan")
            assert np.isnan(score.logsumexp[2]) and np.isnan(score.entropy[2])
            assert score.argmax[2] == -1 and score.rank[2] == -1
            assert np.isnan(nl.cross_entropy(logits, labels, check_labels="nan"))


def test_first_bad_label_is_named():
    logits = np.zeros((3, 4, 5), np.float32)
    labels = np.zeros((3, 4), np.int64)
    labels[1, 2], labels[2, 0] = 17, 99
    with pytest.raises(ValueError, match=r"targets: .*\[0, 5\), got 17 at position \(1, 2\)"):
        none(logits, labels)


@pytest.mark.parametrize("label_dtype", BAD)
def test_label_dtypes(label_dtype):
    """[11] Any width, slices at odd addresses, any order and byte order."""
    logits = make_logits(12, 9).reshape(3, 4, 9)
    labels = make_labels(12, 9).reshape(3, 4)
    expected = none(logits, labels)
    typed = labels.astype(label_dtype)
    shifted = np.empty(typed.nbytes + 1, np.uint8)[1:].view(label_dtype).reshape(3, 4)
    shifted[...] = typed
    layouts = [
        typed,
        np.asfortranarray(typed),
        shifted,
        np.repeat(typed, 2, axis=1)[:, ::2],
        typed[:, ::-1].copy()[:, ::-1],
    ]
    layouts += [typed.astype(typed.dtype.newbyteorder(">")), typed.tolist()]
    for layout in layouts:
        assert_same_bits(none(logits, layout), expected)
        assert_same_bits(nl.sparse_softmax_cross_entropy_with_logits(layout, logits), expected)
    same = np.broadcast_to(typed[:1, :1], (3, 4))
    assert_same_bits(none(logits, same), none(logits, np.full((3, 4), labels[0, 0])))


@pytest.mark.parametrize("labels", [np.array([True, False]), np.array([1.0, 0.0]), np.array(["a", "b"]), [0.5, 1]])
def test_labels_of_the_wrong_kind(labels):
    logits = np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match="labels"):
        nl.sparse_softmax_cross_entropy_with_logits(labels, logits)
    with pytest.raises(TypeError, match="targets"):
        nl.token_logprobs(logits, labels)
    with pytest.raises((TypeError, ValueError), match="targets"):  # float targets of this shape may be probabilities
        nl.cross_entropy(logits, labels)


def test_class_weights_of_an_ignored_label_are_not_read():
    """[8]"""
    logits = make_logits(4, 3)
    for ignored in (-100, -1, 3, 255, 10**9, -(10**12)):
        labels = np.array([0, ignored, 2, ignored])
        got = nl.cross_entropy(logits, labels, class_weights=[1, 2, 3], ignore_index=ignored, reduction="none")
        assert got[1] == 0 and got[3] == 0
        expected = nl.cross_entropy(logits[::2], labels[::2], class_weights=[1, 2, 3], reduction="none")
        assert_same_bits(got[::2], expected)


def test_ignore_index():
    """Any integer of 64 bits; each hides its label only."""
    logits = make_logits(3, 5)
    losses = none(logits, [0, 1, 2])
    for ignored in (1, np.int8(1), 255, -(2**63), 2**63 - 1, np.uint64(7)):
        expected = np.where(np.arange(3) == ignored, 0, losses)
        assert_same_bits(none(logits, [0, 1, 2], ignore_index=ignored), expected)
    for bad in (2**63, 2**64 - 1, -(2**63) - 1, 2**70):
        with pytest.raises(ValueError, match="ignore_index"):
            none(logits, [0, 1, 2], ignore_index=bad)
    for bad in (1.0, None, "1", [1]):
        with pytest.raises(TypeError, match="ignore_index"):
            none(logits, [0, 1, 2], ignore_index=bad)


# -- rows that do not count, empty shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [4, 200, 9000])
def test_rows_that_do_not_count(classes, dtype):
    """A weight of 0, and ignore_index: the row is not looked at, whatever it and its label hold."""
    logits, labels = make_logits(6, classes, dtype), make_labels(6, classes)
    logits[1], logits[2, 0], logits[4] = NAN, INF, -INF
    weights = np.array([1, 0, -0.0, 2, 0, 1], np.float32)
    labels[[1, 2, 4]] = (2**40, -7, 10**15)
    good = [0, 3, 5]
    expected = none(logits[good], labels[good], weights=weights[good])
    got = none(logits, labels, weights=weights)
    assert_same_bits(got[good], expected)
    assert np.all(positive_zero(got[[1, 2, 4]]))
    for reduction in ("mean", "sum"):
        alone = nl.cross_entropy(logits[good], labels[good], weights=weights[good], reduction=reduction)
        assert_same_bits(nl.cross_entropy(logits, labels, weights=weights, reduction=reduction), alone)
    labels[[1, 2, 4]] = 77777
    got = nl.score_tokens(logits, labels, rank=True, entropy=True, ignore_index=77777)
    for field, value in zip(got, (0, 0, -1, -1, 0), strict=True):
        assert np.all(field[[1, 2, 4]] == value)
    assert_same_bits(got.logprob[good], nl.token_logprobs(logits[good], labels[good]))


@pytest.mark.parametrize("dtype", BOTH)
def test_divisor(dtype):
    """[9] The sum of the weights that count; 0 / 0 is NaN."""
    logits, labels = make_logits(4, 3, dtype), np.array([0, -100, 2, 1])
    losses = none(logits, labels).astype(np.float64)
    mean = nl.cross_entropy(logits, labels, weights=[2, 5, 0, 1])
    assert_close(mean, (2 * losses[0] + losses[3]) / 3)
    mean = nl.cross_entropy(logits, labels, class_weights=[2, 1, 4])
    assert_close(mean, (2 * losses[0] + 4 * losses[2] + losses[3]) / 7)
    assert np.isnan(nl.cross_entropy(logits, np.full(4, -100)))
    assert np.isnan(nl.cross_entropy(logits, labels, weights=np.zeros(4)))
    assert nl.cross_entropy(logits, np.full(4, -100), reduction="sum") == 0
    assert nl.cross_entropy(logits, labels, weights=np.zeros(4), reduction="sum") == 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_rows_and_one_class(dtype):
    """[9]"""
    for shape in ((0, 3), (2, 0, 3), (0, 1)):
        logits, labels = np.zeros(shape, dtype), np.zeros(shape[:-1], int)
        assert none(logits, labels).shape == shape[:-1]
        assert none(logits, labels).dtype == result_dtype(dtype)
        assert np.isnan(nl.cross_entropy(logits, labels))
        assert nl.cross_entropy(logits, labels, reduction="sum") == 0
        assert nl.softmax(logits).shape == shape
        assert nl.log_softmax(logits).shape == shape
        assert nl.logsumexp(logits, keepdims=True).shape == (*shape[:-1], 1)
        assert nl.score_tokens(logits, labels).argmax.shape == shape[:-1]
    nothing = np.zeros((0, 3), dtype)
    assert nl.sparse_softmax_cross_entropy_with_logits([], nothing).shape == (0,)  # an empty list has no dtype
    assert np.isnan(nl.cross_entropy(nothing, [], weights=[]))
    one = make_logits(3, 1, dtype, scale=1000)
    assert np.all(positive_zero(none(one, [0, 0, 0])))
    assert np.all(nl.softmax(one) == 1)
    assert np.all(nl.log_softmax(one) == 0)
    assert_same_bits(nl.logsumexp(one), one[:, 0].astype(result_dtype(dtype)))
    assert np.all(np.isnan(none(np.array([[NAN], [INF], [-INF]], dtype), [0, 0, 0])))


def test_no_classes():
    """[9]"""
    logits, labels = np.zeros((2, 0), np.float32), np.zeros(2, int)
    for call in (
        lambda: none(logits, labels),
        lambda: nl.sparse_softmax_cross_entropy_with_logits(labels, logits),
        lambda: nl.softmax_cross_entropy_with_logits(logits, logits),
        lambda: nl.token_logprobs(logits, labels),
        lambda: nl.score_tokens(logits, labels),
        lambda: nl.softmax(logits),
        lambda: nl.log_softmax(logits),
        lambda: nl.logsumexp(logits),
    ):
        with pytest.raises(ValueError, match="logits"):
            call()
