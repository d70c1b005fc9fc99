"""Dask arrays: the bits that the same functions give of the whole array, whatever the chunks and the workers."""

import itertools

import numpy as np
import pytest
from common import DTYPES, assert_same_bits, make_labels, make_logits

dask = pytest.importorskip("dask", reason="Dask is not installed")
import dask.array as da  # noqa: E402

import numbaloss as nl  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

N, T, V = 6, 7, 40
CHUNKS = [(6, 7, 40), (2, 3, 40), ((1, 5), (4, 3), 17), (1, 7, 40)]
rng = np.random.default_rng(0)
X, Q = (make_logits(N * T, V, seed=s).reshape(N, T, V) for s in (0, 1))
Y = make_labels(N * T, V).reshape(N, T)
Y[0, ::2] = -100
W = rng.integers(0, 4, (N, T)) / 3
C = rng.integers(0, 4, V) / 3
P = rng.random((N, T, V), dtype=np.float32)
Z = rng.integers(0, 2, (N, T, V)).astype(np.float32)
FLAGS = [f for f in itertools.product((True, False), repeat=4) if not (f[0] and f[2] or f[1] and f[3])]
FLAGS = [f for f in FLAGS if not (f[0] and f[3] or f[1] and f[2])]
NAMES = "average_across_timesteps", "average_across_batch", "sum_over_timesteps", "sum_over_batch"

CALLS = {  # of logits, other logits, labels, weights, probabilities, zeros and ones
    "sparse": lambda x, q, y, w, p, z: nl.sparse_softmax_cross_entropy_with_logits(y, x, check_labels="nan"),
    "mean": lambda x, q, y, w, p, z: nl.cross_entropy(x, y),
    "sum": lambda x, q, y, w, p, z: nl.cross_entropy(x, y, weights=w, reduction="sum"),
    "weighted mean": lambda x, q, y, w, p, z: nl.cross_entropy(x, y, weights=w, class_weights=C),
    "none": lambda x, q, y, w, p, z: nl.cross_entropy(x, y, weights=w, class_weights=C, reduction="none"),
    "a number": lambda x, q, y, w, p, z: nl.cross_entropy(x, y, weights=1 / 3, reduction="sum"),
    "options": lambda x, q, y, w, p, z: nl.cross_entropy(
        x,
        y,
        weights=w,
        class_weights=C,
        label_smoothing=0.1,
        z_loss=0.01,
        softcap=5.0,
        temperature=1.5,
        ignore_index=3,
        check_labels="nan",
    ),
    "dense mean": lambda x, q, y, w, p, z: nl.cross_entropy(x, p, weights=w, class_weights=C),
    "dense none": lambda x, q, y, w, p, z: nl.cross_entropy(x, p, reduction="none"),
    "focal": lambda x, q, y, w, p, z: nl.focal_loss(x, y, gamma=1.5, weights=w),
    "dense": lambda x, q, y, w, p, z: nl.softmax_cross_entropy_with_logits(p, x),
    "one label for all": lambda x, q, y, w, p, z: nl.softmax_cross_entropy_with_logits(P[0, 0], x),
    "logprobs": lambda x, q, y, w, p, z: nl.token_logprobs(x, y),
    "scores": lambda x, q, y, w, p, z: nl.score_tokens(x, y),
    "all scores": lambda x, q, y, w, p, z: nl.score_tokens(x, y, rank=True, entropy=True),
    "softmax": lambda x, q, y, w, p, z: nl.softmax(x),
    "log_softmax": lambda x, q, y, w, p, z: nl.log_softmax(x),
    "logsumexp": lambda x, q, y, w, p, z: nl.logsumexp(x),
    "keepdims": lambda x, q, y, w, p, z: nl.logsumexp(x, keepdims=True),
    "sigmoid": lambda x, q, y, w, p, z: nl.sigmoid_cross_entropy_with_logits(z, x),
    "weighted": lambda x, q, y, w, p, z: nl.weighted_cross_entropy_with_logits(z, x, 2.5),
    "weighted by class": lambda x, q, y, w, p, z: nl.weighted_cross_entropy_with_logits(z, x, C),
    "sigmoid focal": lambda x, q, y, w, p, z: nl.sigmoid_focal_cross_entropy_with_logits(z, x, alpha=0.25),
    "kl": lambda x, q, y, w, p, z: nl.kl_divergence(x, q, weights=w),
    "kl none": lambda x, q, y, w, p, z: nl.kl_divergence(x, q, weights=w, reduction="none"),
    "js": lambda x, q, y, w, p, z: nl.js_divergence(x, q, reduction="sum"),
    "sequence of probabilities": lambda x, q, y, w, p, z: nl.sequence_loss(x, p, w),
    "sequence of a function": lambda x, q, y, w, p, z: nl.sequence_loss(
        x, np.maximum(y, 0), w, softmax_loss_function=nl.sparse_softmax_cross_entropy_with_logits
    ),
    **{
        f"sequence {flags}": lambda x, q, y, w, p, z, flags=flags: nl.sequence_loss(x, np.maximum(y, 0), w, *flags)
        for flags in FLAGS
    },
}
ARRAYS = X, Q, Y, W, P, Z


