"""What is taken of the tokens of a file, block by block: measures that can be saved, and continued with the same bits.

Means are exact (Evaluation). Other sums are float64 in the order of the tokens, whatever the blocks.
"""

import heapq
import math
import operator

import numpy as np
from numpy.polynomial import chebyshev

from .. import Evaluation, cross_entropy
from ..totals import exp

POSITIONS = 256  # at most: of longer sequences, neighbours count together
BINS = 15  # of confidence, of equal width
SAMPLE = 8192  # rows at most that the temperature is taken from
WORST = 20


class Mean:
    """A weighted mean of one number a token, with its standard error, and of a yes or no beside it."""

    def __init__(self):
        self.evaluation = Evaluation(ignore_index=-1)

    def add(self, values, weights, yes=None):
        """values, yes: (tokens,); weights: (tokens,) or None."""
        y = np.zeros(len(values), np.int64)
        no = y if yes is None else np.where(yes, 0, 1)
        self.evaluation.add(np.ascontiguousarray(0.0 - values, np.float64), no, y, weights)

    def result(self):
        """(mean, standard error, share of yes)."""
        found = self.evaluation.result()
        return found.loss, found.standard_error, found.accuracy

    def state(self):
        return self.evaluation.to_json()

    def restore(self, state):
        self.evaluation = Evaluation.from_json(state)


class Arrays:
    """A measure whose state is arrays; what they are called stands in FIELDS."""

    FIELDS = ()

    def state(self):
        return {name: getattr(self, name).tolist() for name in self.FIELDS}

    def restore(self, state):
        for name in self.FIELDS:
            now = getattr(self, name)
            setattr(self, name, np.array(state[name], now.dtype).reshape(now.shape))


