"""Dask arrays: the functions of this package on blocks of rows, lazily.

A row's result takes that row alone, so blocks of rows can be computed anywhere, with the functions' own bits. Sums over
rows are taken of the losses of all rows at once, so that chunks and workers do not show in them either. The classes of
a row are brought into one chunk.
"""

import inspect
import math
from functools import partial
from operator import itemgetter

import dask
import dask.array as da
import numpy as np

from . import _check, _xent, divergence, sequence
from ._backend import array_module, is_cupy, is_dask, on_its_device
from .sigmoid import (
    _labels,
    sigmoid_cross_entropy_with_logits,
    sigmoid_focal_cross_entropy_with_logits,
    weighted_cross_entropy_with_logits,
)
from .softmax import (
    TokenScores,
    _axis,
    _cross_entropy_rows,
    _focal_rows,
    cross_entropy,
    focal_loss,
    log_softmax,
    logsumexp,
    score_tokens,
    softmax,
    softmax_cross_entropy_with_logits,
    sparse_softmax_cross_entropy_with_logits,
    token_logprobs,
)
from .totals import Evaluation

MERGED = 16  # Evaluations by one task


def call(function, args, options):
    """function(*args, **options), a public function of this package, where a Dask array is among the arguments."""
    given = inspect.signature(function).bind(*args, **options).arguments
    if function not in _LAZY:
        name = next(name for name, x in given.items() if is_dask(x))
        raise TypeError(
            f"{name}: expected a NumPy or CuPy array, got a Dask array; compute it, or call the function on its blocks"
        )
    return _LAZY[function](function, **given)


# -- blocks ------------------------------------------------------------------------------------------------------


def _array(x, name, logits):
    """x as a Dask array whose chunks are known, or a number that counts for all rows."""
    if not is_dask(x):
        x = _check.number_array(x, name, logits._meta)
        return x if x.ndim == 0 else da.from_array(x, chunks=-1, asarray=False)
    if any(map(math.isnan, x.shape)):
        raise ValueError(f"{name}: expected chunks of known sizes, got shape {x.shape}; call compute_chunk_sizes()")
    return x


def _logits(x, axis=-1, name="logits"):
    """x as a Dask array with the classes in its last axis."""
    if not is_dask(x):
        x = da.from_array(_check.logits(x, name), chunks=-1, asarray=False)
    return _array(_check.class_axis_last(x, axis, name), name, x)


def _rows_of(logits, **arrays):
    """Arrays with an item a row, those of None left out."""
    found = {name: _array(x, name, logits) for name, x in arrays.items() if x is not None}
    for name, x in found.items():
        if x.ndim or is_dask(x):
            _check.same_shape(x, name, logits.shape[:-1], "logits", logits)
    return found


def _apply(function, names, numbers, *blocks):
    """function of blocks, by name; of classes that the result has not, dask gives a list of one, which is no copy."""
    blocks = [x[0] if isinstance(x, list) else x for x in blocks]
    result = function(**dict(zip(names, blocks)), **numbers)
    return tuple(x for x in result if x is not None) if isinstance(result, tuple) else result


def _split(arrays):
    """(those that have blocks, numbers for all)"""
    return {k: x for k, x in arrays.items() if is_dask(x)}, {k: x for k, x in arrays.items() if not is_dask(x)}


def _by_rows(function, arrays, classes=0, kept=False):
    """What function(**arrays) gives, from blocks of rows; the first `classes` arrays hold classes in their last axis,
    and so does the result if they are kept. Wrong dtypes and options raise here, on arrays without rows."""
    blocks, numbers = _split(arrays)
    run = partial(_apply, function, tuple(blocks), numbers)
    samples, pairs = [], []
    axes = tuple(range(max(x.ndim for x in blocks.values())))
    rows = axes[:-1] if classes and not kept else axes
    for i, x in enumerate(blocks.values()):
        shape = (0,) * x.ndim
        if i < classes:
            shape, x = (*shape[1:], x.shape[-1]), x.rechunk({x.ndim - 1: -1})
        samples.append(array_module(x._meta).zeros(shape, x.dtype))
        pairs += [x, axes if i < classes else rows[len(rows) - x.ndim :]]
    sample = run(*samples)
    results = sample if isinstance(sample, tuple) else (sample,)
    metas = [array_module(x).empty((0,) * len(rows), x.dtype) for x in results]
    lazy = da.blockwise(run, rows, *pairs, meta=metas[0])
    if not isinstance(sample, tuple):
        return lazy
    return [da.blockwise(itemgetter(i), rows, lazy, rows, meta=meta) for i, meta in enumerate(metas)]


def _total(function, kept, arrays):
    """What function(**arrays) gives of whole arrays of one shape; axes that are kept may be in pieces."""
    blocks, numbers = _split(arrays)
    first = next(iter(blocks.values()))
    axes = tuple(range(first.ndim))
    run = partial(_apply, function, tuple(blocks), numbers)
    pairs = [z for x in blocks.values() for z in (x, axes)]
    meta = array_module(first._meta).empty((0,) * len(kept), first.dtype)
    return da.blockwise(run, kept, *pairs, concatenate=True, meta=meta)


