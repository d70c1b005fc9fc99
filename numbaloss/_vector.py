"""Sixteen floats as one value of compiled code, so that a hot loop need not hope for LLVM's vectoriser.

A function of scalars that is written with +, -, * and _intrinsics takes vectors too, scalars among them
counting sixteen times, and rounds each lane as it would a scalar. LLVM splits a vector into the machine's registers;
on CUDA, into those of the thread.
"""

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

WIDTH = 16


class Vector(types.Type):
    """WIDTH items (another number only on CUDA) of float32 or float64; booleans, where two are compared; int32, where
    each is two logits of 16 bits."""

    def __init__(self, dtype, width=WIDTH):
        self.dtype, self.width = dtype, width
        super().__init__(f"Vector({dtype}, {width})")


def vector_ir(kind):
    """The LLVM type of a Vector."""
    item = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}.get(kind.dtype)
    return ir.VectorType(item or ir.IntType(1 if kind.dtype == types.boolean else 32), kind.width)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, vector_ir(kind))


def vector_of(*operands):
    """The type of a result of these operands: a vector if one is, the scalar they all are, or None if they differ."""
    dtypes = {x.dtype if isinstance(x, Vector) else x for x in operands}
    if len(dtypes) != 1 or not dtypes <= {types.float32, types.float64}:
        return None
    (dtype,) = dtypes
    return next((x for x in operands if isinstance(x, Vector)), dtype)


def spread(builder, value, width=WIDTH):
    """A vector whose lanes all hold this scalar; vectors stay as they are."""
    if isinstance(value.type, ir.VectorType):
        return value
    kind = ir.VectorType(value.type, width)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def lift(builder, result, values):
    """The operands of an operation with a result of this type."""
    return [spread(builder, v, result.width) for v in values] if isinstance(result, Vector) else list(values)


@intrinsic
def splat(typingctx, x):
    """A vector whose lanes all hold x."""
    return Vector(x)(x), lambda context, builder, sig, args: spread(builder, args[0])


def _operator(op, emit, dtype=None):
    @intrinsic
    def run(typingctx, a, b):
        kind = vector_of(a, b)
        result = kind if dtype is None else Vector(dtype, kind.width)
        return result(a, b), lambda context, builder, sig, args: emit(builder, *lift(builder, kind, args))

    @overload(op)
    def _(a, b):
        return (lambda a, b: run(a, b)) if isinstance(vector_of(a, b), Vector) else None


_operator(operator.add, lambda builder, a, b: builder.fadd(a, b))
_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b))
for _op, _sign in (
    (operator.lt, "<"),
    (operator.gt, ">"),
    (operator.le, "<="),
    (operator.ge, ">="),
    (operator.eq, "=="),
):
    _operator(_op, lambda builder, a, b, sign=_sign: builder.fcmp_ordered(sign, a, b), types.boolean)


@intrinsic
def _negative(typingctx, a):
    zeros = ir.Constant(vector_ir(a), [-0.0] * a.width)  # the LLVM of CUDA's older targets has no fneg
    return a(a), lambda context, builder, sig, args: builder.fsub(zeros, args[0])


@overload(operator.neg)
def _neg(a):
    return (lambda a: _negative(a)) if isinstance(a, Vector) else None


@intrinsic
def _magnitude(typingctx, a):
    def codegen(context, builder, sig, args):
        bits = a.dtype.bitwidth
        words = ir.VectorType(ir.IntType(bits), a.width)
        mask = ir.Constant(words, [(1 << (bits - 1)) - 1] * a.width)
        return builder.bitcast(builder.and_(builder.bitcast(args[0], words), mask), args[0].type)

    return a(a), codegen


@overload(abs)
def _abs(a):
    return (lambda a: _magnitude(a)) if isinstance(a, Vector) else None


@intrinsic
def most_bits(typingctx, a, b):
    """The one of two vectors of float32 whose bits are the larger signed integer, lane by lane."""

    def codegen(context, builder, sig, args):
        return _larger_bits(builder, *args)

    return a(a, b), codegen


def _larger_bits(builder, a, b):
    words = ir.VectorType(ir.IntType(32), a.type.count)
    i, j = builder.bitcast(a, words), builder.bitcast(b, words)
    return builder.bitcast(builder.select(builder.icmp_signed(">", i, j), i, j), a.type)


def _reduce(builder, v, combine):
    """Lane l takes in lane l + h for h = 8, 4, 2, 1; lane 0 is left."""
    half = v.type.count // 2
    while half:
        index = ir.VectorType(ir.IntType(32), half)
        low, high = (ir.Constant(index, list(range(k, k + half))) for k in (0, half))
        none = ir.Constant(v.type, ir.Undefined)
        v = combine(builder.shuffle_vector(v, none, low), builder.shuffle_vector(v, none, high))
        half //= 2
    return builder.extract_element(v, ir.Constant(ir.IntType(32), 0))


@intrinsic
def fold(typingctx, v):
    """The butterfly over the lanes of a vector."""
    return v.dtype(v), lambda context, builder, sig, args: _reduce(builder, args[0], builder.fadd)


@intrinsic
def most_bits_of(typingctx, v):
    """The lane of a vector of float32 whose bits are the largest signed integer."""

    def codegen(context, builder, sig, args):
        return _reduce(builder, args[0], lambda a, b: _larger_bits(builder, a, b))

    return v.dtype(v), codegen


@intrinsic
def least_bits_of(typingctx, v):
    """The smallest of the bits of a vector's lanes, as signed integers."""

    def codegen(context, builder, sig, args):
        words = ir.VectorType(ir.IntType(32), v.width)

        def smaller(a, b):
            return builder.select(builder.icmp_signed("<", a, b), a, b)

        return _reduce(builder, builder.bitcast(args[0], words), smaller)

    return types.int32(v), codegen


@intrinsic
def largest(typingctx, v):
    """The largest lane of a vector; where one is NaN, that or another."""

    def codegen(context, builder, sig, args):
        return _reduce(builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

    return v.dtype(v), codegen
