"""The kernels as the CUDA compilers take them, and their PTX, without a GPU."""

import fcntl
import hashlib
import inspect
import os
import pickle
import zlib
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import ptx
from numba import types
from numba.cuda.cudadrv import nvvm

from numbaloss.cuda import _launch, _scores, _sums, dense, divergence, elements, sigmoid, softmax, totals

# -- the kernels -------------------------------------------------------------------------------------------------

I64, F64 = types.int64, types.float64
LIKE = {"float16": types.int16, "bfloat16": types.uint16, "float32": types.float32, "float64": types.float64}
SIZE = {dtype: like.bitwidth // 8 for dtype, like in LIKE.items()}
OPERAND, ROWS = types.UniTuple(I64, 5), types.UniTuple(I64, 6)
CLOSE_ROWS = types.Tuple((I64, I64, I64, I64, types.int32, I64))  # classes side by side: see with_known_stride
LAYOUTS = {"close": CLOSE_ROWS, "strided": ROWS}


def signatures(like, rows):
    """Argument types of each kernel; `rows` where the compiler may know the class stride."""
    labels = OPERAND, OPERAND, I64  # labels, weights, ignore_index
    soft = like if like == F64 else types.float32  # probabilities
    factors = OPERAND, OPERAND, I64, I64, I64  # labels, weights, class_weights, classes, ignore_index
    one, of_each = types.Tuple((I64,) * 5 + (F64, F64, I64)), types.Tuple((soft, *[I64] * 6, F64, F64))  # targets
    cap = types.UniTuple(F64 if like == F64 else types.float32, 3)
    dense_grad = I64, OPERAND, F64, I64, F64, I64, I64, I64, like, rows
    return {
        "_sparse_xent": (I64, I64, I64, I64, like, rows, *labels, I64),
        "_short_sparse_xent": (I64, I64, types.int32, like, rows, *labels, I64),
        "_chunk_sums": (I64, I64, I64, like, rows, *labels, I64),
        "_join_sums": (I64, I64, like, rows, *labels, I64),
        "_sparse_xent_grad": (I64, like, rows, *labels, I64, I64, like, rows),
        "_narrow_sparse_xent": (I64, I64, like, ROWS, *labels, I64),
        "_narrow_sparse_xent_grad": (I64, I64, like, ROWS, *labels, I64, I64, like, ROWS),
        "_narrow_normalize": (I64, I64, like, ROWS, I64, I64),
        "_narrow_score": (I64, I64, like, ROWS, *labels, I64, I64, I64, I64, I64),
        "_narrow_logsumexp": (I64, I64, like, ROWS, I64),
        "_stream_score": (I64, I64, I64, I64, like, rows, *labels, I64, I64, I64, I64),
        "_part_scores": (I64, I64, I64, like, rows, *labels, I64, I64),
        "_join_scores": (I64, I64, like, rows, *labels, I64, I64, I64, I64),
        "_part_sums": (I64, I64, I64, like, rows, *labels, I64),
        "_join_part_sums": (I64, I64, like, rows, *labels, I64, I64, I64),
        "_score": (I64, like, rows, *labels, I64, I64, I64, I64),
        "_entropy": (I64, like, rows, I64, I64, I64, I64),
        "_row_sums": (I64, like, rows, *labels, I64, I64, I64),
        "_stream_sums": (I64, I64, I64, I64, like, rows, *labels, I64, I64, I64),
        "_normalize": (I64, I64, like, rows, I64, I64, I64),
        "_dense_xent": (I64, like, rows, of_each, I64, OPERAND, F64, I64, I64),
        "_dense_xent of one": (I64, like, rows, one, I64, OPERAND, F64, I64, I64),
        "_dense_xent_grad": (I64, like, rows, of_each, *dense_grad),
        "_dense_xent_grad of one": (I64, like, rows, one, *dense_grad),
        "_label_slopes": (I64, like, I64, I64, I64, OPERAND, F64, I64),
        "_cap": (I64, like, ROWS, cap, I64),
        "_uncap": (I64, I64, like, ROWS, cap, like, ROWS),
        "_take_rows": (like, ROWS, I64, OPERAND, I64),
        "_put_rows": (I64, OPERAND, like, ROWS, I64),
        "_binary_xent": (I64, like, ROWS, soft, ROWS, soft, ROWS, I64),
        "_binary_grad": (I64, like, ROWS, soft, ROWS, soft, ROWS, soft, ROWS, I64, like, ROWS, I64, I64, I64),
        "_divergence": (I64, like, rows, rows, OPERAND, I64, I64, I64, I64),
        "_kl_grad": (I64, like, rows, rows, OPERAND, I64, I64, I64, like, rows, like, rows),
        "_js_grad": (I64, like, rows, rows, OPERAND, I64, I64, I64, like, rows, like, rows),
        "_total": (I64, like, I64, *factors, I64, I64),
        "_row_totals": (I64, like, I64, OPERAND, I64, I64, I64, I64, I64, I64),
        "_scale": (I64, like, I64, *factors),
        "_slopes": (I64, OPERAND, *factors, OPERAND, I64),
        "_weight_slopes": (I64, like, like, I64, OPERAND, OPERAND, OPERAND, *factors[:4], I64, I64, I64),
        "_focal": (I64, like, I64, F64),
        "_focal_slopes": (I64, like, I64, F64, I64),
        "_negate": (I64, like, I64),
        "_add_tokens": (I64, like, I64, I64, *labels, I64),
    }


def kernels_of(*modules):
    return {k: v for module in modules for k, v in vars(module).items() if isinstance(v, _launch.Kernel)}


KERNELS = kernels_of(softmax, _scores, _sums, dense, divergence, elements, sigmoid, totals)
KERNELS |= {f"{name} of one": KERNELS[name] for name in ("_dense_xent", "_dense_xent_grad")}
OF_RESULTS = {*kernels_of(totals), "_label_slopes"}  # float32 or float64


class Case(NamedTuple):
    name: str
    dtype: str
    layout: str
    function: object
    signature: tuple
    bounds: tuple  # launch bounds, on sm_90


MULTIPROCESSOR = {"sm_80": (164 << 10, 32), "sm_90": (228 << 10, 32), "sm_100": (228 << 10, 32)}


def bounded(name, dtype):
    return KERNELS[name].of(SimpleNamespace(itemsize=SIZE[dtype]))


def blocks_on(arch, name, dtype):
    """Of a multiprocessor."""
    with mock.patch.object(_launch, "_multiprocessor", MULTIPROCESSOR.get):
        return bounded(name, dtype).blocks(arch)


def cases(dtype, names=KERNELS, layouts=("close",)):
    """A Case for each kernel of these that takes logits, or results, of this dtype."""
    result = []
    for layout in layouts:
        for name, signature in signatures(LIKE[dtype], LAYOUTS[layout]).items():
            is_result = name in OF_RESULTS
            one_form = CLOSE_ROWS not in signatures(LIKE[dtype], CLOSE_ROWS)[name]
            if name not in names or is_result and SIZE[dtype] == 2 or one_form and layout == "strided":
                continue
            bounds = bounded(name, dtype).threads, blocks_on("sm_90", name, dtype)
            result.append(Case(name, dtype, layout, KERNELS[name].py_func, signature, bounds))
    return result


# -- the compilers -----------------------------------------------------------------------------------------------


def on_disk(function):
    """Decorator: what a run has compiled, the next one and the other processes find, as long as no source changes."""
    sources = {__file__, inspect.getsourcefile(function)}
    stamp = hashlib.sha256(b"".join(Path(path).read_bytes() for path in sorted(sources))).hexdigest()[:16]

    @cache
    @wraps(function)
    def find(*args, **more):
        name = hashlib.sha256(repr((function.__name__, args, more)).encode()).hexdigest()[:16]
        path = Path(os.environ["NUMBA_CACHE_DIR"], f"sass-{stamp}-{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may be at it
            file.seek(0)
            try:
                return pickle.loads(zlib.decompress(file.read()))
            except zlib.error:  # new, or a process was killed
                result = function(*args, **more)
                file.truncate(0)
                file.write(zlib.compress(pickle.dumps(result), 1))
                return result

    return find


@cache
def nvvm_modules(*cases):
    """What Numba gives to NVVM, (modules, options): only `arch` depends on the architecture. Names in it have numbers
    that are other ones each time."""
    given = []

    def keep(modules, **options):
        given.append((modules, options))
        return b""

    device = mock.Mock(return_value=SimpleNamespace(compute_capability=(9, 0)))  # which device functions ask for
    with mock.patch("numba.cuda.dispatcher.get_current_device", device), mock.patch.object(nvvm, "compile_ir", keep):
        for case in cases:
            options = {"device": False, "abi": "numba", "cc": (9, 0), "launch_bounds": case.bounds}
            _launch.cuda.compile(case.function, case.signature, **options)
    return list(dict.fromkeys(module for modules, _ in given for module in modules)), given[0][1]


def ptx_by(modules, options, arch, **more):
    """PTX; `more` are options of NVVM."""
    options = options | {"arch": arch.replace("sm_", "compute_")} | more
    return nvvm.compile_ir(modules, **options).decode().strip("\0\n ")


def ptx_of(case, arch, **more):
    return ptx_by(*nvvm_modules(case), arch, **more)


def entries(ptx):
    """{entry: its part of a PTX}."""
    parts = ptx.split(".visible .entry ")[1:]
    return {part.partition("(")[0]: part for part in parts}


@on_disk
def modules_of(dtype, layout):
    return nvvm_modules(*cases(dtype, layouts=(layout,)))


@on_disk
def whole_ptx(dtype, arch, layout, **more):
    return ptx_by(*modules_of(dtype, layout), arch, **more)


@cache
def numbers():
    """{(function, Numba types): (dtype, number of its PTX among whole_ptx)}"""
    return {(case.function, case.signature): (dtype, i) for dtype in LIKE for i, case in enumerate(cases(dtype))}


@cache
def whole(dtype, arch):
    """(PTX of all kernels for this dtype, their entries)"""
    text = whole_ptx(dtype, arch, "close")
    return text, list(entries(text))


@cache
def program(function, signature, arch="sm_90"):
    """The ptx.Program of a kernel for these Numba types; None if it is none of `cases`."""
    if (function, signature) not in numbers():
        return None
    dtype, i = numbers()[function, signature]
    text, names = whole(dtype, arch)
    return ptx.Program(text, names[i])
