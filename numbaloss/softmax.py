"""The softmax family: cross entropies of logits, the scores of tokens, and the functions beneath them."""

from typing import Any, NamedTuple

import numpy as np

from . import _check
from ._backend import array_module, is_cupy, kernels, on_its_device

_DEFAULT = object()
_IGNORED = -100  # ignore_index unless given


@on_its_device
def softmax_cross_entropy_with_logits(labels, logits, axis=-1, name=None, dim=None):
    """Cross entropy between softmax(logits) and class probabilities.

        loss[i] = sum_j labels[i, j] * (logsumexp(logits[i]) - logits[i, j])

    The softmax is never stored. A label of exactly 0 adds 0, also where its logit is -inf.

    Args:
        labels: real numbers, of logits' shape or broadcasting to it (NumPy's rules). Need not sum to 1.
        logits: float16, bfloat16, float32 or float64, with the classes along `axis`. -inf allowed.
        axis: the class axis, positive or negative.
        name: ignored, for compatibility.
        dim: old name of `axis`.
    Returns:
        logits' shape without `axis`, float32, or float64 for float64 logits; in nats. NaN for a row that holds NaN or
        +inf or nothing but -inf. Error under 4 eps for labels >= 0.
    Raises:
        TypeError: a dtype that cannot be scored, or NumPy and CuPy arrays mixed.
        ValueError: shapes that do not fit, no classes, an axis out of range, `axis` and `dim` both given.
    Source: tf.nn.softmax_cross_entropy_with_logits, TF 2.21; differs in that 0 * inf is 0 and that zero classes raise.

    >>> softmax_cross_entropy_with_logits([[0.0, 0.0, 1.0]], np.array([[1.0, 2.0, 3.0]]))
    array([0.40760596])
    """
    if dim is not None:
        if axis != -1:
            raise ValueError(f"dim: expected None when axis is given, got dim={dim!r} and axis={axis!r}")
        axis = dim
    logits = _check.logits(logits)
    labels = _check.number_array(labels, "labels", logits)
    family = kernels("softmax", logits=logits, labels=labels)
    return _check.result(_dense(family, logits, labels, axis, None, None, "labels"))


def _dense(family, logits, labels, axis, weights, class_weights, name):
    """The loss of every row for class probabilities; `weights` only tells which rows are not looked at."""
    x, xp = _check.class_axis_last(logits, axis), array_module(logits)
    try:
        labels = xp.broadcast_to(labels, logits.shape)
    except ValueError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to logits {logits.shape}, got {labels.shape}"
        ) from None
    z = _check.class_axis_last(labels, axis, name)
    loss = xp.empty(x.shape[:-1], _check.result_dtype(x))
    flat = _check.flat(loss)
    for begin, end, ((like, rows, _), (like_labels, label_rows, _)) in _check.pieces(x, z):
        part = _check.part(weights, begin, end)
        args = (like, rows, like_labels, label_rows, class_weights, part, _check.part(flat, begin, end))
        family.dense_xent((end - begin) * x.shape[-1], end - begin, *args)
    return loss


@on_its_device
def sparse_softmax_cross_entropy_with_logits(labels, logits, name=None, *, check_labels="auto"):
    """Cross entropy between softmax(logits) and integer labels.

        loss[i] = log(sum_j exp(logits[i, j])) - logits[i, labels[i]]

    The softmax is never stored. The loss is right relatively, however small.

    Args:
        labels: integers, (...). Values in [0, classes).
        logits: float16, bfloat16, float32 or float64, (..., classes). -inf allowed.
        name: ignored, for compatibility.
        check_labels: "raise" raises for a label out of range, "nan" makes its loss NaN; "auto" raises on NumPy and
            gives NaN on CuPy, where to raise is to wait for the device.
    Returns:
        (...) float32, or float64 for float64 logits; in nats. Error under 4 eps, 1 eps typically.
    Raises:
        TypeError: a dtype that cannot be scored, labels that are not integers, NumPy and CuPy arrays mixed.
        ValueError: shapes that do not fit, no classes, a label out of range.
    Source: tf.nn.sparse_softmax_cross_entropy_with_logits, TF 2.21; differs in raising ValueError for a bad label.

    >>> sparse_softmax_cross_entropy_with_logits([2], np.array([[1.0, 2.0, 3.0]]))
    array([0.40760596])
    """
    logits = _check.logits(logits)
    family = kernels("softmax", logits=logits, labels=labels)
    loss = _sparse(family, logits, labels, -1, None, None, check_labels, "labels")[0]
    return _check.result(loss)


