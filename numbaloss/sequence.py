"""tf.contrib.seq2seq's sequence loss."""

import numpy as np

from . import _check, _xent
from ._backend import array_module, kernels, kernels_of, on_its_device


@on_its_device
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
    flags = average_across_timesteps, average_across_batch, sum_over_timesteps, sum_over_batch
    rule = _rule(*flags)
    logits, targets, weights = _checked(logits, targets, weights)
    return _reduced(_losses(logits, targets, weights, softmax_loss_function), weights, rule)


def _rule(at, ab, st, sb):
    """(axis that stays, divisor): axis None for a scalar; None for no reduction."""
    for one, other, first, second, why in (
        (at, st, "average_across_timesteps", "sum_over_timesteps", ""),
        (ab, sb, "average_across_batch", "sum_over_batch", ""),
        (ab, st, "average_across_batch", "sum_over_timesteps", " because of ambiguous order"),
        (sb, at, "sum_over_batch", "average_across_timesteps", " because of ambiguous order"),
    ):
        if one and other:
            raise ValueError(f"{first} and {second} cannot be set to True at same time{why}")
    if not (at or ab or st or sb):
        return None
    axis = None if (at and ab) or (st and sb) else 0 if at or st else 1
    return axis, _check.FACTORS_OR_NONE if at or ab else _check.NONZERO_OR_NONE


def _checked(logits, targets, weights):
    """The arguments as arrays, weights as the kernels read them."""
    logits = _check.logits(logits)
    if logits.ndim != 3:
        raise ValueError(f"logits: expected shape [batch, time, classes], got {logits.shape}")
    targets = _check.number_array(targets, "targets", logits)
    kernels("totals", logits=logits, targets=targets, weights=weights)
    shape = logits.shape[:2]
    weights = _check.number_array(weights, "weights", logits)
    _check.same_shape(weights, "weights", shape, "logits", logits)
    if targets.ndim == 3:
        _check.same_shape(targets, "targets", logits.shape, "logits")
    else:
        _check.same_shape(targets, "targets", shape, "logits", logits)
    return logits, targets, _check.weights(weights, shape, logits)


def _rows(logits, targets, weights):
    if targets.ndim == 3:
        return _xent.Rows(logits, -1, dense=targets, weights=weights)
    return _xent.labelled(logits, targets, -1, "targets", "auto", weights)


def _losses(logits, targets, weights, function=None):
    """The loss of every step, [batch, time], not weighted; by a function of the user's, if there is one."""
    if function is None:
        return _xent.losses(_rows(logits, targets, weights))
    flat = logits.reshape(-1, logits.shape[2])
    loss = function(labels=targets.reshape(-1, *targets.shape[2:]), logits=flat)
    loss = _check.number_array(loss, "softmax_loss_function's result", logits)
    kernels("totals", logits=logits, loss=loss)
    _check.same_shape(loss, "softmax_loss_function's result", (len(flat),), "its logits")
    loss = array_module(logits).array(loss, _check.result_dtype(logits))  # a copy: it is written to
    return loss.reshape(logits.shape[:2])


def _reduced(loss, weights, rule):
    """The losses [batch, time] weighted, in place, or their totals."""
    family, flat = kernels_of(loss, "totals"), loss.reshape(-1)
    if rule is None:
        family.scale(flat.size, flat.size, flat, None, weights, None, _check.NO_LABEL)
        return loss
    axis, divisor = rule
    if axis is None:
        return family.total(flat, None, weights, None, _check.NO_LABEL, divisor)
    return _row_totals(loss, weights, rule)[0]


def _row_totals(loss, weights, rule):
    """(totals, what they were divided by) along what `rule` reduces; one of each for an axis of None."""
    axis, divisor = rule
    (batch, time), xp = loss.shape, array_module(loss)
    rows, items, row_step, step = ((1, loss.size, 0, 1), (batch, time, time, 1), (time, batch, 1, time))[
        0 if axis is None else axis + 1
    ]
    totals, divisors = xp.empty(rows, loss.dtype), xp.empty(rows, np.float64)
    family, flat = kernels_of(loss, "totals"), loss.reshape(-1)
    family.row_totals(flat.size, rows, flat, weights, items, row_step, step, divisor, totals, divisors)
    return totals, divisors


def _sequence_rows(logits, targets, weights, **flags):
    """(rows, rule, divisor of every step) for a gradient."""
    rule = _rule(*flags.values())
    logits, targets, weights = _checked(logits, targets, weights)
    rows = _rows(logits, targets, weights)
    if rule is None:
        return rows, rule, None
    zeros = array_module(logits).zeros(rows.shape, np.float32)
    return rows, rule, _for_steps(_row_totals(zeros, weights, rule)[1], rule, rows.shape)


def _for_steps(x, rule, shape):
    """What a total is divided or multiplied by, or None, for every step: a number for all, or one each."""
    if x is None or rule is None or rule[0] is None or x.size == 1:
        return x if x is None else x.reshape(-1) if isinstance(x, np.ndarray) else x
    x = array_module(x).broadcast_to(x.reshape((-1, 1) if rule[0] == 0 else (1, -1)), shape)
    return np.ascontiguousarray(x).reshape(-1) if isinstance(x, np.ndarray) else x
