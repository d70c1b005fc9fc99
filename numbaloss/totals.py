"""Exact totals, and Evaluation on them: sums that no order, split or merge can change."""

import json
import math
from typing import NamedTuple

import numpy as np

from . import _check
from ._backend import kernels


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
        self._tokens = 0
        self._words = None  # (6, WORDS) int64 once there is something to sum

    def update(self, logits, targets, weights=None):
        """Add a batch; returns self. A batch that raises adds nothing.

        Args:
            logits: float16, bfloat16, float32 or float64, (..., classes).
            targets: integers, (...).
            weights: real numbers, (...) or one number; 1 if not given.
        Raises:
            TypeError, ValueError: as score_tokens; weights that are negative, infinite or NaN.
        """
        from .softmax import _score

        logits = _check.logits(logits)
        scale = _check.weights(weights, logits.shape[:-1])
        if scale is not None and not ((scale >= 0) & (scale < np.inf)).all():
            first = int(np.argmin((scale >= 0) & (scale < np.inf)))
            where = tuple(int(i) for i in np.unravel_index(first, logits.shape[:-1])) if logits.ndim > 1 else ()
            raise ValueError(f"weights: expected finite numbers from 0 on, got {scale[first]} at position {where}")
        scores = _score(logits, targets, scale, False, False, self.ignore_index, -1, "raise")
        y = _check.labels(targets, logits.shape[:-1], "targets", logits.shape)[0]
        counted = y != self.ignore_index
        if scale is not None:
            counted &= scale != 0
        return self.add(-np.ravel(scores.logprob), np.ravel(scores.argmax) == y, counted, scale)

    def add(self, loss, correct, counted, weights=None):
        """Add tokens that are scored already; returns self.

        Args:
            loss: nats, (n,). correct, counted: booleans, (n,). weights: float64, (n,), or None.
        """
        weight = counted.astype(np.float64) if weights is None else np.where(counted, weights, 0.0)
        loss = np.where(counted, loss, 0).astype(np.float64)
        square = weight * weight
        family = kernels("totals", values=loss)
        if self._words is None:
            self._words = np.zeros((len(_SUMS), family.WORDS), np.int64)
        products = (weight, weight * loss, weight * correct, square, square * loss, square * loss * loss)
        for words, values in zip(self._words, products):
            family.accumulate(values.size, values.size, values, None, words)
        self._tokens += int(np.count_nonzero(counted))
        return self

    def merge(self, other):
        """Add all that another Evaluation has seen; returns self."""
        if not isinstance(other, Evaluation):
            raise TypeError(f"other: expected an Evaluation, got {type(other).__name__}")
        if other._words is not None:
            if self._words is None:
                self._words = np.zeros_like(other._words)
            kernels("totals").merge(1, 1, self._words, other._words)
            self._tokens += other._tokens
        return self

    def result(self):
        """The totals so far as an EvaluationResult: loss in nats a token, perplexity exp(loss), bits a token, accuracy
        (share of the weight whose target has the largest logit), and the standard error of the loss.

        Of no tokens, all but the counts are NaN. The standard error is that of a weighted mean of independent tokens,
        sqrt(sum(w^2 (l - loss)^2) n / (n - 1)) / sum(w); NaN for fewer than two tokens.
        """
        n = self._tokens
        if n == 0:
            return EvaluationResult(0, 0.0, *[math.nan] * 5)
        family = kernels("totals")
        weight, loss, correct, square, square_loss, square_loss2 = (
            family.round_total(0, 1, words) for words in self._words
        )
        mean = loss / weight
        error = math.nan
        if n > 1 and math.isfinite(mean):
            spread = max(0.0, math.fsum((square_loss2, -2 * mean * square_loss, mean * mean * square)))
            error = math.sqrt(spread * n / (n - 1)) / weight
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(mean))
        return EvaluationResult(n, weight, mean, perplexity, mean / math.log(2), correct / weight, error)

    def to_json(self):
        """The whole state as a line of text, for from_json."""
        words = {}
        for name, row in zip(_SUMS, self._words if self._words is not None else ()):
            words[name] = {str(i): int(row[i]) for i in np.flatnonzero(row)}
        return json.dumps(
            {"numbaloss.Evaluation": 1, "ignore_index": self.ignore_index, "tokens": self._tokens, "sums": words}
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
            evaluation._tokens = _check.integer(state["tokens"], "tokens")
            if evaluation._tokens < 0:
                raise ValueError(f"{evaluation._tokens} tokens")
            if state["sums"]:
                evaluation._words = np.zeros((len(_SUMS), kernels("totals").WORDS), np.int64)
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