def _sparse(family, logits, labels, axis, weights, ignore_index, check_labels, name):
    """(loss of every row, labels as the kernels read them)."""
    x = _check.class_axis_last(logits, axis)
    _check.choice(check_labels, "check_labels", ("auto", "raise", "nan"))
    y, given = _check.labels(labels, x.shape[:-1], name, logits)
    loss = array_module(x).empty(x.shape[:-1], _check.result_dtype(x))
    flat, classes = _check.flat(loss), x.shape[-1]
    kernel = family.narrow_sparse_xent if classes <= family.NARROW else family.sparse_xent
    ignore = _check.NO_LABEL if ignore_index is None else ignore_index
    bad = 0
    for begin, end, [(like, rows, _)] in _check.pieces(x):
        n, y_part, w_part = end - begin, _check.part(y, begin, end), _check.part(weights, begin, end)
        bad += kernel(n * classes, n, like, rows, y_part, w_part, ignore, _check.part(flat, begin, end))
    if _must_raise(bad, given, check_labels):
        _check.raise_bad_label(given, classes, weights, ignore, name)
    return loss, y


def _sparse_grad(family, logits, y, axis, weights, ignore_index, slopes, grad):
    """(loss of every row), and `grad`, logits' shape, gets slopes[r] * d loss[r] / d logits."""
    x, z = _check.class_axis_last(logits, axis), _check.class_axis_last(grad, axis, "out")
    loss = array_module(x).empty(x.shape[:-1], _check.result_dtype(x))
    if _check.readable(x) is None:
        x = x.astype(x.dtype.newbyteorder("="), order="C")
    (like, rows), (like_grad, grad_rows) = _check.readable(x), _check.readable(z)
    if loss.size:
        args = (like, rows, y, weights, ignore_index, slopes, _check.flat(loss), like_grad, grad_rows)
        kernel = family.narrow_sparse_xent_grad if x.shape[-1] <= family.NARROW else family.sparse_xent_grad
        kernel(x.size, loss.size, *args)
    return loss


def _must_raise(bad, given, check_labels):
    """Whether labels out of range are to be looked for: `bad` were counted, none on a device."""
    return check_labels == "raise" if is_cupy(given) else bad and check_labels != "nan"


@on_its_device
def cross_entropy(
    logits,
    targets,
    *,
    weights=None,
    class_weights=None,
    ignore_index=_DEFAULT,
    axis=-1,
    reduction="mean",
    check_labels="auto",
):
    """Cross entropy of logits, weighted by token and by class, and reduced.

        loss[i] = -weights[i] * class_weights[y_i] * log softmax(logits[i])[y_i]           for targets y
        loss[i] = -weights[i] * sum_c class_weights[c] * t_ic * log softmax(logits[i])[c]  for probabilities t

    Sums over rows are exact (each product rounded to float64, their sum rounded once), so they depend on no order.

    Args:
        logits: float16, bfloat16, float32 or float64, with the classes along `axis`.
        targets: integers, logits' shape without `axis`; or class probabilities (floats) of logits' shape.
        weights: real numbers, logits' shape without `axis`, or one number. A row of weight 0 is not looked at.
        class_weights: real numbers, (classes,).
        ignore_index: rows with this target are not looked at. -100 unless given; not for probabilities.
        axis: the class axis: -1, or 1 for torch's (N, C, d1, ...).
        reduction: "mean" divides the sum by sum(weights * class_weights[y]) over the rows that count (for
            probabilities by sum(weights)); "sum"; "none".
        check_labels: "raise" raises for a target out of range, "nan" makes its loss NaN; "auto" raises on NumPy and
            gives NaN on CuPy, where to raise is to wait for the device.
    Returns:
        A scalar, or logits' shape without `axis` for "none"; float32, or float64 for float64 logits; in nats. The
        mean of no rows is NaN.
    Raises:
        TypeError: a dtype that cannot be scored, NumPy and CuPy arrays mixed.
        ValueError: shapes that do not fit, no classes, a target out of range, ignore_index with probabilities.
    Source: torch.nn.functional.cross_entropy, torch 2.13, with weights by token; differs in the place of the classes.

    >>> cross_entropy(np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), [2, -100])
    np.float64(0.4076059644443803)
    """
    logits = _check.logits(logits)
    targets = _check.number_array(targets, "targets", logits)
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    family = kernels("softmax", logits=logits, targets=targets, weights=weights, class_weights=class_weights)
    rows_shape = _check.class_axis_last(logits, axis).shape[:-1]
    weights = _check.weights(weights, rows_shape, logits)
    classes = logits.shape[axis]
    if targets.dtype.kind in "iu":
        ignore = _check.integer(_IGNORED if ignore_index is _DEFAULT else ignore_index, "ignore_index")
        by_class = _check.class_weights(class_weights, classes, np.float64, logits)
        loss, y = _sparse(family, logits, targets, axis, weights, ignore, check_labels, "targets")
        factors = (y, weights, by_class, ignore)
    else:
        if targets.dtype.kind == "b":
            raise TypeError("targets: expected integers, or floats for class probabilities, got dtype bool")
        if ignore_index is not _DEFAULT:
            raise ValueError("ignore_index: expected none with targets that are class probabilities")
        _check.same_shape(targets, "targets", logits.shape, "logits")
        by_class = _check.class_weights(class_weights, classes, _check.result_dtype(logits), logits)
        loss = _dense(family, logits, targets, axis, weights, by_class, "targets")
        factors = (None, weights, None, _check.NO_LABEL)
    if reduction == "none" and weights is None and class_weights is None:
        return _check.result(loss)
    totals, flat = kernels("totals", loss=loss), _check.flat(loss)
    if reduction != "none":
        return totals.total(flat, *factors, _check.FACTORS if reduction == "mean" else _check.NOTHING)
    totals.scale(flat.size, flat.size, flat, *factors)
    return _check.result(loss)


