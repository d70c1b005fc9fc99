"""Cross entropy of a linear layer's logits, of which only a chunk exists at a time."""

from copy import copy

import numpy as np

from . import _check, _xent
from ._backend import array_module, is_cupy, kernels, on_its_device
from .softmax import _cross_entropy_rows
from .totals import handed_over

TILE = {"numpy": 512, "cupy": 1024}  # rows of a matmul, or half as many: by no chunk, for bits may depend on how many
CHUNK = {"numpy": 1 << 27, "cupy": 1 << 29}  # bytes of logits and hidden rows at a time, unless given
BLOCK = {"numpy": 1 << 24, "cupy": 1 << 27}  # bytes of the weight at a time


@on_its_device
def linear_cross_entropy(
    hidden,
    weight,
    targets,
    bias=None,
    *,
    weights=None,
    class_weights=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    temperature=1.0,
    reduction="mean",
    check_labels="auto",
    chunk=None,
):
    """cross_entropy of a linear layer, whose logits are never held as a whole.

        loss = cross_entropy(hidden @ weight.T + bias, targets, ...)

    The logits are those of the array library's matmul, and as right as it makes them; from there on all is as in
    cross_entropy. It takes 512 rows at a time (256 if more would fill 128 MiB; CuPy: 1024, 512, 512 MiB) and a block of
    classes. Row i has the same place in the same matmul whatever the chunk, so value and gradients have the same bits
    whatever the chunk, if the library repeats its own. Not promised are the same bits for other rows beside a row,
    another number of threads or another processor: OpenBLAS, NumPy's, keeps them on some processors only.

    value_and_grad gives gradients by "hidden", "weight" and "bias", summed over rows in the result's precision.

    Args:
        hidden: float16, bfloat16, float32 or float64, (..., features). 16 bits are widened to float32.
        weight: as hidden, (classes, features); float64 if and only if hidden is.
        targets: integers, (...).
        bias: real numbers, (classes,), or None.
        weights, class_weights, ignore_index, label_smoothing, z_loss, softcap, temperature, reduction, check_labels: as
            cross_entropy. A row of weight 0 is not looked at, whatever `hidden` holds there.
        chunk: bytes of logits and hidden rows that are held at a time: 128 MiB unless given (CuPy: 512 MiB), and the
            rows of one matmul at least. Beside it there are two blocks of the weight, 16 MiB each (CuPy: 128 MiB).
    Returns:
        A scalar, or targets' shape for "none"; float32, or float64 for float64; in nats. The mean of no rows is NaN.
    Raises:
        TypeError, ValueError: as cross_entropy; shapes that do not fit.
    Source: Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", for not holding the logits.

    >>> hidden, weight = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> linear_cross_entropy(hidden, weight, [2])
    np.float64(0.4076059644443803)
    """
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    options = {"weights": weights, "class_weights": class_weights, "ignore_index": ignore_index}
    options |= {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap, "temperature": temperature}
    layer = _Layer(hidden, weight, targets, bias, chunk, check_labels=check_labels, **options)
    return _xent.reduced(layer.rows, layer.losses(), reduction)


