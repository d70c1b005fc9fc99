"""Runs the PTX of a kernel on the CPU: what the compilers made of it, its inline assembly included, without a GPU.

A register is a NumPy array with an item for each thread of some blocks, a basic block of the code a Python function of
such arrays. The threads that stand at the first place in the code go on, until they meet others: shuffles, votes and
barriers wait for their warp, wherever in the code its threads are, or for all of their block. Found are accesses out of
the memory that was allocated or at a wrong alignment, and threads that miss a barrier; shared memory that is read
before it is written, and copies that are not awaited, by other bits. What ptxas makes of the PTX is not run.
"""

import re

import numpy as np
from numba import vectorize
from simt import MEMORY, SimError

from numbaloss import _intrinsics

KINDS = {"p": "?", "rs": "u2", "h": "u2", "r": "u4", "rd": "u8", "f": "f4", "fd": "f8"}  # of registers, by their names
LETTERS = str.maketrans("bs", "ui")  # of types
ALL = 0xFFFFFFFF
FREE, BARRIER, END = 0, -1, -2  # what stops threads, beside meetings of their warp: those are numbered


@vectorize(["f4(f4,f4,f4)", "f8(f8,f8,f8)"])
def fma(a, b, c):
    return _intrinsics.fma(a, b, c)


# -- what instructions do --------------------------------------------------------------------------------------------


def _larger(a, b):
    """Of numbers; +0 is larger than -0."""
    kind = f"u{a.dtype.itemsize}"
    return np.where(a == b, (a.view(kind) & b.view(kind)).view(a.dtype), np.fmax(a, b))


def _smaller(a, b):
    kind = f"u{a.dtype.itemsize}"
    return np.where(a == b, (a.view(kind) | b.view(kind)).view(a.dtype), np.fmin(a, b))


def _larger_or_nan(a, b):
    return np.where((a != a) | (b != b), a.dtype.type(np.nan), _larger(a, b))


def _pairs(function, a, b, widen, narrow, nan):
    """The larger, or smaller, of each half of words; or NaN, if that is kept."""
    parts = []
    for shift in (0, 16):
        x, y = (widen((v >> np.uint32(shift)).astype("u2")) for v in (a, b))
        lost = nan & ((x != x) | (y != y))
        parts.append(np.where(lost, np.uint16(0x7FFF), narrow(function(x, y))).astype("u4"))
    return parts[0] | parts[1] << np.uint32(16)


def from_bfloat16(x):
    return (x.astype("u4") << np.uint32(16)).view("f4")


def to_bfloat16(x):
    word = x.view("u4")
    rounded = (word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(x == x, rounded, np.uint32(0x7FFF)).astype("u2")


def from_float16(x):
    return x.view("f2").astype("f4")


def to_float16(x):
    with np.errstate(over="ignore"):
        return np.where(x == x, x.astype("f2").view("u2"), np.uint16(0x7FFF))


def up_to_float16(x):
    """Rounded up."""
    near = x.astype("f2")
    up = np.where(near < x, np.nextafter(near, np.float16(np.inf)), near)
    return np.where(x == x, up.view("u2"), np.uint16(0x7FFF))


def _truncated(x):
    """float64 to int64; what does not fit becomes the nearest, NaN the least."""
    inside = (x > -(2.0**63)) & (x < 2.0**63)
    whole = np.where(inside, x, 0).astype("i8")
    return np.where(inside, whole, np.where(x >= 2.0**63, np.int64(2**63 - 1), np.int64(-(2**63))))


def _divided(a, b):
    q = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
    return np.where((a < 0) != (b < 0), -q, q) if a.dtype.kind == "i" else q


def _left(a, n):
    return np.where(n < a.dtype.itemsize * 8, a << n.astype(a.dtype), a.dtype.type(0))


def _right(a, n):
    most = a.dtype.itemsize * 8 - 1
    shifted = a >> np.minimum(n, most).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n <= most, shifted, a.dtype.type(0))


