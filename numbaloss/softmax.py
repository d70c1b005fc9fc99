"""The softmax family: cross entropies of logits, the scores of tokens, and the functions beneath them."""

from typing import Any, NamedTuple

import numpy as np

from . import _check, _xent
from ._backend import array_module, is_cupy, kernels, kernels_of, on_its_device

_DEFAULT = object()


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
    return _check.result(_xent.losses(_dense_rows(labels, logits, axis, dim)))


def _axis(axis, dim):
    """The class axis by its new or its old name."""
    if dim is not None and axis != -1:
        raise ValueError(f"dim: expected None when axis is given, got dim={dim!r} and axis={axis!r}")
    return axis if dim is None else dim


def _dense_rows(labels, logits, axis, dim):
    """The rows of softmax_cross_entropy_with_logits, whose labels broadcast."""
    axis = _axis(axis, dim)
    logits = _check.logits(logits)
    labels = _check.number_array(labels, "labels", logits)
    kernels("dense", logits=logits, labels=labels)
    _check.class_axis_last(logits, axis)
    try:
        labels = array_module(logits).broadcast_to(labels, logits.shape)
    except ValueError:
        raise ValueError(
            f"labels: expected a shape that broadcasts to logits {logits.shape}, got {labels.shape}"
        ) from None
    return _xent.Rows(logits, axis, dense=labels, name="labels")


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
    return _check.result(_xent.losses(_sparse_rows(labels, logits, check_labels)))


def _sparse_rows(labels, logits, check_labels):
    logits = _check.logits(logits)
    kernels("softmax", logits=logits, labels=labels)
    return _xent.labelled(logits, labels, -1, "labels", check_labels)


@on_its_device
def cross_entropy(
    logits,
    targets,
    *,
    weights=None,
    class_weights=None,
    ignore_index=_DEFAULT,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    temperature=1.0,
    axis=-1,
    reduction="mean",
    check_labels="auto",
):
    """Cross entropy of logits, weighted by token and by class, and reduced.

        x       = softcap * tanh(logits / softcap) / temperature
        loss[i] = weights[i] * (sum_c class_weights[c] * t_ic * (lse_i - x_ic) + z_loss * lse_i^2)

    with lse_i = logsumexp(x_i) and t_i the probabilities that are given, or 1 at class y_i and 0 elsewhere; smoothed,
    (1 - label_smoothing) t_ic + label_smoothing / classes.

    Sums over rows are exact (each product rounded to float64, their sum rounded once), so they depend on no order.

    Args:
        logits: float16, bfloat16, float32 or float64, with the classes along `axis`.
        targets: integers, logits' shape without `axis`; or class probabilities (floats) of logits' shape.
        weights: real numbers, logits' shape without `axis`, or one number. A row of weight 0 is not looked at.
        class_weights: real numbers, (classes,).
        ignore_index: rows with this target are not looked at. -100 unless given; not for probabilities.
        label_smoothing: in [0, 1]: the share of a target that is spread evenly over all classes.
        z_loss: from 0 on: the factor of lse^2, which keeps logits near 0. Class weights do not touch it.
        softcap: above 0: logits are kept in (-softcap, softcap). None for as they are.
        temperature: above 0: logits are divided by it. Either option rounds x once more to the result's dtype.
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
        ValueError: shapes that do not fit, no classes, a target or an option out of range, ignore_index with
            probabilities.
    Source: torch.nn.functional.cross_entropy, torch 2.13, with weights by token; differs in the place of the classes.
    z_loss: Chowdhery et al. 2022, "PaLM"; softcap: Bello et al. 2016, "Neural combinatorial optimization".

    >>> cross_entropy(np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), [2, -100])
    np.float64(0.4076059644443803)
    """
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    options = label_smoothing, z_loss, softcap, temperature, axis, check_labels
    rows = _cross_entropy_rows(logits, targets, weights, class_weights, ignore_index, *options)
    return _xent.reduced(rows, _xent.losses(rows), reduction)


