"""The only file that raises for user input. What it returns is canonical: the kernels trust it.

Logits become pieces, each a `like` (a zero of the dtype), a `rows` tuple (see cpu/_chunks.py) and the
range of rows that it holds. An array that the kernels can read where it lies is one piece and is never copied; any
other (foreign byte order, unaligned, more than two independent row strides) is copied piece by piece.
"""

import math

import numpy as np

from ._backend import array_module, is_cupy

PIECE = {"numpy": 1 << 22, "cupy": 1 << 26}  # bytes of logits copied at a time, where they cannot be read in place

_KINDS = {  # dtype name -> a zero of the dtype that the kernels know it by
    "float16": np.int16(0),
    "bfloat16": np.uint16(0),
    "float32": np.float32(0),
    "float64": np.float64(0),
}
NO_LABEL = -(2**63)  # the ignore_index that ignores nothing
# what a sum of factor * value is divided by; CLASS_FACTORS: by the factors, whose class weights do not multiply values;
# FACTORS_ALONE: not that, but the sum of the factors, without a look at the values
NOTHING, FACTORS, CLASS_FACTORS, FACTORS_OR_NONE, NONZERO_OR_NONE, FACTORS_ALONE = range(6)
_BY_DTYPE = {}
_INT64_MAX = np.iinfo(np.int64).max
DLPACK_CUDA = 2


def array(x, name):
    """x as an array: NumPy and CuPy arrays as they are, others by DLPack, without a copy."""
    if type(x) is np.ndarray or is_cupy(x):
        return x
    if isinstance(x, np.ndarray):
        if hasattr(x, "mask"):
            raise TypeError(f"{name}: expected an array without a mask, got {type(x).__name__}; use weights of 0")
        return x.view(np.ndarray)
    if hasattr(x, "__dlpack__"):
        try:
            if x.__dlpack_device__()[0] == DLPACK_CUDA:
                return _cupy(name).from_dlpack(x)
            return np.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError) as error:
            raise TypeError(f"{name}: cannot be read through DLPack ({error}); pass a NumPy or CuPy array") from None
    raise TypeError(f"{name}: expected a NumPy or CuPy array, got {type(x).__name__}")


def _cupy(name):
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f'{name}: an array on a GPU needs CuPy ({error}); install "numbaloss[cuda12]" or "numbaloss[cuda13]"'
        ) from None
    return cupy


def carrier(dtype):
    """The zero by which the kernels know this dtype, in whatever byte order; None if they do not know it."""
    try:
        return _BY_DTYPE[dtype]
    except KeyError:
        _BY_DTYPE[dtype] = like = _KINDS.get(dtype.name)
        return like


def logits(x, name="logits"):
    """x as an array of a float dtype."""
    x = array(x, name)
    if carrier(x.dtype) is None:
        hint = "; view bfloat16 bits as ml_dtypes.bfloat16" if x.dtype in (np.dtype("uint16"), np.dtype("V2")) else ""
        raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {x.dtype}{hint}")
    return x


def number_array(x, name, logits):
    """x as an array of real numbers; numbers and nested lists become an array of the kind that logits is."""
    if hasattr(x, "__dlpack__") or is_cupy(x):
        x = array(x, name)
    else:
        x = np.asarray(x)
        x = x.astype(np.int64) if x.size == 0 else x  # an empty list has no dtype
        if x.dtype.kind in "biuf":
            x = array_module(logits).asarray(x)
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
    ndim = x.ndim
    if ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")
    index = axis_index(axis, ndim)
    if x.shape[index] == 0:
        raise ValueError(f"{name}: expected at least one class, got shape {x.shape} with class axis {index}")
    return x if index == ndim - 1 else array_module(x).moveaxis(x, index, -1)


def same_shape(x, name, shape, other, whole=None):
    """Raise unless x has this shape, that of `other`; `whole` is the array of that name, where it has more axes."""
    if x.shape != shape:
        other = other if whole is None else f"{other} {whole.shape}"
        raise ValueError(f"{name}: expected shape {shape} to match {other}, got {x.shape}")


def labels(x, shape, name, logits):
    """Integer labels, and as they were given (for messages). NumPy's as int64, one after the other in memory; the CUDA
    kernels read any integers where they lie."""
    given = number_array(x, name, logits)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {given.dtype}")
    same_shape(given, name, shape, "logits", logits)
    if is_cupy(given):
        return given, given
    if given.dtype == np.uint64:
        return np.minimum(given, np.uint64(_INT64_MAX)).astype(np.int64).ravel(), given
    return np.ascontiguousarray(given, np.int64).reshape(-1), given