class TokenScores(NamedTuple):
    """What score_tokens gives; each field is an array of the targets' shape, or None if it was not asked for."""

    logprob: Any
    logsumexp: Any
    argmax: Any
    rank: Any = None
    entropy: Any = None


@on_its_device
def token_logprobs(logits, targets, *, ignore_index=-100, axis=-1, check_labels="auto"):
    """The log-probability of each target: log softmax(logits)[target].

    Args:
        logits: float16, bfloat16, float32 or float64, with the classes along `axis`.
        targets: integers, logits' shape without `axis`.
        ignore_index: the result is 0 where the target is this number.
        axis: the class axis.
        check_labels: "raise" raises for a target out of range, "nan" makes its result NaN; "auto" raises on NumPy
            and gives NaN on CuPy, where to raise is to wait for the device.
    Returns:
        logits' shape without `axis`, float32, or float64 for float64 logits; in nats, never positive.
    Raises:
        TypeError, ValueError: as cross_entropy.

    >>> token_logprobs(np.array([[1.0, 2.0, 3.0]]), [2])
    array([-0.40760596])
    """
    logits = _check.logits(logits)
    family = kernels("softmax", logits=logits, targets=targets)
    ignore = _check.integer(ignore_index, "ignore_index")
    loss, _ = _sparse(family, logits, targets, axis, None, ignore, check_labels, "targets")
    kernels("totals", loss=loss).negate(loss.size, loss.size, _check.flat(loss))
    return _check.result(loss)


@on_its_device
def score_tokens(logits, targets, *, rank=False, entropy=False, ignore_index=-100, axis=-1, check_labels="auto"):
    """What the logits say of each target, from one pass over them.

    Args:
        logits: float16, bfloat16, float32 or float64, with the classes along `axis`.
        targets: integers, logits' shape without `axis`.
        rank, entropy: whether these fields are wanted.
        ignore_index: rows with this target are not looked at: 0 in the fields of floats, -1 in the others.
        axis: the class axis.
        check_labels: "raise" raises for a target out of range, "nan" makes its floats NaN; "auto" raises on NumPy
            and gives NaN on CuPy, where to raise is to wait for the device.
    Returns:
        TokenScores of arrays of logits' shape without `axis`:
        logprob: log softmax(logits)[target], float32, or float64 for float64 logits; in nats.
        logsumexp: log(sum(exp(logits))), same dtype.
        argmax: the class of the largest logit, the first of equal ones, int64.
        rank: the number of classes with a larger logit than the target's, int64; 0 means the target is on top.
        entropy: of softmax(logits), in nats, right relatively.
    Raises:
        TypeError, ValueError: as cross_entropy.

    >>> score_tokens(np.array([[1.0, 2.0, 3.0]]), [1], rank=True).rank
    array([1])
    """
    return _score(logits, targets, None, rank, entropy, ignore_index, axis, check_labels)


