"""The sigmoid family: cross entropies of independent two-class decisions."""

import numpy as np

from . import _check
from ._backend import array_module, kernels, on_its_device
from .totals import handed_over


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
    return _binary(labels, logits)


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
    return _binary(_labels(labels, targets), logits, _given(pos_weight))


@on_its_device
def sigmoid_focal_cross_entropy_with_logits(labels=None, logits=None, *, alpha=None, gamma=2.0):
    """Sigmoid cross entropy that counts less where the logit is right already, element by element.

        loss = a z (1 - p)^gamma log(1 / p) + (1 - a) (1 - z) p^gamma log(1 / (1 - p))        for p = sigmoid(logits)

    for z = labels and a = alpha; without an alpha neither part has a factor. A gamma of 0 is the sigmoid cross entropy.

    Args:
        labels: real numbers of logits' shape, usually 0 or 1.
        logits: float16, bfloat16, float32 or float64, any shape. At +-inf the limit is taken.
        alpha: a number in [0, 1], or None.
        gamma: a number in [0, 1e6], not only an integer.
    Returns:
        logits' shape, float32, or float64 for float64 logits; in nats. Error under 4 + 2 gamma eps (labels in [0, 1]).
    Raises:
        TypeError: a dtype that cannot be scored, NumPy and CuPy arrays mixed.
        ValueError: labels or logits missing, or of different shapes; alpha or gamma out of range.
    Source: Lin et al., "Focal loss for dense object detection", 2017; torchvision.ops.sigmoid_focal_loss, which
        differs for labels between 0 and 1: there the power is of p (1 - z) + (1 - p) z.

    >>> sigmoid_focal_cross_entropy_with_logits(np.array([1.0, 0.0]), np.array([0.0, 0.0]), alpha=0.25)
    array([0.0433217, 0.1299651])
    """
    return _binary(labels, logits, focal=_focal(alpha, gamma))


def _labels(labels, targets):
    """labels by their new or their old name."""
    if targets is not None and labels is not None:
        raise ValueError("targets: expected None when labels are given, got both")
    return targets if labels is None else labels


def _given(pos_weight):
    if pos_weight is None:
        raise ValueError("pos_weight: expected a number or an array, got None")
    return pos_weight


def _focal(alpha, gamma):
    """(factor of the positive part, of the negative part, gamma)."""
    gamma = _check.real(gamma, "gamma", 0.0, 1e6)
    if alpha is None:
        return 1.0, 1.0, gamma
    alpha = _check.real(alpha, "alpha", 0.0, 1.0)
    return alpha, 1 - alpha, gamma


def _checked(labels, logits):
    for x, name in ((labels, "labels"), (logits, "logits")):
        if x is None:
            raise ValueError(f"{name}: expected an array, got None")
    logits = _check.logits(logits)
    labels = _check.number_array(labels, "labels", logits)
    _check.same_shape(labels, "labels", logits.shape, "logits")
    return labels, logits


def _factor(x, name, logits):
    """x for each element: an array of logits' shape, or a number for all; None stays None."""
    if x is None:
        return None
    x = _check.number_array(x, name, None if np.size(x) == 1 else logits)
    try:
        wide = array_module(x).broadcast_to(x, logits.shape)
    except ValueError:
        raise ValueError(f"{name}: expected a shape that broadcasts to logits {logits.shape}, got {x.shape}") from None
    return float(x.reshape(())) if type(x) is np.ndarray and x.size == 1 else wide


def _views(logits, *arrays):
    """Arrays of logits' shape as element_rows gives them, and a function that makes of such an array one of that shape;
    what is a number or None stays."""
    shaped = [x.reshape(1) if x.ndim == 0 else x for x in (logits, *arrays) if hasattr(x, "ndim")]
    views, order = _check.element_rows(*shaped)
    shape, views, stays = [shaped[0].shape[axis] for axis in order], iter(views), order == sorted(order)

    def back(x):
        x = x.reshape(shape) if stays else x.reshape(shape).transpose(np.argsort(order))
        return x if logits.ndim else x[0]

    return [next(views) if hasattr(x, "ndim") else x for x in (logits, *arrays)], back