def weights(x, shape, logits, name="weights", other="targets"):
    """Weights, one number counting for all; None stays None. NumPy's as float64, one after the other in memory; the
    CUDA kernels read any real numbers where they lie."""
    if x is None:
        return None
    x = number_array(x, name, logits)
    if x.ndim == 0:
        x = array_module(x).broadcast_to(x, shape)
    same_shape(x, name, shape, other)
    return x if is_cupy(x) else np.ascontiguousarray(x, np.float64).reshape(-1)


def class_weights(x, classes, dtype, logits):
    """Class weights as an array (classes,) of this dtype; None stays None."""
    if x is None:
        return None
    x = number_array(x, "class_weights", logits)
    same_shape(x, "class_weights", (classes,), "the classes of logits")
    return array_module(x).ascontiguousarray(x, dtype)


def flat(x):
    """x with one axis, as a view where it can be one."""
    return x if x.ndim == 1 else x.reshape(-1)


def by_rows(x):
    """x with two axes, of which the last one stays."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def like_logits(logits, dtype, axis):
    """A new array of logits' shape, in their memory order if the kernels can write that."""
    xp = array_module(logits)
    if not logits.flags.c_contiguous:
        x = xp.empty_like(logits, dtype)
        if x.size == 0 or readable(class_axis_last(x, axis)) is not None:
            return x
    return xp.empty(logits.shape, dtype)


def gradient(out, logits, axis, name="logits"):
    """The array that a gradient goes to: `out`, or a new one like the logits, in their memory order."""
    if out is None:
        return like_logits(logits, logits.dtype.newbyteorder("="), axis)
    out = output(out, logits, name)
    if out.size and readable(class_axis_last(out, axis, "out")) is None:
        raise ValueError("out: expected native byte order and at most two row strides, got another layout")
    return out


def output(out, logits, name, argument=None):
    """The array that the gradient by the logits, or by the argument that is given, goes to; None stays None."""
    if out is None:
        return None
    out, by_logits = array(out, "out"), argument is None
    dtype = gradient_dtype(logits if by_logits else argument, logits)
    same_shape(out, "out", np.shape(logits if by_logits else argument), name)
    allowed = (dtype, np.dtype(np.float32)) if by_logits and dtype.itemsize == 2 else (dtype,)
    if out.dtype not in allowed:
        raise TypeError(f"out: expected dtype {' or '.join(map(str, allowed))}, got {out.dtype}")
    if not is_cupy(out) and not out.flags.writeable:
        raise ValueError("out: expected an array that can be written, got a read-only one")
    return out


def gradient_dtype(argument, logits):
    """That of an argument if it is an array of floats, else the losses'."""
    dtype = getattr(argument, "dtype", None)
    if dtype is None or carrier(dtype) is None:
        return np.dtype(result_dtype(logits))
    return dtype.newbyteorder("=")


def differentiable(argument, name):
    """Raise for a gradient by an argument that was not given."""
    if argument is None:
        raise ValueError(f"{name}: expected an argument to differentiate by, got None")
    return argument


def upstream(x, shape, logits):
    """The gradient that comes from above, of this shape; None stays None. NumPy's as float64, one after the other in
    memory, or one number for all."""
    if x is None:
        return None
    x = number_array(x, "upstream", logits)
    try:
        wide = array_module(x).broadcast_to(x, shape)
    except ValueError:
        raise ValueError(f"upstream: expected a shape that broadcasts to the loss's {shape}, got {x.shape}") from None
    if is_cupy(x):
        return wide
    return np.ascontiguousarray(x if x.size == 1 else wide, np.float64).reshape(-1)


def part(x, begin, end):
    """Entries [begin, end) of labels, weights or losses; None stays None."""
    if x is None or (begin == 0 and end == x.size):
        return x
    return flat(x)[begin:end]


def rows_of(x, begin, end):
    """Rows [begin, end) of an array."""
    return x if begin == 0 and end == len(x) else x[begin:end]


def result(x):
    """What a user gets of an array: a scalar of NumPy's in place of an array without axes."""
    return x if x.ndim else x[()]


def choice(x, name, allowed):
    """Raise unless x is one of the allowed words."""
    if x not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {x!r}")
    return x


def raise_bad_label(given, classes, weights, ignore_index, name):
    """Raise for the first label that counts and is out of range, if there is one. Waits for a device."""
    given, weights = on_host(given), on_host(weights)
    flat = given.reshape(-1)
    bad = (flat < 0) | (flat >= classes)
    if ignore_index != NO_LABEL:
        bad &= flat != ignore_index
    if weights is not None:
        bad &= weights.reshape(-1) != 0
    if not bad.any():
        return
    first = int(np.argmax(bad))
    where = tuple(int(i) for i in np.unravel_index(first, given.shape)) if given.ndim else ()
    raise ValueError(f"{name}: expected values in [0, {classes}), got {flat[first]} at position {where}")


