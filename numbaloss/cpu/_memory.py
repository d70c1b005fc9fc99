"""Raw memory for the CPU kernels: addresses in, one-dimensional arrays and float32 or float64 values out."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array, populate_array

from .._scalar import from_bfloat16, from_float16, widen_half

ALIGN = 64  # bytes: a cache line, and the widest vector


@intrinsic
def span(typingctx, like, address, size):
    """A contiguous one-dimensional array of `like`'s dtype over `size` items at `address`. Owns nothing."""
    array = types.Array(like.dtype, 1, "C")

    def codegen(context, builder, sig, args):
        _, address, size = args
        item = ir.Constant(ir.IntType(64), context.get_abi_sizeof(context.get_data_type(like.dtype)))
        view = make_array(array)(context, builder)
        populate_array(
            view,
            data=builder.inttoptr(address, view.data.type),
            shape=[size],
            strides=[item],
            itemsize=item,
            meminfo=None,
        )
        return view._getvalue()

    return array(like, types.int64, types.int64), codegen


def widen(x):
    """A logit as float32 (or float64): bfloat16 comes as uint16, float16 as int16."""


@overload(widen)
def _widen(x):
    if x == types.uint16:
        return lambda x: from_bfloat16(x)
    if x == types.int16:
        return lambda x: from_float16(x)
    return lambda x: x


@intrinsic
def transpose_16(typingctx, like, source, source_stride, target, target_stride):
    """16 rows of 16 neighbouring logits at `source` become 16 rows of float32 at `target`; strides in bytes.

    Four stages that interleave vector i with vector i + 8 transpose; LLVM turns them into the machine's own shuffles.
    """
    kinds = {types.float32: ir.FloatType(), types.int16: ir.IntType(16), types.uint16: ir.IntType(16)}
    if like.dtype not in kinds:
        return None

    def codegen(context, builder, sig, args):
        _, source, source_stride, target, target_stride = args
        kind, item = kinds[like.dtype], 4 if like.dtype == types.float32 else 2
        wide = ir.VectorType(ir.FloatType(), 16)
        words = ir.VectorType(ir.IntType(32), 16)

        def row(base, stride, i, element):
            address = builder.add(base, builder.mul(stride, ir.Constant(stride.type, i)))
            return builder.inttoptr(address, ir.VectorType(element, 16).as_pointer())

        rows = []
        for i in range(16):
            x = builder.load(row(source, source_stride, i, kind), align=item)
            if like.dtype == types.int16:
                x = widen_half(context, builder, x)
            elif like.dtype == types.uint16:
                x = builder.bitcast(builder.shl(builder.zext(x, words), ir.Constant(words, [16] * 16)), wide)
            rows.append(x)
        index = ir.VectorType(ir.IntType(32), 16)
        halves = [ir.Constant(index, [(k // 2 + h) + 16 * (k % 2) for k in range(16)]) for h in (0, 8)]
        for _ in range(4):
            rows = [builder.shuffle_vector(rows[k // 2], rows[k // 2 + 8], halves[k % 2]) for k in range(16)]
        for i in range(16):
            builder.store(rows[i], row(target, target_stride, i, ir.FloatType()), align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(like, i64, i64, i64, i64), codegen


def compute_dtype(like):
    """The dtype that an array of this kind is computed in, as an empty array."""


@overload(compute_dtype)
def _compute_dtype(like):
    if like.dtype == types.float64:
        return lambda like: np.empty(0, np.float64)
    return lambda like: np.empty(0, np.float32)


@njit
def scratch(size, like):
    """`size` items of `like`'s dtype that begin on a cache line."""
    store = np.empty(size * like.itemsize + ALIGN, np.uint8)
    begin = (store.ctypes.data + (ALIGN - 1)) & ~(ALIGN - 1)
    offset = begin - store.ctypes.data
    return store[offset : offset + size * like.itemsize].view(like.dtype)


@njit
def gather(like, address, stride, size, spare):
    """The `size` items at `address`, `stride` bytes apart: in place where they are neighbours, else copied to `spare`.

    `spare` is an address, not an array, so that neither way counts a reference.
    """
    if stride != like.itemsize:
        copy = span(like, spare, size)
        for i in range(np.uint64(size)):
            copy[i] = span(like, address + np.int64(i) * stride, 1)[0]
        return copy
    return span(like, address, size)


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at `address`, which may not exist."""
    byte = ir.IntType(8).as_pointer()

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [byte] + [ir.IntType(32)] * 3)
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        flags = [ir.Constant(ir.IntType(32), k) for k in (0, 3, 1)]  # read, keep, data
        builder.call(function, [builder.inttoptr(args[0], byte), *flags])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
