"""The loss of a file of logits against a file of targets, in blocks: memory does not grow with the files."""

import math
import operator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from .. import score_tokens
from ..totals import exp
from .blocks import Task
from .measures import ByGroup, ByPosition, Calibration, Mean, Temperature, TopK, Worst, checked_ks
from .run import Output, Pass, rehearse


class Score(NamedTuple):
    """What `score` returns."""

    tokens: int
    weight: float
    loss: float  # nats
    perplexity: float
    bits_per_token: float
    accuracy: float
    standard_error: float  # of the loss
    shift: int
    better_shift: int | None  # a neighbouring shift that fits the first rows far better; None: there is none
    seconds: float  # of reading and computing; compiling is not counted
    bytes: int  # of logits, targets and weights read
    rows: int = 0  # that were read, with those that do not count
    complete: bool = True  # False: interrupted
    floor: float | None = None  # of log probabilities in a file of llama.cpp, in nats below the largest
    bits_per_byte: float | None = None
    top_k: dict | None = None  # {k: share of the weight whose target is among the k largest}
    calibration_error: float | None = None  # expected
    calibration: list | None = None  # of bins: confidence, accuracy, tokens, weight
    temperature: list | None = None  # that minimises the loss, low and high end of its 95 % confidence interval
    groups: list | None = None  # of each: group, tokens, weight, loss, perplexity, accuracy
    group_standard_error: float | None = None  # of the loss, if tokens of a group go together
    by_position: list | None = None  # of first, last position, tokens, weight, loss
    worst: list | None = None  # tokens: row, value (the loss), index, target, argmax


def score(
    logits,
    targets=None,
    *,
    weights=None,
    groups=None,
    shift=0,
    ignore_index=-100,
    dtype=None,
    shape=None,
    top_k=(),
    calibration=False,
    text_bytes=None,
    details=False,
    per_token=None,
    resume=None,
    memory=256 << 20,
    device="cpu",
    progress=None,
):
    """Exact mean loss, perplexity and accuracy of logits in a file against targets in a file.

    The result has the same bits as `Evaluation` on the whole arrays, whatever the block size.

    Args:
        logits: path of a .npy, .npz ("file.npz:name") or .safetensors file or its index.json, of a file that llama.cpp
            wrote (`_logits_`), of a folder or a pattern of such files, or "-" for a .npy file on stdin; (..., classes),
            float16, bfloat16, float32 or float64.
        targets: the same; (...), integers in [0, classes) or `ignore_index`. None: those in the file of the logits.
        weights: the same, or None; (...), one number for each target.
        groups: the same, or None; (...), an integer for each target: the document that it belongs to.
        shift: logits at position t are scored against the target (and its weight and group) at t + shift along the last
            axis of `targets`; only positions that have both count. Language models whose logits at t predict token
            t + 1: 1.
        dtype, shape: of logits in a file that does not tell: raw binary, or bfloat16 in a .npy file.
        top_k: numbers of classes: the share of targets among so many largest.
        calibration: the calibration error, and the temperature that minimises the loss, of up to 8192 rows.
        text_bytes: the length of the text that the targets stand for, for bits_per_byte.
        details: the loss by position, and the worst tokens.
        per_token: path of a .npy, .jsonl or .parquet file to write: the log probability of each target that was scored,
            (..., T - |shift|) float32, or float64 for float64 logits; 0 for ignored ones. It appears when everything
            has succeeded.
        resume: path of a file that the state is saved to every ten seconds. If it exists, the pass goes on from there.
        memory: bytes that the buffers may take at most.
        device: "cuda" computes on CuPy's current device, with the same bits.
        progress: called as progress(rows done, rows in all), at the start and then after each block.
    Returns:
        Score
    Raises:
        FileError (a ValueError): a file is damaged or does not fit the others; the message names it.
        Interrupted (a KeyboardInterrupt): Ctrl-C; its `result` is the Score of the rows so far.
    """
    shift, ignore_index = operator.index(shift), operator.index(ignore_index)
    top_k = checked_ks(top_k)
    if text_bytes is not None and not text_bytes > 0:
        raise ValueError(f"text_bytes: expected a number > 0, got {text_bytes}")
    others = {"targets": logits if targets is None else targets, "weights": weights, "groups": groups}
    with ExitStack() as inputs, ExitStack() as outputs:
        how = {"dtype": dtype, "shape": shape}
        task = Task(inputs, {"logits": logits}, others, shift, ignore_index, memory, how, device)
        output = outputs.enter_context(Output(per_token, task, resume is not None)) if per_token is not None else None
        asked = groups is not None, top_k, calibration, details
        taken = _Scores(task, *asked, output)
        run = Pass(task, taken.measures, [shift, ignore_index, *asked], resume, output)
        rehearse(task, _Scores(task, *asked, None))
        result = run.run(lambda block: taken.take(block, run), lambda run: taken.result(run, text_bytes), progress)
        if output:
            output.finish()
    return result


