"""tf.contrib.seq2seq's sequence loss."""

from . import _check
from ._backend import array_module, kernels, on_its_device
from .softmax import _dense, _sparse


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
    targets = _check.number_array(targets, "targets", logits)
    family = kernels("totals", logits=logits, targets=targets, weights=weights)
    batch, time = shape = logits.shape[:2]
    weights = _check.number_array(weights, "weights", logits)
    _check.same_shape(weights, "weights", shape, f"logits {logits.shape}")
    weights = _check.weights(weights, shape, logits)
    loss = _losses(logits, targets, weights, softmax_loss_function)
    flat = loss.reshape(-1)
    if not (at or ab or st or sb):
        family.scale(flat.size, flat.size, flat, None, weights, None, _check.NO_LABEL)
        return loss
    divisor = _check.FACTORS_OR_NONE if at or ab else _check.NONZERO_OR_NONE
    if (at and ab) or (st and sb):
        return family.total(flat, None, weights, None, _check.NO_LABEL, divisor)
    rows, items, row_step, step = (batch, time, time, 1) if at or st else (time, batch, 1, time)
    result = array_module(loss).empty(rows, loss.dtype)
    family.row_totals(flat.size, rows, flat, weights, items, row_step, step, divisor, result)
    return result


def _losses(logits, targets, weights, function):
    """The cross entropy of every step, [batch, time]."""
    shape = logits.shape[:2]
    if targets.ndim == 3:
        _check.same_shape(targets, "targets", logits.shape, "logits")
    else:
        _check.same_shape(targets, "targets", shape, f"logits {logits.shape}")
    if function is not None:
        flat = logits.reshape(-1, logits.shape[2])
        loss = function(labels=targets.reshape(-1, *targets.shape[2:]), logits=flat)
        loss = _check.number_array(loss, "softmax_loss_function's result", logits)
        kernels("totals", logits=logits, loss=loss)
        _check.same_shape(loss, "softmax_loss_function's result", (len(flat),), "its logits")
        return (
            array_module(logits).array(loss, _check.result_dtype(logits)).reshape(shape)
        )  # a copy: scale writes to it
    family = kernels("softmax", logits=logits)
    if targets.ndim == 3:
        return _dense(family, logits, targets, -1, weights, None, "targets")
    return _sparse(family, logits, targets, -1, weights, None, "auto", "targets")[0]
