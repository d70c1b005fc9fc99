"""Intrinsics of the CUDA kernels: global memory by integer addresses, and vectors spread over the lanes of a warp.

What a thread loads at once: n = 16 bytes / item logits, neighbours. A row is read by a team of 8, 16 or 32 threads
(`team`), which load neighbouring 16 bytes. A thread's Vector holds 32 logits: item k of thread t's lies
k // n * team * n + t * n + k % n items from the first of the team. Loads is what such a Vector is before 16-bit logits
are widened, two in a word: what can be done with pairs takes half the instructions.
"""

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .._intrinsics import narrow, on_cuda, widen_half
from .._vector import Vector, VectorModel, spread, vector_ir
from ._launch import register_model

_I1, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 16, 32, 64))
_F32 = ir.FloatType()

WIDTH = 32  # logits of a Vector

register_model(Vector)(type("VectorModel", (VectorModel,), {}))  # the CUDA target keeps models of its own


def _c32(k):
    return ir.Constant(_I32, k)


def _pointer(builder, address, kind):
    """A pointer into global memory, so that loads and stores are of that kind."""
    return builder.inttoptr(address, kind.as_pointer(1))


def _item(like):
    return {types.float32: _F32, types.float64: ir.DoubleType()}.get(like, ir.IntType(like.bitwidth))


# -- single items ------------------------------------------------------------------------------------------------


