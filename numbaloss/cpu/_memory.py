"""Raw memory for the CPU kernels: addresses in, one-dimensional arrays and float32 or float64 values out.

`like` is a zero of the dtype of what is read: bfloat16 comes as uint16, float16 as int16.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array, populate_array

from .._intrinsics import narrow, narrow_pair, widen_half
from .._scalar import LANES
from .._typed import item_size
from .._vector import WIDTH, Vector, spread

# What kernels call, and Python does not: without the wrappers for that, which take time to compile.
inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)

ALIGN = 64  # bytes: a cache line, and the widest vector
TILE_BYTES = 8 * LANES


def _attribute(name, docstring):
    @intrinsic
    def mark(typingctx):
        def codegen(context, builder, sig, args):
            builder.function.attributes.add(name)
            return context.get_dummy_value()

        return types.void(), codegen

    mark.__doc__ = docstring
    return mark


always_inline = _attribute("alwaysinline", "Of the calling function. (Numba's own forceinline passes on to callees.)")
out_of_line = _attribute("noinline", "One copy of the calling function: LLVM takes seconds for each that it inlines.")


@intrinsic
def span(typingctx, like, address, size):
    """A contiguous one-dimensional array of `like`'s dtype over `size` items at `address`. Owns nothing."""
    array = types.Array(like, 1, "C")

    def codegen(context, builder, sig, args):
        _, address, size = args
        item = ir.Constant(ir.IntType(64), context.get_abi_sizeof(context.get_data_type(like)))
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


def _wide(like):
    """The vector type that such logits are widened to."""
    return Vector(types.float64 if like == types.float64 else types.float32)


def _widen_vector(context, builder, like, x):
    if like == types.int16:
        return widen_half(context, builder, x)
    if like == types.uint16:
        words = ir.VectorType(ir.IntType(32), WIDTH)
        shifted = builder.shl(builder.zext(x, words), ir.Constant(words, [16] * WIDTH))
        return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), WIDTH))
    return x


def _load(context, builder, like, address, size=None):
    """The vector of WIDTH logits at `address`; with a size, those from there on are -inf and not touched."""
    item = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}.get(like, ir.IntType(16))
    kind = ir.VectorType(item, WIDTH)
    align = like.bitwidth // 8
    pointer = builder.inttoptr(address, kind.as_pointer())
    if size is None:
        return _widen_vector(context, builder, like, builder.load(pointer, align=align))
    index = ir.VectorType(ir.IntType(32), WIDTH)
    size = spread(builder, builder.trunc(size, ir.IntType(32)))
    mask = builder.icmp_signed("<", ir.Constant(index, list(range(WIDTH))), size)
    low = {types.uint16: 0xFF80, types.int16: 0xFC00}.get(like, -math.inf)
    flags = ir.VectorType(ir.IntType(1), WIDTH)
    function = ir.FunctionType(kind, [kind.as_pointer(), ir.IntType(32), flags, kind])
    suffix = f"v{WIDTH}{item.intrinsic_name}"
    load = cgutils.get_or_insert_function(builder.module, function, f"llvm.masked.load.{suffix}.p0{suffix}")
    x = builder.call(load, [pointer, ir.Constant(ir.IntType(32), align), mask, ir.Constant(kind, [low] * WIDTH)])
    return _widen_vector(context, builder, like, x)


@intrinsic
def load(typingctx, like, address):
    """The WIDTH logits at `address` as a Vector of float32 or float64."""

    def codegen(context, builder, sig, args):
        return _load(context, builder, like, args[1])

    return _wide(like)(like, types.int64), codegen


@intrinsic
def load_part(typingctx, like, address, size):
    """The first `size` < WIDTH logits at `address`, and -inf."""

    def codegen(context, builder, sig, args):
        return _load(context, builder, like, args[1], args[2])

    return _wide(like)(like, types.int64, types.int64), codegen


@inner
def load_up_to(like, address, size):
    """The first `size` > 0 logits at `address`, at most WIDTH, and -inf."""
    always_inline()
    return load(like, address) if size >= WIDTH else load_part(like, address, size)


@intrinsic
def store(typingctx, address, v):
    """Write a Vector to `address`."""

    def codegen(context, builder, sig, args):
        address, value = args
        builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=v.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, v), codegen


@intrinsic
def store_as(typingctx, like, address, v, size):
    """Write the first `size` items of a Vector as the type of `like`, rounded."""

    def codegen(context, builder, sig, args):
        _, address, x, size = args
        if like in (types.int16, types.uint16):
            x = narrow(builder, like, x, getattr(context.codegen(), "_tm_features", "+f16c"))
        kind, align = x.type, like.bitwidth // 8
        pointer = builder.inttoptr(address, kind.as_pointer())
        index = ir.VectorType(ir.IntType(32), WIDTH)
        flags = ir.VectorType(ir.IntType(1), WIDTH)
        with builder.if_else(builder.icmp_signed(">=", size, ir.Constant(size.type, WIDTH))) as (whole, part):
            with whole:
                builder.store(x, pointer, align=align)
            with part:
                count = spread(builder, builder.trunc(size, ir.IntType(32)))
                mask = builder.icmp_signed("<", ir.Constant(index, list(range(WIDTH))), count)
                arguments = [kind, kind.as_pointer(), ir.IntType(32), flags]
                suffix = f"v{WIDTH}{kind.element.intrinsic_name}"
                name = f"llvm.masked.store.{suffix}.p0{suffix}"
                function = cgutils.get_or_insert_function(
                    builder.module, ir.FunctionType(ir.VoidType(), arguments), name
                )
                builder.call(function, [x, pointer, ir.Constant(ir.IntType(32), align), mask])
        return context.get_dummy_value()

    return types.void(like, types.int64, v, types.int64), codegen


