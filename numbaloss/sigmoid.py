"""The sigmoid family: cross entropies of independent two-class decisions."""

import numpy as np

from . import _check
from ._backend import array_module, kernels, on_its_device


@on_its_device
def sigmoid_cross_entropy_with_logits(labels=None, logits=None, name=None):
    """Cross entropy between sigmoid(logits) and labels, element by element.

        loss = max(x, 0) - x * z + log(1 + exp(-|x|))        for x = logits, z = labels

    Args:
        labels: real numbers of logits' shape, usually in [0, 1].
        logits: float16, bfloat16, float32 or float64, any shape. At +-inf the limit is taken.
        name: ignored, for compatibility.
    Returns:
        logits' shape, float32, or float64 for float64 logits; in nats. Error under 2 eps for labels in [0, 1].
    Raises:
        TypeError: a dtype that cannot be scored, NumPy and CuPy arrays mixed.
        ValueError: labels or logits missing, or of different shapes.
    Source: tf.nn.sigmoid_cross_entropy_with_logits, TF 2.21; differs in taking the limit at +-inf.

    >>> sigmoid_cross_entropy_with_logits(np.array([1.0, 0.0]), np.array([0.0, 0.0]))
    array([0.69314718, 0.69314718])
    """
    return _binary(labels, logits, None)


@on_its_device
def weighted_cross_entropy_with_logits(labels=None, logits=None, pos_weight=None, name=None, targets=None):
    """Sigmoid cross entropy whose positive part is weighted, element by element.

        loss = pos_weight * z * log(1 + exp(-x)) + (1 - z) * log(1 + exp(x))        for x = logits, z = labels

    Args:
        labels: real numbers of logits' shape, usually in [0, 1].
        logits: float16, bfloat16, float32 or float64, any shape. At +-inf the limit is taken.
        pos_weight: a number, or an array that broadcasts to logits' shape.
        name: ignored, for compatibility.
        targets: old name of `labels`.
    Returns:
        logits' shape, float32, or float64 for float64 logits; in nats. Error under 4 eps for labels in [0, 1].
    Raises:
        TypeError: a dtype that cannot be scored, NumPy and CuPy arrays mixed.
        ValueError: an argument missing or given twice, shapes that do not fit.
    Source: tf.nn.weighted_cross_entropy_with_logits, TF 2.21; differs in not cancelling for very negative logits.

    >>> weighted_cross_entropy_with_logits(np.array([1.0, 0.0]), np.array([0.0, 0.0]), 2.0)
    array([1.38629436, 0.69314718])
    """
    if targets is not None:
        if labels is not None:
            raise ValueError("targets: expected None when labels are given, got both")
        labels = targets
    if pos_weight is None:
        raise ValueError("pos_weight: expected a number or an array, got None")
    return _binary(labels, logits, pos_weight)


def _binary(labels, logits, pos_weight):
    for x, name in ((labels, "labels"), (logits, "logits")):
        if x is None:
            raise ValueError(f"{name}: expected an array, got None")
    logits = _check.logits(logits)
    labels, xp = _check.number_array(labels, "labels", logits), array_module(logits)
    _check.same_shape(labels, "labels", logits.shape, "logits")
    operands = [logits, labels]
    if pos_weight is not None:
        pos_weight = _check.number_array(pos_weight, "pos_weight", None if np.size(pos_weight) == 1 else logits)
        try:
            operands.append(array_module(pos_weight).broadcast_to(pos_weight, logits.shape))
        except ValueError:
            raise ValueError(
                f"pos_weight: expected a shape that broadcasts to logits {logits.shape}, got {pos_weight.shape}"
            ) from None
    one_weight = type(pos_weight) is np.ndarray and pos_weight.size == 1
    if one_weight:
        operands.pop()
    family = kernels("sigmoid", logits=logits, labels=labels, **({} if one_weight else {"pos_weight": pos_weight}))
    shaped = [x.reshape(1) for x in operands] if logits.ndim == 0 else operands
    views, order = _check.element_rows(*shaped)
    loss = xp.empty(views[0].shape, _check.result_dtype(logits))
    flat = loss.reshape(-1, loss.shape[-1]) if loss.size else loss
    for begin, end, parts in _check.pieces(*views):
        (like, rows, _), (like_labels, label_rows, _) = parts[:2]
        like_weight, weight_rows = (like, float(pos_weight.reshape(())) if one_weight else None)
        if len(parts) > 2:
            like_weight, weight_rows, _ = parts[2]
        out = flat[begin:end]
        family.binary_xent(out.size, out.size, like, rows, like_labels, label_rows, like_weight, weight_rows, out)
    loss = loss.reshape([shaped[0].shape[axis] for axis in order]).transpose(np.argsort(order))
    return loss if logits.ndim else loss[0]
