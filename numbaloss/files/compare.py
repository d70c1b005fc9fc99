"""How far the logits of one file are from those of another, both read once."""

import math
import operator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from .. import score_tokens
from ..divergence import _divergences
from ..totals import exp
from .blocks import Task
from .measures import Mean, Quantiles, TopK, Worst, checked_ks
from .run import Pass, rehearse

DIVERGENCES = "kl", "reverse_kl", "js"
QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}


class Comparison(NamedTuple):
    """What `compare` returns. In nats; without targets what needs them is None."""

    tokens: int
    weight: float
    kl: dict  # KL(base || candidate): mean, standard_error, median, p90, p95, p99, p99_9, max, max_at
    reverse_kl: dict  # KL(candidate || base)
    js: dict  # Jensen-Shannon
    agreement: dict  # top_1: share of tokens whose largest logit is the same class; top_k: base's is among k; its error
    shift: int
    better_shift: int | None
    seconds: float
    bytes: int
    rows: int = 0
    complete: bool = True
    floor: float | None = None
    base: dict | None = None  # as EvaluationResult
    candidate: dict | None = None
    difference: dict | None = None  # of the losses, candidate - base: mean, standard_error; perplexity_ratio
    rms_probability_change: float | None = None  # of the targets
    histogram: list | None = None  # of KL: (from, to, tokens)
    worst: list | None = None  # tokens: row, value (KL), index, base and candidate argmax


def compare(
    base,
    candidate,
    targets=None,
    *,
    weights=None,
    shift=0,
    ignore_index=-100,
    dtype=None,
    shape=None,
    top_k=(5, 10),
    details=False,
    resume=None,
    memory=256 << 20,
    device="cpu",
    progress=None,
):
    """Divergences, agreement and the difference in perplexity of two files of logits of the same tokens.

    Args:
        base, candidate: as `logits` of score, of one shape; files of llama.cpp with one floor.
        targets: as for score, or None: those in a file of llama.cpp, otherwise none, and what needs them is None.
        weights, shift, ignore_index, dtype, shape, resume, memory, device, progress: as for score.
        top_k: numbers of classes: how often base's most likely class is among so many of candidate's.
        details: the histogram of KL, and the worst tokens.
    Returns:
        Comparison. Means are exact, quantiles of all tokens that count right to 2^-11, relatively; equal files give 0.
    Raises:
        FileError, Interrupted: as score.
    """
    shift, ignore_index = operator.index(shift), operator.index(ignore_index)
    top_k = checked_ks(top_k)
    how = {"dtype": dtype, "shape": shape}
    with ExitStack() as inputs:
        files = {"base": base, "candidate": candidate}
        others = {"targets": targets, "weights": weights}
        task = Task(inputs, files, others, shift, ignore_index, memory, how, device)
        taken = _Differences(task, top_k, details)
        run = Pass(task, taken.measures, [shift, ignore_index, top_k, details], resume)
        rehearse(task, _Differences(task, top_k, details))
        return run.run(lambda block: taken.take(block, run), taken.result, progress)


def _scored(logits, y):
    return score_tokens(logits, y, ignore_index=-1)


def _ranked(logits, y):
    return score_tokens(logits, y, ignore_index=-1, rank=True).rank


def _diverged(base, candidate, weights):
    return _divergences(base, candidate, weights, -1, kl=True, reverse=True, js=True)


class _Differences:
    """The measures of two files of logits."""

    def __init__(self, task, top_k, details):
        self.task, self.measures = task, {name: Mean() for name in (*DIVERGENCES, "agreement")}
        self.measures |= {f"{name} quantiles": Quantiles() for name in DIVERGENCES}
        self.measures |= {f"{name} largest": Worst(1) for name in DIVERGENCES} | {"top_k": TopK(top_k)}
        if details:
            self.measures["worst"] = Worst()
        if task.targets is not None:
            self.measures |= {name: Mean() for name in ("base", "candidate", "difference", "squares")}

    def take(self, block, run):
        """Add a block."""
        measures, task, at = self.measures, self.task, np.flatnonzero(block.y >= 0)
        run_on = task.device.run
        base, candidate = (run_on(_scored, x, block.y) for x in block.logits)
        weights = None if block.weights is None else block.weights[at]
        divergences = run_on(_diverged, *block.logits, (block.y >= 0).astype(np.float64))
        divergences = {name: x[at] for name, x in zip(DIVERGENCES, divergences)}
        best, other, rows = base.argmax[at], candidate.argmax[at], at + block.first

        def tell(i):
            return {"index": task.index(rows[i]), "base": int(best[i]), "candidate": int(other[i])}

        for name, values in divergences.items():
            measures[name].add(values, weights)
            measures[f"{name} quantiles"].add(values)
            measures[f"{name} largest"].add(rows, values, tell)
        if "worst" in measures:
            measures["worst"].add(rows, divergences["kl"], tell)
        measures["agreement"].add((best != other).astype(np.float64), weights)
        asked = np.where(base.argmax == candidate.argmax, -1, base.argmax)  # where they agree the rank is 0
        rank = np.maximum(run_on(_ranked, block.logits[1], asked)[at], 0)
        measures["top_k"].add(rank, np.ones(len(at)) if weights is None else weights)
        if task.targets is None:
            return
        if block.first == 0:
            run.notes["better_shift"] = task.better_shift(block, -base.logprob)
        for name, scores in ("base", base), ("candidate", candidate):
            measures[name].evaluation.add(scores.logprob, scores.argmax, block.y, block.weights)
        a, b = base.logprob[at].astype(np.float64), candidate.logprob[at].astype(np.float64)
        with np.errstate(invalid="ignore"):
            measures["difference"].add(a - b, weights)
        measures["squares"].add((exp(a) - exp(b)) ** 2, weights)

    def result(self, run):
        """A Comparison of the rows so far."""
        task, measures = run.task, self.measures
        total = measures["kl"].evaluation.result()
        differ, error, _ = measures["agreement"].result()
        agreement = {"top_1": 1 - differ, "standard_error": error}
        agreement |= {f"top_{k}": share for k, share in measures["top_k"].result().items() if k != "1"}
        fields = {name: self._divergence(name) for name in DIVERGENCES}
        if task.targets is not None:
            for name in ("base", "candidate"):
                fields[name] = measures[name].evaluation.result()._asdict()
            mean, error, _ = measures["difference"].result()
            fields["difference"] = {"mean": mean, "standard_error": error, "perplexity_ratio": float(exp(mean))}
            fields["rms_probability_change"] = math.sqrt(measures["squares"].result()[0])
        has_details = "worst" in measures
        return Comparison(
            tokens=total.tokens,
            weight=total.weight,
            agreement=agreement,
            **fields,
            **run.fields(),
            histogram=measures["kl quantiles"].histogram() if has_details else None,
            worst=measures["worst"].result() if has_details else None,
        )

    def _divergence(self, name):
        mean, error, _ = self.measures[name].result()
        found = {"mean": mean, "standard_error": error}
        found |= {key: self.measures[f"{name} quantiles"].result(q) for key, q in QUANTILES.items()}
        largest = self.measures[f"{name} largest"].result()
        at = largest[0] if largest else {"value": math.nan, "index": None}
        return found | {"max": at["value"], "max_at": at["index"]}
