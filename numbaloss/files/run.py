"""A pass over files: what it leaves behind when it is interrupted, and how it goes on."""

import json
import os
import secrets
import signal
import threading
import time
from contextlib import closing, contextmanager, suppress
from types import SimpleNamespace

import numpy as np
from numpy.lib import format as npy

from ..cpu._launch import leave_a_core
from .arrayfile import FileError, reason

SAVE_SECONDS = 10  # between two writes of the state


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a pass; `result` is what the rows so far give."""

    def __init__(self, result):
        super().__init__("interrupted")
        self.result = result


def rehearse(task, taken):
    """Take blocks of zeros, a full one and one of a row: what has to be compiled is, before the clock starts.

    Ctrl-C takes effect at the end: Numba makes other errors of it.
    """
    if not task.rows:
        return
    with _whole():
        for count in (task.step, 1):
            taken.take(task.zeros(count), SimpleNamespace(notes={}))


@contextmanager
def _whole():
    """Ctrl-C takes effect at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if came:
        signal.raise_signal(signal.SIGINT)


class Pass:
    """Gives a Task's blocks to `take`, and saves and restores measures.

    Args:
        measures: {name: measure}, anything with state() and restore(state).
        arguments: what must be the same for a pass to be continued, JSON-able.
        resume: path of the state, or None. If it is there, the pass goes on where that was written.
    """

    def __init__(self, task, measures, arguments, resume, output=None):
        self.task, self.measures, self.output = task, measures, output
        self.rows, self.seconds, self.notes = 0, 0.0, {}
        self.path = None if resume is None else os.fsdecode(resume)
        self.head = {"numbaloss.pass": 1, "arguments": arguments}
        if self.path is None:
            return
        if output is not None and os.path.realpath(self.path) == output.path:
            raise ValueError("resume: expected another file than per_token's")
        self.head["files"] = [file.identity() for file in task.files]
        if None in self.head["files"]:
            raise ValueError("resume: expected files, got a pipe")
        if os.path.exists(self.path):
            self._restore()
        else:
            if output is not None:
                output.rewind(output.flush())  # what a pass whose state is gone has left behind
            self.save()  # now, and not after an hour, is the time to find that it cannot be written

    def run(self, take, result, progress=None):
        """Calls take(block) for each block left, then returns result(self). Ctrl-C raises Interrupted."""
        if progress:
            progress(self.rows, self.task.rows)
        first, before, start = self.rows, self.seconds, time.perf_counter()
        saved = start
        try:
            with leave_a_core(), closing(self.task.blocks(self.rows)) as blocks:
                for block in blocks:
                    with _whole():  # so that all measures are of the same rows
                        take(block)
                        self.rows = block.first + len(block.y)
                        now = time.perf_counter()
                        self.seconds = before + now - start
                        if self.path is not None and now - saved > SAVE_SECONDS:
                            self.save()
                            saved = now
                    if progress:
                        progress(self.rows, self.task.rows)
        except KeyboardInterrupt:
            if self.path is not None:
                self.save()
            raise Interrupted(result(self)) from None
        self.seconds = before + time.perf_counter() - start
        if self.path is not None and self.rows > first:
            self.save()
        return result(self)

    def fields(self):
        """What every result tells of its pass."""
        task, rows = self.task, self.rows
        return {
            "shift": task.shift,
            "better_shift": self.notes.get("better_shift"),
            "floor": task.logits[0].floor,
            "rows": rows,
            "complete": rows == task.rows,
            "seconds": self.seconds,
            "bytes": sum(file.nbytes for file in task.files) * rows // max(task.rows, 1),
        }

    def save(self):
        """Replaces the state, whole or not at all."""
        state = {**self.head, "rows": self.rows, "seconds": self.seconds, "notes": self.notes}
        state["measures"] = {name: measure.state() for name, measure in self.measures.items()}
        if self.output:
            state["written"] = self.output.flush()
        part = f"{self.path}.part"
        try:
            with open(part, "w") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            raise FileError(self.path, f"cannot be written: {error.strerror or error}") from error

    def _restore(self):
        try:
            with open(self.path) as file:
                state = json.load(file)
            for name, now in self.head.items():
                if state[name] != json.loads(json.dumps(now)):
                    raise FileError(self.path, f"{name}: expected {json.dumps(now)}, got {json.dumps(state[name])}")
            for name, measure in self.measures.items():
                measure.restore(state["measures"][name])
            self.rows, self.seconds, self.notes = int(state["rows"]), float(state["seconds"]), dict(state["notes"])
            written = int(state["written"]) if self.output else 0
            if not 0 <= self.rows <= self.task.rows or written < 0:
                raise ValueError(f"{self.rows} rows of {self.task.rows}, {written} bytes")
            if self.output:
                self.output.rewind(written, self.rows == self.task.rows)
        except FileError:
            raise
        except Exception as error:  # anything can come out of what is damaged
            raise FileError(self.path, f"not the state of such a pass ({reason(error)})") from error


