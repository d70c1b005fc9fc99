"""Random calls: any function, dtype, layout, labels, options and special values, by both backends; without a GPU by
the kernels' sources, with a look for races, and by what they are compiled to.

RANDOM_CALLS=5000 python -m pytest tests/test_cuda_random.py    # more than the few of an ordinary run
"""

import os

import numpy as np
import pytest
from common import DTYPES, assert_same_bits

pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host

if not host.ON_DEVICE:
    pytest.importorskip("greenlet", reason="greenlet is not installed")

import numbaloss as nl

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy tells of infinities
]

CALLS = int(os.environ.get("RANDOM_CALLS", 40))
AT_A_TIME = 20
INF, NAN = np.inf, np.nan


def logits(rng, shape, dtype):
    """In any layout, of any size, with special values here and there."""
    rows, classes = shape
    layout = rng.choice(["C", "F", "part", "steps", "back", "one row"])
    wide = {"part": (rows, classes + 3), "steps": (rows, 2 * classes), "one row": (1, classes)}.get(layout, shape)
    x = rng.standard_normal(wide) * rng.choice([1e-3, 1, 10, 100, 1e4])
    if rng.random() < 0.3:
        x = np.round(x)  # equal ones
    for value in (-INF, INF, NAN, 0.0, -0.0, 3e38):
        if rng.random() < 0.15:
            x[rng.random(wide) < rng.choice([0.01, 0.3, 1.0])] = value
    x = x.astype(DTYPES[dtype])
    return {
        "C": lambda: x,
        "F": lambda: np.asfortranarray(x),
        "part": lambda: x[:, 2:-1],
        "steps": lambda: x[:, ::2],
        "back": lambda: x[::-1],
        "one row": lambda: np.broadcast_to(x, shape),
    }[layout]()


def labels(rng, shape):
    """Integers of any dtype, some of which are none of the classes or are ignored."""
    rows, classes = shape
    y = rng.integers(0, classes, rows)
    for value in (-1, -100, 0, classes, 2**31, -(2**63), 2**32 + 1):
        if rng.random() < 0.2:
            y[rng.random(rows) < 0.3] = value
    if rng.random() < 0.3:
        fits = np.clip(y, -128, 127)
        return fits.astype(rng.choice(["int8", "int16", "int32", "uint8", "uint64"]))
    return y


def weights(rng, count):
    w = rng.integers(0, 4, count) / 2
    if rng.random() < 0.3:
        w = rng.standard_normal(count) * rng.choice([1e-30, 1, 1e30])
    return w.astype(rng.choice(["float32", "float64", "float16", "int32", "bool"]))


def soft(rng, shape):
    p = rng.random(shape) * (rng.random(shape) < 0.5)
    return p.astype(rng.choice(["float32", "float64", "float16"]))


def options(rng, shape, *names):
    """Some of the options of cross_entropy."""
    rows, classes = shape
    every = {
        "weights": lambda: weights(rng, rows),
        "class_weights": lambda: weights(rng, classes).astype(np.float32),
        "ignore_index": lambda: int(rng.choice([-100, 0, -1])),
        "label_smoothing": lambda: float(rng.choice([0.1, 1.0])),
        "z_loss": lambda: 1e-3,
        "softcap": lambda: 30.0,
        "temperature": lambda: 0.7,
        "reduction": lambda: str(rng.choice(["mean", "sum", "none"])),
        "gamma": lambda: float(rng.choice([0, 0.5, 2])),
    }
    return {name: every[name]() for name in names if rng.random() < 0.5}