# -- by function -------------------------------------------------------------------------------------------------


def _cross_entropy(function, logits, targets, weights=None, class_weights=None, axis=-1, reduction="mean", **options):
    """cross_entropy and focal_loss."""
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    if is_dask(class_weights):
        raise TypeError("class_weights: expected an array in memory, got a Dask array")
    options["class_weights"] = class_weights
    x = _logits(logits, axis)
    y, rows = _array(targets, "targets", x), _rows_of(x, weights=weights)
    dense = y.dtype.kind not in "iub"
    if dense:
        y = _logits(y, axis, "targets")
        _check.same_shape(y, "targets", x.shape, "logits")
    else:
        rows |= _rows_of(x, targets=y)
    arrays = {"logits": x, **({"targets": y} if dense else {}), **rows}
    if reduction == "none":
        return _by_rows(partial(function, reduction="none", **options), arrays, 1 + dense)
    values = _by_rows(partial(_row_losses, function, **options), arrays, 1 + dense)
    total = partial(_row_total, function, reduction, x.dtype, x.shape[-1], **options)
    return _total(total, (), {"values": values, **rows})


def _xent_rows(loss, **arguments):
    """The _xent.Rows of a call of cross_entropy or focal_loss."""
    bound = inspect.signature(loss).bind(**arguments)
    bound.apply_defaults()
    bound.arguments.pop("reduction")
    return (_focal_rows if loss is focal_loss else _cross_entropy_rows)(**bound.arguments)


@on_its_device
def _row_losses(loss, **arguments):
    return _check.result(_xent.losses(_xent_rows(loss, **arguments)))


@on_its_device
def _row_total(loss, reduction, dtype, classes, values, **arguments):
    values = array_module(values).asarray(values)
    unread = array_module(values).broadcast_to(array_module(values).zeros((), dtype), (*values.shape, classes))
    arguments.setdefault("targets", unread)
    return _xent.reduced(_xent_rows(loss, logits=unread, **arguments), values, reduction)


def _labelled(function, logits, axis=-1, **options):
    """sparse_softmax_cross_entropy_with_logits, token_logprobs and score_tokens."""
    name = "labels" if "labels" in options else "targets"
    x = _logits(logits, axis)
    rows = _rows_of(x, **{name: options.pop(name)})
    found = _by_rows(partial(function, **options), {"logits": x, **rows}, 1)
    if function is not score_tokens:
        return found
    wanted = [True, True, True, options.get("rank", False), options.get("entropy", False)]
    fields = iter(found)
    return TokenScores(*[next(fields) if want else None for want in wanted])


def _dense(function, labels, logits, axis=-1, name=None, dim=None):
    """softmax_cross_entropy_with_logits."""
    axis = _axis(axis, dim)
    whole = _logits(logits)
    labels = _array(labels, "labels", whole)
    try:
        labels = da.broadcast_to(labels, whole.shape)
    except ValueError:
        raise ValueError(
            f"labels: expected a shape that broadcasts to logits {whole.shape}, got {labels.shape}"
        ) from None
    return _by_rows(function, {"logits": _logits(logits, axis), "labels": _logits(labels, axis, "labels")}, 2)


def _normalized(function, logits, axis=-1, name=None):
    """softmax and log_softmax."""
    found = _by_rows(function, {"logits": _logits(logits, axis)}, 1, kept=True)
    return da.moveaxis(found, -1, _check.axis_index(axis, found.ndim))


def _logsumexp(function, logits, axis=-1, keepdims=False):
    x = _logits(logits, axis)
    found = _by_rows(function, {"logits": x}, 1)
    return da.expand_dims(found, _check.axis_index(axis, x.ndim)) if keepdims else found


def _elements(function, labels=None, logits=None, pos_weight=None, name=None, targets=None, **options):
    """The sigmoid family."""
    labels = _labels(labels, targets)
    for x, what in ((labels, "labels"), (logits, "logits")):
        if x is None:
            raise ValueError(f"{what}: expected an array, got None")
    x = logits if is_dask(logits) else da.from_array(_check.logits(logits), chunks=-1, asarray=False)
    x = _array(x, "logits", x)
    arrays = {"logits": x, "labels": _array(labels, "labels", x)}
    _check.same_shape(arrays["labels"], "labels", x.shape, "logits")
    if pos_weight is not None:
        w = arrays["pos_weight"] = _array(pos_weight, "pos_weight", x)
        try:
            fits = np.broadcast_shapes(w.shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"pos_weight: expected a shape that broadcasts to logits {x.shape}, got {w.shape}")
    return _by_rows(partial(function, **options), arrays)


