"""What the CUDA compilers make of the kernels, without a GPU: no local memory, a short inner loop, nothing contracted.

Numba and NVVM write PTX, ptxas makes machine code of it and tells what that needs, nvdisasm shows the instructions. The
numbers are those of CUDA 13.0; another release may allocate registers differently.
"""

import inspect
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from numba import types

pytest.importorskip("fcntl", reason="there is one on Linux")
pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pathfinder = pytest.importorskip("cuda.pathfinder", reason="cuda-pathfinder is not installed")
pytest.importorskip("numbaloss.cuda", exc_type=ImportError)  # its message says what is missing

from compiled import (  # noqa: E402
    I64,
    KERNELS,
    LIKE,
    ROWS,
    SIZE,
    Case,
    blocks_on,
    bounded,
    cases,
    entries,
    kernels_of,
    on_disk,
    ptx_of,
    signatures,
    whole_ptx,
)
from numba.cuda.np.numpy_support import as_dtype  # noqa: E402

from numbaloss.cuda import _launch, _memory, _scores, _sums, softmax  # noqa: E402


def tool(name):
    path = pathfinder.find_nvidia_binary_utility(name) or shutil.which(name)
    return path or pytest.skip(f"{name} is not installed", allow_module_level=True)


PTXAS, NVDISASM = tool("ptxas"), tool("nvdisasm")  # packages nvidia-cuda-nvcc and nvidia-cuda-nvdisasm
FIND_LARGEST = ("_stream_score", "_part_scores", "_stream_sums", "_part_sums")
FORWARD = ("_sparse_xent", "_chunk_sums", *FIND_LARGEST)  # with an inner loop over rounds

# -- the compilers -----------------------------------------------------------------------------------------------


def assemble(ptx):
    """(machine code, what ptxas says of it)."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        arch = re.search(r"\.target (sm_\w+)", ptx)[1]
        run = subprocess.run([PTXAS, "-v", "-arch", arch, source, "-o", cubin], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return cubin.read_bytes(), run.stderr


def sections(cubin):
    """{entry: its disassembly}."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        run = subprocess.run([NVDISASM, "-c", path], capture_output=True, text=True, check=True)
    text = run.stdout.replace("CALL.REL.NOINC `(.L_", "BRA `(.L_")  # how sm_80 leaves a loop
    return {part.partition(",")[0]: part for part in text.split("\t.section\t.text.")[1:]}


class Code(NamedTuple):
    ptx: str
    text: str  # of its instructions
    stack: str  # what ptxas says of it
    shared: int  # bytes of shared memory


def written_for(dtype, arch):
    """Whose PTX is assembled. NVVM writes the same for sm_80 as for sm_90 (test_ptx_before_blackwell). From sm_100 on
    it is another NVVM, whose PTX of the other dtypes takes long: see test_no_local_memory_on_blackwell."""
    return arch if arch == "sm_100" and dtype == "bfloat16" else "sm_90"


@on_disk
def machine_code(dtype, arch, layout="close", source=None, **more):
    """{kernel: Code} of every kernel that takes this dtype; `more` are options of NVVM."""
    ptx = whole_ptx(dtype, source or written_for(dtype, arch), layout, **more)
    names = [case.name for case in cases(dtype, layouts=(layout,))]
    of = dict(zip(names, entries(ptx), strict=True))  # in the order in which they were given
    assert [name for name, entry in of.items() if f"{name.split()[0]}B" not in entry] == []
    ptx = re.sub(r"\.target sm_\d+", f".target {arch}", ptx)
    if arch == "sm_80":
        for name, entry in of.items():
            bound = rf"(\.entry {entry}\([^{{]*\.minnctapersm) \d+"
            ptx = re.sub(bound, rf"\1 {blocks_on(arch, name, dtype)}", ptx, count=1)
    cubin, log = assemble(ptx)
    parts, code = entries(ptx), sections(cubin)
    said = re.findall(r"Function properties for (\w+)\n\s*(.*)\n(.*)", log)
    use = {entry: (stack, int((re.findall(r"(\d+) bytes smem", more) or [0])[0])) for entry, stack, more in said}
    return {name: Code(parts[entry], code[entry], *use[entry]) for name, entry in of.items()}