CROSS_ENTROPY = ("weights", "class_weights", "ignore_index", "label_smoothing", "z_loss", "softcap", "temperature")
SIGMOID = ("sigmoid_cross_entropy_with_logits", "weighted_cross_entropy_with_logits")
KINDS = {  # name: (arguments, options) from (rng, shape, logits), a function of the package or what makes one
    "cross_entropy": lambda rng, s, x: ((x, labels(rng, s)), options(rng, s, *CROSS_ENTROPY, "reduction")),
    "cross_entropy soft": lambda rng, s, x: (
        (x, soft(rng, s)),
        options(rng, s, *(name for name in CROSS_ENTROPY if name != "ignore_index"), "reduction"),
    ),
    "focal_loss": lambda rng, s, x: (
        (x, labels(rng, s)),
        options(rng, s, "weights", "class_weights", "ignore_index", "gamma", "reduction"),
    ),
    "softmax_cross_entropy_with_logits": lambda rng, s, x: ((soft(rng, s), x), {}),
    "sparse_softmax_cross_entropy_with_logits": lambda rng, s, x: ((labels(rng, s), x), {}),
    "score_tokens": lambda rng, s, x: (
        (x, labels(rng, s)),
        {"rank": rng.random() < 0.5, "entropy": rng.random() < 0.5},
    ),
    "token_logprobs": lambda rng, s, x: ((x, labels(rng, s)), {}),
    "logsumexp": lambda rng, s, x: ((x,), {}),
    "softmax": lambda rng, s, x: ((x,), {}),
    "log_softmax": lambda rng, s, x: ((x,), {}),
    "kl_divergence": lambda rng, s, x: ((x, logits(rng, s, x.dtype.name)), options(rng, s, "weights", "reduction")),
    "js_divergence": lambda rng, s, x: ((x, logits(rng, s, x.dtype.name)), options(rng, s, "weights", "reduction")),
    "sequence_loss": lambda rng, s, x: (
        (x[None], np.clip(labels(rng, s).astype(np.int64), 0, s[1] - 1)[None], weights(rng, s[0])[None]),
        {},
    ),
    SIGMOID[0]: lambda rng, s, x: ((soft(rng, s), x), {}),
    SIGMOID[1]: lambda rng, s, x: ((soft(rng, s), x, weights(rng, s[1])), {}),
}
OFTEN = ["cross_entropy"] * 4 + ["cross_entropy soft", "score_tokens", "focal_loss"]
GRADIENTS = {"kl_divergence": "logits_q", "js_divergence": "logits_p"}
NO_GRADIENT = ("score_tokens", "token_logprobs", "logsumexp", "softmax", "log_softmax")
CHECKED = ("cross_entropy", "focal_loss", "sparse_softmax_cross_entropy_with_logits", "score_tokens", "token_logprobs")


def random_call(rng):
    """(what it is, function, arguments, options)"""
    kind = str(rng.choice([*KINDS, *OFTEN]))
    most = 12 if rng.random() < 0.7 else 3
    low, high = [(1, 40), (100, 300), (900, 1100), (8185, 8200)][rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])]
    shape = int(rng.integers(0 if high < 100 else 1, most if high < 8000 else 3)), int(rng.integers(low, high))
    x = logits(rng, shape, str(rng.choice(list(DTYPES))))
    args, more = KINDS[kind](rng, shape, x)
    name = kind.split()[0]
    function = getattr(nl, name)
    if name in CHECKED and kind == name:
        more["check_labels"] = "nan"
    if name not in NO_GRADIENT and rng.random() < 0.4:
        function = nl.value_and_grad(function, GRADIENTS.get(name, "logits"))
    what = f"{kind} {x.dtype} {x.shape} {x.strides} {sorted(more)}"
    return what, function, args, more


def outcome(function, args, more):
    """Its results, or the kind of its error."""
    try:
        return host.results(function(*args, **more))
    except (TypeError, ValueError) as error:
        return type(error).__name__


def converted(x):
    return host.to_cupy(x) if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize("first", range(0, CALLS, AT_A_TIME))
def test_random_calls(first):
    for seed in range(first, min(first + AT_A_TIME, CALLS)):
        what, function, args, more = random_call(np.random.default_rng(seed))
        want = outcome(function, args, more)
        for how in ({"order": seed % 3 or None, "races": True}, {}):
            with host.on_host(**how):
                got = outcome(function, [converted(x) for x in args], {k: converted(v) for k, v in more.items()})
            if isinstance(want, str) or isinstance(got, str):
                assert got == want, f"call {seed}: {what} {how}"
            else:
                assert_same_bits(got, want, f"call {seed}: {what} {how}")
