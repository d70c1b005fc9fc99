"""Exact totals, and Evaluation on them: sums that no order, split or merge can change."""

import json
import math
from typing import NamedTuple

import numpy as np

from . import _check
from ._backend import array_module, is_cupy, kernels, on_its_device


class EvaluationResult(NamedTuple):
    """What Evaluation.result gives."""

    tokens: int
    weight: float
    loss: float
    perplexity: float
    bits_per_token: float
    accuracy: float
    standard_error: float


_SUMS = ("weight", "loss", "correct", "weight2", "weight2_loss", "weight2_loss2")


class Evaluation:
    """Totals of a language model's losses over any number of batches.

    Its state is six exact sums, so results have the same bits in whatever order, batches or processes the tokens come.

    Args:
        ignore_index: tokens with this target are not looked at, nor are tokens of weight 0.

    >>> Evaluation().update(np.zeros((2, 4)), [0, 1]).result().perplexity
    4.0
    """

    def __init__(self, *, ignore_index=-100):
        self.ignore_index = _check.integer(ignore_index, "ignore_index")
        self._words = None  # once there is something to sum: a row of words for each sum, and one of counts (_exact)

    @on_its_device
    def update(self, logits, targets, weights=None):
        """Add a batch; returns self. A batch that raises adds nothing.

        On CuPy nothing waits for the device, so what is out of range is found by result().

        Args:
            logits: float16, bfloat16, float32 or float64, (..., classes).
            targets: integers, (...).
            weights: real numbers, (...) or one number; 1 if not given.
        Raises:
            TypeError, ValueError: as score_tokens; weights that are negative, infinite or NaN.
        """
        from .softmax import _score

        logits = _check.logits(logits)
        weights = _check.weights(weights, logits.shape[:-1], logits)
        if isinstance(weights, np.ndarray) and not ((weights >= 0) & (weights < np.inf)).all():
            first = int(np.argmin((weights >= 0) & (weights < np.inf)))
            where = tuple(int(i) for i in np.unravel_index(first, logits.shape[:-1])) if logits.ndim > 1 else ()
            raise ValueError(f"weights: expected finite numbers from 0 on, got {weights[first]} at position {where}")
        scores = _score(logits, targets, weights, False, False, self.ignore_index, -1, "auto")
        y = _check.labels(targets, logits.shape[:-1], "targets", logits)[0]
        return self.add(scores.logprob, scores.argmax, y, weights)

    @on_its_device
    def add(self, logprob, argmax, targets, weights=None):
        """Add tokens that score_tokens has scored; returns self.

        Args:
            logprob, argmax: fields of score_tokens' result.
            targets: int64, contiguous, of as many items. weights: float64, contiguous; None for 1.
        """
        xp = array_module(logprob)
        if self._words is None:
            self._words = xp.zeros((len(_SUMS) + 1, kernels("totals").WORDS), np.int64)
        elif is_cupy(self._words) != is_cupy(logprob):
            self._words = xp.asarray(_check.on_host(self._words))
        values = [logprob.ravel(), argmax.ravel(), targets, weights, self.ignore_index, self._words]
        kernels("totals", logprob=logprob, targets=targets).add_tokens(values[0].size, values[0].size, *values)
        return self

    def merge(self, other):
        """Add all that another Evaluation has seen; returns self. Waits for a device."""
        if not isinstance(other, Evaluation):
            raise TypeError(f"other: expected an Evaluation, got {type(other).__name__}")
        if other._words is not None:
            words = _check.on_host(other._words)
            if self._words is None:
                self._words = np.zeros_like(words)
            self._words = _check.on_host(self._words)
            kernels("totals").merge(1, 1, self._words, words)
        return self

    def result(self):
        """The totals so far as an EvaluationResult: loss in nats a token, perplexity exp(loss), bits a token, accuracy
        (share of the weight whose target has the largest logit), and the standard error of the loss.

        Of no tokens, all but the counts are NaN. The standard error is that of a weighted mean of independent tokens,
        sqrt(sum(w^2 (l - loss)^2) n / (n - 1)) / sum(w); NaN for fewer than two tokens. On CuPy, the one transfer.

        Raises:
            ValueError: CuPy arrays given to update held targets or weights out of range.
        """
        words = _check.on_host(self._words)
        n, bad_targets, bad_weights = (0, 0, 0) if words is None else map(int, words[-1, :3])
        if bad_targets:
            raise ValueError(f"targets: expected classes of the logits, got {bad_targets} out of range")
        if bad_weights:
            raise ValueError(f"weights: expected finite numbers from 0 on, got {bad_weights} others")
        if n == 0:
            return EvaluationResult(0, 0.0, *[math.nan] * 5)
        round_total = kernels("totals").round_total
        weight, loss, correct, square, square_loss, square_loss2 = (round_total(0, 1, row) for row in words[:-1])
        mean = loss / weight
        error = math.nan
        if n > 1 and math.isfinite(mean):
            terms = square_loss2, -2 * mean * square_loss, mean * mean * square
            spread = max(0.0, math.fsum(terms)) if all(map(math.isfinite, terms)) else math.inf
            error = math.sqrt(spread * n / (n - 1)) / weight
        return EvaluationResult(n, weight, mean, float(exp(mean)), mean / math.log(2), correct / weight, error)

    def to_json(self):
        """The whole state as a line of text, for from_json."""
        tokens, words, sums = self.result().tokens, _check.on_host(self._words), {}
        for name, row in zip(_SUMS, () if words is None else words):
            sums[name] = {str(i): int(row[i]) for i in np.flatnonzero(row)}
        return json.dumps(
            {"numbaloss.Evaluation": 1, "ignore_index": self.ignore_index, "tokens": tokens, "sums": sums}
        )

    @classmethod
    def from_json(cls, text):
        """The Evaluation whose to_json gave this text.

        Raises:
            ValueError: the text is something else.
        """
        try:
            state = json.loads(text)
            if state["numbaloss.Evaluation"] != 1:
                raise ValueError(f"version {state['numbaloss.Evaluation']}")
            evaluation = cls(ignore_index=state["ignore_index"])
            tokens = _check.integer(state["tokens"], "tokens")
            if tokens < 0 or (tokens and not state["sums"]):
                raise ValueError(f"{tokens} tokens")
            if state["sums"]:
                evaluation._words = np.zeros((len(_SUMS) + 1, kernels("totals").WORDS), np.int64)
                evaluation._words[-1, 0] = tokens
                for name, row in zip(_SUMS, evaluation._words):
                    for i, word in state["sums"][name].items():
                        if not 0 <= int(i) < len(row):
                            raise ValueError(f"word {i}")
                        row[int(i)] = _check.integer(word, "word")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise ValueError(f"text: expected what Evaluation.to_json gives, got something else ({error})") from None
        return evaluation

    def __repr__(self):
        return f"Evaluation({', '.join(f'{k}={v!r}' for k, v in self.result()._asdict().items())})"


