"""Where the blocks of a pass are computed."""

import numpy as np

DEVICES = "cpu", "cuda"


class Host:
    """On NumPy arrays, as they are."""

    empty = staticmethod(np.empty)

    def run(self, function, *arrays):
        return function(*arrays)


class Cuda:
    """On CuPy arrays: rows go there from pinned memory, results come back. The current device and stream."""

    def __init__(self):
        try:
            import cupy
            import cupyx

            from .. import cuda  # noqa: F401 (its message says what is missing)
        except ImportError as error:
            raise ImportError(f"device: expected CuPy and numba-cuda for 'cuda' ({error})") from error
        self._cupy, self.empty = cupy, cupyx.empty_pinned

    def run(self, function, *arrays):
        """function(*arrays) on the device, as NumPy arrays. Each row is computed for itself: in two halves where memory
        there does not suffice."""
        try:
            result = function(*map(self._cupy.asarray, arrays))
        except self._cupy.cuda.memory.OutOfMemoryError:
            count = len(arrays[0])
            if count < 2:
                raise
            parts = [self.run(function, *(a[rows] for a in arrays)) for rows in _halves(count)]
            return _like(parts[0], [None if x[0] is None else np.concatenate(x) for x in zip(*map(_fields, parts))])
        return _like(result, [None if x is None else self._cupy.asnumpy(x) for x in _fields(result)])


def device_of(name):
    """Host or Cuda."""
    if name not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(map(repr, DEVICES))}, got {name!r}")
    return Cuda() if name == "cuda" else Host()


def _halves(count):
    return slice(count // 2), slice(count // 2, None)


def _fields(result):
    return result if isinstance(result, (tuple, list)) else [result]


def _like(result, fields):
    """These fields as such a result."""
    if hasattr(result, "_make"):
        return result._make(fields)
    return fields if isinstance(result, (tuple, list)) else fields[0]
