"""Every public function in plain float64 NumPy, written to be read. Imports nothing from numbaloss.

A row is one vector of logits. Sums leave out the class they are compared with, so small losses keep their digits;
what special values mean is docs/NUMERICS.md, section 5.
"""

import numpy as np

INF, NAN = np.inf, np.nan


def f64(a):
    return np.asarray(a).astype(np.float64)


def rows_of(logits, axis=-1):
    """(rows, classes) float64, and the shape of one value per row."""
    x = np.moveaxis(f64(logits), axis, -1)
    return x.reshape(int(np.prod(x.shape[:-1], dtype=np.int64)), x.shape[-1]), x.shape[:-1]


def undefined(row):
    """Whether a row has no softmax."""
    return bool(np.isnan(row).any() or (row == INF).any() or (row == -INF).all())


# -- rows ----------------------------------------------------------------------------------------------------------


def row_lse_minus(row, j):
    """logsumexp(row) - row[j], never negative: the loss of the target j."""
    if undefined(row):
        return NAN
    if row[j] == -INF:
        return INF
    difference = np.delete(row, j) - row[j]
    largest = difference.max(initial=-INF)
    if largest <= 0:
        return np.log1p(np.exp(difference).sum())
    return largest + np.log(np.exp(-largest) + np.exp(difference - largest).sum())


def row_lse_minus_all(row):
    """logsumexp(row) - row, for every class."""
    if undefined(row):
        return np.full(row.shape, NAN)
    top = row.argmax()
    loss = (row[top] - row) + np.log1p(np.exp(np.delete(row, top) - row[top]).sum())
    loss[top] = row_lse_minus(row, top)
    return loss


def row_lse(row):
    """As a sum of exponentials it is defined where the softmax is not: -inf for nothing but -inf, +inf beside +inf."""
    return row.max() if undefined(row) else row.max() + row_lse_minus(row, row.argmax())


def row_entropy(row):
    """-sum(p log p); a class at -inf adds 0."""
    loss = row_lse_minus_all(row)
    p = np.exp(-loss)
    return (p * np.where(p == 0, 0, loss)).sum()


# -- softmax family ------------------------------------------------------------------------------------------------


def sparse_losses(logits, labels, axis=-1, ignore=None):
    """-log softmax(logits)[label], 0 where `ignore` (shape of labels) is true, NaN for a label out of range."""
    x, shape = rows_of(logits, axis)
    y = np.asarray(labels).reshape(-1)
    skip = np.zeros(len(y), bool) if ignore is None else np.asarray(ignore).reshape(-1)
    loss = np.zeros(len(y))
    for i in range(len(y)):
        if not skip[i]:
            loss[i] = row_lse_minus(x[i], int(y[i])) if 0 <= int(y[i]) < x.shape[1] else NAN
    return loss.reshape(shape)


def dense_losses(logits, labels, axis=-1, magnitude=False):
    """sum_j labels[j] (lse - logits[j]); a label of exactly 0 adds 0. `magnitude`: with |labels|, to bound errors."""
    labels = np.broadcast_to(f64(labels), np.shape(logits))
    x, shape = rows_of(logits, axis)
    z, _ = rows_of(labels, axis)
    loss = np.zeros(len(x))
    for i in range(len(x)):
        if undefined(x[i]):
            loss[i] = NAN
        else:
            with np.errstate(invalid="ignore"):
                terms = np.where(z[i] == 0, 0, z[i] * row_lse_minus_all(x[i]))
                loss[i] = np.abs(terms).sum() if magnitude else terms.sum()
    return loss.reshape(shape)


def log_softmax(logits, axis=-1):
    x = np.moveaxis(f64(logits), axis, -1)
    out = np.array([-row_lse_minus_all(row) for row in x.reshape(-1, x.shape[-1])] if x.size else [])
    return np.moveaxis(out.reshape(x.shape), -1, axis)


def softmax(logits, axis=-1):
    return np.exp(log_softmax(logits, axis))


def logsumexp(logits, axis=-1, keepdims=False):
    x, shape = rows_of(logits, axis)
    out = np.array([row_lse(row) for row in x]).reshape(shape)
    return np.expand_dims(out, axis) if keepdims else out


def score_tokens(logits, targets, axis=-1, ignore_index=-100):
    """logprob, logsumexp, argmax, rank, entropy."""
    x, shape = rows_of(logits, axis)
    y = np.asarray(targets).reshape(-1)
    columns = []
    for row, label in zip(x, y, strict=True):
        if label == ignore_index:
            columns.append((0, 0, -1, -1, 0))
        else:
            rank = (row > row[label]).sum()
            columns.append((-row_lse_minus(row, label), row_lse(row), np.argmax(row), rank, row_entropy(row)))
    out = np.array(columns, dtype=object).reshape(len(y), 5)
    kinds = (np.float64, np.float64, np.int64, np.int64, np.float64)
    return tuple(out[:, k].astype(kind).reshape(shape) for k, kind in enumerate(kinds))


# -- reductions ----------------------------------------------------------------------------------------------------


def divide(total, divisor):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.float64(total) / np.float64(divisor)


def prepared(logits, softcap=None, temperature=1.0):
    """Logits capped and divided; what is infinite stays."""
    x = f64(logits)
    with np.errstate(invalid="ignore", over="ignore"):
        capped = x / temperature if softcap is None else softcap * np.tanh(x / softcap) / temperature
    return np.where(np.isinf(x), x, capped)


