"""What `llama-perplexity --kl-divergence-base FILE` writes: tokens, and a model's log probabilities in 16 bits.

All numbers little-endian, as tools/perplexity/perplexity.cpp of llama.cpp writes them:

    "_logits_", int32 n_ctx, int32 n_vocab, int32 n_chunk
    int32 tokens[n_chunk][n_ctx]
    for each chunk, for each position t = n_ctx // 2, ..., n_ctx - 2, a row:
        float32 scale, float32 least, uint16 q[n_vocab], and one uint16 of padding if n_vocab is odd

The row at t holds log p(token at t + 1 is j) = scale * q[j] + least. What lies more than 16 nats below the largest of a
row is raised to 16 below it, hence scale <= 16 / 65535, and a row's probabilities add up to slightly over 1. (Another
program, ik_llama.cpp, writes the same with 24 for 16.)
"""

import struct

import numpy as np

from .arrayfile import ArrayFile, FileError, StreamFile, size_of, take

MAGIC = b"_logits_"
_HEADER = struct.Struct("<3i")
FLOORS = 16.0, 24.0
_SAMPLE = 64  # rows whose scale is looked at when the file is opened
_PIECE = 1 << 20  # bytes of rows widened at once


def open_llama(name, raw, argument):
    """The log probabilities, or as "targets" the tokens that they predict, of a file that stands behind its magic."""
    size = size_of(raw)
    if size is None:
        raise FileError(name, "a llama.cpp file cannot be read from a pipe")
    if argument not in ("logits", "targets"):
        raise FileError(name, f"{argument}: expected an array, got a llama.cpp file, which has logits and targets only")
    header = take(raw, _HEADER.size)
    if len(header) < _HEADER.size:
        raise FileError(name, "ends inside the header")
    context, classes, chunks = _HEADER.unpack(header)
    rows = context - 1 - context // 2
    if rows < 1 or classes < 1 or chunks < 1:
        raise FileError(
            name, f"damaged header: expected n_ctx > 2, n_vocab > 0, n_chunk > 0, got {context}, {classes}, {chunks}"
        )
    width = 4 + classes + classes % 2
    tokens = chunks * context
    expected = len(MAGIC) + _HEADER.size + 4 * tokens + 2 * chunks * rows * width
    if size != expected:
        raise FileError(name, f"{'truncated' if size < expected else 'damaged'}: expected {expected} bytes, got {size}")
    if argument == "targets":
        return _Targets(name, raw, (chunks, rows), context, classes)
    raw.seek(4 * tokens, 1)
    return _Logits(name, raw, (chunks, rows, classes), width)


class _Logits(ArrayFile):
    """(chunks, rows, classes) float32. Whole rows only: read() and skip() take multiples of `classes`."""

    def __init__(self, name, raw, shape, width):
        super().__init__(name, raw, shape, np.dtype(np.float32))
        self._rows = StreamFile(name, raw, raw, (shape[0] * shape[1], width), np.dtype("<u2"))
        self.nbytes = self._rows.nbytes
        self._row = 0
        start, count = raw.tell(), shape[0] * shape[1]
        for row in sorted({count * i // _SAMPLE for i in range(_SAMPLE)}):
            raw.seek(start + 2 * width * row)
            self._look(np.frombuffer(take(raw, 8).ljust(8, b"\0"), "<f4").reshape(1, 2), row)
        raw.seek(start)

    def _look(self, heads, first):
        """Checks scale and least of rows from `first` on, and finds the floor that no row is wider than."""
        scale, least = heads.T
        bad = ~((scale >= 0) & (scale <= 1) & np.isfinite(least))
        if bad.any():
            i = int(bad.argmax())
            chunk, row = divmod(first + i, self.shape[1])
            expected = "a scale in [0, 1] and a finite least value"
            raise FileError(self.name, f"logits[{chunk}, {row}]: expected {expected}, got {scale[i]} and {least[i]}")
        width = round(65535 * float(scale.max()), 2)
        floor = max(self.floor or 0.0, next((f for f in FLOORS if width <= f), width))
        if self._row and floor > self.floor:
            raise FileError(self.name, f"expected rows {self.floor} nats wide at most, as others, got {width}")
        self.floor = floor

    def read(self, out):
        classes, width = self.shape[2], self._rows.shape[1]
        if len(out) % classes:
            raise ValueError(f"out: expected whole rows of {classes} elements, got {len(out)}")
        rows = out.reshape(-1, classes)
        step = max(1, _PIECE // (2 * width))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            coded = np.empty((len(part), width), np.uint16)
            self._rows.read(coded.reshape(-1))
            heads = coded[:, :4].copy().view(np.float32)
            self._look(heads, self._row)
            np.multiply(coded[:, 4 : 4 + classes], heads[:, :1], out=part)
            part += heads[:, 1:]
            self._row += len(part)

    def skip(self, count):
        rows, rest = divmod(count, self.shape[2])
        if rest:
            raise ValueError(f"count: expected a multiple of {self.shape[2]}, got {count}")
        self._rows.skip(rows * self._rows.shape[1])
        self._row += rows


class _Targets(ArrayFile):
    """(chunks, rows) int32: the tokens at n_ctx // 2 + 1, ..., n_ctx - 1 of each chunk."""

    def __init__(self, name, raw, shape, context, classes):
        super().__init__(name, raw, shape, np.dtype(np.int32))
        self._tokens = StreamFile(name, raw, raw, (shape[0], context), np.dtype("<i4"))
        self._classes = classes
        self._position = 0

    def read(self, out):
        rows, done = self.shape[1], 0
        lead = self._tokens.shape[1] - rows  # tokens of a chunk that nothing predicts here
        while done < len(out):
            chunk, row = divmod(self._position, rows)
            if row == 0:
                self._tokens.skip(lead)
            part = out[done : done + rows - row]
            self._tokens.read(part)
            bad = (part < 0) | (part >= self._classes)
            if bad.any():
                i = int(bad.argmax())
                expected = f"a token in [0, {self._classes})"
                raise FileError(self.name, f"targets[{chunk}, {row + i}]: expected {expected}, got {part[i]}")
            done += len(part)
            self._position += len(part)

    def skip(self, count):
        chunks = [at // self.shape[1] for at in (self._position - 1, self._position + count - 1)]
        lead = self._tokens.shape[1] - self.shape[1]
        self._tokens.skip(count + lead * (chunks[1] - chunks[0]))
        self._position += count