@intrinsic
def load(typingctx, like, address):
    """The item of the type of `like` at this address."""

    def codegen(context, builder, sig, args):
        return builder.load(_pointer(builder, args[1], _item(like)), align=like.bitwidth // 8)

    return like(like, types.int64), codegen


@intrinsic
def load_fresh(typingctx, address):
    """An int64 that other blocks may have changed: not from a cache of this multiprocessor."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(_I64, [_I64])
        return builder.call(ir.InlineAsm(kind, "ld.volatile.global.b64 $0, [$1];", "=l,l", side_effect=True), args)

    return types.int64(types.int64), codegen


@intrinsic
def store(typingctx, address, value):
    """Write one item."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], _pointer(builder, args[0], args[1].type), align=value.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def store_item(typingctx, like, address, value):
    """Write one float, rounded to the type of `like`."""

    def codegen(context, builder, sig, args):
        _, address, x = args
        (x,) = _rounded(builder, like, [x])
        builder.store(x, _pointer(builder, address, _item(like)), align=like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(like, types.int64, value), codegen


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to an int64; returns what it was."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], _I64), args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


# -- vectors -----------------------------------------------------------------------------------------------------


HALF = 16 * WIDTH  # positions of a warp from the first half of its Vectors to the other


def _wide(like):
    return Vector(types.float64 if like == types.float64 else types.float32, WIDTH)


def _loads(like):
    return Vector(types.int32, WIDTH // 2) if like.bitwidth == 16 else _wide(like)


def _per_load(like):
    return 16 // (like.bitwidth // 8)


def _load_words(builder, address):
    """Sixteen bytes as four integers."""
    return _items(builder, builder.load(_pointer(builder, address, ir.VectorType(_I32, 4)), align=16))


def _widen_words(context, builder, like, words):
    """The logits in sixteen bytes."""
    if like in (types.float32, types.float64):
        packed = _pack(builder, words, ir.VectorType(_I32, 4))
        return _items(builder, builder.bitcast(packed, ir.VectorType(_item(like), _per_load(like))))
    result = []
    for word in words:
        if like == types.uint16:
            result += [builder.shl(word, _c32(16)), builder.and_(word, _c32(-65536))]
        else:
            for half in (word, builder.lshr(word, _c32(16))):
                result.append(widen_half(context, builder, builder.trunc(half, _I16)))
    return [builder.bitcast(x, _F32) for x in result]


def _join_words(context, builder, like, words):
    """Loads of sixteen bytes each, as integers."""
    if like.bitwidth != 16:
        words = [x for k in range(0, len(words), 4) for x in _widen_words(context, builder, like, words[k : k + 4])]
    return _pack(builder, words, vector_ir(_loads(like)))


def _none(like):
    """The bits of -inf."""
    return {types.int16: 0xFC00, types.uint16: 0xFF80, types.float32: 0xFF800000}[like]


def _items(builder, v):
    return [builder.extract_element(v, _c32(i)) for i in range(v.type.count)]


def _phi(builder, *incoming):
    result = builder.phi(incoming[0][0].type)
    for value, block in incoming:
        result.add_incoming(value, block)
    return result


def _pack(builder, items, kind):
    result = ir.Constant(kind, ir.Undefined)
    for i, x in enumerate(items):
        result = builder.insert_element(result, x, _c32(i))
    return result


def _load_item(context, builder, like, address):
    """One item, widened."""
    x = builder.load(_pointer(builder, address, _item(like)), align=like.bitwidth // 8)
    if like == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(x, _I32), _c32(16)), _F32)
    return widen_half(context, builder, x) if like == types.int16 else x


def _anew(builder, x):
    """x, and the compiler does not know: or it keeps multiples of a stride in registers all through a loop."""
    if not on_cuda(builder):
        return x
    bits, letter = {"i64": (64, "l"), "float": (32, "f"), "double": (64, "d")}[str(x.type)]
    kind = ir.FunctionType(x.type, [x.type])
    return builder.call(ir.InlineAsm(kind, f"mov.b{bits} $0, $1;", f"={letter},{letter}", side_effect=True), [x])


@intrinsic
def anew(typingctx, x):
    """The int64 x, and the compiler does not know: what is made of it is made again."""
    return types.int64(types.int64), lambda context, builder, sig, args: _anew(builder, args[0])


@intrinsic
def thread_anew(typingctx):
    """cuda.threadIdx.x, read again: or what is made of it occupies registers all through a kernel."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(_I32, [])
        return builder.call(ir.InlineAsm(kind, "mov.u32 $0, %tid.x;", "=r", side_effect=True), [])

    return types.int32(), codegen


def _step(builder, address, stride, count):
    return builder.add(address, builder.mul(stride, ir.Constant(_I64, count)))


@intrinsic
def zeros(typingctx, like):
    """A Vector of zeros."""
    return _wide(like)(like), lambda context, builder, sig, args: ir.Constant(vector_ir(sig.return_type), None)


@intrinsic
def fill(typingctx, like, x):
    """A Vector of x."""
    return _wide(like)(like, x), lambda context, builder, sig, args: spread(builder, args[1], WIDTH)


@intrinsic
def load_vector(typingctx, like, address, team):
    """This thread's Loads of a row that `team` threads read, the first at `address`, at 16 bytes."""

    def codegen(context, builder, sig, args):
        _, address, team = args
        words = []
        for _ in range(WIDTH // _per_load(like)):  # all of them before the first is used
            words += _load_words(builder, address)
            address = builder.add(address, builder.sext(builder.mul(team, _c32(16)), _I64))
        return _join_words(context, builder, like, words)

    return _loads(like)(like, types.int64, types.int32), codegen


@intrinsic
def widened(typingctx, like, v):
    """The Vector of Loads."""

    def codegen(context, builder, sig, args):
        if like.bitwidth != 16:
            return args[1]
        return _pack(builder, _widen_words(context, builder, like, _items(builder, args[1])), vector_ir(_wide(like)))

    return _wide(like)(like, v), codegen


def _load_inside(builder, like, address, stride, position, begin, end):
    """A load of items `stride` bytes apart, as four integers. Items at positions outside of [begin, end) are -inf and
    are not touched. One instruction if all are inside, side by side and at 16 bytes."""
    n, size = _per_load(like), like.bitwidth // 8
    low = ir.Constant(_item(like), _none(like) if like.bitwidth == 16 else -math.inf)
    close = builder.icmp_signed("==", stride, ir.Constant(_I64, size))
    aligned = builder.icmp_signed("==", builder.and_(address, ir.Constant(_I64, 15)), ir.Constant(_I64, 0))
    inside = builder.icmp_signed("<=", builder.add(position, _c32(n)), end)
    if begin is not None:
        inside = builder.and_(inside, builder.icmp_signed(">=", position, begin))
    low_words = _words(builder, _pack(builder, [low] * n, ir.VectorType(_item(like), n)))

    def single(step, k):
        here = builder.icmp_signed("<", _c32(k), builder.sub(end, position))
        if begin is not None:
            here = builder.and_(here, builder.icmp_signed(">=", builder.add(position, _c32(k)), begin))
        before = builder.block
        with builder.if_then(here):
            x = builder.load(_pointer(builder, _step(builder, address, step, k), _item(like)), align=size)
            loaded = builder.block
        return _phi(builder, (low, before), (x, loaded))

    before = builder.block
    with builder.if_then(builder.icmp_signed("<", position, end)):
        with builder.if_else(builder.and_(builder.and_(close, aligned), inside)) as (whole, part):
            with whole:
                together, end_of_whole = _load_words(builder, address), builder.block
            with part:
                step = _anew(builder, stride)
                apart = [single(step, k) for k in range(n)]
                apart, end_of_part = (
                    _words(builder, _pack(builder, apart, ir.VectorType(_item(like), n))),
                    builder.block,
                )
        loaded = [_phi(builder, (x, end_of_whole), (y, end_of_part)) for x, y in zip(together, apart)]
        end_of_load = builder.block
    return [_phi(builder, (x, before), (y, end_of_load)) for x, y in zip(low_words, loaded)]


@intrinsic
def load_once(typingctx, like, address, stride, position, begin, end):
    """A Vector of one load: items `stride` bytes apart, the first at this position of its row. Items at positions
    outside of [begin, end) are -inf and are not touched."""
    result = Vector(_wide(like).dtype, _per_load(like))

    def codegen(context, builder, sig, args):
        items = _widen_words(context, builder, like, _load_inside(builder, like, *args[1:]))
        return _pack(builder, items, vector_ir(result))

    return result(like, types.int64, types.int64, types.int32, types.int32, types.int32), codegen


@intrinsic
def load_part(typingctx, like, address, stride, position, begin, end, team):
    """As load_vector for items `stride` bytes apart, the first at this position of its row. Items at positions outside
    of [begin, end) are -inf and are not touched; `begin` is less than a load."""
    n = _per_load(like)

    def codegen(context, builder, sig, args):
        _, address, stride, position, begin, end, team = args
        step = builder.mul(team, _c32(n))
        far = builder.mul(stride, builder.sext(step, _I64))
        words = []
        for g in range(WIDTH // n):
            words += _load_inside(builder, like, address, stride, position, None if g else begin, end)
            position, address = builder.add(position, step), builder.add(address, far)
        return _join_words(context, builder, like, words)

    i64, i32 = types.int64, types.int32
    return _loads(like)(like, i64, i64, i32, i32, i32, i32), codegen


def _hide_items(builder, like, load, hidden):
    """The items or words of a load, with -inf in place of those items that are hidden, conditions by their numbers."""
    if like.bitwidth != 16:
        low = ir.Constant(load[0].type, -math.inf)
        return [builder.select(hidden[k], low, x) if k in hidden else x for k, x in enumerate(load)]
    low = _none(like)
    for k, here in hidden.items():
        shift = 16 * (k % 2)
        without = builder.and_(load[k // 2], _c32(0xFFFF0000 >> shift))
        load[k // 2] = builder.select(here, builder.or_(without, _c32(low << shift)), load[k // 2])
    return load


def _hide_one(builder, like, load, k):
    """As _hide_items for item k of a load."""
    if like.bitwidth != 16:
        return _hide_items(builder, like, load, {i: builder.icmp_signed("==", k, _c32(i)) for i in range(len(load))})
    far = builder.zext(builder.shl(builder.and_(k, _c32(3)), _c32(4)), _I64)
    mask = builder.bitcast(builder.shl(ir.Constant(_I64, 0xFFFF), far), ir.VectorType(_I32, 2))
    halves, first, low = _items(builder, mask), builder.icmp_signed("<", k, _c32(4)), _c32(_none(like) * 0x10001)
    masks = [builder.select(first, x, _c32(0)) for x in halves] + [builder.select(first, _c32(0), x) for x in halves]
    return [builder.xor(x, builder.and_(builder.xor(x, low), m)) for x, m in zip(load, masks)]  # one instruction each


@intrinsic
def hide(typingctx, like, v, k, team):
    """Loads, but -inf in the place of the item that lies k positions after the first one, if it is one of them."""
    n, each = _per_load(like), v.width * _per_load(like) // WIDTH

    def codegen(context, builder, sig, args):
        _, v, k, team = args
        items = _items(builder, v)
        for g in range(0, v.type.count, each):
            before, load = builder.block, items[g : g + each]
            with builder.if_then(builder.icmp_unsigned("<", k, _c32(n))):
                hidden, after = _hide_one(builder, like, load, k), builder.block
            items[g : g + each] = [_phi(builder, (x, before), (y, after)) for x, y in zip(load, hidden)]
            k = builder.sub(k, builder.mul(team, _c32(n)))
        return _pack(builder, items, v.type)

    return v(like, v, types.int32, types.int32), codegen


@intrinsic
def hide_first(typingctx, like, v, count):
    """Loads, but -inf in the place of their first `count` < n items."""
    n = _per_load(like)

    def codegen(context, builder, sig, args):
        _, v, count = args
        items, each = _items(builder, v), v.type.count * n // WIDTH
        hidden = {i: builder.icmp_signed(">", count, _c32(i)) for i in range(n - 1)}
        items[:each] = _hide_items(builder, like, items[:each], hidden)
        return _pack(builder, items, v.type)

    return v(like, v, types.int32), codegen


def _words(builder, v):
    """Sixteen bytes as four integers."""
    return _items(builder, builder.bitcast(v, ir.VectorType(_I32, 4)))


# -- ahead of time: a ring of rounds in shared memory that is filled while a warp computes -----------------------------


RING = 12288  # bytes of a warp's ring: six rounds of 16-bit logits, three of float32
GRAD_RING = 8192  # the same where a block writes gradients, which is to fit into 99 KB
RING_ITEMS = RING // 8
APART = 512  # bytes from one load of a thread to its next in the ring
EVICT_FIRST = 0x12F0000000000000  # what createpolicy.fractional.L2::evict_first.b64 gives, from sm_80 to sm_100


@intrinsic
def shared_address(typingctx, array):
    """Where an array in shared memory begins, there."""

    def codegen(context, builder, sig, args):
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.ptrtoint(builder.addrspacecast(data, data.type.pointee.as_pointer(3)), _I32)

    return types.int32(array), codegen


def _assembly(builder, code, operands="", args=()):
    """An instruction that other accesses to memory do not move across."""
    kind = ir.FunctionType(ir.VoidType(), [x.type for x in args])
    clobber = "~{memory}"
    text = ir.InlineAsm(kind, code, f"{operands},{clobber}" if operands else clobber, side_effect=True)
    builder.call(text, args)


def _copy_ahead(builder, like, where, address, left=None, last=False):
    """Copy this thread's loads of a round, of each if so many bytes are left; the `last` time that they are read, the
    second-level cache may forget them first."""
    hint, letters, more = "", "r,l", []
    if last:
        hint, letters, more = ".L2::cache_hint", "r,l,l", [ir.Constant(_I64, EVICT_FIRST)]
    code = f"cp.async.cg.shared.global{hint} [$0], [$1], 16{', $2' if last else ''};"
    for g in range(WIDTH // _per_load(like)):
        to, at = builder.add(where, _c32(APART * g)), builder.add(address, ir.Constant(_I64, APART * g))
        if left is None:
            _assembly(builder, code, letters, [to, at, *more])
        else:
            with builder.if_then(builder.icmp_signed(">=", left, _c32(APART * g + 16))):
                _assembly(builder, code, letters, [to, at, *more])


def _copier(last):
    """(copy_ahead, copy_ahead_part) for the first time that logits are read, or the last."""

    @intrinsic
    def copy(typingctx, like, where, address):
        """Start to copy what load_vector reads at `address` to this thread's places in a ring, the first at `where`."""

        def codegen(context, builder, sig, args):
            _copy_ahead(builder, like, *args[1:], last=last)
            return context.get_dummy_value()

        return types.void(like, types.int32, types.int64), codegen

    @intrinsic
    def copy_part(typingctx, like, where, address, left):
        """As copy_ahead, but of the bytes from `address` on only the first `left`, less what makes no whole load."""

        def codegen(context, builder, sig, args):
            _copy_ahead(builder, like, *args[1:], last=last)
            return context.get_dummy_value()

        return types.void(like, types.int32, types.int64, types.int32), codegen

    return copy, copy_part


copy_ahead, copy_ahead_part = _copier(last=False)
copy_last, copy_last_part = _copier(last=True)


@intrinsic
def end_of_round(typingctx):
    """What copy_ahead has started since the last call is a round, which may be empty."""

    def codegen(context, builder, sig, args):
        _assembly(builder, "cp.async.commit_group;")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def await_oldest(typingctx, like, capacity):
    """Wait for the oldest of this thread's rounds, of as many as a ring of `capacity` bytes holds."""

    def codegen(context, builder, sig, args):
        for size in {RING, GRAD_RING}:  # a number of the instruction; the compiler knows the capacity
            with builder.if_then(builder.icmp_signed("==", args[1], _c32(size))):
                _assembly(builder, f"cp.async.wait_group {size // (32 * WIDTH * (like.bitwidth // 8)) - 1};")
        return context.get_dummy_value()

    return types.void(like, types.int32), codegen


@intrinsic
def store_ring(typingctx, like, where, item):
    """Write one logit to a ring."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[1], _item(like).as_pointer(3))
        builder.store(args[2], pointer, align=like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(like, types.int32, like), codegen


def _store_none(builder, like, where, count):
    """`count` times -inf to shared memory."""
    bits = ir.IntType(like.bitwidth)
    pointer = builder.inttoptr(where, ir.VectorType(bits, count).as_pointer(3))
    builder.store(
        ir.Constant(ir.VectorType(bits, count), [_none(like)] * count), pointer, align=count * like.bitwidth // 8
    )


@intrinsic
def hide_item(typingctx, like, where):
    """Write -inf to a ring in place of one logit."""

    def codegen(context, builder, sig, args):
        _store_none(builder, like, args[1], 1)
        return context.get_dummy_value()

    return types.void(like, types.int32), codegen


@intrinsic
def hide_load(typingctx, like, where):
    """As hide_item, in place of 16 bytes."""

    def codegen(context, builder, sig, args):
        _store_none(builder, like, args[1], _per_load(like))
        return context.get_dummy_value()

    return types.void(like, types.int32), codegen


@intrinsic
def load_ring(typingctx, like, where):
    """The Loads that copy_ahead has copied."""

    def codegen(context, builder, sig, args):
        kind, words = ir.VectorType(_I32, 4), []
        for g in range(WIDTH // _per_load(like)):
            pointer = builder.inttoptr(builder.add(args[1], _c32(APART * g)), kind.as_pointer(3))
            words += _items(builder, builder.load(pointer, align=16))
        return _join_words(context, builder, like, words)

    return _loads(like)(like, types.int32), codegen


# -- pairs of 16-bit logits in a word ----------------------------------------------------------------------------


def _larger_pair(builder, like, a, b, which="max"):
    """The larger of two pairs of 16-bit logits, or the lesser ("min"), half by half; NaN if one is."""
    kind = ir.FunctionType(_I32, [_I32, _I32])
    dtype = "bf16x2" if like == types.uint16 else "f16x2"
    return builder.call(ir.InlineAsm(kind, f"{which}.NaN.{dtype} $0, $1, $2;", "=r,r,r"), [a, b])


def _turned(builder, pair):
    """The halves of a pair in the other order."""
    return builder.or_(builder.shl(pair, _c32(16)), builder.lshr(pair, _c32(16)))


@intrinsic
def larger_pair(typingctx, like, a, b):
    """The larger of two pairs, NaN being the largest."""
    return types.int32(like, types.int32, types.int32), lambda context, builder, sig, args: _larger_pair(
        builder, like, *args[1:]
    )


@intrinsic
def pairs_above(typingctx, like, v, low):
    """Loads, but those of the pair `low` where a logit is less."""

    def codegen(context, builder, sig, args):
        return _pack(builder, [_larger_pair(builder, like, w, args[2]) for w in _items(builder, args[1])], args[1].type)

    return v(like, v, types.int32), codegen


@intrinsic
def largest_pair(typingctx, like, v, top):
    """The largest of Loads and of the pair `top`."""

    def codegen(context, builder, sig, args):
        top, words = args[2], _items(builder, args[1])
        for i in range(0, len(words), 2):  # of three at once: one instruction
            top = _larger_pair(builder, like, _larger_pair(builder, like, *words[i : i + 2]), top)
        return top

    return types.int32(like, v, types.int32), codegen


@intrinsic
def pair_above(typingctx, like, x):
    """Two times the least 16-bit logit that is not less than the float32 x, in a word."""

    def codegen(context, builder, sig, args):
        x = args[1]
        if like == types.int16:
            kind = ir.FunctionType(_I16, [_F32])
            half = builder.zext(builder.call(ir.InlineAsm(kind, "cvt.rp.f16.f32 $0, $1;", "=h,f"), [x]), _I32)
        else:
            word = builder.bitcast(x, _I32)  # towards zero is up for negative numbers
            up = builder.select(builder.icmp_signed("<", word, _c32(0)), _c32(0), _c32(0xFFFF))
            half = builder.lshr(builder.add(word, up), _c32(16))
        return builder.or_(half, builder.shl(half, _c32(16)))

    return types.int32(like, types.float32), codegen


@intrinsic
def larger_of_pair(typingctx, like, pair):
    """The larger logit of a pair, widened; NaN if one is."""

    def codegen(context, builder, sig, args):
        largest = _larger_pair(builder, like, args[1], _turned(builder, args[1]))
        return _widen_words(context, builder, like, [largest])[0]

    return types.float32(like, types.int32), codegen


@intrinsic
def least_logit(typingctx, like, v):
    """The least of Loads of 16 bits, widened; NaN if one is."""

    def codegen(context, builder, sig, args):
        words = _items(builder, args[1])
        least = words[0]
        for i in range(1, len(words) - 1, 2):  # of three at once, as in largest_pair
            least = _larger_pair(builder, like, _larger_pair(builder, like, *words[i : i + 2], "min"), least, "min")
        least = _larger_pair(builder, like, least, words[-1], "min")
        return _widen_words(
            context, builder, like, [_larger_pair(builder, like, least, _turned(builder, least), "min")]
        )[0]

    return types.float32(like, v), codegen


# -- rounded and written -----------------------------------------------------------------------------------------


def _rounded(builder, like, items):
    """Floats in the type of `like`."""
    if like.bitwidth == 16:
        return [narrow(builder, like, x) for x in items]
    if items[0].type == _item(like):
        return items
    return [(builder.fpext if like.bitwidth == 64 else builder.fptrunc)(x, _item(like)) for x in items]


def _store_words(builder, address, words):
    """Two or four words side by side, which the caches may forget first: logits that are read again stay there."""
    count = len(words)
    if on_cuda(builder):
        code = f"st.global.cs.v{count}.b32 [$0], {{{', '.join(f'${i + 1}' for i in range(count))}}};"
        return _assembly(builder, code, ",".join(["l"] + ["r"] * count), [address, *words])
    kind = ir.VectorType(_I32, count)
    return builder.store(_pack(builder, words, kind), _pointer(builder, address, kind), align=4 * count)


@intrinsic
def store_part(typingctx, like, like_out, address, stride, position, begin, end, v):
    """Write a Vector that load_part gave a thread of a warp, rounded to the type of `like_out`: items `stride` bytes
    apart, the first to `address` if its position is in [begin, end); others likewise. Neighbours together where that
    can be."""
    n, size = _per_load(like), like_out.bitwidth // 8
    align = min(16, n * size)

    def codegen(context, builder, sig, args):
        _, _, address, stride, position, begin, end, v = args
        items = _items(builder, v)
        close = builder.icmp_signed("==", stride, ir.Constant(_I64, size))
        lies_well = builder.icmp_signed("==", builder.and_(address, ir.Constant(_I64, align - 1)), ir.Constant(_I64, 0))
        together = builder.and_(close, lies_well)
        step = _anew(builder, stride)

        def is_inside(first, last):
            not_before = builder.icmp_signed(">=", builder.add(position, _c32(first)), begin)
            return builder.and_(not_before, builder.icmp_signed("<=", builder.add(position, _c32(last)), end))

        def store_load(g, items):
            where = builder.add(address, ir.Constant(_I64, g * 32 * size))
            packed = _pack(builder, items[g : g + n], ir.VectorType(_item(like_out), n))
            words = _items(builder, builder.bitcast(packed, ir.VectorType(_I32, n * size // 4)))
            for k in range(0, len(words), 4):
                _store_words(builder, builder.add(where, ir.Constant(_I64, 4 * k)), words[k : k + 4])

        def store_items(g, items):
            for k in range(n):
                with builder.if_then(is_inside(g * 32 + k, g * 32 + k + 1)):
                    pointer = _pointer(builder, _step(builder, address, step, g * 32 + k), _item(like_out))
                    builder.store(items[g + k], pointer, align=size)

        not_before = builder.icmp_signed("==", begin, _c32(0))  # of all threads: what is less is rare
        all_inside = builder.and_(not_before, builder.icmp_signed(">=", end, _c32(WIDTH * 32)))
        with builder.if_else(builder.and_(together, all_inside)) as (whole, parts):
            with whole:
                rounded = _rounded(builder, like_out, items)
                for g in range(0, WIDTH, n):
                    store_load(g, rounded)
            with parts:  # rounded here too, or what is stored together is moved into neighbouring registers first
                rounded = _rounded(builder, like_out, [_anew(builder, x) for x in items])
                for g in range(0, WIDTH, n):
                    with builder.if_else(builder.and_(together, is_inside(g * 32, g * 32 + n))) as (load, single):
                        with load:
                            store_load(g, rounded)
                        with single:
                            store_items(g, rounded)
        return context.get_dummy_value()

    i64, i32 = types.int64, types.int32
    return types.void(like, like_out, i64, i64, i32, i32, i32, v), codegen


@intrinsic
def store_once(typingctx, like_out, address, stride, begin, end, v):
    """Write the items [begin, end) of what load_once gave, rounded to the type of `like_out`, `stride` bytes apart; the
    first item's place is `address`. Together if all are inside, side by side and at 16 bytes."""
    n, size = v.width, like_out.bitwidth // 8

    def codegen(context, builder, sig, args):
        _, address, stride, begin, end, v = args
        items = _rounded(builder, like_out, _items(builder, v))
        close = builder.icmp_signed("==", stride, ir.Constant(_I64, size))
        aligned = builder.icmp_signed("==", builder.and_(address, ir.Constant(_I64, 15)), ir.Constant(_I64, 0))
        inside = builder.and_(builder.icmp_signed("<=", begin, _c32(0)), builder.icmp_signed(">=", end, _c32(n)))
        with builder.if_else(builder.and_(builder.and_(close, aligned), inside)) as (together, apart):
            with together:
                packed = _pack(builder, items, ir.VectorType(_item(like_out), n))
                words = _items(builder, builder.bitcast(packed, ir.VectorType(_I32, n * size // 4)))
                for k in range(0, len(words), 4):
                    _store_words(builder, builder.add(address, ir.Constant(_I64, 4 * k)), words[k : k + 4])
            with apart:
                for k in range(n):
                    here = builder.and_(
                        builder.icmp_signed("<=", begin, _c32(k)), builder.icmp_signed(">", end, _c32(k))
                    )
                    with builder.if_then(here):
                        pointer = _pointer(builder, _step(builder, address, stride, k), _item(like_out))
                        builder.store(items[k], pointer, align=size)
        return context.get_dummy_value()

    i64, i32 = types.int64, types.int32
    return types.void(like_out, i64, i64, i32, i32, v), codegen


# -- labels, class weights ---------------------------------------------------------------------------------------


@intrinsic
def load_apart(typingctx, like, like_items, address, stride, position, end):
    """The first half of what load_part reads in a warp for logits like `like`, from items of any type and at any
    address, in the precision of the logits; 0 at positions from `end` on. HALF positions on, the other. Neighbours
    together where that can be, others one by one."""
    n, size, wide = _per_load(like), like_items.bitwidth // 8, Vector(_wide(like).dtype, WIDTH // 2)
    align = min(16, n * size)

    def codegen(context, builder, sig, args):
        _, _, address, stride, position, end = args
        close = builder.icmp_signed("==", stride, ir.Constant(_I64, size))
        stride = _anew(builder, stride)
        room = builder.trunc(builder.sub(end, position), _I32)
        kind = vector_ir(wide)

        def convert(x):
            if x.type == kind.element:
                return x
            return (builder.fpext if kind.element == ir.DoubleType() else builder.fptrunc)(x, kind.element)

        def side_by_side(first):
            words, load = [], ir.VectorType(_I32, align // 4)
            for k in range(0, n * size, align):
                at = builder.add(first, ir.Constant(_I64, k))
                words += _items(builder, builder.load(_pointer(builder, at, load), align=align))
            if size == 2:
                return [convert(x) for x in _widen_words(context, builder, like_items, words)]
            packed = _pack(builder, words, ir.VectorType(_I32, len(words)))
            return [convert(x) for x in _items(builder, builder.bitcast(packed, ir.VectorType(_item(like_items), n)))]

        def one_by_one(first, place):
            items = []
            for k in range(n):
                before = builder.block
                with builder.if_then(builder.icmp_signed("<", _c32(place + k), room)):
                    x = convert(_load_item(context, builder, like_items, _step(builder, first, stride, k)))
                    loaded = builder.block
                items.append(_phi(builder, (ir.Constant(kind.element, 0.0), before), (x, loaded)))
            return items

        items = []
        for g in range(WIDTH // 2 // n):
            place = g * 32 * n
            first = _step(builder, address, stride, place)
            aligned = builder.icmp_signed("==", builder.and_(first, ir.Constant(_I64, align - 1)), ir.Constant(_I64, 0))
            inside = builder.icmp_signed("<=", _c32(place + n), room)
            with builder.if_else(builder.and_(builder.and_(close, aligned), inside)) as (whole, part):
                with whole:
                    together, end_of_whole = side_by_side(first), builder.block
                with part:
                    apart, end_of_part = one_by_one(first, place), builder.block
            items += [_phi(builder, (x, end_of_whole), (y, end_of_part)) for x, y in zip(together, apart)]
        return _pack(builder, items, kind)

    i64 = types.int64
    return wide(like, like_items, i64, i64, i64, i64), codegen


@intrinsic
def ones_apart(typingctx, like, position, end):
    """What load_apart reads from ones."""
    n, wide = _per_load(like), Vector(_wide(like).dtype, WIDTH // 2)

    def codegen(context, builder, sig, args):
        room, kind = builder.trunc(builder.sub(args[2], args[1]), _I32), vector_ir(wide)
        one, zero = ir.Constant(kind.element, 1.0), ir.Constant(kind.element, 0.0)
        inside = [builder.icmp_signed("<", _c32(k // n * 32 * n + k % n), room) for k in range(WIDTH // 2)]
        return _pack(builder, [builder.select(x, one, zero) for x in inside], kind)

    return wide(like, types.int64, types.int64), codegen


# -- folds and shuffles ------------------------------------------------------------------------------------------


def _part(builder, v, begin, end):
    """Items [begin, end) of a vector, a scalar for one."""
    items = [builder.extract_element(v, _c32(i)) for i in range(begin, end)]
    return items[0] if len(items) == 1 else _pack(builder, items, ir.VectorType(v.type.element, len(items)))


@intrinsic
def fold_loads(typingctx, like, v):
    """The butterfly between the loads of a Vector: of a Vector, one of n items."""
    result = Vector(v.dtype, _per_load(like))

    def codegen(context, builder, sig, args):
        v = args[1]
        while v.type.count > result.width:
            half = v.type.count // 2
            v = builder.fadd(_part(builder, v, 0, half), _part(builder, v, half, 2 * half))
        return v

    return result(like, v), codegen


@intrinsic
def halves(typingctx, v):
    """The lower and the upper half of a vector; a scalar twice."""
    half = v
    if isinstance(v, Vector):
        half = Vector(v.dtype, v.width // 2) if v.width > 2 else v.dtype
    result = types.UniTuple(half, 2)

    def codegen(context, builder, sig, args):
        parts = [args[0]] * 2
        if isinstance(v, Vector):
            parts = [_part(builder, args[0], 0, v.width // 2), _part(builder, args[0], v.width // 2, v.width)]
        return context.make_tuple(builder, result, parts)

    return result(v), codegen


@intrinsic
def join(typingctx, low, high):
    """The vector of two halves."""
    result = Vector(low.dtype, 2 * low.width)

    def codegen(context, builder, sig, args):
        items = [builder.extract_element(v, _c32(i)) for v in args for i in range(low.width)]
        return _pack(builder, items, vector_ir(result))

    return result(low, high), codegen


def _shuffle(builder, x, mask, mode=3):
    """x of the thread whose number differs in the bits of `mask`; in mode 0, of the thread of that number."""
    if isinstance(x.type, ir.VectorType):
        items = [_shuffle(builder, builder.extract_element(x, _c32(i)), mask) for i in range(x.type.count)]
        return _pack(builder, items, x.type)
    if x.type == _F32:
        return builder.bitcast(_shuffle(builder, builder.bitcast(x, _I32), mask), _F32)
    if x.type == ir.DoubleType():
        return builder.bitcast(_shuffle(builder, builder.bitcast(x, _I64), mask), x.type)
    if x.type == _I64:
        low = builder.zext(_shuffle(builder, builder.trunc(x, _I32), mask), _I64)
        high = builder.zext(_shuffle(builder, builder.trunc(builder.lshr(x, ir.Constant(_I64, 32)), _I32), mask), _I64)
        return builder.or_(builder.shl(high, ir.Constant(_I64, 32)), low)
    result = ir.LiteralStructType((_I32, _I1))
    kind = ir.FunctionType(result, [_I32] * 5)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.nvvm.shfl.sync.i32")
    return builder.extract_value(builder.call(function, [_c32(-1), _c32(mode), x, mask, _c32(31)]), 0)


@intrinsic
def first_lanes(typingctx, x):
    """x of the first eight threads of the warp, as a Vector; all threads take part."""
    result = Vector(x, 8)

    def codegen(context, builder, sig, args):
        word = builder.bitcast(args[0], _I32)
        items = [builder.bitcast(_shuffle(builder, word, _c32(k), 0), _F32) for k in range(8)]
        return _pack(builder, items, vector_ir(result))

    return result(x), codegen


@intrinsic
def warp_largest(typingctx, x):
    """The largest int32 of the warp's threads."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(_I32, [_I32])
        code = "redux.sync.max.s32 $0, $1, 0xffffffff;"
        return builder.call(ir.InlineAsm(kind, code, "=r,r", side_effect=True), args)

    return types.int32(types.int32), codegen


@intrinsic
def butterfly(typingctx, x, mask):
    """x of the thread whose number differs from this one's in the bits of `mask`; all threads of the warp take part."""

    def codegen(context, builder, sig, args):
        return _shuffle(builder, args[0], builder.trunc(args[1], _I32))

    return x(x, types.int64), codegen


def _key(builder, x):
    """ordered_bits of x + 0, which is 0 for -0."""
    integer = _I32 if x.type == _F32 else _I64
    word = builder.bitcast(builder.fadd(x, ir.Constant(x.type, 0.0)), integer)
    sign = builder.ashr(word, ir.Constant(integer, integer.width - 1))
    return builder.xor(word, builder.and_(sign, ir.Constant(integer, (1 << (integer.width - 1)) - 1)))


@intrinsic
def largest_key(typingctx, v):
    """The largest ordered_bits of the items of a Vector, -0 counting as 0."""

    def codegen(context, builder, sig, args):
        keys = [_key(builder, x) for x in _items(builder, args[0])]
        best = keys[0]
        for key in keys[1:]:
            best = builder.select(builder.icmp_signed(">", key, best), key, best)
        return builder.sext(best, _I64) if best.type == _I32 else best

    return types.int64(v), codegen


@intrinsic
def count_larger(typingctx, v, x):
    """How many items of a Vector are larger than x."""

    def codegen(context, builder, sig, args):
        total = _c32(0)
        for item in _items(builder, args[0]):
            total = builder.add(total, builder.zext(builder.fcmp_ordered(">", item, args[1]), _I32))
        return total

    return types.int32(v, x), codegen


@intrinsic
def unless_zero(typingctx, label, v, otherwise):
    """v, but `otherwise` where the label is 0; item by item."""

    def codegen(context, builder, sig, args):
        zero = ir.Constant(args[0].type, [0.0] * label.width)
        return builder.select(builder.fcmp_ordered("==", args[0], zero), args[2], args[1])

    return v(label, v, v), codegen


@intrinsic
def item_of(typingctx, v, k):
    """Item k of a Vector, for a k that the compiler gets to know."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], builder.trunc(args[1], _I32))

    return v.dtype(v, types.int64), codegen


@intrinsic
def first_item(typingctx, v, x):
    """The first item of a Vector that equals x, or how many there are."""

    def codegen(context, builder, sig, args):
        first = _c32(v.width)
        for k in reversed(range(v.width)):
            here = builder.fcmp_ordered("==", builder.extract_element(args[0], _c32(k)), args[1])
            first = builder.select(here, _c32(k), first)
        return first

    return types.int32(v, v.dtype), codegen
