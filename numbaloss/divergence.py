"""Divergences between the softmaxes of two arrays of logits."""

import numpy as np

from . import _check
from ._backend import array_module, kernels, on_its_device


@on_its_device
def kl_divergence(logits_p, logits_q, *, weights=None, axis=-1, reduction="mean"):
    """Kullback-Leibler divergence between two rows of logits, p = softmax(logits_p) and q = softmax(logits_q).

        divergence[i] = weights[i] * sum_j p[i, j] * (log p[i, j] - log q[i, j])

    Neither softmax is stored. The sum is taken of terms that are never negative, so it is right relatively, also for
    rows that hardly differ, and 0 for equal ones. Swap the arguments for the other direction.

    Args:
        logits_p: float16, bfloat16, float32 or float64, with the classes along `axis`. -inf allowed.
        logits_q: the same, of logits_p's shape. Where the dtypes differ both are widened, exactly.
        weights: real numbers, logits' shape without `axis`, or one number. A row of weight 0 is not looked at.
        axis: the class axis.
        reduction: "mean" divides the sum by sum(weights); "sum"; "none".
    Returns:
        A scalar, or logits' shape without `axis` for "none"; float32, or float64 if either dtype is; in nats. +inf
        where q is 0 and p is not; NaN for a row that holds NaN or +inf or nothing but -inf. Error under 4 eps in
        float32; in float64 a row's span in nats may add as many.
    Raises:
        TypeError: a dtype that cannot be scored, NumPy and CuPy arrays mixed.
        ValueError: shapes that do not fit, no classes.
    Source: torch.nn.functional.kl_div with log_target of two log_softmax; differs in taking logits, p first.

    >>> kl_divergence(np.array([[0.0, 0.0]]), np.array([[0.0, 2.0]])).round(4)
    np.float64(0.4338)
    """
    return _reduced("kl", logits_p, logits_q, weights, axis, reduction)


@on_its_device
def js_divergence(logits_p, logits_q, *, weights=None, axis=-1, reduction="mean"):
    """Jensen-Shannon divergence between two rows of logits, p = softmax(logits_p) and q = softmax(logits_q).

        divergence[i] = weights[i] * (KL(p[i] || m[i]) + KL(q[i] || m[i])) / 2,    m = (p + q) / 2

    Symmetric, never negative, at most ln 2, right relatively also for rows that hardly differ, and 0 for equal ones.

    Args:
        logits_p, logits_q, weights, axis, reduction: as for kl_divergence.
    Returns:
        As kl_divergence, but never infinite.
    Raises:
        TypeError, ValueError: as kl_divergence.
    Source: scipy.spatial.distance.jensenshannon, whose square this is; differs in taking logits.

    >>> js_divergence(np.array([[0.0, 0.0]]), np.array([[0.0, -np.inf]])).round(4)
    np.float64(0.2158)
    """
    return _reduced("js", logits_p, logits_q, weights, axis, reduction)


def _reduced(name, logits_p, logits_q, weights, axis, reduction):
    """The divergence of this name, weighted and reduced."""
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    p, q = _check.logits(logits_p, "logits_p"), _check.logits(logits_q, "logits_q")
    kernels("divergence", logits_p=p, logits_q=q, weights=weights)
    weights = _check.weights(weights, _rows_shape(p, q, axis), p, other="logits")
    (loss,) = (x for x in _divergences(p, q, weights, axis, **{name: True}) if x is not None)
    return _total(loss, weights, reduction)


def _total(loss, weights, reduction):
    totals, flat = kernels("totals", loss=loss), _check.flat(loss)
    factors = None, weights, None, _check.NO_LABEL
    if reduction != "none":
        return totals.total(flat, *factors, _check.FACTORS if reduction == "mean" else _check.NOTHING)
    if weights is not None:
        totals.scale(flat.size, flat.size, flat, *factors)
    return _check.result(loss)


