"""Gradients of the losses, in the same pass as their values."""

import inspect
from functools import wraps

import numpy as np

from . import _check
from ._backend import array_module, kernels, on_its_device
from .divergence import _js_grad, _kl_grad, js_divergence, kl_divergence
from .softmax import (
    _DEFAULT,
    _IGNORED,
    _sparse_grad,
    cross_entropy,
    sparse_softmax_cross_entropy_with_logits,
)


def value_and_grad(loss, wrt="logits"):
    """A function that gives the value of a loss and its gradient.

        value, grad = value_and_grad(loss)(*args, upstream=None, out=None, **options)

    It takes what the loss takes. The value has the loss's own bits. A row of logits is read from memory once and its
    gradient written once. The target's entry comes without cancellation: it is right relatively, however small.

    Args:
        loss: numbaloss.cross_entropy (with integer targets), sparse_softmax_cross_entropy_with_logits, kl_divergence or
            js_divergence.
        wrt: an argument's name, or a tuple of names: what the loss is differentiated by.
        upstream: real numbers that broadcast to the loss: the gradient is that of sum(upstream * loss).
        out: where the gradient goes, of the argument's shape and dtype (or float32 for 16 bits); for a tuple of names a
            tuple, with None for a new array. May be the logits themselves, which then are overwritten, and only then.
    Returns:
        (value, gradient), the gradient of the argument's shape and dtype, or a tuple of gradients. Zeros for rows that
        do not count, NaN for rows without a softmax or with a label out of range. Error under 4 eps of the row's
        largest entry, and of the target's own entry; in 16 bits rounded once more.
    Raises:
        TypeError, ValueError: as the loss; an upstream that does not broadcast to the loss, an out that does not fit.
    Source: jax.value_and_grad; torch.autograd for the options of cross_entropy.

    >>> x = np.array([[1.0, 2.0, 3.0]])
    >>> value_and_grad(cross_entropy)(x, [2])[1].round(3)
    array([[ 0.09 ,  0.245, -0.335]])
    """
    if loss not in _GRADIENTS:
        expected = ", ".join(f.__name__ for f in _GRADIENTS)
        raise TypeError(f"loss: expected one of {expected}, got {getattr(loss, '__name__', loss)!r}")
    allowed, gradient = _GRADIENTS[loss]
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in names:
        _check.choice(name, "wrt", allowed)
    signature = inspect.signature(loss)

    @wraps(loss)
    @on_its_device
    def run(*args, upstream=None, out=None, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        if isinstance(wrt, str):
            outs = (out,)
        elif out is None:
            outs = (None,) * len(names)
        elif isinstance(out, tuple) and len(out) == len(names):
            outs = out
        else:
            raise TypeError(f"out: expected a tuple of {len(names)} arrays or None, as wrt is one, got {out!r:.60}")
        value, grads = gradient(upstream, dict(zip(names, outs)), **bound.arguments)
        return value, grads[wrt] if isinstance(wrt, str) else tuple(grads[name] for name in names)

    return run


# -- by loss: f(upstream, out, **arguments of the loss) -> (value, {name: gradient}), the keys of `out` being the wanted
# names and its values arrays or None


def _cross_entropy(upstream, out, logits, targets, weights, class_weights, ignore_index, axis, reduction, check_labels):
    logits = _check.logits(logits)
    targets = _check.number_array(targets, "targets", logits)
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integers for a gradient, got dtype {targets.dtype}")
    ignore = _check.integer(_IGNORED if ignore_index is _DEFAULT else ignore_index, "ignore_index")
    options = weights, class_weights, ignore, axis, reduction, check_labels
    value, grad = _sparse(logits, targets, *options, upstream, out["logits"], "targets")
    return value, {"logits": grad}


def _sparse_softmax_cross_entropy(upstream, out, labels, logits, name, check_labels):
    logits = _check.logits(logits)
    labels = _check.number_array(labels, "labels", logits)
    options = None, None, _check.NO_LABEL, -1, "none", check_labels
    value, grad = _sparse(logits, labels, *options, upstream, out["logits"], "labels")
    return value, {"logits": grad}


_GRADIENTS = {
    cross_entropy: (("logits",), _cross_entropy),
    sparse_softmax_cross_entropy_with_logits: (("logits",), _sparse_softmax_cross_entropy),
    kl_divergence: (("logits_p", "logits_q"), _kl_grad),
    js_divergence: (("logits_p", "logits_q"), _js_grad),
}


def _sparse(logits, targets, weights, class_weights, ignore, axis, reduction, check_labels, upstream, out, name):
    """(value, gradient with respect to the logits) of the cross entropy of integer targets."""
    arrays = {"logits": logits, name: targets, "weights": weights, "class_weights": class_weights}
    family = kernels("softmax", **arrays, upstream=upstream, out=out)
    xp, shape = array_module(logits), _check.class_axis_last(logits, axis).shape[:-1]
    _check.choice(check_labels, "check_labels", ("auto", "raise", "nan"))
    weights = _check.weights(weights, shape, logits)
    by_class = _check.class_weights(class_weights, logits.shape[axis], np.float64, logits)
    y, given = _check.labels(targets, shape, name, logits)
    if check_labels == "raise" or (check_labels == "auto" and xp is np):  # before anything is overwritten
        _check.raise_bad_label(given, logits.shape[axis], weights, ignore, name)
    grad = _check.gradient(out, logits, axis)
    upstream = _check.upstream(upstream, shape if reduction == "none" else (), logits)
    totals, factors = kernels("totals", logits=logits), (y, weights, by_class, ignore)
    slopes, divisor, n = xp.empty(int(np.prod(shape)), np.float64), None, int(np.prod(shape))
    if reduction == "mean":
        totals.slopes(n, n, None, *factors, None, slopes)
        divisor = totals.total(slopes, None, None, None, _check.NO_LABEL, _check.NOTHING).reshape(1)
    totals.slopes(n, n, upstream, *factors, divisor, slopes)
    loss = _sparse_grad(family, logits, y, axis, weights, ignore, slopes, grad)
    flat = _check.flat(loss)
    if reduction != "none":
        divided = _check.FACTORS if reduction == "mean" else _check.NOTHING
        return totals.total(flat, *factors, divided), grad
    if weights is not None or class_weights is not None:
        totals.scale(n, n, flat, *factors)
    return _check.result(loss), grad