class _Layer:
    """Checked arguments, and a chunk of hidden rows and of logits."""

    def __init__(self, hidden, weight, targets, bias, chunk, **options):
        self.hidden, self.weight = hidden, weight = _check.logits(hidden, "hidden"), _check.logits(weight, "weight")
        kernels("elements", hidden=hidden, weight=weight, targets=targets, bias=bias)
        if hidden.ndim == 0 or hidden.shape[-1] == 0:
            raise ValueError(f"hidden: expected shape (..., features), got {hidden.shape}")
        features = hidden.shape[-1]
        if weight.ndim != 2 or weight.shape[1] != features or len(weight) == 0:
            fits = f"(classes, {features}) to match hidden {hidden.shape}"
            raise ValueError(f"weight: expected shape {fits}, got {weight.shape}")
        self.dtype, self.xp = np.dtype(_check.result_dtype(hidden)), array_module(hidden)
        if _check.result_dtype(weight) != self.dtype:
            raise TypeError(f"weight: expected a dtype as hidden's {hidden.dtype}, got {weight.dtype}")
        if bias is not None:
            bias = _check.number_array(bias, "bias", hidden)
            _check.same_shape(bias, "bias", (len(weight),), f"weight {weight.shape}")
            bias = bias.astype(self.dtype, copy=False)
        self.bias = bias
        like_logits = self.xp.broadcast_to(self.xp.zeros((), self.dtype), (*hidden.shape[:-1], len(weight)))
        targets = _check.number_array(targets, "targets", hidden)
        if targets.dtype.kind not in "iu":
            raise TypeError(f"targets: expected integers, got dtype {targets.dtype}")
        self.rows = q = _cross_entropy_rows(like_logits, targets, **options)
        if q.check_labels == "raise" or (q.check_labels == "auto" and not is_cupy(hidden)):
            q.raise_bad_label()
        self._prepare(chunk)

    def _prepare(self, chunk):
        xp, (classes, features), n = self.xp, self.weight.shape, int(np.prod(self.rows.shape))
        self.tile, item = TILE[xp.__name__], self.dtype.itemsize
        if self.tile * classes * item > CHUNK[xp.__name__]:
            self.tile //= 2
        chunk = CHUNK[xp.__name__] if chunk is None else _check.integer(chunk, "chunk")
        if chunk < 1:
            raise ValueError(f"chunk: expected a number of bytes from 1 on, got {chunk}")
        step = max(1, chunk // ((classes + 2 * features) * item * self.tile)) * self.tile
        self.chunks = [(i, min(i + step, n)) for i in range(0, n, step)]
        height = min(step, n)
        self.x, self.logits = xp.empty((height, features), self.dtype), xp.empty((height, classes), self.dtype)
        step = min(classes, max(1, BLOCK[xp.__name__] // (features * item)))
        self.blocks = [(a, min(a + step, classes)) for a in range(0, classes, step)]
        weight = self.weight
        as_it_is = weight.dtype == self.dtype and weight.flags.c_contiguous and _check.readable(weight) is not None
        self.room = None if as_it_is else xp.empty((step, features), self.dtype)
        self.factors = xp.empty(n, np.float64)  # 0 for rows that do not count
        q, totals = self.rows, kernels("totals", hidden=self.hidden)
        totals.slopes(n, n, None, q.y, q.weights, None, q.ignore_index, None, self.factors)
        self.hidden = _check.in_reach(self.hidden, self.hidden)

    def _take(self, x, first, weights, out):
        """out = as many rows of x, from `first` on."""
        arguments = *_check.readable(x), first, weights, out
        kernels("elements", x=x).take_rows(out.size, len(out), *arguments)

    def _weight_block(self, a, b):
        if self.room is None:
            return self.weight[a:b]
        self._take(_check.in_reach(self.weight[a:b], self.hidden), 0, None, self.room[: b - a])
        return self.room[: b - a]

    def _tiles(self, size):
        return [(i, min(i + self.tile, size)) for i in range(0, size, self.tile)]

    def _chunk(self, begin, end):
        """The rows [begin, end) with their logits, which are overwritten by the next ones."""
        size, xp = end - begin, self.xp
        self._take(self.hidden, begin, self.factors[begin:end], self.x[:size])
        for a, b in self.blocks:
            weight = self._weight_block(a, b)
            for i, j in self._tiles(size):
                logits = self.logits[i:j, a:b]
                xp.matmul(self.x[i:j], weight.T, out=logits)
                if self.bias is not None:
                    xp.add(logits, self.bias[a:b], out=logits)
        q = copy(self.rows)
        q.logits = q.x = self.logits[:size]
        q.shape, q.check_labels = (size,), "nan"  # labels have been checked
        q.y, q.weights = _check.part(q.y, begin, end), _check.part(q.weights, begin, end)
        return q

    def losses(self):
        loss = self.xp.empty(self.rows.shape, self.dtype)
        with kernels("_launch", hidden=self.hidden).leave_a_core():
            for begin, end in self.chunks:
                _xent.losses(self._chunk(begin, end), _check.part(_check.flat(loss), begin, end))
        return loss

    def gradients(self, slopes, grads):
        """The losses; `grads` by name: "hidden" of hidden's shape, "weight" and "bias" zeros in self.dtype."""
        loss = self.xp.empty(self.rows.shape, self.dtype)
        by_hidden = None if grads["hidden"] is None else self.xp.empty(self.x.shape, self.dtype)
        with kernels("_launch", hidden=self.hidden).leave_a_core():
            for begin, end in self.chunks:
                q = self._chunk(begin, end)
                row_loss = _check.part(_check.flat(loss), begin, end)
                _xent.gradients(q, slopes[begin:end], q.x, loss=row_loss)
                self._add_products(end - begin, by_hidden, grads["weight"], grads["bias"])
                if by_hidden is not None:
                    values = by_hidden[: end - begin], self.factors[begin:end]
                    to = _check.readable(grads["hidden"])
                    kernels("elements", loss=loss).put_rows(values[0].size, end - begin, *values, *to, begin)
        return loss

    def _add_products(self, size, by_hidden, by_weight, by_bias):
        """Of a chunk whose logits have become their gradient; a sum runs over tiles of rows, or blocks of classes."""
        xp, (_, features) = self.xp, self.weight.shape
        step = self.blocks[0][1]
        tile = xp.empty((min(self.tile, size), features), self.dtype)
        block = xp.empty((step, features), self.dtype) if by_weight is not None else None
        ones, sums = xp.ones((1, len(tile)), self.dtype), xp.empty((1, step), self.dtype)
        for a, b in self.blocks:
            weight = self._weight_block(a, b) if by_hidden is not None else None
            for i, j in self._tiles(size):
                slopes = self.logits[i:j, a:b]
                if by_hidden is not None:
                    part = tile[: j - i] if a else by_hidden[i:j]
                    xp.matmul(slopes, weight, out=part)
                    if a:
                        xp.add(by_hidden[i:j], part, out=by_hidden[i:j])
                if by_weight is not None:
                    xp.matmul(slopes.T, self.x[i:j], out=block[: b - a])
                    xp.add(by_weight[a:b], block[: b - a], out=by_weight[a:b])
                if by_bias is not None:
                    xp.matmul(ones[:, : j - i], slopes, out=sums[:, : b - a])
                    xp.add(by_bias[a:b], sums[0, : b - a], out=by_bias[a:b])


def _linear_gradients(upstream, out, hidden, weight, targets, bias, reduction, chunk, **options):
    """As numbaloss.grad asks for them."""
    _check.choice(reduction, "reduction", ("mean", "sum", "none"))
    layer = _Layer(hidden, weight, targets, bias, chunk, **options)
    q, given = layer.rows, {"hidden": layer.hidden, "weight": layer.weight, "bias": bias}
    kernels("softmax", logits=layer.hidden, upstream=upstream, **{f"out ({name})": x for name, x in out.items()})
    upstream = _check.upstream(upstream, q.shape if reduction == "none" else (), q.logits)
    grads = dict.fromkeys(given)
    for name, x in out.items():
        if name == "hidden":
            grads[name] = _check.gradient(x, layer.hidden, -1, name)
        else:
            _check.output(x, layer.hidden, name, _check.differentiable(given[name], name))
            grads[name] = layer.xp.zeros(np.shape(given[name]), layer.dtype)
    slopes = _xent.slopes_of(q, upstream, _xent.divisor_of(q) if reduction == "mean" else None)
    value = _xent.reduced(q, layer.gradients(slopes, grads), reduction)
    for name, x in out.items():
        if name != "hidden":
            grads[name] = handed_over(grads[name], given[name], layer.hidden, x)
    return value, grads