def _divergences(p, q, weights, axis, kl=False, reverse=False, js=False):
    """(KL(p || q), KL(q || p), Jensen-Shannon) of each row from one visit, None for those not asked for; 0 for a row of
    weight 0, weights as the kernels read them."""
    family, xp = kernels("divergence", logits_p=p, logits_q=q), array_module(p)
    shape, dtype = _rows_shape(p, q, axis), _common_dtype(p, q)
    x, y = _check.class_axis_last(p, axis), _check.class_axis_last(q, axis)
    fields = [xp.empty(shape, dtype or _check.result_dtype(p)) if wanted else None for wanted in (kl, reverse, js)]
    for begin, end, ((like, rows_p, _), (_, rows_q, _)) in _check.pieces(x, y, dtype=dtype):
        n, part = end - begin, _check.part(weights, begin, end)
        out = [None if field is None else _check.part(_check.flat(field), begin, end) for field in fields]
        family.divergence(2 * n * x.shape[-1], n, like, rows_p, rows_q, n, part, *out)
    return fields


def _rows_shape(p, q, axis):
    shape = _check.class_axis_last(p, axis, "logits_p").shape[:-1]
    _check.same_shape(q, "logits_q", p.shape, "logits_p")
    return shape


def _common_dtype(p, q):
    """The dtype that logits of different dtypes are widened to, None for those of one."""
    if p.dtype.newbyteorder("=") == q.dtype.newbyteorder("="):
        return None
    return np.result_type(_check.result_dtype(p), _check.result_dtype(q))


# -- gradients, as grad.py wants them --------------------------------------------------------------------------------


def _kl_grad(upstream, out, **arguments):
    return _value_and_grad("kl_grad", upstream, out, **arguments)


def _js_grad(upstream, out, **arguments):
    return _value_and_grad("js_grad", upstream, out, **arguments)


def _value_and_grad(name, upstream, out, logits_p, logits_q, weights, axis, reduction):
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    given = {"logits_p": _check.logits(logits_p, "logits_p"), "logits_q": _check.logits(logits_q, "logits_q")}
    p, q = given.values()
    outs = {f"out of {k}": v for k, v in out.items()}
    family = kernels("divergence", **given, weights=weights, upstream=upstream, **outs)
    shape, xp = _rows_shape(p, q, axis), array_module(p)
    weights = _check.weights(weights, shape, p, other="logits")
    grads = {k: _check.gradient(v, given[k], axis) for k, v in out.items()}
    upstream = _check.upstream(upstream, shape if reduction == "none" else (), p)
    totals, n = kernels("totals", logits=p), int(np.prod(shape))
    factors, slopes, divisor = (None, weights, None, _check.NO_LABEL), xp.empty(n, np.float64), None
    if reduction == "mean":
        divisor = totals.total(slopes, *factors, _check.FACTORS_ALONE).reshape(1)  # without a look at the slopes
    totals.slopes(n, n, upstream, *factors, divisor, slopes)
    loss = _sloped(getattr(family, name), given, weights, axis, slopes, grads)
    return _total(loss, weights, reduction), grads


def _sloped(kernel, given, weights, axis, slopes, grads):
    """The divergence of every row; `grads`, by name, get slopes[r] times its slopes."""
    dtype = _common_dtype(*given.values())
    x, y = (_readable(_check.class_axis_last(z, axis), dtype) for z in given.values())
    loss = array_module(x).empty(x.shape[:-1], _check.result_dtype(x))
    into = {
        k: g
        if _check.result_dtype(g) == loss.dtype or g.itemsize == 2 and loss.itemsize == 4
        else array_module(g).empty(g.shape, loss.dtype)
        for k, g in grads.items()
    }
    if loss.size:
        (like, rows_p), (_, rows_q) = _check.readable(x), _check.readable(y)
        places = [
            _check.readable(_check.class_axis_last(into[k], axis, "out")) if k in into else (None, None) for k in given
        ]
        kernel(2 * x.size, loss.size, like, rows_p, rows_q, weights, slopes, _check.flat(loss), *places[0], *places[1])
    for k, g in grads.items():
        if into[k] is not g:
            g[...] = into[k]
    return loss


def _readable(x, dtype):
    """x, or a copy that the kernels can read, of this dtype unless it is None."""
    if dtype is None and _check.readable(x) is not None:
        return x
    return x.astype(dtype or x.dtype.newbyteorder("="), order="C")
