"""Races, looked for without a GPU: in every kernel, and in every kernel without one of its barriers.

compute-sanitizer's racecheck looks for those in shared memory on a device (`few_calls` in test_cuda_device.py).
"""

import contextlib
import pathlib
import re
from unittest import mock

import numpy as np
import pytest
from common import assert_same_bits

pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("greenlet", reason="greenlet is not installed")

import cuda_on_host as host
import simt
from test_cuda_device import FUNCTIONS, NAN, inputs

import numbaloss as nl
from numbaloss.cuda import _launch

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(host.ON_DEVICE, reason="a GPU")]

EVALUATION, UNDEFINED = "Evaluation", "logsumexp of NaN"
CROSS_ENTROPY, KL = nl.value_and_grad(nl.cross_entropy), nl.value_and_grad(nl.kl_divergence, "logits_p")
IN_PLACE = {  # gradients that overwrite the logits, each in the same memory
    "in place": lambda x, y, w, c, z: CROSS_ENTROPY(x, y, out=x, **NAN),
    "in place, smoothed": lambda x, y, w, c, z: CROSS_ENTROPY(x, y, out=x, label_smoothing=0.1, **NAN),
    "in place, soft": lambda x, y, w, c, z: CROSS_ENTROPY(x, z, out=x),
    "in place, KL": lambda x, y, w, c, z: KL(x[: len(x) // 2], x[-(len(x) // 2) :], out=x[: len(x) // 2]),
}
OWN = IN_PLACE | {
    EVALUATION: lambda x, y, w, c, z: tuple(nl.Evaluation().update(x, y, w).result()[:4]),
    UNDEFINED: lambda x, y, w, c, z: nl.logsumexp(x),
}
NAMES = ["none", "mean", "score_tokens", "logsumexp", "softmax", "dense", "gradient none", "options", "kl", "js"]
NAMES += ["sequence_loss by step"]
STREAMS = ("none", "score_tokens", "logsumexp")
IN_TURNS = 21, 16_393  # rows of which a warp takes some and then others, on what `multiprocessors` leaves
MANY_PARTS = 66 * 8192  # more chunks than are joined at a time
SHAPES = [(40, 10), (5, 1000), (5, 1025), (3, 8200), (2, 20_000), (3, 33_000)]
CASES = [(name, *IN_TURNS, "bfloat16") for name in STREAMS]
CASES += [("none", 150, 1000, "bfloat16"), ("mean", 5000, 3, "float32"), (EVALUATION, 5000, 3, "float32")]
CASES += [(name, 3, 8200, "float64") for name in (*STREAMS, UNDEFINED, "gradient none")]
CASES += [(name, *shape, "bfloat16") for shape in SHAPES for name in NAMES]
CASES += [(name, *shape, "float32") for shape in SHAPES[:3] for name in NAMES]
CASES += [(name, *shape, dtype) for shape in SHAPES[:4] for name in IN_PLACE for dtype in ("bfloat16", "float32")]
CASES += [(name, 1, MANY_PARTS, "bfloat16") for name in (*STREAMS, "dense")]


def call(name, *arrays):
    return (OWN.get(name) or FUNCTIONS[name])(*arrays)


@contextlib.contextmanager
def multiprocessors(*shape):
    """One, with room for one block, where there are to be few warps."""
    with contextlib.ExitStack() as patches:
        if shape == IN_TURNS:
            patches.enter_context(mock.patch.object(_launch, "_processors", lambda number: 1))
            patches.enter_context(mock.patch.object(_launch, "_multiprocessor", lambda number: (20 << 10, 32)))
        yield


def run(name, rows, classes, dtype, order=None):
    """The same bits as on NumPy, without a race."""
    arrays = inputs(rows, classes, dtype)
    if name == UNDEFINED:
        arrays[0][:, -9] = np.nan
    with host.on_host(order, races=True), multiprocessors(rows, classes):
        got = host.results(call(name, *map(host.to_cupy, arrays)))
    assert_same_bits(got, host.results(call(name, *arrays)), f"{name} {rows}x{classes} {dtype}")


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_no_races(name):
    """Of rows beyond two chunks only those in turns, of float32 few classes: `pytest -m mutants` has them all."""
    for case in CASES:
        if case[0] == name and (case[2] <= (10 if case[3] == "float32" else 8200) or case[1:3] == IN_TURNS):
            run(*case, order=1)


BARRIERS = [
    (str(path), number, line.strip())
    for path in sorted(pathlib.Path(_launch.__file__).parent.glob("*.py"))
    for number, line in enumerate(path.read_text().split("\n"), 1)
    if re.search(r"cuda\.sync\w+\(", line)
]


@pytest.mark.mutants
def test_no_barrier_can_go():
    """Without any of them there is a race, or in some order of the threads another result."""
    reached = {}  # by barrier: the cases that come to it
    for case in CASES:
        simt.REACHED.clear()
        run(*case)
        for place in simt.REACHED:
            reached.setdefault(place, []).append(case)
    spare = []
    for path, number, line in BARRIERS:
        cases = reached.get((path, number), ())[:12]
        with mock.patch.object(simt, "LEFT_OUT", {(path, number)}):
            if not any(fails(*case, order) for order in (None, 1, 2, 3) for case in cases):
                spare.append(f"{pathlib.Path(path).name}:{number}: {line}")
    assert not spare, spare


def fails(*case):
    try:
        run(*case)
    except (simt.SimError, AssertionError):
        return True
    return False
