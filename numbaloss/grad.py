"""Gradients of the losses, in the same pass as their values."""

import inspect
from functools import wraps

import numpy as np

from . import _check, _xent
from ._backend import array_module, kernels, on_its_device
from .divergence import _js_grad, _kl_grad, js_divergence, kl_divergence
from .linear import _linear_gradients, linear_cross_entropy
from .sequence import _for_steps, _sequence_rows, sequence_loss
from .sequence import _reduced as _reduced_sequence
from .sigmoid import (
    _focal_grad,
    _focal_hess,
    _sigmoid_grad,
    _sigmoid_hess,
    _weighted_grad,
    _weighted_hess,
    sigmoid_cross_entropy_with_logits,
    sigmoid_focal_cross_entropy_with_logits,
    weighted_cross_entropy_with_logits,
)
from .softmax import (
    _cross_entropy_rows,
    _dense_rows,
    _focal_rows,
    _sparse_rows,
    cross_entropy,
    focal_loss,
    softmax_cross_entropy_with_logits,
    sparse_softmax_cross_entropy_with_logits,
)


def value_and_grad(loss, wrt="logits", *, derivative=None):
    """A function that gives the value of a loss and its gradient.

        value, grad = value_and_grad(loss)(*args, upstream=None, out=None, **options)

    It takes what the loss takes. The value has the loss's own bits. A row of logits is read from memory once and its
    gradient written once. The target's entry comes without cancellation: it is right relatively, however small.

    Args:
        loss: a loss of this package.
        wrt: an argument's name, or a tuple of names: what the loss is differentiated by. "logits"; "weights", where
            there are any; "labels", where they are real numbers, or "targets"; "pos_weight"; "logits_p", "logits_q";
            "hidden", "weight", "bias" of linear_cross_entropy.
        derivative: "tensorflow" or "true", for softmax_cross_entropy_with_logits alone, whose gradient in TensorFlow is
            softmax - labels also where the labels of a row do not sum to 1; the true derivative is then
            sum(labels) * softmax - labels. TensorFlow's unless given. (sequence_loss has TensorFlow's, cross_entropy
            the true one.)
    The function takes, besides the loss's own arguments:
        upstream: real numbers that broadcast to the loss: the gradient is that of sum(upstream * loss).
        out: where the gradient goes, of the argument's shape and dtype (or float32 for 16 bits); for a tuple of names a
            tuple, with None for a new array. May be the logits themselves, which then are overwritten, and only then.
    Returns:
        (value, gradient), the gradient of the argument's shape and dtype (float32, or float64 for float64 logits, for
        an argument that is not an array of floats), or a tuple of gradients. Zeros for rows that do not count, NaN for
        rows without a softmax or with a label out of range. Error under 4 eps of the row's largest entry, and of the
        target's own entry; with options of cross_entropy 8 eps; in 16 bits rounded once more,
        and in bfloat16 0 below about 2^-126.
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
    fixed = {}
    if loss is softmax_cross_entropy_with_logits:
        fixed["as_one"] = _check.choice(derivative, "derivative", (None, "tensorflow", "true")) != "true"
    elif derivative is not None:
        raise ValueError(f"derivative: expected None for {loss.__name__}, got {derivative!r}")
    bind = _binding(loss)

    @wraps(loss)
    @on_its_device
    def run(*args, upstream=None, out=None, **options):
        arguments = bind(args, options)
        if isinstance(wrt, str):
            outs = (out,)
        elif out is None:
            outs = (None,) * len(names)
        elif isinstance(out, tuple) and len(out) == len(names):
            outs = out
        else:
            raise TypeError(f"out: expected a tuple of {len(names)} arrays or None, as wrt is one, got {out!r:.60}")
        value, grads = gradient(upstream, dict(zip(names, outs)), **fixed, **arguments)
        return value, grads[wrt] if isinstance(wrt, str) else tuple(grads[name] for name in names)

    return run


def value_grad_hess(loss, hessian="diagonal"):
    """A function that gives the value of a loss, its gradient and the diagonal of its Hessian by the logits.

        value, grad, hess = value_grad_hess(loss)(*args, upstream=None, **options)

    It takes what the loss takes. Value and gradient have the bits of the loss and of value_and_grad. numbaloss.boosting
    makes objectives of it.

    Args:
        loss: cross_entropy (without softcap) or one of TensorFlow's but for sequence_loss, or
            sigmoid_focal_cross_entropy_with_logits.
        hessian: "diagonal"; or, for the softmax family, "upper_bound", which is 2 p (1 - p) in place of p (1 - p) and
            bounds the whole Hessian, off its diagonal too.
        upstream: real numbers that broadcast to the loss: derivatives are those of sum(upstream * loss). Where it is
            exactly 0, so are the sigmoid family's, whatever the element holds.
    Returns:
        (value, gradient, Hessian), all of logits' shape; the Hessian float32, or float64 for float64 logits. It is
        negative where a focal loss is concave. Error under 4 eps (focal: of its terms' magnitudes).
    Raises:
        TypeError, ValueError: as the loss; an upstream that does not broadcast to the loss.
    Source: the pairs (gradient, Hessian) that XGBoost and LightGBM ask for; Böhning 1992, "Multinomial logistic
    regression algorithm", for the bound.

    >>> x = np.array([0.0, 2.0])
    >>> [a.round(3) for a in value_grad_hess(sigmoid_cross_entropy_with_logits)([1, 0], x)]
    [array([0.693, 2.127]), array([-0.5  ,  0.881]), array([0.25 , 0.105])]
    """
    if loss not in _HESSIANS:
        expected = ", ".join(f.__name__ for f in _HESSIANS)
        raise TypeError(f"loss: expected one of {expected}, got {getattr(loss, '__name__', loss)!r}")
    bind = _binding(loss)

    @wraps(loss)
    @on_its_device
    def run(*args, upstream=None, **options):
        return _HESSIANS[loss](upstream, hessian, **bind(args, options))

    return run


def _binding(loss):
    """f(args, options) -> all arguments of loss(*args, **options) by their names; raises as that call would. For what
    fits, Signature.bind gives the same, in ten times the time."""
    signature = inspect.signature(loss)
    parameters = signature.parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]

    def bind(args, options):
        given = {**dict(zip(positional, args)), **options}
        arguments = {**defaults, **given}
        if len(given) != len(args) + len(options) or arguments.keys() != signature.parameters.keys():
            signature.bind(*args, **options)
        return arguments

    return bind


# -- by loss: f(upstream, out, **arguments of the loss) -> (value, {name: gradient}), the keys of `out` being the wanted
# names and its values arrays or None


def _cross_entropy(upstream, out, reduction, **arguments):
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    return _reduced(_cross_entropy_rows(**arguments), reduction, upstream, out, **arguments)


def _focal(upstream, out, reduction, **arguments):
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    return _reduced(_focal_rows(**arguments), reduction, upstream, out, **arguments)


def _softmax_cross_entropy(upstream, out, as_one, labels, logits, axis, name, dim):
    q = _dense_rows(labels, logits, axis, dim)
    return _reduced(q, "none", upstream, out, as_one, labels=labels)


def _sparse_softmax_cross_entropy(upstream, out, labels, logits, name, check_labels):
    return _reduced(_sparse_rows(labels, logits, check_labels), "none", upstream, out)


def _reduced(q, reduction, upstream, out, as_one=False, **arguments):
    """(value, gradients) of losses that are reduced as cross_entropy's."""
    _same_kind(q, upstream, out)
    upstream = _check.upstream(upstream, q.shape if reduction == "none" else (), q.logits)
    divisor = _xent.divisor_of(q) if reduction == "mean" else None

    def value_of(loss):
        value = _xent.reduced(q, loss, reduction)
        return value, value.reshape(1) if reduction == "mean" else None

    return _gradients(q, value_of, upstream, divisor, out, as_one, arguments)


def _sequence_loss(upstream, out, logits, targets, weights, softmax_loss_function, name, **flags):
    if softmax_loss_function is not None:
        raise ValueError("softmax_loss_function: expected None for a gradient, got a function")
    q, rule, divisor = _sequence_rows(logits, targets, weights, **flags)
    _same_kind(q, upstream, out)
    shape = q.shape if rule is None else () if rule[0] is None else (q.shape[rule[0]],)
    upstream = _for_steps(_check.upstream(upstream, shape, q.logits), rule, q.shape)

    def value_of(loss):
        value = _reduced_sequence(loss, q.weights, rule)
        averages = rule is not None and rule[1] == _check.FACTORS_OR_NONE
        return value, _for_steps(array_module(loss).reshape(value, -1), rule, q.shape) if averages else None

    arguments = {"targets": targets, "weights": weights}
    return _gradients(q, value_of, upstream, divisor, out, True, arguments)  # TensorFlow's derivative


def _same_kind(q, upstream, out):
    """Raise where NumPy and CuPy arrays are mixed."""
    outs = {f"out ({name})": x for name, x in out.items() if x is not None}
    kernels("softmax", logits=q.logits, upstream=upstream, **outs)


def _gradients(q, value_of, upstream, divisor, out, as_one, arguments):
    """value_of(losses) and the gradients by the names in `out`; `upstream` and `divisor` a number a row, for all, or
    None. value_of gives the value, and what it is a mean of or None."""
    targets = [name for name in out if name in ("labels", "targets")]
    if targets and q.dense is None:
        raise TypeError(f"{targets[0]}: expected class probabilities for a gradient, got dtype {q.given.dtype}")
    grads = {}
    for name, x in out.items():
        if name == "logits":
            grads[name] = _check.gradient(x, q.logits, q.axis)
        else:
            grads[name] = _check.output(x, q.logits, name, _check.differentiable(arguments[name], name))
    slopes = _xent.slopes_of(q, upstream, divisor)
    for name in targets:  # before the logits may be overwritten
        grads[name] = _xent.label_gradients(q, slopes, arguments[name], grads[name])
    loss = _xent.gradients(q, slopes, grads["logits"], as_one) if "logits" in out else _xent.losses(q)
    rows = array_module(loss).array(loss) if "weights" in out else None
    value, mean = value_of(loss)
    if "weights" in out:
        weights = arguments["weights"]
        grads["weights"] = _xent.weight_gradients(q, rows, upstream, divisor, mean, weights, grads["weights"])
    return value, grads


_GRADIENTS = {
    cross_entropy: (("logits", "weights", "targets"), _cross_entropy),
    focal_loss: (("logits", "weights"), _focal),
    linear_cross_entropy: (("hidden", "weight", "bias"), _linear_gradients),
    softmax_cross_entropy_with_logits: (("logits", "labels"), _softmax_cross_entropy),
    sparse_softmax_cross_entropy_with_logits: (("logits",), _sparse_softmax_cross_entropy),
    sequence_loss: (("logits", "weights", "targets"), _sequence_loss),
    sigmoid_cross_entropy_with_logits: (("logits", "labels"), _sigmoid_grad),
    weighted_cross_entropy_with_logits: (("logits", "labels", "pos_weight"), _weighted_grad),
    sigmoid_focal_cross_entropy_with_logits: (("logits", "labels"), _focal_grad),
    kl_divergence: (("logits_p", "logits_q"), _kl_grad),
    js_divergence: (("logits_p", "logits_q"), _js_grad),
}


# -- by loss: f(upstream, hessian, **arguments of the loss) -> (value, gradient and Hessian by the logits)


def _cross_entropy_hess(upstream, hessian, softcap, **arguments):
    if softcap is not None:
        raise ValueError(f"softcap: expected None for a Hessian, got {softcap!r}")
    value, grads = _cross_entropy(upstream, {"logits": None}, softcap=None, **arguments)
    reduction = arguments.pop("reduction")
    return value, grads["logits"], _hess(_cross_entropy_rows(**arguments), reduction, upstream, hessian)


def _softmax_cross_entropy_hess(upstream, hessian, labels, logits, axis, name, dim):
    value, grads = _softmax_cross_entropy(upstream, {"logits": None}, False, labels, logits, axis, name, dim)
    return value, grads["logits"], _hess(_dense_rows(labels, logits, axis, dim), "none", upstream, hessian)


def _sparse_softmax_cross_entropy_hess(upstream, hessian, labels, logits, name, check_labels):
    value, grads = _sparse_softmax_cross_entropy(upstream, {"logits": None}, labels, logits, name, check_labels)
    return value, grads["logits"], _hess(_sparse_rows(labels, logits, check_labels), "none", upstream, hessian)


def _hess(q, reduction, upstream, hessian):
    """The diagonal of the Hessian of losses that are reduced as cross_entropy's."""
    _check.choice(hessian, "hessian", ("diagonal", "upper_bound"))
    upstream = _check.upstream(upstream, q.shape if reduction == "none" else (), q.logits)
    slopes = _xent.slopes_of(q, upstream, _xent.divisor_of(q) if reduction == "mean" else None)
    hess = _check.like_logits(q.logits, np.dtype(_check.result_dtype(q.logits)), q.axis)
    _xent.gradients(q, slopes, hess, second=1 if hessian == "diagonal" else 2)
    return hess


_HESSIANS = {
    cross_entropy: _cross_entropy_hess,
    softmax_cross_entropy_with_logits: _softmax_cross_entropy_hess,
    sparse_softmax_cross_entropy_with_logits: _sparse_softmax_cross_entropy_hess,
    sigmoid_cross_entropy_with_logits: _sigmoid_hess,
    weighted_cross_entropy_with_logits: _weighted_hess,
    sigmoid_focal_cross_entropy_with_logits: _focal_hess,
}
