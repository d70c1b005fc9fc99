"""tf.contrib.seq2seq's sequence loss."""

import numpy as np

from . import _check
from ._backend import kernels
from .softmax import _dense, _sparse, scaled


def sequence_loss(
    logits,
    targets,
    weights,
    average_across_timesteps=True,
    average_across_batch=True,
    sum_over_timesteps=False,
    sum_over_batch=False,
    softmax_loss_function=None,
    name=None,
):
    """Weighted cross entropy of a batch of sequences of logits.

    With v = cross entropy * weights, what comes back is, by the four flags (at, ab, st, sb):

        T T F F   sum(v) / sum(weights)                   a scalar
        F F T T   sum(v) / count_nonzero(weights)         a scalar
        T F F F   the same as T T F F for each sequence   [batch]
        F T F F   ... for each time step                  [time]
        F F T F   the same as F F T T for each sequence   [batch]
        F F F T   ... for each time step                  [time]
        F F F F   v                                       [batch, time]

    A divisor of exactly 0 gives 0. A step of weight 0 is not looked at, whatever its target or logits.

    Args:
        logits: float16, bfloat16, float32 or float64, [batch, time, classes].
        targets: integers, [batch, time]; or class probabilities, [batch, time, classes].
        weights: real numbers, [batch, time]; usually 1 for a token, 0 for padding.
        average_across_timesteps, average_across_batch, sum_over_timesteps, sum_over_batch: see above.
        softmax_loss_function: f(labels=, logits=) on flat [batch * time] labels (or [batch * time, classes]) and
            [batch * time, classes] logits, giving [batch * time] losses; sparse softmax cross entropy if None.
        name: ignored, for compatibility.
    Returns:
        float32, or float64 for float64 logits; in nats. Sums are exact, rounded once.
    Raises:
        TypeError: a dtype that cannot be scored, NumPy and CuPy arrays mixed.
        ValueError: shapes that do not fit, a target out of range where the weight is not 0, flags that exclude each
            other.
    Source: tfa.seq2seq.sequence_loss 0.23 and tf.contrib.seq2seq.sequence_loss; differ in reading arguments of a wrong
    shape, and in letting NaN through a weight of 0.

    >>> sequence_loss(np.array([[[1.0, 2.0]]]), [[1]], [[1.0]])
    np.float64(0.31326168751822286)
    """
    at, ab, st, sb = average_across_timesteps, average_across_batch, sum_over_timesteps, sum_over_batch
    for one, other, first, second, why in (
        (at, st, "average_across_timesteps", "sum_over_timesteps", ""),
        (ab, sb, "average_across_batch", "sum_over_batch", ""),
        (ab, st, "average_across_batch", "sum_over_timesteps", " because of ambiguous order"),
        (sb, at, "sum_over_batch", "average_across_timesteps", " because of ambiguous order"),
    ):
        if one and other:
            raise ValueError(f"{first} and {second} cannot be set to True at same time{why}")
    logits = _check.logits(logits)
    if logits.ndim != 3:
        raise ValueError(f"logits: expected shape [batch, time, classes], got {logits.shape}")
    targets = _check.number_array(targets, "targets")
    family = kernels("totals", logits=logits, targets=targets, weights=weights)
    shape = logits.shape[:2]
    weights = _check.number_array(weights, "weights")
    _check.same_shape(weights, "weights", shape, f"logits {logits.shape}")
    scale = _check.weights(weights, shape)
    loss = _losses(logits, targets, scale, softmax_loss_function)
    if not (at or ab or st or sb):
        return scaled(loss, scale)
    scale = scale.reshape(shape)
    divisor = scale if at or ab else (scale != 0).astype(np.float64)
    whole = (at and ab) or (st and sb)
    if not whole and (ab or sb):
        loss, scale, divisor = loss.T, scale.T, divisor.T
    if whole:
        loss, scale, divisor = (x.reshape(1, -1) for x in (loss, scale, divisor))
    tops, bottoms = np.empty(len(loss)), np.empty(len(loss))
    family.row_totals(loss.size, len(loss), np.ascontiguousarray(loss), np.ascontiguousarray(scale), tops)
    family.row_totals(loss.size, len(loss), np.ascontiguousarray(divisor), np.ones(divisor.shape), bottoms)
    with np.errstate(all="ignore"):
        result = np.where(bottoms == 0, 0.0, tops / bottoms).astype(loss.dtype)
    return result[0] if whole else result


def _losses(logits, targets, scale, function):
    """The cross entropy of every step, [batch, time]."""
    shape = logits.shape[:2]
    if targets.ndim == 3:
        _check.same_shape(targets, "targets", logits.shape, "logits")
    else:
        _check.same_shape(targets, "targets", shape, f"logits {logits.shape}")
    if function is not None:
        flat = logits.reshape(-1, logits.shape[2])
        loss = np.asarray(function(labels=targets.reshape(-1, *targets.shape[2:]), logits=flat))
        _check.same_shape(loss, "softmax_loss_function's result", (len(flat),), "its logits")
        return loss.reshape(shape).astype(_check.result_dtype(logits), copy=False)
    family = kernels("softmax", logits=logits)
    if targets.ndim == 3:
        return np.asarray(_dense(family, logits, targets, -1, scale, None, "targets"))
    return _sparse(family, logits, targets, -1, scale, None, "auto", "targets")[0]