@intrinsic
def store_pair(typingctx, like, address, a, b):
    """Write two Vectors side by side as the type of `like`, rounded; none of their items is subnormal."""

    def codegen(context, builder, sig, args):
        _, address, *pair = args
        features = getattr(context.codegen(), "_tm_features", "+f16c")
        if like == types.uint16:
            pair = [narrow_pair(builder, *pair, features)]
        elif like == types.int16:
            pair = [narrow(builder, like, x, features) for x in pair]
        for i, x in enumerate(pair):
            at = builder.add(address, ir.Constant(address.type, i * WIDTH * like.bitwidth // 8))
            builder.store(x, builder.inttoptr(at, x.type.as_pointer()), align=like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(like, types.int64, a, a), codegen


@intrinsic
def store_item(typingctx, like, address, value):
    """Write one float as the type of `like`, rounded. (Not store_as of a splat with a size of 1: LLVM 22 makes of that
    a store that is as wide as before the rounding.)"""

    def codegen(context, builder, sig, args):
        _, address, x = args
        if like in (types.int16, types.uint16):
            x = narrow(builder, like, x, getattr(context.codegen(), "_tm_features", "+f16c"))
        builder.store(x, builder.inttoptr(address, x.type.as_pointer()), align=like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(like, types.int64, value), codegen


@intrinsic
def transpose(typingctx, like, source, source_stride, size, target, target_stride):
    """16 rows of `size` neighbouring logits at `source` become 16 rows at `target`, the last all -inf for a size < 16.

    Strides in bytes. Vectors i and i + 1, 2, 4, 8 exchange halves: two stages within quarters, two of whole quarters,
    for which machines have instructions.
    """
    index = ir.VectorType(ir.IntType(32), 16)

    def picks(*quarters):
        return ir.Constant(index, [q + k for q, inner in quarters for k in inner])

    quarters = range(0, 16, 4)
    whole = range(4)
    even, odd = (picks(*((q, whole) for q in (k, k + 8, k + 16, k + 24))) for k in (0, 4))
    stages = (
        (1, picks(*((q, (0, 16, 1, 17)) for q in quarters)), picks(*((q, (2, 18, 3, 19)) for q in quarters))),
        (2, picks(*((q, (0, 1, 16, 17)) for q in quarters)), picks(*((q, (2, 3, 18, 19)) for q in quarters))),
        (4, even, odd),
        (8, even, odd),
    )

    def codegen(context, builder, sig, args):
        _, source, source_stride, size, target, target_stride = args

        def row(base, stride, i):
            return builder.add(base, builder.mul(stride, ir.Constant(stride.type, i)))

        def move(part):
            rows = [_load(context, builder, like, row(source, source_stride, i), part) for i in range(16)]
            for far, low, high in stages:
                for i in range(16):
                    if not i & far:
                        a, b = rows[i], rows[i + far]
                        rows[i], rows[i + far] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
            for i, x in enumerate(rows):
                column = i // 4 * 4 + (0, 2, 1, 3)[i % 4]
                pointer = builder.inttoptr(row(target, target_stride, column), x.type.as_pointer())
                builder.store(x, pointer, align=4)

        with builder.if_else(builder.icmp_signed("<", size, ir.Constant(size.type, 16))) as (partial, whole):
            with partial:
                move(size)
            with whole:
                move(None)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(like, i64, i64, i64, i64, i64), codegen


@intrinsic(prefer_literal=True)
def stack(typingctx, size):
    """The address of `size` bytes, a literal, on the stack of the calling function, at a cache line."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    room = ir.ArrayType(ir.IntType(8), size.literal_value)

    def codegen(context, builder, sig, args):
        with builder.goto_entry_block():  # not cgutils.alloca_once, which fills it with zeros
            pointer = builder.alloca(room)
        pointer.align = ALIGN
        return builder.ptrtoint(pointer, ir.IntType(64))

    return types.int64(size), codegen


@inner
def gather(like, address, stride, size, spare):
    """The address of `size` neighbouring items: those at `address`, copied to `spare` if their stride is larger."""
    always_inline()
    if stride == item_size(like):
        return address
    copy = span(like, spare, size)
    for i in range(np.uint64(size)):
        copy[i] = span(like, address + np.int64(i) * stride, 1)[0]
    return spare


@inner
def fill(array, value):
    """array[:] = value. That, and array[:] = others, would have Numba compile for seconds what formats an error."""
    always_inline()
    for i in range(np.uint64(array.size)):
        array[i] = value


@inner
def copy(array, others):
    """array[:] = others, of as many items."""
    always_inline()
    for i in range(np.uint64(array.size)):
        array[i] = others[i]


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at `address`, which may not exist."""
    byte = ir.IntType(8).as_pointer()

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [byte] + [ir.IntType(32)] * 3)
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        flags = [ir.Constant(ir.IntType(32), k) for k in (0, 2, 1)]  # read, second level, data
        builder.call(function, [builder.inttoptr(args[0], byte), *flags])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def write(array, r, value):
    """array[r] = value, where there is an array."""


@overload(write)
def _write(array, r, value):
    if array == types.none:
        return lambda array, r, value: None

    def put(array, r, value):
        array[r] = value

    return put