def cross_entropy(
    logits,
    targets,
    weights=None,
    class_weights=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    temperature=1.0,
    axis=-1,
    reduction="mean",
    magnitude=False,
):
    """Integer targets, or class probabilities of the logits' shape; weight 0 and ignore_index hide a row."""
    x, targets = prepared(logits, softcap, temperature), np.asarray(targets)
    classes = np.shape(logits)[axis]
    of_class = np.ones(classes) if class_weights is None else f64(class_weights)
    w = np.ones(np.delete(np.shape(x), axis % x.ndim)) if weights is None else f64(weights)
    if targets.dtype.kind in "iu":
        ignore = (targets == ignore_index) | (w == 0)
        good = (targets >= 0) & (targets < classes)
        scale = np.where(ignore, 0, w)
        divisor = scale * of_class[np.where(good, targets, 0)]
        hot = sparse_losses(x, targets, axis, ignore) * of_class[np.where(good, targets, 0)]
        hot = np.where(of_class[np.where(good, targets, 0)] == 0, 0, hot)
    else:
        scale = divisor = w
        z = np.moveaxis(np.moveaxis(f64(targets), axis, -1) * of_class, -1, axis)
        hot = dense_losses(x, z, axis, magnitude)
    loss = (1 - label_smoothing) * hot if label_smoothing < 1 else np.zeros(hot.shape)
    if label_smoothing:
        shape = [-1 if k == axis % x.ndim else 1 for k in range(x.ndim)]
        loss = loss + label_smoothing / classes * dense_losses(x, of_class.reshape(shape), axis)
    if z_loss:
        loss = loss + z_loss * logsumexp(x, axis) ** 2
    values = np.where(scale == 0, 0, scale * np.where(scale == 0, 0, loss))
    values = np.abs(values) if magnitude else values
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else divide(values.sum(), divisor.sum())


def cross_entropy_gradient(logits, targets, upstream=1.0, reduction="mean", **options):
    """d sum(upstream * cross_entropy) / d logits, the classes last; the logits finite."""
    weights, of_class, e = options.get("weights"), options.get("class_weights"), options.get("label_smoothing", 0.0)
    softcap, temperature, z_loss = options.get("softcap"), options.get("temperature", 1.0), options.get("z_loss", 0.0)
    x, targets = prepared(logits, softcap, temperature), np.asarray(targets)
    classes = x.shape[-1]
    of_class = np.ones(classes) if of_class is None else f64(of_class)
    w = np.ones(x.shape[:-1]) if weights is None else f64(weights)
    divisor = w
    if targets.dtype.kind in "iu":
        w = np.where(targets == options.get("ignore_index", -100), 0, w)
        targets = np.where(targets < 0, 0, targets)
        divisor, targets = w * of_class[targets], np.eye(classes)[targets]
    shares = ((1 - e) * f64(targets) + e / classes) * of_class
    p, lse = softmax(x), logsumexp(x)
    grad = (shares.sum(-1) + 2 * z_loss * lse)[..., None] * p - shares
    slope = 1 / temperature if softcap is None else (1 - np.tanh(f64(logits) / softcap) ** 2) / temperature
    scale = w * f64(upstream) / (divisor.sum() if reduction == "mean" else 1)
    return grad * slope * scale[..., None]


def sequence_loss(
    logits,
    targets,
    weights,
    average_across_timesteps=True,
    average_across_batch=True,
    sum_over_timesteps=False,
    sum_over_batch=False,
    magnitude=False,
):
    targets, w = np.asarray(targets), f64(weights)
    if targets.ndim == 2:
        loss = sparse_losses(logits, targets, ignore=w == 0)
    else:
        loss = dense_losses(logits, targets, magnitude=magnitude)
    values = np.where(w == 0, 0, w * np.where(w == 0, 0, loss))
    values = np.abs(values) if magnitude else values
    over_batch, over_time = average_across_batch or sum_over_batch, average_across_timesteps or sum_over_timesteps
    axes = tuple(axis for axis, over in ((0, over_batch), (1, over_time)) if over)
    if not axes:
        return values
    summed = sum_over_timesteps or sum_over_batch
    divisor = np.count_nonzero(w, axis=axes) if summed else w.sum(axis=axes)
    divisor = np.asarray(divisor, np.float64)
    out = np.where(divisor == 0, 0, divide(values.sum(axis=axes), np.where(divisor == 0, 1, divisor)))
    return np.abs(out) if magnitude else out


# -- one logit, two classes ----------------------------------------------------------------------------------------


def softplus(x):
    """log(1 + exp(x))."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def weighted_losses(labels, logits, pos_weight=1.0, magnitude=False):
    """q z softplus(-x) + (1 - z) softplus(x), a factor of 0 winning over an infinite softplus."""
    x, z, q = f64(logits), f64(labels), f64(pos_weight)
    positive, negative = np.broadcast_to(q * z, x.shape), 1 - z
    with np.errstate(invalid="ignore"):
        a, b = positive * softplus(-x), negative * softplus(x)
    a = np.where((positive == 0) & ~np.isnan(x), 0, a)
    b = np.where((negative == 0) & ~np.isnan(x), 0, b)
    return np.abs(a) + np.abs(b) if magnitude else a + b


def sigmoid_losses(labels, logits, magnitude=False):
    return weighted_losses(labels, logits, 1.0, magnitude)