def exp(x):
    """e^x of a number or an array, in float64: the same bits everywhere, where NumPy's differ between processors."""
    x = np.asarray(x, np.float64)
    out = np.empty(x.shape)
    kernels("totals").exponentials(x.size, x.size, x.reshape(-1), out.reshape(-1))
    return out


def sum_to(x, shape):
    """x summed along the axes along which an array of this shape is broadcast to it: exactly, rounded once."""
    if x.shape == shape:
        return x
    xp, totals = array_module(x), kernels("totals", x=x)
    lead = x.ndim - len(shape)
    kept = [axis for axis in range(lead, x.ndim) if shape[axis - lead] == x.shape[axis]]
    summed = [axis for axis in range(x.ndim) if axis not in kept]
    terms = xp.ascontiguousarray(x.transpose(kept + summed)).reshape(-1)
    rows = math.prod(shape)
    if rows == 1:
        return totals.total(terms, None, None, None, _check.NO_LABEL, _check.NOTHING).reshape(shape)
    sums, count = xp.empty(rows, x.dtype), math.prod(x.shape[axis] for axis in summed)
    totals.row_totals(terms.size, rows, terms, None, count, count, 1, _check.NOTHING, sums, None)
    return sums.reshape(shape)


def handed_over(grad, argument, logits, out):
    """A gradient by an argument, which was broadcast to this shape: in the argument's shape and dtype, and in `out` if
    that is given."""
    grad = sum_to(grad, np.shape(argument)).astype(_check.gradient_dtype(argument, logits), copy=False)
    if out is None:
        return _check.result(grad)
    out[...] = grad
    return out