def _high(a, b):
    """The upper half of the product."""
    bits = 8 * a.itemsize
    wide = [int(x) * int(y) >> bits for x, y in zip(*np.broadcast_arrays(a, b))]
    return np.array([x & (1 << bits) - 1 for x in wide], f"u{a.itemsize}").view(a.dtype)


def _inserted(a, b, begin, count):
    """bfi: the bits of a in b, of constants."""
    kind = b.dtype.type
    mask = kind(((1 << int(count)) - 1) << int(begin))
    return b & ~mask | (a << kind(int(begin))) & mask


def _turned(a, b, n):
    """shf.l.wrap"""
    n = n & np.uint32(31)
    return np.where(n == 0, b, b << n | a >> (np.uint32(32) - n & np.uint32(31)))


COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
EXPRESSIONS = {
    "mad": "{0} * {1} + {2}",
    "fma": "fma({0}, {1}, {2})",
    "not": "~{0}",
    "neg": "-{0}",
    "abs": "np.abs({0})",
}
EXPRESSIONS |= {"rcp": "{0}.dtype.type(1) / {0}", "rem": "{0} - _divided({0}, {1}) * {1}"}
NARROW = {("rn", "bf16", "f32"): "to_bfloat16", ("rn", "f16", "f32"): "to_float16"}
NARROW |= {("rp", "f16", "f32"): "up_to_float16"}
METHODS = {"mov": "move", "ld": "memory", "st": "memory", "shfl": "together", "redux": "together", "vote": "together"}
METHODS |= {"bar": "nothing", "membar": "nothing", "cp": "copy", "atom": "add", "cvt": "convert", "setp": "test"}
METHODS |= {"selp": "select", "shl": "shift", "shr": "shift"}
BINARY = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^", "mul": "*"}


# -- a program -------------------------------------------------------------------------------------------------------


def kind_of(text):
    """NumPy's kind of a type, such as i4 of s32; f2 of f16 and bf16, ? of pred and of pairs."""
    found = re.fullmatch(r"b?([bsuf])(\d+)", text)
    return f"{found[1].translate(LETTERS)}{int(found[2]) // 8}" if found else "?"


def _operands(text):
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[]+)+", text) if x.strip()]


def registers_of(block):
    """(those read before they are written, those written)"""
    reads, writes = set(), set()
    for guard, opcode, operands in block:
        names = [re.findall(r"%((?:p|rs|h|rd|r|fd|f)\d+)\b", x) for x in operands]
        to = 0 if opcode.startswith(("st", "bra", "bar", "cp", "membar", "ret", "red.")) else 1
        if guard:
            reads |= set(re.findall(r"%(p\d+)", guard)) - writes
        for part in names[to:]:
            reads |= set(part) - writes
        for part in names[:to]:
            writes |= set(part)
    return reads, writes


