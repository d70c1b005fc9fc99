"""Instructions that the mathematics is written with, for the CPU and for CUDA alike: one rounding each."""

import platform

from llvmlite import ir
from llvmlite.binding import initialize_native_asmparser
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._vector import Vector, lift, spread, vector_of

_F32, _F64 = ir.FloatType(), ir.DoubleType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once."""
    result = vector_of(a, b, c)
    if result is None:
        return None

    def codegen(context, builder, sig, args):
        args = lift(builder, result, args)
        kind = args[0].type
        if not isinstance(result, Vector):
            return builder.fma(*args)
        name = f"llvm.fma.v{kind.count}{kind.element.intrinsic_name}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(function, args)

    return result(a, b, c), codegen


@intrinsic
def select(typingctx, condition, a, b):
    """a if condition else b, both computed: a branch would keep a loop out of the vector lanes."""
    if condition == types.boolean and a == b:
        return a(condition, a, a), lambda context, builder, sig, args: builder.select(*args)
    result = vector_of(a, b)
    if result is None or not isinstance(condition, Vector):
        return None
    result = Vector(getattr(result, "dtype", result), condition.width)

    def codegen(context, builder, sig, args):
        return builder.select(args[0], *lift(builder, result, args[1:]))

    return result(condition, a, b), codegen


@intrinsic
def at_least(typingctx, x, low):
    """low if x < low else x."""
    result = vector_of(x, low)
    if result is None:
        return None

    def codegen(context, builder, sig, args):
        x, low = lift(builder, result, args)
        if on_cuda(builder) and getattr(result, "dtype", result) == types.float32:
            return each(builder, x, low, _max_nan)
        return builder.select(builder.fcmp_ordered("<", x, low), low, x)

    return result(x, low), codegen


def on_cuda(builder):
    """Whether this code is for a GPU."""
    return "nvptx" in builder.module.triple


def each(builder, a, b, combine):
    """combine(builder, x, y) of two scalars, or lane by lane of two vectors."""
    if not isinstance(a.type, ir.VectorType):
        return combine(builder, a, b)
    result = ir.Constant(a.type, ir.Undefined)
    for i in range(a.type.count):
        k = ir.Constant(_I32, i)
        lane = combine(builder, builder.extract_element(a, k), builder.extract_element(b, k))
        result = builder.insert_element(result, lane, k)
    return result


def _max_nan(builder, x, low):
    """One instruction where a comparison and a selection are two."""
    kind = ir.FunctionType(_F32, [_F32, _F32])
    return builder.call(ir.InlineAsm(kind, "max.NaN.f32 $0, $1, $2;", "=f,f,f"), [x, low])


@intrinsic
def rounded_product(typingctx, a, b):
    """a * b, rounded: CUDA's compiler would make one fma of it and the sum that it goes into."""
    if a != b:
        return None

    def multiply(builder, x, y):
        code, letter = ("mul.rn.f32 $0, $1, $2;", "f") if x.type == _F32 else ("mul.rn.f64 $0, $1, $2;", "d")
        kind = ir.FunctionType(x.type, [x.type] * 2)
        return builder.call(ir.InlineAsm(kind, code, f"={letter},{letter},{letter}"), [x, y])

    def codegen(context, builder, sig, args):
        return each(builder, *args, multiply) if on_cuda(builder) else builder.fmul(*args)

    return a(a, b), codegen


@intrinsic
def float_bits(typingctx, x):
    """The bits of a float as a signed integer of its width."""
    if x == types.float32:
        return types.int32(x), lambda context, builder, sig, args: builder.bitcast(args[0], _I32)
    if x == types.float64:
        return types.int64(x), lambda context, builder, sig, args: builder.bitcast(args[0], _I64)
    return None


@intrinsic
def bits_float(typingctx, i):
    """The float that has these bits."""
    if i == types.int32:
        return types.float32(i), lambda context, builder, sig, args: builder.bitcast(args[0], _F32)
    if i == types.int64:
        return types.float64(i), lambda context, builder, sig, args: builder.bitcast(args[0], _F64)
    return None


@intrinsic
def ordered_bits(typingctx, x):
    """An integer that orders as the floats do, -0 below +0, a positive NaN above +inf, a negative one below -inf."""
    if x not in (types.float32, types.float64):
        return None

    def codegen(context, builder, sig, args):
        integer = _I32 if x == types.float32 else _I64
        word = builder.bitcast(args[0], integer)
        sign = builder.ashr(word, ir.Constant(integer, integer.width - 1))
        return builder.xor(word, builder.and_(sign, ir.Constant(integer, (1 << (integer.width - 1)) - 1)))

    return (types.int32 if x == types.float32 else types.int64)(x), codegen


@intrinsic
def low_bits_exponent(typingctx, t):
    """The float whose exponent field is the low bits of t: 2^(k - bias) where t = MAGIC + k; 0 where k = 0."""
    if vector_of(t) is None:
        return None

    def codegen(context, builder, sig, args):
        integer, shift = (_I32, 23) if getattr(t, "dtype", t) == types.float32 else (_I64, 52)
        shift = ir.Constant(integer, shift)
        if isinstance(t, Vector):
            integer, shift = ir.VectorType(integer, t.width), spread(builder, shift, t.width)
        return builder.bitcast(builder.shl(builder.bitcast(args[0], integer), shift), args[0].type)

    return t(t), codegen


