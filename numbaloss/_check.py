"""The only file that raises for user input. What it returns is canonical: the kernels trust it.

Logits become pieces, each a `like` (a zero of the dtype), a `rows` tuple (see cpu/_chunks.py) and the
range of rows that it holds. An array that the kernels can read where it lies is one piece and is never copied; any
other (foreign byte order, unaligned, more than two independent row strides) is copied piece by piece.
"""

import numpy as np

from ._backend import is_cupy

PIECE = 1 << 22  # bytes of logits copied at a time, where the array cannot be read in place

_KINDS = {  # dtype name -> a zero of the dtype that the kernels know it by
    "float16": np.int16(0),
    "bfloat16": np.uint16(0),
    "float32": np.float32(0),
    "float64": np.float64(0),
}
NO_LABEL = -(2**63)  # the ignore_index that ignores nothing
_BY_DTYPE = {}
_INT64_MAX = np.iinfo(np.int64).max


def array(x, name):
    """x as an array: NumPy and CuPy arrays as they are, others by DLPack."""
    if type(x) is np.ndarray or is_cupy(x):
        return x
    if isinstance(x, np.ndarray):
        if hasattr(x, "mask"):
            raise TypeError(f"{name}: expected an array without a mask, got {type(x).__name__}; use weights of 0")
        return x.view(np.ndarray)
    if hasattr(x, "__dlpack__"):
        try:
            return np.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError) as error:
            raise TypeError(f"{name}: cannot be read through DLPack ({error}); pass a NumPy or CuPy array") from None
    raise TypeError(f"{name}: expected a NumPy or CuPy array, got {type(x).__name__}")


def carrier(dtype):
    """The zero by which the kernels know this dtype, in whatever byte order; None if they do not know it."""
    if dtype not in _BY_DTYPE:
        _BY_DTYPE[dtype] = _KINDS.get(dtype.name)
    return _BY_DTYPE[dtype]


def logits(x, name="logits"):
    """x as an array of a float dtype."""
    x = array(x, name)
    if carrier(x.dtype) is None:
        hint = "; view bfloat16 bits as ml_dtypes.bfloat16" if x.dtype in (np.dtype("uint16"), np.dtype("V2")) else ""
        raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {x.dtype}{hint}")
    return x


def number_array(x, name):
    """x, which may be a number or nested lists, as an array of real numbers."""
    if hasattr(x, "__dlpack__") or is_cupy(x):
        x = array(x, name)
    else:
        x = np.asarray(x)
        x = x.astype(np.int64) if x.size == 0 else x  # an empty list has no dtype
    if x.dtype.kind not in "biuf" and carrier(x.dtype) is None:
        raise TypeError(f"{name}: expected real numbers, got dtype {x.dtype}")
    return x


def result_dtype(x):
    """float64 for float64 logits, else float32."""
    return np.float64 if x.dtype.char == "d" else np.float32


def axis_index(axis, ndim, name="axis"):
    """axis as a number in [0, ndim)."""
    index = integer(axis, name)
    if not -ndim <= index < ndim:
        raise ValueError(f"{name}: expected a value in [{-ndim}, {ndim}) for logits of {ndim} dimensions, got {index}")
    return index % ndim


def class_axis_last(x, axis, name="logits"):
    """x with its class axis moved to the end (a view), which must hold a class."""
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")
    index = axis_index(axis, x.ndim)
    if x.shape[index] == 0:
        raise ValueError(f"{name}: expected at least one class, got shape {x.shape} with class axis {index}")
    return x if index == x.ndim - 1 else np.moveaxis(x, index, -1)


def same_shape(x, name, shape, other):
    """Raise unless x has this shape, that of `other`."""
    if x.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} to match {other}, got {x.shape}")


def labels(x, shape, name="labels", logits_shape=None):
    """Integer labels as int64, one after the other in memory, and as they were given (for messages)."""
    given = number_array(x, name)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {given.dtype}")
    if given.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} to match logits {logits_shape}, got {given.shape}")
    if given.dtype == np.uint64:
        return np.minimum(given, np.uint64(_INT64_MAX)).astype(np.int64).ravel(), given
    return np.ascontiguousarray(given, np.int64).reshape(-1), given