class Program:
    """One entry of a PTX."""

    def __init__(self, ptx, entry):
        self.symbols, self.size, extern = {}, 1024, None
        head, _, text = ptx.partition(f".entry {entry}(")
        declarations, _, body = text.partition("\n{\n")
        self.parameters = re.findall(r"\.param \.(\w+) (\w+)", declarations)
        body = body.partition("\n}\n")[0]
        words = set(re.findall(r"\w+", body))
        for align, name, size in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\];", head):
            if name in words:
                if size:
                    self.size = -(-self.size // int(align)) * int(align)
                    self.symbols[name] = self.size
                    self.size += int(size)
                else:
                    extern = name
        if extern:
            self.size = -(-self.size // 16) * 16
            self.symbols[extern] = self.size
        self._names, self._steps = dict(globals()), {}
        self._compile(list(self._lines(body)))

    @staticmethod
    def _lines(body):
        """Labels as text, instructions as (guard, opcode, operands)."""
        for line in body.split("\n"):
            line = line.partition("//")[0].strip()
            if label := re.fullmatch(r"(\$\w+):", line):
                yield label[1]
            for statement in line.strip("{} ").split(";") if not line.startswith((".", "$")) and ";" in line else ():
                statement = statement.strip()
                if not statement or statement.startswith("."):
                    continue
                if statement.count("{") > statement.count("}"):
                    statement += "}"
                found = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*)", statement)
                yield found[1], found[2], _operands(found[3])

    def _compile(self, lines):
        blocks, labels, current = [], {}, []
        for line in lines:
            if type(line) is str:
                if current:
                    blocks.append(current)
                    current = []
                labels[line] = len(blocks)
                continue
            if self._meets(line[1]) and current:
                blocks.append(current)
                current = []
            current.append(line)
            if line[1].startswith(("bra", "ret", "exit")):
                blocks.append(current)
                current = []
        if current:
            blocks.append(current)
        self._blocks, self._labels, self.end = blocks, labels, len(blocks)
        self._registers = [registers_of(block) for block in blocks]
        self.shared_registers = set().union(*(reads for reads, _ in self._registers))
        opcodes = [block[0][1] for block in blocks]
        known = sorted({x for x in opcodes if self._meets(x) == "warp"})
        self.met = {i + 1: x.split(".") for i, x in enumerate(known)}
        kinds = {None: FREE, "block": BARRIER}
        kinds = [known.index(x) + 1 if x in known else kinds[self._meets(x)] for x in opcodes]
        self.kind = np.array([*kinds, END])

    def step(self, i):
        """The function of basic block i, which is translated when threads first come to it."""
        if i not in self._steps:
            text = "\n    ".join(self._source(i, self._blocks[i], *self._registers[i]))
            exec(compile(text, "ptx", "exec"), self._names)
            self._steps[i] = self._names["step"]
        return self._steps[i]

    def _source(self, i, block, reads, writes):
        yield "def step(R, at, n, M, met=None):"
        for x in sorted(reads):
            yield f"{x} = R[{x!r}][at]"
        if self._meets(block[0][1]) == "warp":
            yield "if met is None:"
            yield f"    return {self._asked(block[0][1].split('.'), block[0][2])}"
        after = f"return {i + 1}"
        for guard, opcode, operands in block:
            if opcode.startswith("bra"):
                to = self._labels[operands[-1]]
                after = f"return {to}"
                if guard:
                    test = guard.replace("%", "").replace("!", "~")
                    after = f"return np.where({test}, {to}, {i + 1})"
            elif opcode in ("ret", "exit"):
                after = f"return {self.end}"
            else:
                if guard:
                    raise NotImplementedError(f"a guard before {opcode}")
                yield from self._translate(opcode, operands)
        for x in sorted(writes & self.shared_registers):
            yield f"R[{x!r}][at] = {x}"
        yield after

    @staticmethod
    def _meets(opcode):
        if opcode.startswith(("shfl", "redux", "vote", "bar.warp")):
            return "warp"
        return "block" if opcode.startswith("bar.sync") else None

    # Operands as Python expressions

    def _constant(self, value):
        name = f"C{len(self._names)}"
        self._names[name] = value
        return name

    def _value(self, text, kind):
        """An operand of NumPy kind `kind`."""
        if found := re.fullmatch(r"%((p|rs|h|rd|r|fd|f)\d+)", text):
            natural = KINDS[found[2]]
            if natural == kind:
                return found[1]
            if np.dtype(natural).itemsize == np.dtype(kind).itemsize:
                return f"{found[1]}.view({kind!r})"
            bits = f"{found[1]}.astype('u{np.dtype(kind).itemsize}')"  # the lower ones
            return bits if kind.startswith("u") else f"{bits}.view({kind!r})"
        if special := {
            "%laneid": "M.lane[at]",
            "%tid.x": "M.thread[at]",
            "%ctaid.x": "M.block[at]",
            "%ntid.x": "M.threads",
            "%nctaid.x": "M.blocks",
            "%dynamic_smem_size": "M.room",
        }.get(text):
            return f"(np.zeros(n, 'u4') + {special})"
        if text in self.symbols:
            return self._constant(np.array([self.symbols[text]], kind))
        if text.startswith("0f"):
            number = np.uint32(int(text[2:], 16)).view("f4")
        elif text.startswith("0d"):
            number = np.uint64(int(text[2:], 16)).view("f8")
        elif kind == "?":
            return self._constant(np.array([int(text) != 0]))
        else:
            size = np.dtype(kind).itemsize
            number = np.array([int(text, 0) & (1 << 8 * size) - 1], f"u{size}").view(kind)[0]
        return self._constant(np.array([number], kind))

    @staticmethod
    def _natural(register):
        return KINDS[re.fullmatch(r"%(p|rs|h|rd|r|fd|f)\d+", register)[1]]

    def _set(self, register, expression, kind):
        """A statement that sets a register to what has this kind."""
        natural = self._natural(register)
        if natural == kind:
            return f"{register[1:]} = {expression}"
        if np.dtype(natural).itemsize == np.dtype(kind).itemsize:
            return f"{register[1:]} = np.asarray({expression}).view({natural!r})"
        wide = f"{kind[0]}{np.dtype(natural).itemsize}"
        return f"{register[1:]} = np.asarray({expression}).astype({wide!r}).view({natural!r})"

    def _address(self, text):
        found = re.fullmatch(r"\[(%?\w+)(?:\+(-?\d+))?\]", text)
        name, offset = found[1], found[2]
        if name.startswith("%"):
            base = self._value(name, self._natural(name)) + ".astype('u8')"
        else:
            base = self._constant(np.array([self.symbols[name]], "u8"))
        return f"spread({base} + {self._constant(np.array([int(offset or 0) & 2**64 - 1], 'u8'))}, n)"

    def _translate(self, opcode, operands):
        """Statements."""
        parts = opcode.split(".")
        if set(parts) & {"ftz", "sat", "approx", "cc", "rz", "rm"}:
            raise NotImplementedError(opcode)
        translate = getattr(self, f"_{METHODS.get(parts[0], 'compute')}")
        return translate(parts, operands)

    def _nothing(self, parts, operands):
        """Barriers: threads wait before the block that begins with one."""
        return ["pass"]

    def _move(self, parts, operands):
        kind, (to, source) = kind_of(parts[-1]), operands
        if source[0] == "{":  # of several registers, the lowest first
            items = [x.strip() for x in source[1:-1].split(",")]
            size = np.dtype(kind).itemsize // len(items)
            shifts = [self._constant(np.array([8 * size * i], kind)) for i in range(len(items))]
            words = (f"({self._value(x, f'u{size}')}.astype({kind!r}) << {n})" for x, n in zip(items, shifts))
            return [self._set(to, " | ".join(words), kind)]
        if to[0] == "{":
            items = [x.strip() for x in to[1:-1].split(",")]
            size, whole = np.dtype(kind).itemsize // len(items), self._value(source, kind)
            shifts = [self._constant(np.array([8 * size * i], kind)) for i in range(len(items))]
            words = [f"({whole} >> {n}).astype('u{size}')" for n in shifts]
            # "_", or a name that is declared for it, is read by nobody
            return [self._set(x, word, f"u{size}") for x, word in zip(items, words) if x[0] == "%"]
        kind = self._natural(to) if kind == "?" else kind
        return [self._set(to, f"{self._value(source, kind)}.copy()", kind)]  # the other may change before it

    def _copy(self, parts, operands):
        if parts[2] == "commit_group":
            return ["M.end_group(at)"]
        if parts[2] in ("wait_group", "wait_all"):
            return [f"M.await_groups(at, {int(operands[0]) if operands else 0})"]
        if operands[2] != "16":
            raise NotImplementedError(f"{parts} {operands}")
        return [f"M.copy(at, {self._address(operands[0])}, {self._address(operands[1])})"]

    def _add(self, parts, operands):
        kind = kind_of(parts[-1])
        if parts[2] != "add" or kind != "u8":
            raise NotImplementedError(parts)
        value = f"spread({self._value(operands[2], kind)}, n)"
        return [self._set(operands[0], f"M.add_{parts[1]}(at, {self._address(operands[1])}, {value})", kind)]

    def _test(self, parts, operands):
        _, test, kind = parts
        kind = kind_of(kind)
        a, b = (self._value(x, kind) for x in operands[1:])
        ordered, unordered = f"({a} == {a}) & ({b} == {b})", f"({a} != {a}) | ({b} != {b})"
        if test in ("num", "nan"):
            expression = ordered if test == "num" else unordered
        elif kind[0] == "f" and test == "ne":
            expression = f"({a} != {b}) & {ordered}"
        elif kind[0] == "f" and test not in COMPARE and test[-1] == "u":
            expression = f"({a} {COMPARE[test[:-1]]} {b}) | {unordered}"
        else:
            expression = f"{a} {COMPARE[test]} {b}"
        return [self._set(operands[0], f"({expression})", "?")]

    def _select(self, parts, operands):
        kind = kind_of(parts[-1])
        values = f"{self._value(operands[1], kind)}, {self._value(operands[2], kind)}"
        return [self._set(operands[0], f"np.where({self._value(operands[3], '?')}, {values})", kind)]

    def _shift(self, parts, operands):
        kind, function = kind_of(parts[-1]), {"shl": "_left", "shr": "_right"}[parts[0]]
        expression = f"{function}({self._value(operands[1], kind)}, {self._value(operands[2], 'u4')})"
        return [self._set(operands[0], expression, kind)]

    def _compute(self, parts, operands):
        """What takes operands of one type and gives a result of it, but for products that are twice as wide."""
        name, kind, to = parts[0], kind_of(parts[-1]), operands[0]
        if parts[-1] in ("bf16x2", "f16x2"):
            if parts[0] not in ("max", "min") or parts[1:-1] not in ([], ["NaN"]):
                raise NotImplementedError(parts)
            both = "from_bfloat16, to_bfloat16" if parts[-1] == "bf16x2" else "from_float16, to_float16"
            a, b = (self._value(x, "u4") for x in operands[1:])
            function = {"max": "_larger", "min": "_smaller"}[name]
            return [self._set(to, f"_pairs({function}, {a}, {b}, {both}, {'NaN' in parts})", "u4")]
        if kind == "?" and parts[-1] != "pred":
            raise NotImplementedError(parts)
        a, is_float = [self._value(x, kind) for x in operands[1:]], kind[0] == "f"
        if name == "mul" and parts[1] == "wide":
            kind = f"{kind[0]}{2 * int(kind[1])}"
            expression = " * ".join(f"{x}.astype({kind!r})" for x in a)
        elif name == "mul" and parts[1] == "hi":
            expression = f"_high({a[0]}, {a[1]})"
        elif name in BINARY:
            expression = f"{a[0]} {BINARY[name]} {a[1]}"
        elif name in EXPRESSIONS:
            expression = EXPRESSIONS[name].format(*a)
        elif name == "div":
            expression = f"{a[0]} / {a[1]}" if is_float else f"_divided({a[0]}, {a[1]})"
        elif name in ("max", "min"):
            function = {"max": "_larger", "min": "_smaller"}[name] if is_float else f"np.{name}imum"
            expression = f"{function}{'_or_nan' if 'NaN' in parts else ''}({a[0]}, {a[1]})"
        elif name == "bfi":
            expression = f"_inserted({a[0]}, {a[1]}, {', '.join(str(int(x, 0)) for x in operands[3:])})"
        elif name == "shf" and parts[1:3] == ["l", "wrap"]:
            expression = f"_turned({', '.join(a)})"
        else:
            raise NotImplementedError(parts)
        return [self._set(to, expression, kind)]

    def _convert(self, parts, operands):
        to, source = parts[-2], parts[-1]
        kinds = [kind_of(to), kind_of(source)]
        if narrow := NARROW.get((parts[1], to, source)):
            return [self._set(operands[0], f"{narrow}({self._value(operands[1], 'f4')})", "u2")]
        if to in ("bf16", "f16") or parts[1] == "rp":
            raise NotImplementedError(parts)
        if source in ("f16", "bf16"):
            function = "from_float16" if source == "f16" else "from_bfloat16"
            value = f"{function}({self._value(operands[1], 'u2')})"
            return [self._set(operands[0], f"{value}.astype({kinds[0]!r})", kinds[0])]
        value = self._value(operands[1], kinds[1])
        if kinds[1][0] == "f" and kinds[0][0] != "f":
            if parts[1] != "rzi" or kinds != ["i8", "f8"]:
                raise NotImplementedError(parts)
            return [self._set(operands[0], f"_truncated({value})", "i8")]
        return [self._set(operands[0], f"{value}.astype({kinds[0]!r})", kinds[0])]

    def _memory(self, parts, operands):
        kind, count = kind_of(parts[-1]), 1
        for part in parts:
            count = int(part[1:]) if part in ("v2", "v4") else count
        space = next(x for x in parts if x in ("param", "global", "shared"))
        if space == "param":
            number = [name for _, name in self.parameters].index(operands[1][1:-1])
            return [self._set(operands[0], f"M.parameters[{number}].astype({kind!r})", kind)]
        if parts[0] == "ld":
            items = [x.strip() for x in operands[0].strip("{}").split(",")]
            load = f"M.load_{space}(at, {self._address(operands[1])}, {count}, {kind!r})"
            if count == 1:
                return [self._set(items[0], f"{load}[:, 0]", kind)]
            return [f"loaded = {load}", *(self._set(x, f"loaded[:, {i}].copy()", kind) for i, x in enumerate(items))]
        items = [x.strip() for x in operands[1].strip("{}").split(",")]
        values = ", ".join(f"spread({self._value(x, kind)}, n)" for x in items)
        return [f"M.store_{space}(at, {self._address(operands[0])}, np.stack([{values}], 1))"]

    def _asked(self, parts, operands):
        """What a thread brings to a meeting of its warp, or True."""
        if parts[0] == "bar":
            return "True"
        kinds = {"shfl": ["u4"] * 4, "redux": ["i4", "u4"], "vote": ["?", "u4"]}[parts[0]]
        return ", ".join(f"spread({self._value(x, kind)}, n)" for x, kind in zip(operands[1:], kinds))

    def _together(self, parts, operands):
        to, _, valid = operands[0].partition("|")
        kind = {"shfl": "u4", "redux": "i4", "vote": "?"}[parts[0]]
        lines = [self._set(to, "met", kind)]
        return [*lines, self._set(valid, "np.ones(n, bool)", "?")] if valid else lines


# -- memory ----------------------------------------------------------------------------------------------------------


def spread(x, n):
    return x if x.shape == (n,) else np.broadcast_to(x, n)


def take(memory, at, count, kind):
    """(as many arrays of `count` items of this kind as there are places in these bytes)"""
    words, places = items_at(memory, at, count, kind)
    return words[places]


def put(memory, at, values):
    words, places = items_at(memory, at, values.shape[1], values.dtype)
    words[places] = values


def items_at(memory, at, count, kind):
    """(an array of this kind in these bytes, where `count` items lie in it from each place on)"""
    size = np.dtype(kind).itemsize
    first = -memory.ctypes.data % size  # where addresses are multiples of it
    words = memory[first : first + (memory.size - first) // size * size].view(kind)
    return words, ((at - first) // size)[:, None] + np.arange(count)


def add(memory, at, values):
    """What each of these words held before, as they are added to one after the other."""
    order = np.argsort(at, kind="stable")
    at, values = at[order], values[order]
    sums = np.cumsum(values) - values
    first = np.maximum.accumulate(np.where(np.diff(at, prepend=-1) != 0, np.arange(at.size), 0))
    before = take(memory, at, 1, "u8")[:, 0] + (sums - sums[first])
    last = np.diff(at, append=-1) != 0
    put(memory, at[last], (before + values)[last, None])
    result = np.empty_like(before)
    result[order] = before
    return result


def ranges(addresses, size):
    """[(which of them, bytes of a range of memory, where they lie in it)]"""
    if (addresses & np.uint64(size - 1)).any():
        raise SimError(f"{size} bytes at a wrong alignment")
    left, result = np.arange(addresses.size), []
    while left.size:
        found = MEMORY._find(int(addresses[left[0]]), size, 1)
        here = (addresses[left] >= np.uint64(found.start)) & (addresses[left] + np.uint64(size) <= np.uint64(found.end))
        result.append((left[here], found.bytes, (addresses[left[here]] - np.uint64(found.start)).astype("i8")))
        left = left[~here]
    return result


class Blocks:
    """What the threads of some blocks of a grid have and share; `parameters` are arrays of one item."""

    def __init__(self, program, some, blocks, threads, room, parameters):
        self.threads, self.blocks, self.room = np.uint32(threads), np.uint32(blocks), np.uint32(room)
        self.block, self.thread = (
            np.repeat(np.array(some, "u4"), threads),
            np.tile(np.arange(threads, dtype="u4"), len(some)),
        )
        self.lane, self.parameters = self.thread & np.uint32(31), parameters
        self.every = np.arange(self.thread.size)
        self.size = program.size + room  # bytes of a block's shared memory
        stride = -(-self.size // 16) * 16
        self.begin = np.repeat(np.arange(len(some)) * stride, threads)
        self.shared = np.full(len(some) * stride, 0x41, np.uint8)  # 12.08 or 2261634.5: no kernel looks for it
        self.pending, self.group = [], np.zeros(self.thread.size, np.int64)
        self.copies = 0

    def load_global(self, at, addresses, count, kind):
        parts = ranges(addresses, np.dtype(kind).itemsize * count)
        if len(parts) == 1:
            return take(*parts[0][1:], count, kind)
        out = np.empty((addresses.size, count), kind)
        for which, memory, places in parts:
            out[which] = take(memory, places, count, kind)
        return out

    def store_global(self, at, addresses, values):
        for which, memory, places in ranges(addresses, values.itemsize * values.shape[1]):
            put(memory, places, values[which])

    def add_global(self, at, addresses, values):
        before = np.empty_like(values)
        for which, memory, places in ranges(addresses, 8):
            before[which] = add(memory, places, values[which])
        return before

    def _place(self, at, addresses, size):
        where = addresses.astype("i8")
        if (where % size).any() or where.min() < 1024 or where.max() + size > self.size:
            raise SimError(f"{size} bytes of shared memory at {where.min()} to {where.max()} of {self.size}")
        return where + self.begin[at]

    def load_shared(self, at, addresses, count, kind):
        return take(self.shared, self._place(at, addresses, np.dtype(kind).itemsize * count), count, kind)

    def store_shared(self, at, addresses, values):
        put(self.shared, self._place(at, addresses, values.itemsize * values.shape[1]), values)

    def add_shared(self, at, addresses, values):
        return add(self.shared, self._place(at, addresses, 8), values)

    def copy(self, at, to, source):
        """Every second one at once, the others not before they are awaited."""
        self.copies += 1
        threads, places = self.every[at], self._place(at, to, 16)
        data = self.load_global(at, source, 2, "u8")
        if self.copies % 2:
            put(self.shared, places, data)
        else:
            self.pending.append((threads, self.group[threads], places, data))

    def end_group(self, at):
        self.group[at] += 1

    def await_groups(self, at, under_way):
        done = np.full(self.every.size, -1)
        done[at] = self.group[at] - under_way  # groups below have come
        left = []
        for threads, groups, place, data in self.pending:
            come = groups < done[threads]
            put(self.shared, place[come], data[come])
            if not come.all():
                left.append((threads[~come], groups[~come], place[~come], data[~come]))
        self.pending = left


def meet(parts, asked):
    """What the threads of whole warps get of an instruction that they execute together."""
    if parts[0] == "bar":
        return True
    if (asked[-1] != ALL).any():
        raise NotImplementedError("a mask of some threads")
    values = asked[0].reshape(-1, 32)
    reduce = {("redux", "max"): np.max, ("redux", "min"): np.min, ("vote", "any"): np.any}.get((parts[0], parts[2]))
    if reduce:
        return np.repeat(reduce(values, 1), 32)
    lane, b = np.arange(32), asked[1].reshape(-1, 32).astype("i8")
    source = {"bfly": lane ^ b, "idx": b & 31, "up": lane - b}[parts[2]]
    return np.take_along_axis(values, np.where(source < 0, lane, source), 1).reshape(-1)


AT_A_TIME = 2048  # threads, in whole blocks


def run(program, blocks, threads, room, numbers):
    """Start blocks of threads with these numbers, a NumPy scalar for each parameter."""
    if threads % 32:
        raise SimError(f"expected whole warps, got {threads} threads")
    kinds = [kind_of(t) for t, _ in program.parameters]
    parameters = []
    for x, kind in zip(numbers, kinds, strict=True):
        whole = int(x) & (1 << 8 * int(kind[1])) - 1 if kind[0] != "f" else x
        parameters.append(np.array([whole], kind))
    step = max(1, AT_A_TIME // threads)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, step):
            some = range(first, min(first + step, blocks))
            _run_blocks(program, Blocks(program, some, blocks, threads, room, parameters))


def _run_blocks(program, M):
    size = M.thread.size
    R = {x: np.zeros(size, KINDS[re.match("[a-z]+", x)[0]]) for x in program.shared_registers}
    place, everyone = np.zeros(size, np.int64), slice(None)
    while True:
        first = place[0]
        if (place == first).all():
            kind = program.kind[first]
            if kind == END:
                return
            step, met = program.step(int(first)), None
            if kind > 0:
                met = meet(program.met[kind], step(R, everyone, size, M))
            place[:] = step(R, everyone, size, M, met)
            continue
        kinds = program.kind[place]
        if (kinds == FREE).any():
            here = place[kinds == FREE].min()
            at = np.flatnonzero(place == here)
            place[at] = program.step(int(here))(R, at, at.size, M)
            continue
        of_warp = kinds.reshape(-1, 32)
        ready = (of_warp == of_warp[:, :1]).all(1) & (of_warp[:, 0] > 0)
        if ready.any():
            kind = of_warp[ready][0, 0]
            at = np.flatnonzero(np.repeat(ready & (of_warp[:, 0] == kind), 32))
            _go_on(program, M, R, place, at, program.met[kind])
            continue
        ready = (kinds == BARRIER).reshape(-1, M.threads).all(1)
        if ready.any():
            _go_on(program, M, R, place, np.flatnonzero(np.repeat(ready, M.threads)), ["bar"])
        else:
            where = {int(p): (int((place == p).sum()), int(program.kind[p])) for p in np.unique(place)}
            raise SimError(f"threads wait for different things, (threads, for what) by block of the code: {where}")


def _go_on(program, M, R, place, at, parts):
    """Threads that have met, wherever in the code, go on."""
    groups = [np.flatnonzero(place[at] == here) for here in np.unique(place[at])]
    steps = [(program.step(int(place[at[group[0]]])), at[group], group) for group in groups]
    met = True
    if parts[0] != "bar":
        asked = None
        for step, threads, group in steps:
            own = step(R, threads, threads.size, M)
            asked = asked or [np.empty(at.size, x.dtype) for x in own]
            for x, y in zip(asked, own):
                x[group] = y
        met = meet(parts, asked)
    for step, threads, group in steps:
        place[threads] = step(R, threads, threads.size, M, met if met is True else met[group])