def instructions(text):
    """(opcodes, {label: number of the next opcode}, [(number of a jump, its label, whether it is taken always)])."""
    opcodes, labels, jumps = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(?:.*`\((\.L_\w+)\))?", line)
        if found and found[2] != "NOP":
            if found[2].startswith(("BRA", "EXIT", "RET")):
                jumps.append((len(opcodes), found[3], not found[1]))
            opcodes.append(found[2])
    return opcodes, labels, jumps


def opcodes_of(text):
    return instructions(text)[0]


def basic_blocks(text):
    """Opcodes, in lists that end at a jump or before a label."""
    opcodes, labels, jumps = instructions(text)
    cuts = sorted({0, len(opcodes), *labels.values(), *(at + 1 for at, _, _ in jumps)})
    return [opcodes[begin:end] for begin, end in zip(cuts, cuts[1:])]


def inner_loops(text):
    """Opcodes between a jump back and where it leads to, without other such jumps inside."""
    opcodes, labels, jumps = instructions(text)
    spans = {(labels[label], at) for at, label, _ in jumps if label in labels and labels[label] < at}
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return [opcodes[begin : end + 1] for begin, end in inner]


def ring_round(text, terms, through, loads):
    """(opcodes on the shortest way once around the loop that takes whole rounds from the ring, all of its opcodes), by
    a block with so many opcodes `through`, then one that copies as much; the loop has so many FFMA a class, and one
    more at most."""
    opcodes, labels, jumps = instructions(text)
    to = {at: (labels[label], always) for at, label, always in jumps if label in labels}
    cuts = sorted({*labels.values(), *(at + 1 for at, _, _ in jumps), len(opcodes)})

    def shortest(begin, end):
        steps = {begin: 0}
        for i in range(begin, end):
            target, always = to.get(i, (0, False))
            for j in ({i + 1} if not always else set()) | ({target} if target > i else set()):
                steps[j] = min(steps.get(j, len(opcodes)), steps.get(i, len(opcodes)) + 1)
        return steps[end]

    for at, (head, _) in sorted(to.items()):
        loop = opcodes[head : at + 1]
        if head < at and "DEPBAR.LE" in loop and loop.count("FFMA") - terms * CLASSES in (0, 1):
            way = next(i for i, j in zip(cuts, cuts[1:]) if i >= head and opcodes[i:j].count(through) == loads)
            copies = [i for i, j in zip(cuts, cuts[1:]) if way <= i <= at and opcodes[i:j].count(COPY) == loads]
            return shortest(head, way) + min(shortest(way, i) + shortest(i, at) for i in copies) + 1, loop
    raise AssertionError("expected a loop that waits for a copy, got none")


# -- tests -------------------------------------------------------------------------------------------------------


def test_the_table_is_complete():
    table = signatures(types.float32, ROWS)
    assert set(table) == set(KERNELS)
    for name, kernel in KERNELS.items():
        assert len(table[name]) == len(inspect.signature(kernel.py_func).parameters), name


def sample(kind):
    """An argument of this Numba type."""
    if isinstance(kind, types.BaseTuple):
        return tuple(sample(k) for k in kind)
    return 0 if kind == I64 else as_dtype(kind).type(0)


def arguments_fit(case, ptx):
    """Whether launch() packs arguments as the kernel reads them: its parameters, each at a multiple of its size."""
    args = tuple(sample(kind) for kind in case.signature)
    declared = re.findall(r"\.param \.[bsuf](\d+) \w+_param_\d+", ptx)
    packed = [struct.calcsize(code) * 8 for code in _launch.parameters(args)[1:]]
    return _launch.signature(args) == case.signature and packed == [int(bits) for bits in declared]


ARCHS = ("sm_90", "sm_80", "sm_100")
NO_STACK = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def stacks(codes):
    """Of the kernels that have one."""
    return {name: code.stack for name, code in codes.items() if code.stack != NO_STACK}


def each_case(*dtypes):
    """Parameters (dtype, arch), a dtype after the other: what is compiled is kept."""
    return pytest.mark.parametrize("dtype, arch", [(d, arch) for d in dtypes for arch in ARCHS], scope="module")


@each_case(*LIKE)
def test_no_local_memory(dtype, arch):
    """No stack, hence no LDL and no STL."""
    codes = machine_code(dtype, arch)
    assert stacks(codes) == {}
    assert [case.name for case in cases(dtype) if not arguments_fit(case, codes[case.name].ptx)] == []
    known = {name: bounded(name, dtype).shared for name in codes}  # by which blocks are planned
    assert {name: codes[name].shared for name in codes if known[name]} == {name: n for name, n in known.items() if n}


@pytest.mark.architectures
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"], scope="module")
def test_no_local_memory_on_blackwell(dtype):
    assert stacks(machine_code(dtype, "sm_100", source="sm_100")) == {}


@pytest.mark.architectures
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"], scope="module")
def test_no_local_memory_for_classes_apart(dtype):
    codes = machine_code(dtype, "sm_90", "strided")
    assert stacks(codes) == {}
    wanted = cases(dtype, layouts=("strided",))
    assert [case.name for case in wanted if not arguments_fit(case, codes[case.name].ptx)] == []


SOME = [("bfloat16", ("_sparse_xent_grad",)), ("float64", ("_entropy",)), ("float32", ("_total",))]


@pytest.mark.parametrize(
    "dtype, names", [*SOME, *(pytest.param(dtype, KERNELS, marks=pytest.mark.architectures) for dtype in LIKE)]
)
def test_ptx_before_blackwell(dtype, names):
    """NVVM writes the same for sm_80 as for sm_90."""
    for case in cases(dtype, names):
        assert ptx_of(case, "sm_80").replace("sm_80", "sm_90") == ptx_of(case, "sm_90"), case.name


def test_a_kernel_among_others():
    """It is the same alone."""
    (case,) = cases("float32", ("_score",))
    (alone,) = sections(assemble(ptx_of(case, "sm_90"))[0]).values()
    assert opcodes_of(machine_code("float32", "sm_90")["_score"].text) == opcodes_of(alone)


CLASSES = 32  # of a thread in a round of the inner loop
COPY = "LDGSTS.E.BYPASS.128"  # 16 bytes to shared memory
LIMITS = {"float16": 13.4, "bfloat16": 13.4, "float32": 13.7}  # instructions a class: 3 % above what they are
GRAD_LIMITS = {"float16": 13.0, "bfloat16": 13.0, "float32": 12.2}
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|.*\bF64")
SLOW = re.compile(FLOAT64.pattern + "|MUFU|LDL|STL|CALL")  # and approximations, local memory


OVER_CLASSES = {*kernels_of(softmax, _scores, _sums)} - {"_short_sparse_xent", "_join_sums", "_join_scores"}
STREAMS = {name for name in OVER_CLASSES if "narrow" not in name}


@each_case(*LIKE)
def test_the_loops_over_classes(dtype, arch):
    """Loops that take exponentials have no float64 below float64, and those that stream rows load 16 bytes at a time
    and do nothing SLOW, but for one conversion a round in the entropy's."""
    fma = "DFMA" if dtype == "float64" else "FFMA"
    for name in OVER_CLASSES:
        loops = [loop for loop in inner_loops(machine_code(dtype, arch)[name].text) if loop.count(fma) >= 8]
        streams = [loop for loop in loops if loop.count("LDG.E.128") >= CLASSES * SIZE[dtype] // 16]
        wanted = streams if name in STREAMS else loops
        assert max(loop.count(fma) for loop in wanted) >= (8 * CLASSES if name in STREAMS else 8), name
        if dtype != "float64":
            slow = [op for loop in loops for op in loop if (SLOW if loop in streams else FLOAT64).match(op)]
            assert len(slow) <= (name == "_entropy"), (name, slow)


@each_case(*LIKE)
def test_elements_are_read_before_one_is_written(dtype, arch):
    """Four of them, of up to three arrays, without float64 below float64; or four and a weight, by its type."""
    loads = {"_binary_xent": 12, "_binary_grad": 12, "_cap": 4, "_uncap": 8, "_take_rows": 16, "_put_rows": 16}
    for name, count in loads.items():
        opcodes = opcodes_of(machine_code(dtype, arch)[name].text)
        first = next(i for i, op in enumerate(opcodes) if op.startswith("STG"))
        assert sum(op.startswith("LDG") for op in opcodes[:first]) >= count, name
        assert dtype == "float64" or count == 16 or [op for op in opcodes if FLOAT64.match(op)] == [], name


@pytest.mark.parametrize("name", FORWARD)
@each_case("float16", "bfloat16", "float32")
def test_the_inner_loop(dtype, arch, name):
    """Whole rounds from the ring: loads and copies of 16 bytes, eight FFMA a class, nothing SLOW."""
    text = machine_code(dtype, arch)[name].text
    loads = CLASSES * SIZE[dtype] // 16
    count, loop = ring_round(text, 8, "LDS.128", loads)
    print(f"{name} {dtype} {arch}: {count / CLASSES:.2f} instructions a class")
    assert loop.count("LDS.128") == loads and loop.count(COPY) == 2 * loads  # of a whole round or less
    assert [op for op in loop if op == "LDG.E.128" or SLOW.match(op)] == []
    assert any(SLOW.match(op) for op in opcodes_of(text))  # elsewhere there are some
    assert count / CLASSES <= LIMITS[dtype] + 0.5 * (name in FIND_LARGEST)  # and count nothing


@each_case("float16", "bfloat16", "float32")
def test_the_loops_of_a_gradient(dtype, arch):
    """Whole rounds of the sum, then of what is written: stores of 16 bytes; seven FFMA twice, for entries that are 0
    or subnormal too, of which a thread takes one."""
    text = machine_code(dtype, arch)["_sparse_xent_grad"].text
    loads = CLASSES * SIZE[dtype] // 16
    for terms, through, limits in ((8, "LDS.128", LIMITS), (14, "STG.E.EF.128", GRAD_LIMITS)):
        count, loop = ring_round(text, terms, through, loads)
        print(f"_sparse_xent_grad {dtype} {arch}: {count / CLASSES:.2f} instructions a class, {terms} FFMA")
        assert [op for op in loop if op == "LDG.E.128" or SLOW.match(op)] == []
        assert count / CLASSES <= limits[dtype]


@each_case("float16", "bfloat16", "float32")
def test_the_only_round(dtype, arch):
    """Rows of one round: all loads of a thread before the first is used; clipping, widening and the terms."""
    text = machine_code(dtype, arch)["_short_sparse_xent"].text
    blocks = basic_blocks(text)
    assert max(block.count("LDG.E.128") for block in blocks) == CLASSES * SIZE[dtype] // 16
    near, far = sorted((block for block in blocks if block.count("FFMA") >= 7.5 * CLASSES), key=len)  # far: subtracts
    print(f"_short_sparse_xent {dtype} {arch}: {len(near) / CLASSES:.2f} instructions a class")
    assert [op for op in near + far if SLOW.match(op)] == []
    assert len(near) / CLASSES <= (11.8 if SIZE[dtype] == 2 else 11.3)
    assert len(far) - len(near) >= CLASSES - 2


@each_case(*LIKE)
def test_softmax_is_written_16_bytes_at_a_time(dtype, arch):
    """In the loop that takes the exponentials; and rows of few classes are read so."""
    codes, size = machine_code(dtype, arch), 8 if dtype == "float64" else 4
    loops = inner_loops(codes["_normalize"].text)
    stores = [sum(op in ("STG.E.128", "STG.E.EF.128") for op in loop) for loop in loops]
    assert max(stores) >= CLASSES * size // 16
    for name in codes:
        if name.startswith("_narrow"):
            assert "LDG.E.128" in opcodes_of(codes[name].text), name


def test_the_policy_of_last_copies():
    """EVICT_FIRST is what its instruction gives; from sm_90 on, that is computed while the kernel runs."""
    ptx = """.version 8.0
.target sm_80
.address_size 64
.visible .entry policy(.param .u64 to)
{
.reg .b64 %p<3>;
ld.param.u64 %p1, [to];
createpolicy.fractional.L2::evict_first.b64 %p2, 1.0;
st.global.b64 [%p1], %p2;
ret;
}
"""
    (text,) = sections(assemble(ptx)[0]).values()
    low, high = _memory.EVICT_FIRST & 0xFFFFFFFF, _memory.EVICT_FIRST >> 32
    assert low == 0 and re.search(rf"MOV.* {high:#x} ;", text), text


FUSED = re.compile(r"\bfma\.rn\.f(?:32|64)\b")


@pytest.mark.architectures
@pytest.mark.parametrize("dtype", ["float32", "float64"], scope="module")  # with 16 bits all is float32
def test_no_product_and_sum_are_contracted(dtype):
    """Each is rounded, as on the CPU: fma=0 forbids it to NVVM, and to ptxas in the PTX, and makes no difference."""
    default, rounded = (machine_code(dtype, "sm_90", **more) for more in ({}, {"fma": 0}))
    fused = {name: [len(FUSED.findall(codes[name].ptx)) for codes in (default, rounded)] for name in default}
    assert {name: counts for name, counts in fused.items() if counts[0] != counts[1]} == {}
    assert [name for name in default if opcodes_of(default[name].text) != opcodes_of(rounded[name].text)] == []


def test_ptxas_contracts_nothing():
    """It might, where NVVM has not written how to round: written there, it makes no difference. What NVVM contracts
    shows when the PTX is run."""
    ptx = whole_ptx("float32", "sm_90", "close")
    rounded = re.sub(r"\b(add|sub|mul)\.(f32|f64)\b", r"\1.rn.\2", ptx)
    assert len(rounded) > len(ptx) + 5000
    code = sections(assemble(rounded)[0])
    of = dict(zip(machine_code("float32", "sm_90").values(), entries(rounded), strict=True))
    assert [entry for known, entry in of.items() if opcodes_of(known.text) != opcodes_of(code[entry])] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_focal_loss(dtype):
    """Its three numbers in place of a pos_weight: no local memory, no float64, nothing contracted."""
    numbers = types.UniTuple(types.float64, 3)
    for name in ("_binary_xent", "_binary_grad"):
        (case,) = cases(dtype, (name,))
        case = case._replace(signature=(*case.signature[:6], numbers, *case.signature[7:]))
        cubin, log = assemble(ptx_of(case, "sm_90"))
        assert NO_STACK in log
        assert assemble(ptx_of(case, "sm_90", fma=0))[0] == cubin
        (code,) = sections(cubin).values()
        assert [op for op in opcodes_of(code) if re.match("D(ADD|MUL|FMA)", op)] == []


def test_a_contraction_would_be_seen():
    def multiply_add(a, b, c, out):
        _memory.store(out, a * b + c)

    f32 = types.float32
    case = Case("multiply_add", "float32", "close", multiply_add, (f32, f32, f32, I64), (32, 1))
    default, rounded = ptx_of(case, "sm_90"), ptx_of(case, "sm_90", fma=0)
    assert [len(FUSED.findall(ptx)) for ptx in (default, rounded)] == [1, 0]
    left_to_ptxas = rounded.replace("mul.rn", "mul").replace("add.rn", "add")
    codes = [opcodes_of(*sections(assemble(ptx)[0]).values()) for ptx in (rounded, left_to_ptxas)]
    assert [opcodes.count("FFMA") for opcodes in codes] == [0, 1]