def _score(logits, targets, weights, rank, entropy, ignore_index, axis, check_labels):
    """score_tokens, but for rows of weight 0 (weights as the kernels read them, or None)."""
    logits = _check.logits(logits)
    family = kernels("softmax", logits=logits, targets=targets)
    x = _check.class_axis_last(logits, axis)
    _check.choice(check_labels, "check_labels", ("auto", "raise", "nan"))
    ignore = _check.integer(ignore_index, "ignore_index")
    shape, classes, dtype, xp = x.shape[:-1], x.shape[-1], _check.result_dtype(x), array_module(x)
    y, given = _check.labels(targets, shape, "targets", logits)
    fields = [xp.empty(shape, dtype), xp.empty(shape, dtype), xp.empty(shape, np.int64)]
    fields.append(xp.empty(shape, np.int64) if rank else None)
    fields.append(xp.empty(shape, dtype) if entropy else None)
    flat = [None if field is None else _check.flat(field) for field in fields]
    bad = 0
    for begin, end, [(like, rows, _)] in _check.pieces(x):
        n, y_part, w_part = end - begin, _check.part(y, begin, end), _check.part(weights, begin, end)
        out = [None if field is None else field[begin:end] for field in flat]
        bad += family.score(n * classes, n, like, rows, y_part, w_part, ignore, *out)
    if _must_raise(bad, given, check_labels):
        _check.raise_bad_label(given, classes, weights, ignore, "targets")
    return TokenScores(*(None if field is None else _check.result(field) for field in fields))


@on_its_device
def softmax(logits, axis=-1, name=None):
    """exp(logits) / sum(exp(logits)) along an axis.

    Args:
        logits: float16, bfloat16, float32 or float64, at least one dimension.
        axis: the class axis.
        name: ignored, for compatibility.
    Returns:
        logits' shape, float32, or float64 for float64 logits; error under 4 eps of each entry. NaN in a row that holds
        NaN or +inf or nothing but -inf.
    Raises:
        TypeError, ValueError: as cross_entropy.
    Source: tf.nn.softmax, TF 2.21; differs in giving float32 for 16-bit logits.

    >>> softmax(np.array([0.0, 0.0]))
    array([0.5, 0.5])
    """
    return _normalized(logits, axis, False)


@on_its_device
def log_softmax(logits, axis=-1, name=None):
    """log(softmax(logits)) along an axis, right relatively also for the largest class.

    Arguments, result and errors are those of softmax; -inf where a logit is.
    Source: tf.nn.log_softmax, TF 2.21; differs in giving float32 for 16-bit logits.

    >>> log_softmax(np.array([0.0, 0.0]))
    array([-0.69314718, -0.69314718])
    """
    return _normalized(logits, axis, True)


def _normalized(logits, axis, logarithm):
    logits = _check.logits(logits)
    family = kernels("softmax", logits=logits)
    x = _check.class_axis_last(logits, axis)
    out = array_module(x).empty(x.shape, _check.result_dtype(x))
    flat = out.reshape(-1, x.shape[-1])
    kernel = family.narrow_normalize if x.shape[-1] <= family.NARROW else family.normalize
    for begin, end, [(like, rows, _)] in _check.pieces(x):
        kernel((end - begin) * x.shape[-1], end - begin, like, rows, logarithm, flat[begin:end])
    return array_module(x).moveaxis(out, -1, _check.axis_index(axis, logits.ndim))


@on_its_device
def logsumexp(logits, axis=-1, keepdims=False):
    """log(sum(exp(logits))) along an axis, without overflow.

    Args:
        logits: float16, bfloat16, float32 or float64, at least one dimension.
        axis: the axis to sum over.
        keepdims: whether that axis stays, with length 1.
    Returns:
        logits' shape without `axis`, float32, or float64 for float64 logits. -inf for a row of -inf, +inf for a row
        that holds it, NaN for one that holds NaN.
    Raises:
        TypeError, ValueError: as cross_entropy.
    Source: tf.reduce_logsumexp and scipy.special.logsumexp for one axis.

    >>> logsumexp(np.array([0.0, 0.0]))
    np.float64(0.6931471805599453)
    """
    logits = _check.logits(logits)
    family = kernels("softmax", logits=logits)
    x = _check.class_axis_last(logits, axis)
    lse = array_module(x).empty(x.shape[:-1], _check.result_dtype(x))
    flat = _check.flat(lse)
    for begin, end, [(like, rows, _)] in _check.pieces(x):
        family.logsumexp((end - begin) * x.shape[-1], end - begin, like, rows, _check.part(flat, begin, end))
    if keepdims:
        return array_module(x).expand_dims(lse, _check.axis_index(axis, logits.ndim))
    return _check.result(lse)
