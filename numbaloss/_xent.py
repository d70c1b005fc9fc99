"""The rows of a cross entropy: their losses and gradients, and how these are reduced."""

import math
from fractions import Fraction

import numpy as np

from . import _check
from ._backend import array_module, is_cupy, kernels_of
from .totals import handed_over

IGNORED = -100  # ignore_index unless given


class Rows:
    """What losses and gradients of rows start from: checked arguments, as the kernels read them.

    The targets are `y`, an int64 a row, or `dense`, of logits' shape. Rows are plain if all of a target is one class's
    and there is no z-loss; the losses of others hold their class weights already.
    """

    def __init__(
        self,
        logits,
        axis,
        y=None,
        dense=None,
        given=None,  # targets as they were given, and their name, for messages
        name="targets",
        weights=None,
        class_weights=None,
        ignore_index=_check.NO_LABEL,
        check_labels="auto",
        smoothing=0.0,
        z_loss=0.0,
        cap=None,  # see _typed.capped
        gamma=0.0,  # of a focal loss
    ):
        self.logits, self.axis, self.x = logits, axis, _check.class_axis_last(logits, axis)
        shape = self.x.shape
        self.shape, self.classes = shape[:-1], shape[-1]
        self.y, self.dense, self.given, self.name = y, dense, given, name
        self.weights, self.class_weights, self.ignore_index = weights, class_weights, ignore_index
        self.check_labels, self.smoothing, self.z_loss, self.cap = check_labels, smoothing, z_loss, cap
        self.gamma, self.plain = gamma, dense is None and smoothing == 0 and z_loss == 0

    def arrays(self):
        """What is read row by row, with the classes in the last axis."""
        return [self.x] if self.dense is None else [self.x, _check.class_axis_last(self.dense, self.axis, self.name)]

    def factors(self):
        """Labels, weights, class weights and ignore_index by which totals weigh the loss of a row."""
        return self.y, self.weights, self.class_weights if self.plain else None, self.ignore_index

    def raise_bad_label(self):
        _check.raise_bad_label(self.given, self.classes, self.weights, self.ignore_index, self.name)


def labelled(logits, labels, axis, name, check_labels, weights=None, **options):
    """Rows with integer labels."""
    _check.choice(check_labels, "check_labels", ("auto", "raise", "nan"))
    q = Rows(logits, axis, name=name, weights=weights, check_labels=check_labels, **options)
    q.y, q.given = _check.labels(labels, q.shape, name, logits)
    return q


def cap_of(softcap, temperature, dtype):
    """What _typed.capped takes, or None where it would change nothing."""
    if softcap is None and temperature == 1:
        return None
    temperature = _check.real(temperature, "temperature", 0.0, above=True)
    if softcap is not None:
        softcap = _check.real(softcap, "softcap", 0.0, above=True)
        return dtype(1 / softcap), dtype(softcap / temperature), dtype(1 / temperature)
    scale = dtype(1 / temperature)
    return dtype(0), scale, dtype(float(1 / Fraction(temperature) - Fraction(float(scale))))


def losses(q, loss=None):
    """The loss of every row, logits' shape without the class axis, in `loss` if that is given; raises for labels out of
    range where asked to."""
    if loss is None:
        loss = array_module(q.x).empty(q.shape, _check.result_dtype(q.x))
    flat, bad = _check.flat(loss), 0
    for begin, end, parts in _check.pieces(*q.arrays(), prepare=_capping(q)):
        bad += _fill_losses(q, parts, begin, end, _check.part(flat, begin, end))
    if q.check_labels == "raise" if is_cupy(q.x) else bad and q.check_labels != "nan":
        q.raise_bad_label()
    if q.gamma != 0:
        kernels_of(q.x, "totals").focal(flat.size, flat.size, flat, q.gamma)
    return loss


def gradients(q, slopes, grad, as_one=False, second=0, loss=None):
    """losses(q, loss); and `grad`, of logits' shape, gets slopes[r] * d loss[r] / d logits. `as_one` differentiates as
    if the labels of a row summed to 1; a `second` that is not 0 gives the diagonal of the Hessian times it instead."""
    if q.y is not None and (q.check_labels == "raise" or (q.check_labels == "auto" and not is_cupy(q.x))):
        q.raise_bad_label()  # before anything is overwritten
    loss = array_module(q.x).empty(q.shape, _check.result_dtype(q.x)) if loss is None else loss
    flat, arrays = _check.flat(loss), q.arrays()
    capped = [] if q.cap is None else [q.x]
    out = _check.class_axis_last(grad, q.axis, "out")
    for begin, end, parts in _check.pieces(*arrays, out, *capped, prepare=_capping(q)):
        slope, row_loss = _check.part(slopes, begin, end), _check.part(flat, begin, end)
        to = parts[0][:2] if capped else parts[len(arrays)][:2]
        if q.gamma != 0:
            _fill_losses(q, parts, begin, end, row_loss)
            kernels_of(q.x, "totals").focal_slopes(end - begin, end - begin, row_loss, q.gamma, slope)
        _fill_gradients(q, parts, begin, end, as_one, second, slope, row_loss, to)
        if capped:
            grads, original, to = parts[0][2].reshape(-1, q.classes), parts[-1][:2], parts[len(arrays)][:2]
            cap = (q.cap[0], q.cap[1] * q.cap[1], q.cap[2]) if second else q.cap
            kernels_of(q.x, "elements").uncap(grads.size, end - begin, grads, *original, cap, *to)
    if q.gamma != 0:
        kernels_of(q.x, "totals").focal(flat.size, flat.size, flat, q.gamma)
    return loss


