"""Labels, weights and other arrays with one item a row: how a kernel gets them as integers, and how it reads them."""

import cupy
import numpy as np

from .._check import NO_LABEL, row_steps
from .._intrinsics import from_bfloat16, from_float16
from ._launch import device, kept
from ._memory import load

_NAMES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_NAMES += ("float16", "bfloat16", "float32", "float64")
KINDS = {name: kind for kind, name in enumerate(_NAMES, 1)}
BOOL, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64, FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = KINDS.values()
ABSENT = 0

_BY_DTYPE = {}  # KINDS, by dtypes: to ask one for its name takes as long as all the rest
_KNOWN = {size: np.int32(size) for size in (2, 4, 8)}

_i8, _u8, _i16, _u16 = np.int8(0), np.uint8(0), np.int16(0), np.uint16(0)
_i32, _u32, _i64, _f32, _f64 = np.int32(0), np.uint32(0), np.int64(0), np.float32(0), np.float64(0)


def operand(x):
    """(kind, address, inner, outer stride, inner stride): x has an item for each row, strides are in bytes, and x is
    read where it lies. The dtype is looked up while the kernel runs, once a row. None is a kind too."""
    if x is None:
        return ABSENT, 0, 1, 0, 0
    kind = _BY_DTYPE.get(x.dtype) or _BY_DTYPE.setdefault(x.dtype, KINDS[x.dtype.name])
    if x.flags.c_contiguous:
        return kind, x.data.ptr, x.size or 1, 0, x.itemsize
    steps = row_steps(x.shape, x.strides)
    if steps is None or any(step % x.itemsize for step in (x.data.ptr, *steps[1:])):
        return operand(kept(cupy.ascontiguousarray(x)))  # CuPy gives its memory to later work on this stream only
    inner, inner_stride, outer_stride = steps
    return kind, x.data.ptr, inner, outer_stride, inner_stride


def with_known_stride(like, rows):
    """`rows` with the class stride as an int32 where classes lie side by side: a kernel of its own, that knows it."""
    return (*rows[:4], _KNOWN[rows[4]], rows[5]) if rows[4] == like.itemsize else rows


def address(x):
    """Where a contiguous array lies; 0 for None."""
    return 0 if x is None else x.data.ptr


@device
def item_place(layout, r):
    """The address of item r by (address, inner, outer stride, inner stride)."""
    address, inner, outer_stride, inner_stride = layout
    outer = np.int64(0)
    if r >= inner:  # a division is a function call
        outer = r // inner
    return address + outer * outer_stride + (r - outer * inner) * inner_stride


@device
def item_address(operand, r):
    return item_place(operand[1:], r)


@device
def label_at(labels, r):
    """Label r as int64; what does not fit is out of every range."""
    kind, at = labels[0], item_address(labels, r)
    if kind == INT64:
        return load(_i64, at)
    if kind == INT32:
        return np.int64(load(_i32, at))
    if kind == UINT64:
        y = load(_i64, at)
        return y if y >= 0 else np.int64(0x7FFFFFFFFFFFFFFF)
    if kind == UINT32:
        return np.int64(load(_u32, at))
    if kind == INT16:
        return np.int64(load(_i16, at))
    if kind == UINT16:
        return np.int64(load(_u16, at))
    if kind == INT8:
        return np.int64(load(_i8, at))
    return np.int64(load(_u8, at))


@device
def weight_at(weights, r):
    """Weight r as float64; 1 where there are none."""
    kind = weights[0]
    if kind == ABSENT:
        return 1.0
    at = item_address(weights, r)
    if kind == FLOAT32:
        return np.float64(load(_f32, at))
    if kind == FLOAT64:
        return load(_f64, at)
    if kind == FLOAT16:
        return np.float64(from_float16(load(_i16, at)))
    if kind == BFLOAT16:
        return np.float64(from_bfloat16(load(_u16, at)))
    if kind == UINT64:
        y = load(_i64, at)
        return np.float64(y) if y >= 0 else np.float64((y >> 1) & 0x7FFFFFFFFFFFFFFF | (y & 1)) * 2.0
    return np.float64(label_at(weights, r))


@device
def counts(r, labels, weights, ignore_index):
    """Whether row r is looked at. An ignore_index of NO_LABEL ignores none."""
    if labels[0] != ABSENT and ignore_index != NO_LABEL and label_at(labels, r) == ignore_index:
        return False
    return weight_at(weights, r) != 0.0


@device
def factor(i, labels, weights, class_weights, classes, ignore_index):
    """The weight of row i times that of its class, 0 if it does not count; any of the three may be absent."""
    w = weight_at(weights, i)
    if labels[0] == ABSENT:
        return w
    y = label_at(labels, i)
    if y == ignore_index and ignore_index != NO_LABEL:
        return 0.0
    if class_weights != 0 and w != 0.0 and 0 <= y < classes:
        return w * load(_f64, class_weights + y * 8)
    return w
