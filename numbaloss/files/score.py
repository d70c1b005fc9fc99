"""The loss of a file of logits against a file of targets, in blocks: memory does not grow with the files."""

import math
import operator
import os
import queue
import secrets
import threading
import time
from contextlib import ExitStack, closing, suppress
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from .. import Evaluation, score_tokens
from .readers import FileError, open_array

_BLOCK = 16 << 20  # bytes of logits: what has just been read should still be in the processor's cache when it is used
_PROBE = 32, 4096  # rows on which the neighbouring shifts are tried: at least, at most


class Score(NamedTuple):
    """What `score` returns: the fields of `EvaluationResult`, and how they were obtained."""

    tokens: int
    weight: float
    loss: float
    perplexity: float
    bits_per_token: float
    accuracy: float
    standard_error: float
    shift: int
    better_shift: int | None  # a neighbouring shift that fits the first rows far better; None: there is none
    seconds: float  # of reading and computing; compiling is not counted
    bytes: int  # of logits, targets and weights read


def score(
    logits,
    targets,
    *,
    weights=None,
    shift=0,
    ignore_index=-100,
    per_token=None,
    memory=256 << 20,
    progress=None,
):
    """Exact mean loss, perplexity and accuracy of logits in a file against targets in a file.

    The result has the same bits as `Evaluation` on the whole arrays, whatever the block size.

    Args:
        logits: path of a .npy or .npz file, "file.npz:name", or "-" for stdin; (..., classes), float16/32/64.
        targets: the same; (...), integers in [0, classes) or `ignore_index`.
        weights: the same, or None; (...), one number for each target.
        shift: logits at position t are scored against the target (and its weight) at t + shift along the last axis of
            `targets`; only positions that have both count. Language models whose logits at t predict token t + 1: 1.
        per_token: path of a .npy file to write: the log probability of each target that was scored, (..., T - |shift|)
            float32, or float64 for float64 logits; 0 for ignored ones. It appears when everything has succeeded.
        memory: bytes that the buffers may take at most.
        progress: called as progress(rows done, rows in all), with 0 first and then after each block.
    Returns:
        Score
    Raises:
        FileError (a ValueError): a file is damaged or does not fit the others; the message names it.
    """
    shift, ignore_index = operator.index(shift), operator.index(ignore_index)
    with ExitStack() as inputs, ExitStack() as outputs:
        task = _Task(inputs, logits, targets, weights, shift, ignore_index, memory)
        output = None
        if per_token is not None:
            kept = (*task.shape[:-1], task.last - task.first) if task.shape else ()
            output = outputs.enter_context(_Output(per_token, kept, task.logits.dtype, task.files))
        evaluation, better, seconds = _run(task, output, progress)
        if output:
            output.finish()
    result = evaluation.result()._asdict()
    size = sum(file.nbytes for file in task.files)
    return Score(**result, shift=shift, better_shift=better, seconds=seconds, bytes=size)


def _run(task, output, progress):
    """(the Evaluation of all rows, a better shift or None, seconds)."""
    if progress:
        progress(0, task.rows)
    if task.rows:
        _compile(task)
    evaluation, better = Evaluation(ignore_index=-1), None
    start = time.perf_counter()
    with closing(_blocks(task)) as blocks:
        for first, logits, labels, weights in blocks:
            counted = task.counted(first, labels, weights)
            y = labels.astype(np.int64)
            y[~counted] = -1
            scores = score_tokens(logits, y, ignore_index=-1)  # one pass serves both the totals and the output
            evaluation.add(scores.logprob, scores.argmax, y, weights)
            if first == 0:
                better = task.better_shift(logits, labels, counted, -scores.logprob)
            if output:
                output.write(scores.logprob[task.scored(first, len(labels))])
            if progress:
                progress(first + len(labels), task.rows)
    return evaluation, better, time.perf_counter() - start


def _compile(task):
    """Compiles, or loads, the kernels for a full block and for a small one, before the clock starts."""
    logits = _Block(task).logits
    logits[:] = 0
    evaluation = Evaluation(ignore_index=-1)
    for rows in (logits, logits[:1]):
        y = np.zeros(len(rows), np.int64)
        scores = score_tokens(rows, y, ignore_index=-1)
        evaluation.add(scores.logprob, scores.argmax, y)
    evaluation.result()