def _capping(q):
    """What makes a piece of the logits ready, for _check.pieces; None for nothing."""
    if q.cap is None:
        return None

    def prepare(x):
        out = array_module(x).empty(x.shape, _check.result_dtype(x))
        rows = _check.by_rows(out)
        kernels_of(x, "elements").cap(out.size, len(rows), *_check.readable(x), q.cap, rows)
        return out

    return prepare


def _fill_losses(q, parts, begin, end, loss):
    """loss = that of rows [begin, end); returns how many labels are out of range, which on a device is not known."""
    like, rows, _ = parts[0]
    n, y, weights = end - begin, _check.part(q.y, begin, end), _check.part(q.weights, begin, end)
    if q.plain:
        family = kernels_of(q.x, "softmax")
        kernel = family.narrow_sparse_xent if q.classes <= family.NARROW else family.sparse_xent
        return kernel(n * q.classes, n, like, rows, y, weights, q.ignore_index, loss)
    family, targets = kernels_of(q.x, "dense"), _targets(q, parts, y)
    return family.dense_xent(n * q.classes, n, like, rows, *targets, weights, q.z_loss, loss)


def _fill_gradients(q, parts, begin, end, as_one, second, slopes, loss, grad):
    """As _fill_losses; and the gradient goes to `grad`, (like, rows)."""
    like, rows, _ = parts[0]
    n, y, weights = end - begin, _check.part(q.y, begin, end), _check.part(q.weights, begin, end)
    if q.plain and not second:
        family = kernels_of(q.x, "softmax")
        kernel = family.narrow_sparse_xent_grad if q.classes <= family.NARROW else family.sparse_xent_grad
        return kernel(n * q.classes, n, like, rows, y, weights, q.ignore_index, slopes, loss, *grad)
    family, targets = kernels_of(q.x, "dense"), _targets(q, parts, y)
    return family.dense_xent_grad(
        n * q.classes, n, like, rows, *targets, weights, q.z_loss, as_one, second, slopes, loss, *grad
    )


def _targets(q, parts, y):
    """Targets and class weights as the dense kernels take them."""
    keep, rest = 1.0 - q.smoothing, q.smoothing / q.classes
    if q.dense is None:
        return (y, keep, rest, q.ignore_index), _class_weights(q)
    return (parts[1][0], *parts[1][1], keep, rest), _class_weights(q)


def _class_weights(q):
    """In the precision of the losses."""
    if q.class_weights is None:
        return None
    return array_module(q.x).ascontiguousarray(q.class_weights, _check.result_dtype(q.x))


# -- reductions --------------------------------------------------------------------------------------------------


def reduced(q, loss, reduction):
    """A mean or sum of the losses, or the losses weighted, in place."""
    by_class = q.plain and q.class_weights is not None
    if reduction == "none" and q.weights is None and not by_class:
        return _check.result(loss)
    totals, flat = kernels_of(loss, "totals"), _check.flat(loss)
    if reduction == "mean":
        divisor = _check.FACTORS if q.plain else _check.CLASS_FACTORS
        return totals.total(flat, q.y, q.weights, q.class_weights if q.dense is None else None, q.ignore_index, divisor)
    if reduction == "sum":
        return totals.total(flat, *q.factors(), _check.NOTHING)
    totals.scale(flat.size, flat.size, flat, *q.factors())
    return _check.result(loss)


def divisor_of(q):
    """What a mean divides by, float64, (1,)."""
    unread = array_module(q.x).empty(math.prod(q.shape), np.float64)
    factors = q.y, q.weights, q.class_weights if q.dense is None else None, q.ignore_index
    return kernels_of(q.x, "totals").total(unread, *factors, _check.FACTORS_ALONE).reshape(1)


def slopes_of(q, upstream, divisor):
    """d(result) / d(loss of a row), float64; `divisor` a number for each row, for all, or None."""
    n = math.prod(q.shape)
    slopes = array_module(q.x).empty(n, np.float64)
    kernels_of(q.x, "totals").slopes(n, n, upstream, *q.factors(), divisor, slopes)
    return slopes


# -- other gradients ---------------------------------------------------------------------------------------------


def weight_gradients(q, loss, upstream, divisor, mean, weights, out):
    """d(result) / d(weights), of losses that are not yet weighted; `mean` is the result if it is a mean, or None."""
    flat = _check.flat(loss)
    grad = array_module(q.x).empty(flat.size, loss.dtype)
    factors = q.y, q.weights, q.class_weights if q.dense is None else None, not q.plain, q.ignore_index
    totals = kernels_of(q.x, "totals")
    totals.weight_slopes(flat.size, flat.size, flat, upstream, divisor, mean, *factors, grad)
    return handed_over(grad.reshape(q.shape), weights, q.logits, out)


def label_gradients(q, slopes, labels, out):
    """d(result) / d(labels): slopes times class weights times lse - x."""
    grad = array_module(q.x).empty(q.x.shape, _check.result_dtype(q.x))
    flat, family = _check.by_rows(grad), kernels_of(q.x, "softmax")
    kernel = family.narrow_normalize if q.classes <= family.NARROW else family.normalize
    for begin, end, parts in _check.pieces(q.x, prepare=_capping(q)):
        kernel((end - begin) * q.classes, end - begin, *parts[0][:2], True, _check.rows_of(flat, begin, end))
    factors = _class_weights(q), q.weights, 1.0 - q.smoothing, slopes
    kernels_of(q.x, "dense").label_slopes(grad.size, len(flat), flat, *factors)
    grad = array_module(q.x).moveaxis(grad, -1, _check.axis_index(q.axis, q.logits.ndim))
    return handed_over(grad, labels, q.logits, out)