class Output:
    """A file of one line or item a scored token, that appears under its name when it is finished.

    By its ending: .jsonl or .parquet (index, target, logprob, argmax), else .npy (log probabilities). With
    `keep`, an interrupted pass leaves it as NAME.part, and rewind() goes on with it.
    """

    def __init__(self, path, task, keep):
        self.name = os.fsdecode(path)
        self.path = os.path.realpath(self.name)
        kind = os.path.splitext(self.name)[1].lower()
        kind = kind if kind in (".jsonl", ".parquet") else ".npy"
        if keep and kind == ".parquet":
            raise ValueError("per_token: expected .npy or .jsonl for a pass that can be resumed, got .parquet")
        if os.path.exists(self.path):
            if not os.path.isfile(self.path):
                raise FileError(self.name, "expected a file name to write to, got something else that exists")
            for file in task.files:
                if file.is_file(self.path):
                    raise FileError(self.name, "would replace an input")
        self.task, self.keep, self.kind = task, keep, kind
        self.part = f"{self.path}.part" if keep else f"{self.path}.{secrets.token_hex(4)}.part"
        self.dtype = np.dtype(np.float64 if task.logits[0].dtype == np.float64 else np.float32)
        self.file = self.writer = None
        self.left = keep and os.path.exists(self.part)  # behind when a pass ends early: not what a refused one began
        if kind == ".parquet":
            try:
                import pyarrow.parquet  # noqa: F401
            except ImportError:
                raise ImportError("per_token: .parquet needs pyarrow: pip install pyarrow") from None

    def _guard(self, function, *arguments):
        try:
            return function(*arguments)
        except OSError as error:
            raise FileError(self.name, f"cannot be written: {error.strerror or error}") from error

    def __enter__(self):
        mode = "r+b" if self.left else "w+b" if self.keep else "xb"
        self.file = self._guard(open, self.part, mode)
        if self.kind == ".npy":
            shape = (*self.task.shape[:-1], self.task.last - self.task.first) if self.task.shape else ()
            header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
            self._guard(npy.write_array_header_1_0, self.file, header)
        if self.kind == ".parquet":
            self.writer = _parquet_writer(self.file, self.dtype)
        return self

    def rewind(self, written, complete=False):
        """Drops what was written after this number of bytes."""
        self._guard(self.file.flush)
        if self._guard(os.path.getsize, self.part) < written:
            if complete and os.path.exists(self.path) and os.path.getsize(self.path) == written:
                self._guard(self.file.close)
                os.unlink(self.part)
                self.part = None  # the pass was complete, and the file has its name
                return
            raise FileError(self.name, f"expected {written} bytes in {self.part} to go on with, got fewer")
        self._guard(self.file.truncate, written)
        self._guard(self.file.seek, written)
        self.left = True

    def flush(self):
        """Bytes written so far, all of them with the operating system."""
        self._guard(self.file.flush)
        return self.file.tell()

    def write(self, block, scores):
        """The tokens of a block that have a target."""
        at = np.flatnonzero(block.scored)
        logprob = np.ascontiguousarray(scores.logprob[at], self.dtype)
        if self.kind == ".npy":
            self._guard(self.file.write, logprob)
            return
        columns = {
            "index": [self.task.index(row) for row in at + block.first],
            "target": block.labels[at].tolist(),
            "logprob": [x if np.isfinite(x) else None for x in logprob.tolist()],
            "argmax": scores.argmax[at].tolist(),
        }
        if self.kind == ".jsonl":
            lines = (json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values()))
            self._guard(self.file.write, "".join(lines).encode())
            return
        import pyarrow

        table = pyarrow.table(columns | {"logprob": logprob}, schema=self.writer.schema)
        self._guard(self.writer.write_table, table)

    def finish(self):
        if self.part is None:
            return
        if self.writer is not None:
            self._guard(self.writer.close)
        self._guard(self.file.close)
        self._guard(os.replace, self.part, self.path)
        self.part = None

    def __exit__(self, *_):
        if self.part is not None:
            for file in filter(None, (self.writer, self.file)):
                with suppress(OSError):  # the disk is full: that error is on its way already
                    file.close()
            if not self.left:
                os.unlink(self.part)


def _parquet_writer(file, dtype):
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    whole, real = pyarrow.int64(), pyarrow.from_numpy_dtype(dtype)
    kinds = {"index": pyarrow.list_(whole), "target": whole, "logprob": real, "argmax": whole}
    return ParquetWriter(file, pyarrow.schema(kinds))