def in_chunks(chunks, *arrays):
    return [da.from_array(a, chunks=chunks[: a.ndim]) for a in arrays]


def computed(lazy):
    if isinstance(lazy, tuple):
        assert all(x is None or isinstance(x, da.Array) for x in lazy)
        return tuple(x for x in dask.compute(*lazy, scheduler="synchronous") if x is not None)
    assert isinstance(lazy, da.Array)
    result = lazy.compute(scheduler="synchronous")
    assert (np.shape(result), result.dtype) == (lazy.shape, lazy.dtype)
    return result


def fields(result):
    return tuple(x for x in result if x is not None) if isinstance(result, tuple) else result


def check(call, arrays, lazy):
    want, got = fields(call(*arrays)), computed(call(*lazy))
    for a, b in zip(want, got) if isinstance(want, tuple) else [(want, got)]:
        assert (np.shape(a), a.dtype) == (np.shape(b), b.dtype)
        assert_same_bits(np.asarray(b), np.asarray(a))


@pytest.mark.parametrize("name", CALLS)
def test_same_bits(name):
    for chunks in CHUNKS:
        check(CALLS[name], ARRAYS, in_chunks(chunks, *ARRAYS))
    lazy = in_chunks(CHUNKS[1], X)
    check(CALLS[name], ARRAYS, [*lazy, *ARRAYS[1:]])  # the others in memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    arrays = X.astype(DTYPES[dtype]), Q.astype(DTYPES[dtype]), *ARRAYS[2:]
    for name in ("weighted mean", "all scores", "softmax", "kl", "sigmoid"):
        check(CALLS[name], arrays, in_chunks(CHUNKS[2], *arrays))


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_axis(axis):
    """Classes that lie in pieces along another axis."""
    x, q, p = (np.moveaxis(a, -1, axis) for a in (X, Q, P))
    arrays = x, q, Y, W, p, None
    calls = {
        "mean": lambda x, q, y, w, p, z: nl.cross_entropy(x, y, weights=w, axis=axis),
        "none": lambda x, q, y, w, p, z: nl.cross_entropy(x, y, axis=axis, reduction="none"),
        "dense mean": lambda x, q, y, w, p, z: nl.cross_entropy(x, p, axis=axis),
        "dense": lambda x, q, y, w, p, z: nl.softmax_cross_entropy_with_logits(p, x, axis),
        "dim": lambda x, q, y, w, p, z: nl.softmax_cross_entropy_with_logits(p, x, dim=axis),
        "softmax": lambda x, q, y, w, p, z: nl.softmax(x, axis),
        "logsumexp": lambda x, q, y, w, p, z: nl.logsumexp(x, axis, keepdims=True),
        "kl": lambda x, q, y, w, p, z: nl.kl_divergence(x, q, axis=axis),
        "scores": lambda x, q, y, w, p, z: nl.score_tokens(x, y, axis=axis, rank=True),
    }
    x, q, p = (da.from_array(a, chunks=4) for a in (x, q, p))
    for call in calls.values():
        check(call, arrays, (x, q, *in_chunks((2, 3), Y, W), p, None))


@pytest.mark.parametrize("shape", [(V,), (0, V), (3, 0, V), (1, V)])
def test_few_rows(shape):
    rows = shape[:-1]
    arrays = np.zeros(shape), np.ones(shape), np.zeros(rows, int), np.ones(rows), np.ones(shape), np.ones(shape)
    for name in ("mean", "sum", "none", "dense mean", "scores", "softmax", "kl", "sigmoid", "focal"):
        check(lambda *a, name=name: CALLS[name](*a[:3], None, *a[4:]), arrays, [da.asarray(a) for a in arrays])


def test_in_memory_logits():
    check(CALLS["weighted mean"], ARRAYS, [X, Q, *in_chunks((2, 3), Y, W), P, Z])
    check(CALLS["sigmoid"], ARRAYS, [X, Q, Y, W, P, *in_chunks((2, 3, 5), Z)])


def test_schedulers():
    """Threads whose kernels run at once, and processes, which get the functions by name."""
    x, y, w = in_chunks((1, 2, V), X, Y, W)
    for scheduler in ("threads", "processes"):
        with dask.config.set(scheduler=scheduler, num_workers=2):
            for call in (nl.cross_entropy, nl.focal_loss, lambda x, y, weights: nl.score_tokens(x, y).logprob):
                assert_same_bits(np.asarray(call(x, y, weights=w).compute()), np.asarray(call(X, Y, weights=W)))
            got = nl.Evaluation().update(x, y, w).to_json()
            assert got == nl.Evaluation().update(X, Y, W).to_json()