@intrinsic
def add_low_bits(typingctx, p, t):
    """p with the low bits of t added to its exponent field: p * 2^k where t = MAGIC + k, if p and that are normal."""
    kind = vector_of(p, t)
    if kind is None:
        return None

    def codegen(context, builder, sig, args):
        words = ir.VectorType(_I32, kind.width) if isinstance(kind, Vector) else _I32
        p, t = (builder.bitcast(x, words) for x in args)
        shift = ir.Constant(words, [23] * kind.width if isinstance(kind, Vector) else 23)
        return builder.bitcast(builder.add(p, builder.shl(t, shift)), args[0].type)

    return kind(p, t), codegen


@intrinsic
def from_bfloat16(typingctx, h):
    """The float32 of a bfloat16 held as uint16. Exact."""
    if h != types.uint16:
        return None

    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(h), codegen


@intrinsic
def from_float16(typingctx, h):
    """The float32 of a float16 held as int16. Exact."""
    if h != types.int16:
        return None
    return types.float32(h), lambda context, builder, sig, args: widen_half(context, builder, args[0])


def widen_half(context, builder, h):
    """LLVM code for float16 bits to float32, scalars and vectors; by integers on an x86 without F16C instructions."""
    lanes = getattr(h.type, "count", None)

    def of(kind, value=None):
        kind = kind if lanes is None else ir.VectorType(kind, lanes)
        return kind if value is None else ir.Constant(kind, value if lanes is None else [value] * lanes)

    features = getattr(context.codegen(), "_tm_features", "+f16c")
    if platform.machine().lower() not in ("x86_64", "amd64") or "+f16c" in features:
        return builder.fpext(builder.bitcast(h, of(ir.HalfType())), of(_F32))
    word = builder.zext(h, of(_I32))
    size = builder.shl(builder.and_(word, of(_I32, 0x7FFF)), of(_I32, 13))
    finite = builder.bitcast(builder.fmul(builder.bitcast(size, of(_F32)), of(_F32, 2.0**112)), of(_I32))
    special = builder.icmp_unsigned(">=", size, of(_I32, 0x7C00 << 13))
    size = builder.select(special, builder.or_(size, of(_I32, 0x7F800000)), finite)
    sign = builder.shl(builder.and_(word, of(_I32, 0x8000)), of(_I32, 16))
    return builder.bitcast(builder.or_(size, sign), of(_F32))


def narrow(builder, result, x, features="+f16c"):
    """LLVM code for float32 to bfloat16 (uint16) or float16 (int16) bits, to nearest even, vectors too. np.nan becomes
    a NaN, which differs by machine."""
    lanes = getattr(x.type, "count", None)

    def of(kind, value=None):
        kind = kind if lanes is None else ir.VectorType(kind, lanes)
        return kind if value is None else ir.Constant(kind, value if lanes is None else [value] * lanes)

    if on_cuda(builder):
        name = "bf16" if result == types.uint16 else "f16"
        kind = ir.FunctionType(_I16, [_F32])
        return builder.call(ir.InlineAsm(kind, f"cvt.rn.{name}.f32 $0, $1;", "=h,f"), [x])
    word = builder.bitcast(x, of(_I32))
    if result == types.uint16:
        odd = builder.and_(builder.lshr(word, of(_I32, 16)), of(_I32, 1))
        half = builder.lshr(builder.add(word, builder.add(odd, of(_I32, 0x7FFF))), of(_I32, 16))
        return builder.trunc(half, of(_I16))
    if platform.machine().lower() not in ("x86_64", "amd64") or "+f16c" in features:
        return builder.bitcast(builder.fptrunc(x, of(ir.HalfType())), of(_I16))
    size = builder.and_(word, of(_I32, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, of(_I32, 13)), of(_I32, 1))
    normal = builder.lshr(builder.add(size, builder.add(odd, of(_I32, 0xFFF - (112 << 23)))), of(_I32, 13))
    small = builder.fadd(builder.bitcast(size, of(_F32)), of(_F32, 0.5))  # whose last place is 2^-24
    small = builder.sub(builder.bitcast(small, of(_I32)), of(_I32, 126 << 23))
    half = builder.select(builder.icmp_unsigned("<", size, of(_I32, 113 << 23)), small, normal)
    half = builder.select(builder.icmp_unsigned(">=", size, of(_I32, 143 << 23)), of(_I32, 0x7C00), half)
    half = builder.or_(half, builder.and_(builder.lshr(word, of(_I32, 16)), of(_I32, 0x8000)))
    nan = builder.fcmp_unordered("uno", x, x)
    return builder.trunc(builder.select(nan, of(_I32, 0x7FFF), half), of(_I16))


def narrow_pair(builder, a, b, features):
    """LLVM code for two vectors of 16 float32, none subnormal, to 32 bfloat16 (uint16) bits, to nearest even. By
    assembly: the types of LLVM's intrinsic differ by its version."""
    if "+avx512bf16" in features:
        initialize_native_asmparser()
        words = ir.VectorType(_I32, 16)
        kind = ir.FunctionType(words, [a.type, a.type])
        pair = builder.call(ir.InlineAsm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v"), [a, b])
        return builder.bitcast(pair, ir.VectorType(_I16, 32))
    low, high = (narrow(builder, types.uint16, x) for x in (a, b))
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))