def _cross_entropy_rows(
    logits,
    targets,
    weights,
    class_weights,
    ignore_index,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    temperature=1.0,
    axis=-1,
    check_labels="auto",
    gamma=0.0,
):
    """The rows of cross_entropy or focal_loss."""
    logits = _check.logits(logits)
    targets = _check.number_array(targets, "targets", logits)
    kernels("softmax", logits=logits, targets=targets, weights=weights, class_weights=class_weights)
    options = {"cap": _xent.cap_of(softcap, temperature, _check.result_dtype(logits)), "gamma": gamma}
    if label_smoothing != 0:
        options["smoothing"] = _check.real(label_smoothing, "label_smoothing", 0.0, 1.0)
    if z_loss != 0:
        options["z_loss"] = _check.real(z_loss, "z_loss", 0.0)
    if weights is not None or class_weights is not None:
        x = _check.class_axis_last(logits, axis)
        options["weights"] = _check.weights(weights, x.shape[:-1], logits)
        options["class_weights"] = _check.class_weights(class_weights, x.shape[-1], np.float64, logits)
    if targets.dtype.kind in "iu":
        ignore = _check.integer(_xent.IGNORED if ignore_index is _DEFAULT else ignore_index, "ignore_index")
        return _xent.labelled(logits, targets, axis, "targets", check_labels, ignore_index=ignore, **options)
    if targets.dtype.kind == "b":
        raise TypeError("targets: expected integers, or floats for class probabilities, got dtype bool")
    if ignore_index is not _DEFAULT:
        raise ValueError("ignore_index: expected none with targets that are class probabilities")
    _check.same_shape(targets, "targets", logits.shape, "logits")
    return _xent.Rows(logits, axis, dense=targets, **options)


@on_its_device
def focal_loss(
    logits,
    targets,
    *,
    gamma=2.0,
    weights=None,
    class_weights=None,
    ignore_index=-100,
    axis=-1,
    reduction="mean",
    check_labels="auto",
):
    """Cross entropy that counts little where a target is already likely, weighted and reduced as cross_entropy's.

        loss[i] = -weights[i] * class_weights[y_i] * (1 - p_i)^gamma * log p_i,   p_i = softmax(logits[i])[y_i]

    Args:
        logits: float16, bfloat16, float32 or float64, with the classes along `axis`.
        targets: integers, logits' shape without `axis`.
        gamma: a number in [0, 1e6]; 0 gives cross_entropy.
        weights, class_weights, ignore_index, axis, reduction, check_labels: as cross_entropy.
    Returns:
        A scalar, or logits' shape without `axis` for "none"; float32, or float64 for float64 logits; in nats. Error
        under 4 (gamma + 1) eps.
    Raises:
        TypeError, ValueError: as cross_entropy; gamma out of range.
    Source: Lin et al. 2017, "Focal loss for dense object detection", for any number of classes.

    >>> focal_loss(np.array([[1.0, 2.0, 3.0]]), [2])
    np.float64(0.045678...)
    """
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    rows = _focal_rows(logits, targets, gamma, weights, class_weights, ignore_index, axis, check_labels)
    return _xent.reduced(rows, _xent.losses(rows), reduction)


def _focal_rows(logits, targets, gamma, weights, class_weights, ignore_index, axis, check_labels):
    logits = _check.logits(logits)
    targets = _check.number_array(targets, "targets", logits)
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integers, got dtype {targets.dtype}")
    gamma = _check.real(gamma, "gamma", 0.0, 1e6)
    options = {"axis": axis, "check_labels": check_labels, "gamma": gamma}
    return _cross_entropy_rows(logits, targets, weights, class_weights, ignore_index, **options)


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
    kernels("softmax", logits=logits, targets=targets)
    ignore = _check.integer(ignore_index, "ignore_index")
    loss = _xent.losses(_xent.labelled(logits, targets, axis, "targets", check_labels, ignore_index=ignore))
    kernels_of(loss, "totals").negate(loss.size, loss.size, _check.flat(loss))
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
        out = [_check.part(field, begin, end) for field in flat]
        bad += family.score(n * classes, n, like, rows, y_part, w_part, ignore, *out)
    if check_labels == "raise" if is_cupy(x) else bad and check_labels != "nan":
        _check.raise_bad_label(given, classes, weights, ignore, "targets")
    return TokenScores(*[None if field is None else _check.result(field) for field in fields])


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
    flat = _check.by_rows(out)
    kernel = family.narrow_normalize if x.shape[-1] <= family.NARROW else family.normalize
    for begin, end, [(like, rows, _)] in _check.pieces(x):
        kernel((end - begin) * x.shape[-1], end - begin, like, rows, logarithm, _check.rows_of(flat, begin, end))
    return out if x is logits else array_module(x).moveaxis(out, -1, _check.axis_index(axis, logits.ndim))


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