@pytest.mark.parametrize("chunks", CHUNKS)
def test_evaluation(chunks):
    """At once, with the state that one batch would leave."""
    want = nl.Evaluation().update(X, Y, W).update(Q, Y)
    with dask.config.set(scheduler="synchronous"):
        got = nl.Evaluation().update(*in_chunks(chunks, X, Y), W)
        assert got.update(*in_chunks(chunks, Q), Y).to_json() == want.to_json()
        y = Y.copy()
        y[4, 4] = V
        with pytest.raises(ValueError, match=f"got {V}"):
            got.update(*in_chunks(chunks, X, y))
    assert got.to_json() == want.to_json()


def test_nothing_is_computed_before_it_is_asked_for():
    def boom(block):
        if block.size:
            raise RuntimeError("computed")
        return block

    x, q, y, w, p, z = (a.map_blocks(boom, dtype=a.dtype) for a in in_chunks(CHUNKS[1], *ARRAYS))
    for call in CALLS.values():
        lazy = call(x, q, y, w, p, z)
        with pytest.raises(RuntimeError, match="computed"):
            (lazy[0] if isinstance(lazy, tuple) else lazy).compute(scheduler="synchronous")


def test_scores_are_computed_once():
    blocks = []

    def seen(block):
        blocks.append(block.size)
        return block

    x, y = in_chunks(CHUNKS[1], X, Y)
    scores = nl.score_tokens(x.map_blocks(seen, meta=X[:0]), y, rank=True, entropy=True)
    dask.compute(*scores, scheduler="synchronous")
    assert len(blocks) == x.npartitions


def test_errors():
    x, q, y, w, p, z = in_chunks(CHUNKS[1], *ARRAYS)
    for error, match, call in (
        (TypeError, "logits: expected dtype", lambda: nl.cross_entropy(x.astype(np.int32), y)),
        (TypeError, "targets: expected integers", lambda: nl.score_tokens(x, w)),
        (TypeError, "targets: expected integers", lambda: nl.cross_entropy(x, y == 1)),
        (ValueError, r"targets: expected shape \(6, 7\) to match logits", lambda: nl.cross_entropy(x, y[1:])),
        (ValueError, r"targets: expected shape \(6, 7, 40\)", lambda: nl.cross_entropy(x, p[..., 1:])),
        (ValueError, r"weights: expected shape \(6, 7\)", lambda: nl.cross_entropy(x, y, weights=w[0])),
        (ValueError, "reduction: expected one of", lambda: nl.cross_entropy(x, y, reduction="max")),
        (ValueError, "label_smoothing: expected", lambda: nl.cross_entropy(x, y, label_smoothing=2.0)),
        (ValueError, "axis: expected", lambda: nl.logsumexp(x, axis=3)),
        (ValueError, "at least one dimension", lambda: nl.logsumexp(x[0, 0, 0])),
        (ValueError, "axis: expected", lambda: nl.softmax(x, axis=-4)),
        (ValueError, "at least one class", lambda: nl.softmax(x[..., :0])),
        (ValueError, "labels: expected a shape that broadcasts", lambda: nl.softmax_cross_entropy_with_logits(y, x)),
        (ValueError, "labels: expected shape", lambda: nl.sigmoid_cross_entropy_with_logits(z[0], x)),
        (ValueError, "labels: expected an array", lambda: nl.sigmoid_cross_entropy_with_logits(None, x)),
        (ValueError, "pos_weight: expected", lambda: nl.weighted_cross_entropy_with_logits(z, x, y)),
        (ValueError, "pos_weight: expected a number", lambda: nl.weighted_cross_entropy_with_logits(z, x)),
        (ValueError, "logits_q: expected shape", lambda: nl.kl_divergence(x, q[1:])),
        (ValueError, r"expected shape \[batch, time, classes\]", lambda: nl.sequence_loss(x[0], y[0], w[0])),
        (ValueError, "weights: expected shape", lambda: nl.sequence_loss(x, y, 1.0)),
        (ValueError, "cannot be set to True at same time", lambda: nl.sequence_loss(x, y, w, sum_over_timesteps=True)),
        (
            TypeError,
            "class_weights: expected an array in memory",
            lambda: nl.cross_entropy(x, y, class_weights=p[0, 0]),
        ),
        (TypeError, "logits: expected a NumPy or CuPy array", lambda: nl.value_and_grad(nl.cross_entropy)(x, y)),
        (ValueError, "compute_chunk_sizes", lambda: nl.cross_entropy(x[x[:, 0, 0] > 0], y)),
        (TypeError, "missing a required argument", lambda: nl.cross_entropy(x)),
    ):
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(ValueError, match="targets: expected values in"):
        nl.cross_entropy(x, y + V).compute(scheduler="synchronous")
