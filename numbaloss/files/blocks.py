"""Files of logits, targets, weights and groups, checked against each other and read in blocks of rows."""

import math
import os
import queue
import threading
from typing import NamedTuple

import numpy as np

from .. import score_tokens
from .device import device_of
from .readers import FileError, open_array

_BLOCK = 16 << 20  # bytes of logits: what has just been read should still be in the processor's cache when it is used
_PROBE = 32, 4096  # rows on which the neighbouring shifts are tried: at least, at most


class Block(NamedTuple):
    """Rows `first` to `first + len(y)`, in buffers that are used again."""

    first: int
    logits: list  # (rows, classes) of each file of logits
    labels: np.ndarray  # as in the file; zeros without targets
    y: np.ndarray  # int64, -1 where a row does not count
    weights: np.ndarray | None  # float64
    groups: np.ndarray | None
    scored: np.ndarray  # whether a row has a target at this shift


class Task:
    """The opened files and how their rows go together.

    Args:
        stack: an ExitStack that closes the files.
        logits: {name of the argument: path}, one or more files of one shape.
        others: {"targets", "weights", "groups": path or None}.
        how: dtype and shape of raw files, as for open_array.
        device: "cpu" or "cuda".
    """

    def __init__(self, stack, logits, others, shift, ignore_index, memory, how, device="cpu"):
        self.device = device_of(device)
        given = [*logits.values(), *(path for path in others.values() if path is not None)]
        if sum(os.fsdecode(path) == "-" for path in given) > 1:
            raise ValueError("-: expected one input on stdin, got more")
        self.logits = [stack.enter_context(open_array(path, "logits", **how)) for path in logits.values()]
        if self.logits[0].floor is not None and others["targets"] is None:
            others = {**others, "targets": given[0]}  # a file of llama.cpp has its own
        others = {name: path for name, path in others.items() if path is not None}
        opened = {name: stack.enter_context(open_array(path, name)) for name, path in others.items()}
        self.targets, self.weights, self.groups = (opened.get(name) for name in ("targets", "weights", "groups"))
        self.files = [*self.logits, *opened.values()]
        self.stack, self.shift, self.ignore_index = stack, shift, ignore_index
        *shape, self.classes = self.logits[0].shape or (0,)
        self.shape = tuple(shape)
        self.rows = math.prod(shape)
        self._check_shapes(logits, opened)
        self.length = shape[-1] if shape else 1
        self.first, self.last = max(0, -shift), min(self.length, self.length - shift)  # positions that have a target
        if shift and (not shape or self.last <= self.first):
            raise ValueError(f"shift: expected less than {self.length} either way, targets {self.shape}, got {shift}")
        self.set_memory(memory)

    def _check_shapes(self, names, opened):
        first = self.logits[0]
        if not self.classes:
            raise FileError(first.name, f"logits: expected (..., classes), classes > 0, got {first.shape}")
        for name, file in zip(names, self.logits):
            if file.shape != first.shape:
                raise FileError(file.name, f"{name}: expected shape {first.shape} as {first.name}, got {file.shape}")
            if file.floor != first.floor:
                raise FileError(
                    file.name, f"{name}: expected a floor of {first.floor} nats as {first.name}, got {file.floor}"
                )
        for name, file in opened.items():
            if file.shape != self.shape:
                fits = f"to match logits {first.shape}"
                raise FileError(file.name, f"{name}: expected shape {self.shape} {fits}, got {file.shape}")

    def set_memory(self, memory):
        """Blocks of so many rows that two of them, one being read and one computed, fit."""
        row = sum(self.classes * file.dtype.itemsize for file in self.logits)
        if 2 * row > memory:
            raise FileError(self.logits[0].name, f"expected two rows to fit into {memory} bytes, got {row} bytes a row")
        step = memory // (2 * row + 200)  # of a row's labels, weights, losses and masks
        if not any(file.by_column for file in self.logits):  # where a longer block means longer reads
            step = min(step, _BLOCK // row)
        self.step = max(1, min(self.rows, step))

    def position(self, rows):
        """Where in its sequence a row stands."""
        return rows % self.length

    def index(self, row):
        """Where a row stands in the array."""
        return [int(i) for i in np.unravel_index(row, self.shape)] if self.shape else []

    def _scored(self, first, count):
        position = self.position(np.arange(first, first + count))
        return (position >= self.first) & (position < self.last)

    def _read(self, room, first):
        """Rows `first` to `first + step` and their targets; each file front to back, each element once."""
        count = min(self.step, self.rows - first)
        for file, buffer in zip(self.logits, room.logits):
            file.read(buffer[:count].reshape(-1))
        parts = [None if x is None else x[:count] for x in (room.labels, room.weights, room.groups)]
        for file, part in zip((self.targets, self.weights, self.groups), parts):
            if file is not None:
                begin = first + self.shift
                low, high = (min(max(at, 0), self.rows) - begin for at in (begin, begin + count))
                file.read(part[low:high])
                part[:low], part[high:] = 0, 0  # these rows have no target: not looked at
        return first, [x[:count] for x in room.logits], *parts

    def _checked(self, first, logits, labels, weights, groups):
        """A Block. Raises for a label or a weight that cannot be used, with its place in its file."""
        scored = self._scored(first, len(labels))
        counted = scored.copy()
        if weights is not None:
            weights = weights.astype(np.float64)
            bad = counted & ~((weights >= 0) & (weights < np.inf))
            self._raise_first(bad, first, self.weights, "weights", "a finite number >= 0", weights)
            counted &= weights != 0
        if self.targets is not None:
            counted &= labels != self.ignore_index
            bad = counted & ((labels < 0) | (labels >= self.classes))
            expected = f"a label in [0, {self.classes}) or {self.ignore_index}"
            self._raise_first(bad, first, self.targets, "targets", expected, labels)
        y = labels.astype(np.int64)
        y[~counted] = -1
        return Block(first, logits, labels, y, weights, groups, scored)

    def _raise_first(self, bad, first, file, name, expected, values):
        if bad.any():
            row = int(bad.argmax())
            place = self.index(first + row + self.shift) or ""
            raise FileError(file.name, f"{name}{place}: expected {expected}, got {values[row]}")

    def blocks(self, first=0):
        """The Blocks from row `first` on; the next one is read while the caller computes."""
        free, full = queue.SimpleQueue(), queue.SimpleQueue()
        files = self.stack.pop_all()

        def read():
            with files:
                try:
                    self._skip(first)
                    for row in range(first, self.rows, self.step):
                        room = free.get()
                        if room is None:
                            return
                        full.put((room, self._read(room, row)))
                    full.put((None, None))
                except BaseException as error:  # raised again in the caller's thread
                    full.put((None, error))

        for _ in range(2):
            free.put(Room(self))
        # A daemon, which nobody waits for long: it may hang in a pipe that says nothing. So it closes the files itself.
        thread = threading.Thread(target=read, name="numbaloss reader", daemon=True)
        thread.start()
        try:
            while True:
                room, item = full.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    return
                yield self._checked(*item)
                free.put(room)
        finally:
            free.put(None)
            thread.join(1)

    def _skip(self, first):
        for file in self.logits:
            file.skip(first * self.classes)
        for file in (self.targets, self.weights, self.groups):
            if file is not None:
                file.skip(min(max(first + self.shift, 0), self.rows))

    def zeros(self, count):
        """A Block of so many rows."""
        room = Room(self)
        for x in (*room.logits, room.labels):
            x[:] = 0
        weights = np.ones(count) if self.weights else None
        groups = None if self.groups is None else np.zeros(count, np.int64)
        y, logits = np.zeros(count, np.int64), [x[:count] for x in room.logits]
        return Block(0, logits, room.labels[:count], y, weights, groups, np.ones(count, bool))

    def better_shift(self, block, losses):
        """A shift of -1, 0 or 1 that divides the perplexity of the first rows by e, beyond four standard errors."""
        count = min(len(block.y), _PROBE[1])
        counted, row = block.y[:count] >= 0, np.arange(count)
        used = losses[:count][counted].astype(np.float64)
        if used.size < _PROBE[0] or self.length < 2:
            return None
        with np.errstate(invalid="ignore", over="ignore"):  # NaN, infinite losses: no shift is better
            best, least = None, used.mean() - max(1.0, 4 * used.std() / math.sqrt(used.size))
        for shift in {-1, 0, 1} - {self.shift}:
            source = row + shift - self.shift  # where in the labels the target at that shift is
            known = counted & (source >= 0) & (source < len(block.labels))
            known &= (row % self.length + shift >= 0) & (row % self.length + shift < self.length)
            moved = block.labels[np.where(known, source, 0)]
            known &= (moved >= 0) & (moved < self.classes) & (moved != self.ignore_index)
            if known.any():
                y = moved.astype(np.int64)
                y[~known] = -1
                scores = score_tokens(block.logits[0][:count], y, ignore_index=-1)
                loss = -scores.logprob[known].mean(dtype=np.float64)
                if loss < least:
                    best, least = shift, loss
        return best


class Room:
    """Buffers for a block."""

    def __init__(self, task):
        self.logits = [task.device.empty((task.step, task.classes), file.dtype) for file in task.logits]
        self.labels = np.zeros(task.step, task.targets.dtype if task.targets else np.int64)
        self.weights = np.empty(task.step, task.weights.dtype) if task.weights else None
        self.groups = np.empty(task.step, task.groups.dtype) if task.groups else None