def _divergence(function, logits_p, logits_q, weights=None, axis=-1, reduction="mean"):
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    p, q = _logits(logits_p, axis, "logits_p"), _logits(logits_q, axis, "logits_q")
    _check.same_shape(q, "logits_q", p.shape, "logits_p")
    rows = _rows_of(p, weights=weights)
    arrays = {"logits_p": p, "logits_q": q, **rows}
    if reduction == "none":
        return _by_rows(partial(function, reduction="none"), arrays, 2)
    values = _by_rows(partial(_row_divergences, function.__name__[:2]), arrays, 2)
    return _total(partial(_divergence_total, reduction), (), {"values": values, **rows})


@on_its_device
def _row_divergences(kind, logits_p, logits_q, weights=None):
    p, q = _check.logits(logits_p, "logits_p"), _check.logits(logits_q, "logits_q")
    weights = _check.weights(weights, p.shape[:-1], p, other="logits")
    (values,) = (x for x in divergence._divergences(p, q, weights, -1, **{kind: True}) if x is not None)
    return _check.result(values)


@on_its_device
def _divergence_total(reduction, values, weights=None):
    values = array_module(values).asarray(values)
    return divergence._total(values, _check.weights(weights, values.shape, values, other="logits"), reduction)


def _sequence(function, logits, targets, weights, softmax_loss_function=None, name=None, **flags):
    names = "average_across_timesteps", "average_across_batch", "sum_over_timesteps", "sum_over_batch"
    flags = [flags.get(flag, default) for flag, default in zip(names, (True, True, False, False))]
    rule = sequence._rule(*flags)
    x = _logits(logits)
    if x.ndim != 3:
        raise ValueError(f"logits: expected shape [batch, time, classes], got {x.shape}")
    y = _array(targets, "targets", x)
    dense = y.ndim == 3
    _check.same_shape(y, "targets", x.shape if dense else x.shape[:2], "logits", None if dense else x)
    rows = _rows_of(x, weights=weights)
    if rows["weights"].ndim != 2:
        _check.same_shape(rows["weights"], "weights", x.shape[:2], "logits", x)
    arrays = {"logits": x, "targets": y, **rows}
    if rule is None:
        flags = dict(zip(names, flags))
        run = partial(function, softmax_loss_function=softmax_loss_function, **flags)
        return _by_rows(run, arrays, 1 + dense)
    values = _by_rows(partial(_sequence_losses, softmax_loss_function), arrays, 1 + dense)
    kept = () if rule[0] is None else (rule[0],)
    return _total(partial(_sequence_total, rule), kept, {"values": values, **rows})


@on_its_device
def _sequence_losses(function, logits, targets, weights):
    return sequence._losses(*sequence._checked(logits, targets, weights), function)


@on_its_device
def _sequence_total(rule, values, weights):
    return sequence._reduced(values, _check.weights(weights, values.shape, values), rule)


def _update(function, self, logits, targets, weights=None):
    """Evaluation.update: at once, in an Evaluation for each block."""
    x = _logits(logits)
    blocks, numbers = _split({"logits": x.rechunk({x.ndim - 1: -1}), **_rows_of(x, targets=targets, weights=weights)})
    axes = tuple(range(x.ndim))
    pairs = [z for name, a in blocks.items() for z in (a, axes if name == "logits" else axes[:-1])]
    _, aligned = da.core.unify_chunks(*pairs)
    parts = [a.to_delayed().ravel() for a in aligned]
    evaluate = dask.delayed(partial(_evaluate, self.ignore_index, tuple(blocks), numbers))
    found = [evaluate(*block) for block in zip(*parts)]
    while len(found) > 1:
        found = [dask.delayed(_merged)(found[i : i + MERGED]) for i in range(0, len(found), MERGED)]
    return self.merge(found[0].compute()) if found else self


def _evaluate(ignore_index, names, numbers, *blocks):
    found = Evaluation(ignore_index=ignore_index).update(**dict(zip(names, blocks)), **numbers)
    found._words = _check.on_host(found._words) if is_cupy(found._words) else found._words
    return found


def _merged(evaluations):
    found = Evaluation(ignore_index=evaluations[0].ignore_index)
    for other in evaluations:
        found.merge(other)
    return found


_LAZY = {
    cross_entropy: _cross_entropy,
    focal_loss: _cross_entropy,
    sparse_softmax_cross_entropy_with_logits: _labelled,
    token_logprobs: _labelled,
    score_tokens: _labelled,
    softmax_cross_entropy_with_logits: _dense,
    softmax: _normalized,
    log_softmax: _normalized,
    logsumexp: _logsumexp,
    sigmoid_cross_entropy_with_logits: _elements,
    weighted_cross_entropy_with_logits: _elements,
    sigmoid_focal_cross_entropy_with_logits: _elements,
    divergence.kl_divergence: _divergence,
    divergence.js_divergence: _divergence,
    sequence.sequence_loss: _sequence,
    Evaluation.update: _update,
}