class ByPosition(Arrays):
    """The mean loss by position in a sequence of this length."""

    FIELDS = ("tokens", "weight", "loss")

    def __init__(self, length):
        self.length, bins = length, min(length, POSITIONS)
        self.tokens, self.weight, self.loss = np.zeros(bins, np.int64), np.zeros(bins), np.zeros(bins)

    def add(self, position, loss, weights):
        at = position * len(self.tokens) // self.length
        np.add.at(self.tokens, at, 1)
        np.add.at(self.weight, at, weights)
        np.add.at(self.loss, at, weights * loss)

    def result(self):
        """A list of {first, last position, tokens, weight, loss}."""
        bins = len(self.tokens)
        edges = [-(-k * self.length // bins) for k in range(bins + 1)] if bins else []
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = self.loss / self.weight
        columns = zip(edges, edges[1:], self.tokens.tolist(), self.weight.tolist(), loss.tolist())
        return [{"first": a, "last": b - 1, "tokens": n, "weight": w, "loss": x} for a, b, n, w, x in columns]


class ByGroup:
    """Losses by group, and the standard error of the mean if tokens of a group go together."""

    def __init__(self):
        self.sums = {}  # group: [tokens, weight, weight * loss, weight * correct]

    def add(self, groups, loss, weights, correct):
        found, at = np.unique(groups, return_inverse=True)
        sums = np.array([self.sums.get(int(g), (0, 0.0, 0.0, 0.0)) for g in found], np.float64).reshape(-1, 4)
        for column, values in enumerate((1.0, weights, weights * loss, weights * correct)):
            np.add.at(sums[:, column], at, values)
        self.sums.update(zip(found.tolist(), sums.tolist()))

    def result(self, mean, weight):
        """([{group, tokens, weight, loss, perplexity, accuracy}], clustered standard error of the mean)."""
        rows, spread = [], 0.0
        for group, (n, w, loss, correct) in sorted(self.sums.items()):
            own = loss / w if w else math.nan
            row = {"group": group, "tokens": int(n), "weight": w, "loss": own, "perplexity": float(exp(own))}
            rows.append(row | {"accuracy": correct / w if w else math.nan})
            spread += (loss - mean * w) * (loss - mean * w)  # ** raises where this is infinite
        n = len(rows)
        return rows, math.sqrt(spread * n / (n - 1)) / weight if n > 1 and weight else math.nan

    def state(self):
        return list(self.sums.items())

    def restore(self, state):
        self.sums = {int(group): [float(n), float(w), float(x), float(c)] for group, (n, w, x, c) in state}


class TopK(Arrays):
    """The share of the weight whose rank is below each k."""

    FIELDS = ("weight", "inside")

    def __init__(self, ks):
        self.ks, self.weight, self.inside = tuple(ks), np.zeros(1), np.zeros(len(ks))

    def add(self, rank, weights):
        np.add.at(self.weight, np.zeros(len(rank), np.int64), weights)
        for i, k in enumerate(self.ks):
            np.add.at(self.inside, np.full(len(rank), i), weights * (rank < k))

    def result(self):
        """{k: share}."""
        weight = self.weight[0]
        return {str(k): float(x / weight) if weight else math.nan for k, x in zip(self.ks, self.inside)}


class Quantiles(Arrays):
    """Quantiles of numbers from 0 on. Counts in bins that are 2^-10 wide, relatively: half of that is the error."""

    FIELDS = ("bins",)
    BITS = 13  # of float32 that a bin leaves out

    def __init__(self):
        self.bins = np.zeros((0x7F800000 >> self.BITS) + 2, np.int64)  # the last: NaN

    def add(self, values):
        with np.errstate(over="ignore"):
            x = np.asarray(values, np.float32) + np.float32(0)
        at = np.where(x == x, x.view(np.int32) >> self.BITS, len(self.bins) - 1)
        self.bins += np.bincount(at, minlength=len(self.bins))

    def result(self, q):
        """The number with a share q of all below it; NaN if there is none or one was NaN."""
        total = int(self.bins.sum())
        if not total or self.bins[-1]:
            return math.nan
        at = int(np.searchsorted(np.cumsum(self.bins), max(1, math.ceil(q * total))))
        low, high = (float(np.int32(k << self.BITS).view(np.float32)) for k in (at, at + 1))
        return 0.0 if at == 0 else low if math.isinf(low) else (low + min(high, 3.4e38)) / 2

    def histogram(self):
        """[(from, to, count)] of quarters of a power of two, zeros first."""
        if not self.bins[:-1].any():
            return []
        step = 21 - self.BITS  # a quarter of an octave
        used = np.flatnonzero(self.bins[:-1]) >> step
        keys, counts = np.unique(used, return_inverse=True)
        sums = np.bincount(counts, weights=self.bins[np.flatnonzero(self.bins[:-1])])
        edge = [float(np.int32(min(int(k) << 21, 0x7F800000)).view(np.float32)) for k in (*keys, *(keys + 1))]
        return [(edge[i], edge[len(keys) + i], int(sums[i])) for i in range(len(keys))]

    def state(self):
        used = np.flatnonzero(self.bins)
        return {"at": used.tolist(), "count": self.bins[used].tolist()}

    def restore(self, state):
        self.bins[:] = 0
        self.bins[np.array(state["at"], np.int64)] = state["count"]


class Worst:
    """The tokens with the largest values, the first of equal ones."""

    def __init__(self, count=WORST):
        self.count, self.found = count, []  # (value, -row, what is told of it)

    def add(self, rows, values, tell):
        """tell(i): what is told of item i, a dict."""
        values = np.where(values == values, values, np.inf)
        if len(self.found) == self.count:
            some = np.flatnonzero(values > self.found[-1][0])
        else:
            some = np.arange(len(values))
        for i in some[np.argsort(-values[some], kind="stable")[: self.count]]:
            self.found.append((float(values[i]), -int(rows[i]), tell(int(i))))
        self.found = heapq.nlargest(self.count, self.found, key=lambda x: x[:2])

    def result(self):
        return [{"row": -row, "value": value, **told} for value, row, told in self.found]

    def state(self):
        return self.found

    def restore(self, state):
        self.found = [(float(value), int(row), dict(told)) for value, row, told in state]


class Calibration(Arrays):
    """How far the probability of the most likely class is from the share of times that it is right."""

    FIELDS = ("tokens", "weight", "confidence", "correct")

    def __init__(self):
        self.tokens = np.zeros(BINS, np.int64)
        self.weight, self.confidence, self.correct = np.zeros(BINS), np.zeros(BINS), np.zeros(BINS)

    def add(self, confidence, correct, weights):
        at = np.clip((np.nan_to_num(confidence, nan=0.0) * BINS).astype(np.int64), 0, BINS - 1)
        np.add.at(self.tokens, at, 1)
        for sums, values in ((self.weight, 1.0), (self.confidence, confidence), (self.correct, correct)):
            np.add.at(sums, at, weights * values)

    def result(self):
        """(expected calibration error, [{confidence, accuracy, tokens, weight} of each bin that is not empty])."""
        some = self.weight > 0
        weight, confidence, correct = (x[some] for x in (self.weight, self.confidence, self.correct))
        columns = confidence / weight, correct / weight, self.tokens[some], weight
        names = "confidence", "accuracy", "tokens", "weight"
        bins = [dict(zip(names, (x.item() for x in row))) for row in zip(*columns)]
        total = float(weight.sum())
        return float(abs(confidence - correct).sum()) / total if total else math.nan, bins


class Temperature(Arrays):
    """The temperature that minimises the mean loss of evenly spaced rows.

    Losses are taken at Chebyshev points of log(temperature); between them their polynomial is as good as the loss. The
    standard error is that of a root of the mean slope, from the tokens' own slopes.
    """

    FIELDS = ("weight", "losses", "squares")
    SPAN = math.log(4)  # from a quarter to four
    HALF = (0.992708874098054, 0.9350162426854148, 0.8229838658936564)
    HALF += (0.6631226582407952, 0.46472317204376856, 0.23931566428755777)
    POINTS = np.array([*HALF, 0.0, *(-x for x in HALF[::-1])])  # cos(pi (j + 1/2) / 13), not by a processor's cos

    def __init__(self, rows):
        self.every = max(1, -(-rows // SAMPLE))
        n = len(self.POINTS)
        self.weight, self.losses, self.squares = np.zeros(1), np.zeros(n), np.zeros((n, n))

    def add(self, first, logits, y, weights):
        rows = np.arange(-first % self.every, len(y), self.every)
        rows = rows[y[rows] >= 0]
        if not len(rows):
            return
        x, y, w = logits[rows], y[rows], weights[rows]
        losses = [cross_entropy(x, y, temperature=t, reduction="none") for t in exp(self.SPAN * self.POINTS)]
        for weight, loss in zip(w, np.stack(losses, -1).astype(np.float64)):
            self.weight += weight
            self.losses += weight * loss
            with np.errstate(over="ignore"):
                self.squares += weight * weight * np.outer(loss, loss)

    def result(self):
        """[temperature, low and high end of its 95 % confidence interval]; None if none from a quarter to four is."""
        if not self.weight[0] or not np.isfinite(self.losses).all():
            return None
        n = len(self.POINTS)
        basis = chebyshev.chebvander(self.POINTS, n - 1).T * (2 / n)  # a column is the polynomial of one point's loss
        basis[0] /= 2
        mean = np.array([math.fsum(row) for row in basis * (self.losses / self.weight[0])])
        minima = _where_it_rises(lambda x: chebyshev.chebval(x, chebyshev.chebder(mean)))
        if not len(minima):
            return None
        best = min(minima, key=lambda x: chebyshev.chebval(x, mean))
        rise = chebyshev.chebval([-1, 1], mean).min() - chebyshev.chebval(best, mean)
        if not rise > 4 * abs(mean[-2:]).sum() + 2.0**-20 * self.losses.max() / self.weight[0]:
            return None  # no deeper than a ripple of the polynomial, or rounding
        slopes = chebyshev.chebval(best, chebyshev.chebder(basis))
        curvature = chebyshev.chebval(best, chebyshev.chebder(mean, 2))
        terms = (np.outer(slopes, slopes) * self.squares).ravel()
        variance = math.fsum(terms) if abs(terms).max() < 1e300 else math.inf
        error = math.sqrt(max(0.0, variance)) / self.weight[0] / curvature
        half = 1.96 * error
        return exp(self.SPAN * np.array([best, best - half, best + half])).tolist()


def _where_it_rises(function):
    """Where a function of arrays goes from below 0 to 0 or above between -1 and 1, by bisection: a solver of LAPACK's
    gives other bits on another processor."""
    x = np.arange(-1024, 1025) / 1024
    below = function(x) < 0
    at = np.flatnonzero(below[:-1] & ~below[1:])
    low, high = x[at], x[at + 1]
    for _ in range(64):
        middle = (low + high) / 2
        below = function(middle) < 0
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high


def checked_ks(top_k):
    """Numbers of classes as a tuple."""
    ks = tuple(operator.index(k) for k in top_k)
    if any(k < 1 for k in ks):
        raise ValueError(f"top_k: expected numbers from 1 on, got {ks}")
    return ks