class _Scores:
    """The measures of one file of logits."""

    def __init__(self, task, groups, top_k, calibration, details, output):
        self.task, self.output = task, output
        self.measures = {"loss": Mean()}
        if groups:
            self.measures["groups"] = ByGroup()
        if top_k:
            self.measures["top_k"] = TopK(top_k)
        if calibration:
            self.measures |= {"calibration": Calibration(), "temperature": Temperature(task.rows)}
        if details:
            self.measures |= {"by_position": ByPosition(task.length), "worst": Worst()}

    def take(self, block, run):
        """Add a block."""
        measures, (logits,) = self.measures, block.logits
        ranked = "top_k" in measures
        scores = self.task.device.run(lambda x, y: score_tokens(x, y, ignore_index=-1, rank=ranked), logits, block.y)
        measures["loss"].evaluation.add(scores.logprob, scores.argmax, block.y, block.weights)
        if block.first == 0:
            run.notes["better_shift"] = self.task.better_shift(block, -scores.logprob)
        if self.output:
            self.output.write(block, scores)
        if len(measures) > 1:
            self._take_more(block, scores)

    def _take_more(self, block, scores):
        measures, at = self.measures, np.flatnonzero(block.y >= 0)
        y, loss = block.y[at], 0.0 - scores.logprob[at].astype(np.float64)
        weights = np.ones(len(at)) if block.weights is None else block.weights[at]
        correct = (scores.argmax[at] == y).astype(np.float64)
        if "groups" in measures:
            measures["groups"].add(block.groups[at], loss, weights, correct)
        if "top_k" in measures:
            measures["top_k"].add(scores.rank[at], weights)
        if "calibration" in measures:
            top = block.logits[0][at, scores.argmax[at]].astype(np.float64)
            with np.errstate(invalid="ignore"):
                confidence = exp(top - scores.logsumexp[at])
            measures["calibration"].add(confidence, correct, weights)
            every = np.ones(len(block.y)) if block.weights is None else block.weights
            measures["temperature"].add(block.first, block.logits[0], block.y, every)
        if "by_position" in measures:
            rows = at + block.first
            measures["by_position"].add(self.task.position(rows), loss, weights)
            measures["worst"].add(rows, loss, lambda i: self._tell(rows[i], y[i], scores.argmax[at[i]]))

    def _tell(self, row, target, argmax):
        return {"index": self.task.index(row), "target": int(target), "argmax": int(argmax)}

    def result(self, run, text_bytes):
        """A Score of the rows so far."""
        found = {name: measure.result() for name, measure in self.measures.items() if name != "groups"}
        total = self.measures["loss"].evaluation.result()
        groups, group_error = None, None
        if "groups" in self.measures:
            groups, group_error = self.measures["groups"].result(total.loss, total.weight)
        error, bins = found.get("calibration", (None, None))
        bits = None if text_bytes is None else total.loss * total.weight / math.log(2) / text_bytes
        return Score(
            **total._asdict(),
            **run.fields(),
            top_k=found.get("top_k"),
            bits_per_byte=bits,
            calibration_error=error,
            calibration=bins,
            temperature=found.get("temperature"),
            groups=groups,
            group_standard_error=group_error,
            by_position=found.get("by_position"),
            worst=found.get("worst"),
        )