def weights(x, shape, name="weights"):
    """Weights as float64, one after the other in memory; None stays None. One number counts for all."""
    if x is None:
        return None
    x = number_array(x, name)
    if x.ndim == 0:
        x = np.broadcast_to(x, shape)
    same_shape(x, name, shape, "targets")
    return np.ascontiguousarray(x, np.float64).reshape(-1)


def class_weights(x, classes, dtype):
    """Class weights as an array (classes,) of this dtype; None stays None."""
    if x is None:
        return None
    x = number_array(x, "class_weights")
    same_shape(x, "class_weights", (classes,), "the classes of logits")
    return np.ascontiguousarray(x, dtype)


def choice(x, name, allowed):
    """Raise unless x is one of the allowed words."""
    if x not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {x!r}")
    return x


def raise_bad_label(given, classes, counted, name="labels"):
    """Raise for the first label that counts and is out of range."""
    flat = given.reshape(-1)
    bad = (flat < 0) | (flat >= classes)
    if counted is not None:
        bad &= counted
    first = int(np.argmax(bad))
    where = tuple(int(i) for i in np.unravel_index(first, given.shape)) if given.ndim else ()
    raise ValueError(f"{name}: expected values in [0, {classes}), got {flat[first]} at position {where}")


def integer(x, name):
    """x as a Python integer of 64 bits."""
    try:
        value = int(x.__index__())
    except (AttributeError, TypeError):
        raise TypeError(f"{name}: expected an integer, got {type(x).__name__}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
    return value


def pieces(*arrays):
    """Rows of arrays that share all axes but the last: [(begin, end, [(like, rows, owner) for each array])].

    `owner` keeps the memory alive. One piece where the kernels can read all arrays in place.
    """
    first = arrays[0]
    n = first.size // first.shape[-1] if first.size else 0
    if n == 0:
        return []
    layouts = [_layout(x) for x in arrays]
    if None not in layouts:
        return [(0, n, [(carrier(x.dtype), rows, x) for x, rows in zip(arrays, layouts)])]
    return _copied_pieces(arrays, n)


def _copied_pieces(arrays, n):
    dtypes = [x.dtype.newbyteorder("=") if carrier(x.dtype) is not None else result_dtype(arrays[0]) for x in arrays]
    step = max(1, PIECE // (arrays[0].shape[-1] * arrays[0].itemsize))
    for begin in range(0, n, step):
        end = min(begin + step, n)
        index = np.unravel_index(np.arange(begin, end), arrays[0].shape[:-1]) if arrays[0].ndim > 1 else (None,)
        blocks = [np.ascontiguousarray(x[index], dtype) for x, dtype in zip(arrays, dtypes)]
        yield begin, end, [(carrier(x.dtype), _layout(x), x) for x in blocks]


def element_rows(*arrays):
    """Arrays of one shape, read element by element: (the same with their axes in the order of the first one's memory
    and as few as possible, the order)."""
    order = sorted(range(arrays[0].ndim), key=lambda axis: -abs(arrays[0].strides[axis]))
    views = [x.transpose(order) for x in arrays]
    if all(x.flags.c_contiguous for x in views):
        return [x.reshape(1, -1) for x in views], order
    return views, order


def _layout(x):
    """The `rows` tuple of x, or None if the kernels cannot read x where it lies."""
    item = x.itemsize
    if not (carrier(x.dtype) is not None and x.flags.aligned and x.dtype.isnative):
        return None
    shape, strides = x.shape, x.strides
    address = x.__array_interface__["data"][0]
    if x.flags.c_contiguous:
        row = shape[-1] * item
        return address, max(1, x.size // shape[-1]), 0, row, item, shape[-1]
    merged = []
    for size, stride in zip(shape[:-1], strides[:-1]):
        if stride % item:
            return None
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if strides[-1] % item or len(merged) > 2:
        return None
    inner, inner_stride = merged[-1] if merged else (1, 0)
    outer_stride = merged[0][1] if len(merged) == 2 else 0
    return address, inner, outer_stride, inner_stride, strides[-1], shape[-1]
