"""SHA-256 of results for fixed inputs: the same on every processor and backend.

    python tests/test_hashes.py --write     takes the hashes anew (only when the definition changes)
    python tests/test_hashes.py FUNCTION…   prints those of some functions as JSON

Inputs come from the raw output of PCG64 by integer arithmetic and exact conversions, so they are the same everywhere.
"""

import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import ml_dtypes
import numba
import numpy as np
import pytest

import numbaloss as nl
from numbaloss import cross_entropy, js_divergence, kl_divergence, weighted_cross_entropy_with_logits

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = pathlib.Path(__file__).with_name("hashes.json")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
CLASSES = [3, 10, 100, 1000, 8193, 50257]
FEW_CLASSES = [10, 1000, 8193]  # of functions whose rows of seven chunks would show nothing more
DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 50}


def integers(seed, n, below):
    return (np.random.PCG64(seed).random_raw(n) % np.uint64(below)).astype(np.int64)


def logits_for(name, classes):
    """Multiples of a power of two between -16 and 16, and -inf here and there. In most rows the target leads, by little
    or much: its loss is small, and shows every bit of the sum over the others. One row is very wrong."""
    rows, digits = (9 if classes < 8000 else 5), DIGITS[name]
    whole = integers(classes, rows * classes, 2**digits).reshape(rows, classes) - 2 ** (digits - 1)
    x = np.ldexp(whole.astype(np.float64), 5 - digits).astype(DTYPES[name])
    labels = integers(classes + 1, rows, classes)
    x[range(rows), labels] = [30, 20, -1000, 24, 80, 0, 17, 40, 22][:rows]
    x[1, 1 : classes // 2] = -np.inf
    x[1, labels[1]] = 20
    return x, labels


def functions():
    """f(logits, labels) by name."""

    def soft(x):  # multiples of 1/8, 0 among them
        return (integers(5, x.size, 8).reshape(x.shape) / 8).astype(np.float32)

    def weights(y):
        return integers(6, y.size, 5) / 4

    def sequence(x, y):
        return nl.sequence_loss(x[None], y[None], weights(y)[None])

    def evaluation(x, y):
        return np.array(nl.Evaluation().update(x, y, weights(y)).result()[1:])

    def words(value, *arrays):
        return value, *(a.view(f"u{a.itemsize}") for a in arrays)

    def gradient(x, y):
        return words(*nl.value_and_grad(cross_entropy)(x, y, weights=weights(y)))

    def finite(x):
        return np.maximum(x, x.dtype.type(-8))

    def options(x, y):
        numbers = {"label_smoothing": 0.125, "z_loss": 2**-7, "softcap": 20.0, "temperature": 0.75}
        classes = integers(7, x.shape[1], 4) / 4 + 0.25
        return words(*nl.value_and_grad(cross_entropy)(finite(x), y, class_weights=classes, **numbers))

    def hessian(x, y):
        return words(*nl.value_grad_hess(cross_entropy)(finite(x), y, label_smoothing=0.125))

    def divergence(function):
        def call(x, y):
            run = nl.value_and_grad(function, ("logits_p", "logits_q"))
            value, grads = run(x, (x * x.dtype.type(0.75)).astype(x.dtype), reduction="none")
            return words(value, *grads)

        return call

    def sigmoid(x, y):
        run = nl.value_and_grad(weighted_cross_entropy_with_logits, ("logits", "labels", "pos_weight"))
        labels = soft(x).astype(np.float64 if x.dtype == np.float64 else np.float32)
        value, grads = run(labels, finite(x), 3.0)
        return *words(value, grads[0]), *grads[1:]

    return {
        "cross_entropy": lambda x, y: nl.cross_entropy(x, y, reduction="none"),
        "cross_entropy mean": lambda x, y: nl.cross_entropy(x, y, weights=weights(y)),
        "sparse_softmax_cross_entropy_with_logits": lambda x, y: nl.sparse_softmax_cross_entropy_with_logits(y, x),
        "softmax_cross_entropy_with_logits": lambda x, y: nl.softmax_cross_entropy_with_logits(soft(x), x),
        "sequence_loss": sequence,
        "token_logprobs": nl.token_logprobs,
        "score_tokens": lambda x, y: nl.score_tokens(x, y, rank=True, entropy=True),
        "softmax": lambda x, y: nl.softmax(x),
        "log_softmax": lambda x, y: nl.log_softmax(x),
        "logsumexp": lambda x, y: nl.logsumexp(x),
        "sigmoid_cross_entropy_with_logits": lambda x, y: nl.sigmoid_cross_entropy_with_logits(soft(x), x),
        "weighted_cross_entropy_with_logits": lambda x, y: nl.weighted_cross_entropy_with_logits(soft(x), x, 3.0),
        "Evaluation": evaluation,
        "value_and_grad": gradient,
        "value_and_grad with options": options,
        "value_grad_hess": hessian,
        "kl_divergence": divergence(kl_divergence),
        "js_divergence": divergence(js_divergence),
        "value_and_grad of sigmoids": sigmoid,
    }


FEW = [name for name in functions() if name.startswith(("value_and_grad ", "value_grad_hess")) or "divergence" in name]


def sha256(result):
    digest = hashlib.sha256()
    for a in result if isinstance(result, tuple) else (result,):
        a = np.asarray(a)
        assert not np.issubdtype(a.dtype, np.floating) or not np.isnan(a).any()  # a NaN has many bit patterns
        digest.update(f"{a.dtype.name}{a.shape}".encode())
        digest.update(np.ascontiguousarray(a.astype(a.dtype.newbyteorder("<"))).tobytes())
    return digest.hexdigest()


def hashes(names, wanted=None):
    """{what: hash}; `wanted` keeps to some of them."""
    calls = functions()
    cases = {
        f"{name} {dtype} {classes}": (name, dtype, classes)
        for name in names
        for dtype in DTYPES
        for classes in (FEW_CLASSES if name in FEW else CLASSES)
    }
    return {
        key: sha256(calls[name](*logits_for(dtype, classes)))
        for key, (name, dtype, classes) in cases.items()
        if wanted is None or key in wanted
    }


def inputs_hash():
    digest = hashlib.sha256()
    for dtype in DTYPES:
        for classes in CLASSES:
            for a in logits_for(dtype, classes):
                digest.update(a.astype(a.dtype.newbyteorder("<") if dtype != "bfloat16" else a.dtype).tobytes())
    return digest.hexdigest()


def kept(names):
    every = json.loads(FILE.read_text())["hashes"]
    return {key: value for key, value in every.items() if key.rsplit(" ", 2)[0] in names}


@pytest.mark.parametrize("name", functions())
def test_hashes(name):
    assert hashes([name]) == kept([name])


def test_every_hash_is_tested():
    assert json.loads(FILE.read_text())["hashes"] == kept(functions())


def test_inputs():
    """Were they to differ, so would everything: a hash of their own."""
    assert inputs_hash() == json.loads(FILE.read_text())["inputs"]


# One function of each family of kernels, few dtypes: compiling for another processor is what takes the time.
SUBSET = ["log_softmax", "weighted_cross_entropy_with_logits", "value_and_grad"]
PROCESSORS = {
    "no vectors to speak of": ("generic", "", ["float16"]),
    "AVX2 without AVX-512": ("haswell", "+avx2,+fma,+f16c,+bmi2", ["bfloat16", "float64"]),
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_other_processors(processor):
    """SSE2 has no fused multiply-add: there it is a call, and the bits are the same."""
    name, features, dtypes = PROCESSORS[processor]
    with tempfile.TemporaryDirectory() as cache:
        chosen = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": cache}
        package = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, **chosen, "PYTHONPATH": package}
        wanted = [key for key in kept(SUBSET) if key.split(" ")[-2] in dtypes]
        command = [sys.executable, __file__, *wanted]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {key: kept(SUBSET)[key] for key in wanted}


def main(arguments):
    if arguments == ["--write"]:
        text = {"inputs": inputs_hash(), "hashes": hashes(list(functions()))}
        FILE.write_text(json.dumps(text, indent=0) + "\n")
    else:
        numba.set_num_threads(1)
        print(json.dumps(hashes(functions(), arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