def on_host(x):
    """x as a NumPy array, once a device has finished it; None stays None."""
    return x.get() if is_cupy(x) else x


def integer(x, name):
    """x as a Python integer of 64 bits."""
    try:
        value = int(x.__index__())
    except (AttributeError, TypeError):
        raise TypeError(f"{name}: expected an integer, got {type(x).__name__}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
    return value


def real(x, name, low, high=math.inf, above=False):
    """x as a Python float in [low, high], or above `low`, and finite."""
    try:
        value = float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a real number, got {type(x).__name__}") from None
    if not low <= value <= high or (above and value == low) or math.isinf(value):
        span = f"above {low:g}" if above else f"in [{low:g}, {high:g}]" if high < math.inf else f"from {low:g} on"
        raise ValueError(f"{name}: expected a finite number {span}, got {x!r}")
    return value


def pieces(*arrays, prepare=None, dtype=None):
    """Rows of arrays that share all axes but the last: [(begin, end, [(like, rows, owner) for each array])].

    `owner` keeps the memory alive. One piece where the kernels can read all arrays in place; else pieces of PIECE
    bytes, what cannot be read, or is not of `dtype`, being copied. `prepare` makes the first array from each piece of
    it.
    """
    size = arrays[0].size
    if size == 0:
        return []
    if prepare is None and dtype is None:
        whole = [_layout(x) for x in arrays]
        if None not in whole:
            return [(0, size // arrays[0].shape[-1], whole)]
    return _prepared_pieces(arrays, prepare, dtype)


def _prepared_pieces(arrays, prepare, dtype):
    for begin, end, index in blocks(arrays[0]):
        parts = [in_reach(x[index], arrays[0], dtype) for x in arrays]
        if prepare is not None:
            parts[0] = prepare(parts[0])
        yield begin, end, [_layout(x) for x in parts]


def in_reach(x, logits, dtype=None):
    """x, or a copy that the kernels can read, of this dtype unless it is None."""
    if _layout(x) is not None and (dtype is None or x.dtype == dtype):
        return x
    own = x.dtype.newbyteorder("=") if carrier(x.dtype) is not None else result_dtype(logits)
    return array_module(x).array(x, dtype or own, order="C")


def blocks(x, begin=0, index=()):
    """(begin, end, index) of blocks of about PIECE bytes: x[index] has the rows [begin, end) of x."""
    step = max(1, PIECE[array_module(x).__name__] * len(x) // (x.size * x.itemsize)) if x.ndim > 1 else len(x)
    if step == 1 and x.ndim > 2:
        for i in range(len(x)):
            yield from blocks(x[i], begin + i * (x[i].size // x.shape[-1]), (*index, i))
    else:
        for i in range(0, len(x), step):
            part = x[i : i + step]
            rows = part.size // x.shape[-1]
            yield begin, begin + rows, (*index, slice(i, i + step))
            begin += rows


def readable(x):
    """(like, rows) of an array that the kernels can read, and write, where it lies; None for another."""
    layout = _layout(x)
    return layout and layout[:2]


def element_rows(*arrays):
    """Arrays of one shape, read element by element: (the same with their axes in the order of the first one's memory
    and as few as possible, the order)."""
    steps = [abs(stride) for stride in arrays[0].strides]
    order = sorted(range(len(steps)), key=steps.__getitem__, reverse=True)
    views = arrays if order == sorted(order) else [x.transpose(order) for x in arrays]
    if all(x.flags.c_contiguous for x in views):
        return [x.reshape(1, -1) for x in views], order
    return views, order


def _layout(x):
    """(like, rows, x), or None if the kernels cannot read x where it lies."""
    dtype, item, address = x.dtype, x.itemsize, address_of(x)
    like = carrier(dtype)
    if like is None or address % item or not dtype.isnative:
        return None
    shape = x.shape
    if x.flags.c_contiguous:
        classes = shape[-1]
        return like, (address, x.size // classes or 1, 0, classes * item, item, classes), x
    strides = x.strides
    steps = row_steps(shape[:-1], strides[:-1])
    if steps is None or any(step % item for step in (*steps, strides[-1])[1:]):
        return None
    inner, inner_stride, outer_stride = steps
    return like, (address, inner, outer_stride, inner_stride, strides[-1], shape[-1]), x


def address_of(x):
    """Where an array's first item lies in memory, the host's or the device's."""
    return x.data.ptr if is_cupy(x) else x.__array_interface__["data"][0]


def row_steps(shape, strides):
    """(inner, inner stride, outer stride): item r of these axes lies (r // inner) outer strides and r % inner inner
    strides from the first; None if that takes more than two strides."""
    merged = []
    for size, stride in zip(shape, strides):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    return *(merged[-1] if merged else (1, 0)), merged[0][1] if len(merged) == 2 else 0
