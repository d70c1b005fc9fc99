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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
from numba import types

pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pathfinder = pytest.importorskip("cuda.pathfinder", reason="cuda-pathfinder is not installed")
pytest.importorskip("numbaloss.cuda", exc_type=ImportError)  # its message says what is missing

from numba.cuda.cudadrv import nvvm  # noqa: E402
from numba.cuda.np.numpy_support import as_dtype  # noqa: E402

from numbaloss.cuda import _launch, _memory, divergence, sigmoid, softmax, totals  # noqa: E402


def tool(name):
    path = pathfinder.find_nvidia_binary_utility(name) or shutil.which(name)
    return path or pytest.skip(f"{name} is not installed", allow_module_level=True)


PTXAS, NVDISASM = tool("ptxas"), tool("nvdisasm")  # packages nvidia-cuda-nvcc and nvidia-cuda-nvdisasm
FORWARD = ("_sparse_xent", "_wide_sparse_xent")  # with an inner loop over rounds

# -- the kernels -------------------------------------------------------------------------------------------------

I64 = types.int64
LIKE = {"float16": types.int16, "bfloat16": types.uint16, "float32": types.float32, "float64": types.float64}
SIZE = {dtype: like.bitwidth // 8 for dtype, like in LIKE.items()}
OPERAND, ROWS = types.UniTuple(I64, 5), types.UniTuple(I64, 6)
CLOSE_ROWS = types.Tuple((I64, I64, I64, I64, types.int32, I64))  # classes side by side: see with_known_stride
LAYOUTS = {"close": CLOSE_ROWS, "strided": ROWS}


def signatures(like, rows):
    """Argument types of each kernel; `rows` where the compiler may know the class stride."""
    labels = OPERAND, OPERAND, I64  # labels, weights, ignore_index
    factors = OPERAND, OPERAND, I64, I64, I64  # labels, weights, class_weights, classes, ignore_index
    return {
        "_sparse_xent": (I64, I64, like, rows, *labels, I64),
        "_short_sparse_xent": (I64, I64, I64, like, rows, *labels, I64),
        "_wide_sparse_xent": (I64, like, rows, *labels, I64),
        "_chunk_sums": (I64, like, rows, *labels, I64),
        "_join_sums": (I64, I64, like, rows, *labels, I64),
        "_sparse_xent_grad": (I64, like, rows, *labels, I64, I64, like, rows),
        "_narrow_sparse_xent": (I64, I64, like, ROWS, *labels, I64),
        "_narrow_sparse_xent_grad": (I64, I64, like, ROWS, *labels, I64, I64, like, ROWS),
        "_narrow_normalize": (I64, I64, like, ROWS, I64, I64),
        "_score": (I64, like, rows, *labels, I64, I64, I64, I64),
        "_entropy": (I64, like, rows, I64, I64, I64, I64),
        "_logsumexp": (I64, like, rows, I64),
        "_normalize": (I64, like, rows, I64, I64),
        "_dense_xent": (I64, like, rows, like, ROWS, I64, OPERAND, I64),
        "_binary_xent": (I64, like, ROWS, like, ROWS, like, ROWS, I64),
        "_divergence": (I64, like, rows, rows, OPERAND, I64, I64, I64),
        "_kl_grad": (I64, like, rows, rows, OPERAND, I64, I64, like, rows, like, rows),
        "_js_grad": (I64, like, rows, rows, OPERAND, I64, I64, like, rows, like, rows),
        "_total": (I64, like, I64, *factors, I64, I64),
        "_row_totals": (I64, like, I64, OPERAND, I64, I64, I64, I64, I64),
        "_scale": (I64, like, I64, *factors),
        "_slopes": (I64, OPERAND, *factors, OPERAND, I64),
        "_negate": (I64, like, I64),
        "_add_tokens": (I64, like, I64, I64, *labels, I64),
    }


def kernels_of(*modules):
    return {k: v for module in modules for k, v in vars(module).items() if isinstance(v, _launch.Kernel)}


KERNELS = kernels_of(softmax, sigmoid, totals, divergence)


class Case(NamedTuple):
    name: str
    dtype: str
    layout: str
    function: object
    signature: tuple
    bounds: tuple  # launch bounds


def cases(dtype, names=KERNELS, layouts=("close",)):
    """A Case for each kernel of these that takes logits, or results, of this dtype."""
    result = []
    for layout in layouts:
        for name, signature in signatures(LIKE[dtype], LAYOUTS[layout]).items():
            is_result = name in kernels_of(totals)  # float32 or float64
            one_form = CLOSE_ROWS not in signatures(LIKE[dtype], CLOSE_ROWS)[name]
            if name not in names or is_result and SIZE[dtype] == 2 or one_form and layout == "strided":
                continue
            bounds = KERNELS[name].of(SimpleNamespace(itemsize=SIZE[dtype])).targetoptions["launch_bounds"]
            result.append(Case(name, dtype, layout, KERNELS[name].py_func, signature, bounds))
    return result


# -- the compilers -----------------------------------------------------------------------------------------------


@cache
def nvvm_modules(case):
    """What Numba gives to NVVM, (modules, options): only `arch` depends on the architecture."""
    given = []

    def keep(modules, **options):
        given.append((list(modules), options))
        return b""

    device = mock.Mock(return_value=SimpleNamespace(compute_capability=(9, 0)))  # which device functions ask for
    with mock.patch("numba.cuda.dispatcher.get_current_device", device), mock.patch.object(nvvm, "compile_ir", keep):
        options = {"device": False, "abi": "numba", "cc": (9, 0), "launch_bounds": case.bounds}
        _launch.cuda.compile(case.function, case.signature, **options)
    return given[0]


@cache
def ptx_of(case, arch, **more):
    """PTX; `more` are options of NVVM."""
    modules, options = nvvm_modules(case)
    options = options | {"arch": arch.replace("sm_", "compute_")} | more
    return nvvm.compile_ir(modules, **options).decode().strip("\0\n ")


@cache
def assemble(ptx):
    """(machine code, what ptxas says of it)."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        arch = re.search(r"\.target (sm_\w+)", ptx)[1]
        run = subprocess.run([PTXAS, "-v", "-arch", arch, source, "-o", cubin], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return cubin.read_bytes(), run.stderr


def assemble_all(wanted, arch):
    """{case: result of assemble}; ptxas, a process of its own, works while NVVM, in this one, writes the next PTX."""
    with ThreadPoolExecutor() as pool:
        futures = {case: pool.submit(assemble, ptx_of(case, arch)) for case in wanted}
    return {case: future.result() for case, future in futures.items()}


def basic_blocks(cubin):
    """Opcodes, in lists that end at a jump or before a label."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        run = subprocess.run([NVDISASM, "-c", path], capture_output=True, text=True, check=True)
    blocks = [[]]
    for line in run.stdout.replace("CALL.REL.NOINC `(.L_", "BRA `(.L_").splitlines():  # how sm_80 leaves a loop
        opcode = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if opcode and opcode[1] != "NOP":
            blocks[-1].append(opcode[1])
        if re.match(r"\s*\.L_\w+:", line) or (opcode and opcode[1].startswith(("BRA", "EXIT", "RET"))):
            blocks.append([])
    return blocks


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


COMPILED = {("sm_90", dtype): KERNELS for dtype in LIKE}  # what there is time for, in two dtypes strided too
for sm in ("sm_80", "sm_100"):
    COMPILED |= {(sm, "bfloat16"): KERNELS, (sm, "float32"): (*FORWARD, *kernels_of(totals)), (sm, "float16"): FORWARD}


KNOWN_STACK = {("_divergence", "float64"): 16, ("_js_grad", "float64"): 16}  # bytes; js_term keeps 30 constants


@pytest.mark.parametrize("arch, dtype", COMPILED)
def test_no_local_memory(arch, dtype):
    """No stack, hence no LDL and no STL."""
    both = arch == "sm_90" and dtype in ("bfloat16", "float64")
    wanted = cases(dtype, COMPILED[arch, dtype], ("close", "strided") if both else ("close",))
    wrong = {}
    for case, (_, log) in assemble_all(wanted, arch).items():
        stack = KNOWN_STACK.get((case.name, case.dtype), 0)
        if f" {stack} bytes stack frame, {stack} bytes spill stores, {stack} bytes spill loads" not in log:
            wrong[case.name, case.layout] = log
    assert wrong == {}
    assert [case.name for case in wanted if not arguments_fit(case, ptx_of(case, arch))] == []


CLASSES = 32  # of a thread in a round of the inner loop
LIMITS = {  # instructions a class: 3 % above what they are
    "sm_80": {"float16": 13.8, "bfloat16": 13.8, "float32": 12.9},
    "sm_90": {"float16": 13.5, "bfloat16": 13.5, "float32": 12.6},
    "sm_100": {"float16": 13.5, "bfloat16": 13.5, "float32": 12.6},
}
SLOW = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|.*\bF64|MUFU|LDL|STL|CALL")  # float64, approximations, local memory


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("dtype", LIMITS["sm_90"])
@pytest.mark.parametrize("arch", LIMITS)
def test_the_inner_loop(arch, dtype, name):
    """Its body is one block: loads of 16 bytes, eight FFMA a class, nothing SLOW."""
    (case,) = cases(dtype, (name,))
    blocks = basic_blocks(assemble(ptx_of(case, arch))[0])
    (body,) = [block for block in blocks if block.count("FFMA") >= 8 * CLASSES and "LDG.E.128" in block]
    print(f"{name} {dtype} {arch}: {len(body) / CLASSES:.2f} instructions a class")
    assert body.count("FFMA") == 8 * CLASSES
    assert [op for op in body if op.startswith("LD")] == ["LDG.E.128"] * (CLASSES * SIZE[dtype] // 16)
    assert [op for op in body if SLOW.match(op)] == []
    assert any(SLOW.match(op) for block in blocks for op in block)  # elsewhere there are some
    assert len(body) / CLASSES <= LIMITS[arch][dtype]


@pytest.mark.parametrize("dtype", LIMITS["sm_90"])
@pytest.mark.parametrize("arch", LIMITS)
def test_the_only_round(arch, dtype):
    """Rows of one round: all loads of a thread before the first is used, 11 instructions a class from there on."""
    (case,) = cases(dtype, ("_short_sparse_xent",))
    blocks = basic_blocks(assemble(ptx_of(case, arch))[0])
    loads = CLASSES * SIZE[dtype] // 16
    assert max(block.count("LDG.E.128") for block in blocks) == loads
    near, far = sorted((block for block in blocks if block.count("FFMA") >= 8 * CLASSES), key=len)  # far: subtracts
    print(f"_short_sparse_xent {dtype} {arch}: {len(near) / CLASSES:.2f} instructions a class")
    assert [op for op in near + far if SLOW.match(op)] == []
    assert len(near) / CLASSES <= 11.5
    assert len(far) - len(near) >= CLASSES - 2


FUSED = re.compile(r"\bfma\.rn\.f(?:32|64)\b")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_no_product_and_sum_are_contracted(dtype):
    """Each is rounded, as on the CPU: fma=0 forbids it to NVVM, and to ptxas in the PTX, and makes no difference."""
    more = {}
    for case in cases(dtype):
        default, rounded = ptx_of(case, "sm_90"), ptx_of(case, "sm_90", fma=0)
        more[case.name] = len(FUSED.findall(default)) - len(FUSED.findall(rounded))
        if case.name in (*FORWARD, "_normalize", "_binary_xent", "_total"):  # not all, to save time
            assert assemble(default)[0] == assemble(rounded)[0], case.name
    assert {name: n for name, n in more.items() if n != 0} == {}


def test_a_contraction_would_be_seen():
    def multiply_add(a, b, c, out):
        _memory.store(out, a * b + c)

    f32 = types.float32
    case = Case("multiply_add", "float32", "close", multiply_add, (f32, f32, f32, I64), (32, 1))
    default, rounded = ptx_of(case, "sm_90"), ptx_of(case, "sm_90", fma=0)
    assert [len(FUSED.findall(ptx)) for ptx in (default, rounded)] == [1, 0]
    left_to_ptxas = rounded.replace("mul.rn", "mul").replace("add.rn", "add")
    codes = [basic_blocks(assemble(ptx)[0]) for ptx in (rounded, left_to_ptxas)]
    assert [sum(block.count("FFMA") for block in blocks) for blocks in codes] == [0, 1]