class _Task:
    """The opened files, checked against each other, and how rows of logits and targets go together."""

    def __init__(self, stack, logits, targets, weights, shift, ignore_index, memory):
        paths = {"logits": logits, "targets": targets} | ({"weights": weights} if weights is not None else {})
        if sum(os.fsdecode(path) == "-" for path in paths.values()) > 1:
            raise ValueError("-: expected one input on stdin, got more")
        self.files = [stack.enter_context(open_array(path, name)) for name, path in paths.items()]
        self.logits, self.targets, self.weights = self.files if weights is not None else (*self.files, None)
        self.stack, self.shift, self.ignore_index = stack, shift, ignore_index
        *shape, self.classes = self.logits.shape or (0,)
        self.shape = tuple(shape)
        self.rows = math.prod(shape)
        self._check_shapes()
        length = shape[-1] if shape else 1
        self.length = length
        self.first, self.last = max(0, -shift), min(length, length - shift)  # positions of logits that have a target
        if shift and (not shape or self.last <= self.first):
            raise ValueError(f"shift: expected less than {length} either way, targets {self.shape}, got {shift}")
        row = self.classes * self.logits.dtype.itemsize
        if 2 * row > memory:
            raise FileError(self.logits.name, f"expected two rows to fit into {memory} bytes, got {row} bytes a row")
        # Two blocks (one is read, one computed), and about 100 bytes a row for labels, weights, losses and masks.
        step = memory // (2 * row + 100)
        if not self.logits.by_column:  # where a longer block means longer reads
            step = min(step, _BLOCK // row)
        self.step = max(1, min(self.rows, step))

    def _check_shapes(self):
        if not self.classes:
            raise FileError(self.logits.name, f"logits: expected (..., classes), classes > 0, got {self.logits.shape}")
        for name, file in ("targets", self.targets), ("weights", self.weights):
            if file and file.shape != self.shape:
                fits = f"to match logits {self.logits.shape}"
                raise FileError(file.name, f"{name}: expected shape {self.shape} {fits}, got {file.shape}")

    def scored(self, first, count):
        """For each of `count` rows from `first` on: has it both logits and target?"""
        position = np.arange(first, first + count) % self.length
        return (position >= self.first) & (position < self.last)

    def read(self, block, first):
        """Reads rows `first` to `first + step` and their targets; each file front to back, each element once."""
        count = min(self.step, self.rows - first)
        self.logits.read(block.logits[:count].reshape(-1))
        self._read_aligned(self.targets, block.labels[:count], first)
        if self.weights:
            self._read_aligned(self.weights, block.weights[:count], first)
        weights = block.weights[:count].astype(np.float64) if self.weights else None
        return first, block.logits[:count], block.labels[:count], weights

    def _read_aligned(self, file, out, first):
        begin = first + self.shift
        if first == 0:
            self._skip(file, min(max(begin, 0), self.rows))
        low, high = (min(max(at, 0), self.rows) - begin for at in (begin, begin + len(out)))
        file.read(out[low:high])
        out[:low], out[high:] = 0, 0  # these rows have no target: not looked at

    def _skip(self, file, count):
        while count > 0:
            count -= len(scratch := np.empty(min(count, self.step), file.dtype))
            file.read(scratch)

    def counted(self, first, labels, weights):
        """Which rows count. Raises for a label or a weight that cannot be used, with its place in its file."""
        counted = self.scored(first, len(labels))
        if weights is not None:
            bad = counted & ~((weights >= 0) & (weights < np.inf))
            self._raise_first(bad, first, self.weights, "weights", "a finite number >= 0", weights)
            counted &= weights != 0
        counted &= labels != self.ignore_index
        bad = counted & ((labels < 0) | (labels >= self.classes))
        expected = f"a label in [0, {self.classes}) or {self.ignore_index}"
        self._raise_first(bad, first, self.targets, "targets", expected, labels)
        return counted

    def _raise_first(self, bad, first, file, name, expected, values):
        if bad.any():
            row = int(bad.argmax())
            place = np.unravel_index(first + row + self.shift, self.shape) if self.shape else ()
            place = f"[{', '.join(str(int(i)) for i in place)}]" if place else ""
            raise FileError(file.name, f"{name}{place}: expected {expected}, got {values[row]}")

    def better_shift(self, logits, labels, counted, losses):
        """A shift of -1, 0 or 1 that divides the perplexity of the first rows by e, beyond four standard errors."""
        count = min(len(labels), _PROBE[1])
        counted, row = counted[:count], np.arange(count)
        used = losses[:count][counted].astype(np.float64)
        if used.size < _PROBE[0] or self.length < 2:
            return None
        best, least = None, used.mean() - max(1.0, 4 * used.std() / math.sqrt(used.size))
        for shift in {-1, 0, 1} - {self.shift}:
            source = row + shift - self.shift  # where in `labels` the target at that shift is
            known = counted & (source >= 0) & (source < len(labels))
            known &= (row % self.length + shift >= 0) & (row % self.length + shift < self.length)
            moved = labels[np.where(known, source, 0)]
            known &= (moved >= 0) & (moved < self.classes) & (moved != self.ignore_index)
            if known.any():
                y = moved.astype(np.int64)
                y[~known] = -1
                loss = -score_tokens(logits[:count], y, ignore_index=-1).logprob[known].mean(dtype=np.float64)
                if loss < least:
                    best, least = shift, loss
        return best


class _Block:
    def __init__(self, task):
        self.logits = np.empty((task.step, task.classes), task.logits.dtype)
        self.labels = np.empty(task.step, task.targets.dtype)
        self.weights = np.empty(task.step, task.weights.dtype) if task.weights else None


def _blocks(task):
    """(first row, logits, labels, weights) of each block; the next one is read while the caller computes."""
    free, full = queue.SimpleQueue(), queue.SimpleQueue()
    files = task.stack.pop_all()

    def read():
        with files:
            try:
                for first in range(0, task.rows, task.step):
                    block = free.get()
                    if block is None:
                        return
                    full.put((block, task.read(block, first)))
                full.put((None, None))
            except BaseException as error:  # raised again in the caller's thread
                full.put((None, error))

    for _ in range(2):
        free.put(_Block(task))
    # A daemon, which nobody waits for long: it may hang in a pipe that says nothing. Hence it closes the files itself.
    thread = threading.Thread(target=read, name="numbaloss reader", daemon=True)
    thread.start()
    try:
        while True:
            block, item = full.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
            free.put(block)
    finally:
        free.put(None)
        thread.join(1)


class _Output:
    """A .npy file that appears under its name when it is finished, or not at all."""

    def __init__(self, path, shape, dtype, inputs):
        self.name = os.fsdecode(path)
        self.path = os.path.realpath(self.name)
        if os.path.exists(self.path):
            if not os.path.isfile(self.path):
                raise FileError(self.name, "expected a file name to write to, got something else that exists")
            for file in inputs:
                if file.is_file(self.path):
                    raise FileError(self.name, "would replace an input")
        self.dtype = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        self.header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        self.part = f"{self.path}.{secrets.token_hex(4)}.part"
        self.file = None

    def _guard(self, function, *arguments):
        try:
            return function(*arguments)
        except OSError as error:
            raise FileError(self.name, f"cannot be written: {error.strerror or error}") from error

    def __enter__(self):
        self.file = self._guard(open, self.part, "xb")
        return self

    def write(self, values):
        if self.header:
            header, self.header = self.header, None
            self._guard(npy.write_array_header_1_0, self.file, header)
        self._guard(self.file.write, np.ascontiguousarray(values, self.dtype))

    def finish(self):
        self.write(np.empty(0, self.dtype))  # the header, where there was no block
        self._guard(self.file.close)
        self._guard(os.replace, self.part, self.path)
        self.part = None

    def __exit__(self, *_):
        if self.part is not None:
            with suppress(OSError):  # the disk is full: that error is on its way already
                self.file.close()
            os.unlink(self.part)