def _binary(labels, logits, pos_weight=None, focal=None):
    labels, logits = _checked(labels, logits)
    weight = _factor(pos_weight, "pos_weight", logits)
    family = kernels("sigmoid", logits=logits, labels=labels, pos_weight=weight)
    (x, z, weight), back = _views(logits, labels, weight)
    loss = array_module(x).empty(x.shape, _check.result_dtype(x))
    flat = _check.by_rows(loss) if loss.size else loss
    for begin, end, parts in _check.pieces(x, z, *([weight] if hasattr(weight, "ndim") else [])):
        (like, rows, _), (like_labels, label_rows, _) = parts[:2]
        like_weight, weight_rows, _ = parts[2] if len(parts) > 2 else (like, weight if focal is None else focal, None)
        out = _check.rows_of(flat, begin, end)
        family.binary_xent(out.size, out.size, like, rows, like_labels, label_rows, like_weight, weight_rows, out)
    return back(loss)


# -- derivatives, for grad.py


def _sigmoid_grad(upstream, out, labels, logits, name):
    return _derivatives(upstream, out, labels, logits)[:2]


def _weighted_grad(upstream, out, labels, logits, pos_weight, name, targets):
    return _derivatives(upstream, out, _labels(labels, targets), logits, _given(pos_weight))[:2]


def _focal_grad(upstream, out, labels, logits, alpha, gamma):
    return _derivatives(upstream, out, labels, logits, focal=_focal(alpha, gamma))[:2]


def _sigmoid_hess(upstream, hessian, labels, logits, name):
    return _with_hessian(upstream, hessian, labels, logits)


def _weighted_hess(upstream, hessian, labels, logits, pos_weight, name, targets):
    return _with_hessian(upstream, hessian, _labels(labels, targets), logits, _given(pos_weight))


def _focal_hess(upstream, hessian, labels, logits, alpha, gamma):
    return _with_hessian(upstream, hessian, labels, logits, focal=_focal(alpha, gamma))


def _with_hessian(upstream, hessian, *arguments, **options):
    _check.choice(hessian, "hessian", ("diagonal",))
    value, grads, hess = _derivatives(upstream, {"logits": None}, *arguments, **options, hessian=True)
    return value, grads["logits"], hess


def _derivatives(upstream, out, labels, logits, pos_weight=None, focal=None, hessian=False):
    """(loss, {name: gradient of sum(upstream * loss)} for the names in `out`, the diagonal of its Hessian or None)."""
    given, (labels, logits) = {"labels": labels, "pos_weight": pos_weight}, _checked(labels, logits)
    weight = _factor(pos_weight, "pos_weight", logits)
    slope = _factor(upstream, "upstream", logits)
    outs = {name: _check.output(x, logits, name, given.get(name)) for name, x in out.items()}
    arrays = {"logits": logits, "labels": labels, "pos_weight": weight, "upstream": slope}
    family = kernels("sigmoid", **arrays, **{f"out for {name}": x for name, x in outs.items()})
    (*operands, target), back = _views(*arrays.values(), outs.get("logits"))

    def room(wanted, dtype=_check.result_dtype(logits)):
        return array_module(logits).empty(operands[0].shape, dtype) if wanted else None

    if "logits" in out and target is None:
        target = room(True, logits.dtype.newbyteorder("="))
    loss, by_label, by_weight, hess = map(room, (True, "labels" in out, "pos_weight" in out, hessian))
    if logits.size:
        _run(family, operands, focal, target, loss, by_label, by_weight, hess)
    grads = {"labels": by_label, "pos_weight": by_weight}
    for name, x in outs.items():
        if name != "logits":
            grads[name] = handed_over(back(grads[name]), given[name], logits, x)
        else:
            grads[name] = _check.result(back(target)) if x is None else x
    return back(loss), grads, back(hess) if hessian else None


def _run(family, operands, focal, target, *results):
    """The kernel on arrays as _views gives them; `results` are contiguous, or None."""
    like_out, out_rows = _check.carrier(operands[0].dtype), None
    if target is not None:
        like_out, out_rows = _check.readable(target) or (None, None)
        if out_rows is None:
            raise ValueError("out: expected native byte order and at most two row strides, got another layout")
    arguments, kept = [], []
    for x in operands:
        if hasattr(x, "ndim"):
            x = _check.in_reach(x, operands[0])
            kept.append(x)
        arguments += _check.readable(x) if hasattr(x, "ndim") else (np.float32(0), x)
    if focal is not None:
        arguments[5] = focal
    loss, *others = (None if x is None else _check.by_rows(x) for x in results)
    family.binary_grad(loss.size, loss.size, *arguments, loss, like_out, out_rows, *others)
