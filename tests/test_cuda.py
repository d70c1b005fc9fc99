"""The CUDA backend through the public functions, on CuPy arrays: the bits of the NumPy backend.

Without a GPU the arrays lie in host memory and ptx.py runs what the kernels are compiled to, or simt.py their sources;
with one, everything here runs on it. CUDA_SOURCES=1 has simt.py run all of them. The first run compiles for minutes.
[n]: a line of docs/PITFALLS.md.
"""

import inspect
import json
import pathlib
import re
import types

import numpy as np
import pytest
import test_hashes
from common import BFLOAT16, DTYPES, LAYOUTS, assert_same_bits, make_labels, make_logits

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host  # noqa: E402

import numbaloss as nl  # noqa: E402
from numbaloss._check import FACTORS, FACTORS_ALONE, NO_LABEL, NONZERO_OR_NONE, NOTHING  # noqa: E402
from numbaloss.cpu import totals as cpu_totals  # noqa: E402
from numbaloss.cpu._launch import Kernel  # noqa: E402
from numbaloss.cuda import totals as cuda_totals  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy tells of infinities without a GPU
]

INF, NAN = np.inf, np.nan
ON_DEVICE = host.ON_DEVICE
if not ON_DEVICE:
    pytest.importorskip("greenlet", reason="greenlet is not installed")


@pytest.fixture(autouse=True)
def device():
    """CuPy arrays can be made and kernels run."""
    with host.on_host():
        yield


def on_cupy(function, *args, **options):
    """function on CuPy arrays in place of NumPy's, its results as NumPy arrays, NaN made one."""
    args = [host.to_cupy(a) if isinstance(a, np.ndarray) else a for a in args]
    options = {k: host.to_cupy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    return host.results(function(*args, **options))


def check(function, *args, **options):
    """function gives the same bits for NumPy and CuPy arrays."""
    expected = host.results(function(*args, **options))
    assert_same_bits(on_cupy(function, *args, **options), expected, getattr(function, "__name__", "result"))


def none(logits, targets, **options):
    return nl.cross_entropy(logits, targets, reduction="none", **{"check_labels": "nan", **options})


def scores(logits, targets):
    return nl.score_tokens(logits, targets, rank=True, entropy=True, check_labels="nan")


def check_all(logits, targets):
    """Every function of a row; a warp or more a row, which takes long without a GPU, for the first 16 only."""
    check(none, logits, targets)
    check(scores, logits, targets)
    for function in (nl.logsumexp, nl.softmax, nl.log_softmax):
        check(function, logits)
    logits, targets = logits[:16], targets[:16]
    labels = np.zeros(logits.shape, np.float32)
    np.put_along_axis(labels, np.clip(targets, 0, logits.shape[-1] - 1)[..., None], 0.75, -1)
    labels[..., ::3] += np.float32(0.25)
    check(nl.softmax_cross_entropy_with_logits, labels, logits)


def check_most(logits, targets):
    """check_all, but what takes long without a GPU for rows of many classes only for the first."""
    check(none, logits, targets)
    few = slice(None) if logits.shape[-1] < 200 else slice(0, 3)
    check_all(logits[few], targets[few])


# -- the same bits -------------------------------------------------------------------------------------------------


def telling(x, targets):
    """x with large logits at both ends and a target above all: its loss is small and shows every bit of the sum."""
    x = x.copy()
    top = x.astype(np.float32).max(axis=1)
    x[:, 0] = x[:, -1] = top
    x[np.arange(len(x)), targets] = top + 5
    return x


class Converted:
    """The package, taking NumPy arrays to CuPy's and back: for tests that were written for NumPy."""

    def __getattr__(self, name):
        if name == "Evaluation":
            return ConvertedEvaluation
        if name in ("value_and_grad", "value_grad_hess"):
            of = getattr(nl, name)
            return lambda *loss: lambda *args, **options: on_cupy(of(*loss), *args, **options)
        return lambda *args, **options: on_cupy(getattr(nl, name), *args, **options)


class ConvertedEvaluation(nl.Evaluation):
    def update(self, *args):
        return super().update(*(host.to_cupy(a) for a in args))


ELEMENTWISE = ("sigmoid_cross_entropy_with_logits", "weighted_cross_entropy_with_logits", "value_and_grad of sigmoids")
OF_SEVEN_CHUNKS = ("cross_entropy", "score_tokens", "softmax", "value_and_grad", "value_and_grad with options")


def takes_long(name, dtype, classes):
    """Of 50257 classes, seven chunks: all but one function of each way to take chunks, in one dtype of each precision.
    How others are loaded shows in rows of two chunks, which functions that know no chunks do without."""
    if name in ELEMENTWISE:
        return int(classes) > 1000
    return classes == "50257" and (name not in OF_SEVEN_CHUNKS or dtype in ("float16", "float32"))


@pytest.mark.parametrize("name", test_hashes.functions())
def test_hashes_on_cupy(name, monkeypatch):
    """Every hash that the CPU has; without a GPU, not those of large inputs that differ from others in time only."""
    monkeypatch.setattr(test_hashes, "nl", Converted())
    every = test_hashes.kept([name])
    wanted = every if ON_DEVICE else {key: every[key] for key in every if not takes_long(*key.rsplit(" ", 2))}
    assert len(wanted) >= (8 if name in ELEMENTWISE else 12)
    assert test_hashes.hashes([name], wanted) == wanted


@pytest.mark.parametrize("dtype, order", list(zip(DTYPES.values(), (1, 2, 3, 4))), ids=DTYPES)
def test_order_of_threads(dtype, order):
    """[16] Which thread comes first does not matter."""
    if ON_DEVICE:
        pytest.skip("a device has an order of its own")
    with host.on_host(order):
        for rows, classes in ((3, 5), (2, 130), (2, 8200)):
            check_all(make_logits(rows, classes, dtype), make_labels(rows, classes))
        if dtype in (BFLOAT16, np.float32):  # others differ in what a thread does alone
            check(none, make_logits(9, 8200, dtype), make_labels(9, 8200))
            check(nl.value_and_grad(nl.cross_entropy), make_logits(1, 24577, dtype), make_labels(1, 24577))
        x, y = make_logits(70, 3, dtype), make_labels(70, 3)
        check(nl.cross_entropy, x, y, weights=np.arange(70) % 9 / 8)
        evaluations = nl.Evaluation().update(x, y), ConvertedEvaluation().update(x, y)
        assert evaluations[0].to_json() == evaluations[1].to_json()


CLASSES = [1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2048]
CLASSES += [2049, 7680, 8191, 8192, 8193, 9216, 16384, 16385]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_classes(classes, dtype):
    """[14] Around a thread's load, a warp's, a lane, a chunk; the target at every edge of those."""
    edges = {0, 1, 7, 8, 255, 256, 511, 512, 1023, 1024, 8191, 8192, classes - 1}
    targets = np.array(sorted(t for t in edges if t < classes))
    check(none, telling(make_logits(len(targets), classes, dtype, seed=classes), targets), targets)
    if classes in (1, 3, 33, 129, 513, 1025, 8193):
        check_all(make_logits(3, classes, dtype, seed=classes), make_labels(3, classes))


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
def test_many_classes(dtype):
    """[14] More chunks than warps; more than are joined at once."""
    for rows, classes in ((1, 65537), (4, 65537), (1, 151_936), (4, 151_936)):
        check(none, make_logits(rows, classes, dtype), make_labels(rows, classes))
    grads = nl.value_and_grad(nl.cross_entropy)
    check(grads, make_logits(2, 74_001, dtype), make_labels(2, 74_001))  # some warps have two chunks
    rows = make_logits(4, 80_000, dtype)
    with pytest.MonkeyPatch.context() as patch:
        for module in host.modules():
            if hasattr(module, "PARTS"):
                patch.setattr(module, "PARTS", 8)
        for x in (rows, rows[:1]):
            check(none, x, make_labels(len(x), 80_000))
        check(scores, rows[:1], make_labels(1, 80_000))
        for classes in (65_000, 74_000):  # unaligned rows
            x = make_logits(3, classes + 1, dtype)[:, :-1]
            check(grads, x, make_labels(3, classes), reduction="none")


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_unaligned_rows(dtype, offset):
    """[12] Rows that begin at any item between two 16-byte boundaries; targets among the items that are read apart."""
    for classes in (9, 136, 1024 - offset, 1024, 8192, 8193, 8200):
        y = np.array([1, classes - 1, min(offset, classes - 1), classes // 2])
        store = make_logits(4, classes + offset, dtype, seed=offset)
        x = store[:, offset:]
        x[...] = telling(x, y)
        x[1, :offset] = -INF
        check(none, x, y)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [3, 300])
def test_losses_that_are_too_small(dtype, classes):
    """Minus 0 is 0 in a log-probability."""
    x = np.full((2, classes), -200, dtype)
    x[:, 1] = 0
    check(scores, x, np.array([1, 1]))
    check(nl.token_logprobs, x, np.array([1, 1]))


@pytest.mark.parametrize("classes", [300, 1100, 1101, 9001])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_in_a_stream(dtype, classes):
    """Rows that do not count between others, at the beginning and at the end, and rows whose exponents no guess by the
    row before fits: all are copied and summed one after the other."""
    x, y = make_logits(70, classes, dtype), make_labels(70, classes)
    x[7] += 60
    x[8] -= 60
    x[9, 5], x[11, 3], x[12, classes - 1] = NAN, INF, INF
    x[10], x[13, classes // 2 :], x[14, ::2] = -INF, -INF, -INF
    for k in (0, 1, 20, 21, 22, 23, 24, 25, 39, 69):
        y[k] = -100
    y[30] = classes
    check(none, x[:40], y[:40])
    if classes < 8192:
        check(none, x, y)
    check(none, x[:5, 1:], np.array([-100, -100, 3, -100, 1]))


@pytest.mark.parametrize("classes, begin", [(1100, 0), (1101, 1), (9001, 3)])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
def test_scores_in_a_stream(dtype, classes, begin):
    """Largest logits and ranks beside sums: equal ones in one round, two, two chunks, and at the target, before it or
    behind; NaN and infinities there and elsewhere; a target far below the others; logits far from 0."""
    x, y = make_logits(60, classes + begin, dtype)[:, begin:], make_labels(60, classes)
    last, middle = classes - 1, classes // 2
    for k, at in enumerate(([5, 6], [5, 700], [700, last], [5, last], [middle, last], [0, middle])):
        x[4 * k : 4 * k + 4, at] = 30
        y[4 * k : 4 * k + 3] = at[0], at[1], (at[0] + at[1]) // 2
    for k, value in enumerate((NAN, INF, -INF)):
        rows = slice(24 + 6 * k, 30 + 6 * k)
        x[rows, middle], y[rows] = value, [middle, 3, last, middle, middle, middle]
        x[24 + 6 * k + 3, 9], x[24 + 6 * k + 4, last] = value, value
        x[24 + 6 * k + 5, 7] = -value
    x[42], x[43], x[44], x[45, :last] = -INF, 2, -0.0, -INF
    x[46, 8:], x[47, y[47]], x[48, y[48]], x[49] = -INF, -120, -300, x[49] * 8 + 200
    x[50, ::2], x[50, 1::2] = 0, -0.0
    x[51], x[52] = x[51] - 300, x[52] * 200
    y[53], y[54], y[55] = -100, classes, -3
    x[56], x[56, y[56]] = -200, 0
    with host.on_host(launches=(launches := [])):
        check(scores, x, y)
        check(nl.logsumexp, x)
    wanted = {"_stream_score", "_stream_sums" if classes > 8192 else "_row_sums"}
    assert host.ON_DEVICE or wanted <= {name for name, *_ in launches}
    check(lambda x, y: nl.score_tokens(x, y, check_labels="nan"), x[20:], y[20:])


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
def test_scores_of_few_rows(dtype):
    """Chunks of a row in warps of their own: the largest logit in two of them, or the target, or among those larger;
    a target far below the others; rows without a softmax, or that do not count; more chunks than are joined at once."""
    x, y = make_logits(11, 17_003, dtype)[:, 3:], make_labels(11, 17_000)
    x[:4, 16_000] = x[:4, 9000] = 30
    y[:4] = 16_000, 9000, 12_000, 8191
    x[3, 8191], x[4, y[4]], x[5, 9], x[6, 8500], x[7] = 31, -300, INF, NAN, -INF
    y[8], y[9] = -100, 17_000
    x[10], x[10, y[10]] = -200, 0
    long = make_logits(1, 65 * 8192 - 100, dtype)
    long[0, 300_000] = long[0, -1] = 30
    with host.on_host(launches=(launches := [])):
        for rows in (slice(4), slice(4, 8), slice(8, 11)):
            check(scores, x[rows], y[rows])
        check(scores, long, np.array([524_289]))
        check(nl.score_tokens, x[:2], y[:2])
    names = [name for name, *_ in launches if name in ("_part_scores", "_join_scores", "_score", "_stream_score")]
    assert host.ON_DEVICE or names == ["_part_scores", "_join_scores"] * 5


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
def test_sums_in_a_stream(dtype):
    """Rows of three chunks, two of them a warp's; the largest logit in any chunk, or in two; rows that do not count."""
    x, y, weights = make_logits(35, 16_390, dtype)[:, 3:], make_labels(35, 16_387), np.ones(35)
    x[np.arange(35), np.arange(35) * 481] = 30
    x[::5, 16_000], x[7, 9000], x[8] = 30, NAN, -INF
    y[::6], weights[1::6] = -100, 0
    with host.on_host(launches=(launches := [])):
        check(nl.logsumexp, x)
        check(none, x[:12], y[:12], weights=weights[:12], z_loss=0.1)
        check(nl.kl_divergence, x[5:10], x[4:9], weights=weights[5:10], reduction="none")
    names = [name for name, *_ in launches]
    assert host.ON_DEVICE or (names.count("_stream_sums") == 4 and "_row_sums" not in names)


def test_sums_of_few_rows():
    """Chunks of a row in warps of their own: some rows do not count; more chunks than are joined at once."""
    x, y = make_logits(3, 33_003, np.float32)[:, 3:], np.array([32_999, -100, 5])
    long = make_logits(1, 65 * 8192 - 100)
    x[2, 100] = x[2, 20_000] = 9.7
    x[0, 20_000] = x[0, 30_000] = long[0, 300_000] = long[0, -1] = 30
    with host.on_host(launches=(launches := [])):
        check(none, x, y, weights=np.array([1.0, 1, 0]), z_loss=0.1)
        check(nl.value_and_grad(nl.cross_entropy), x, y, z_loss=0.1, reduction="none", check_labels="nan")
        check(nl.logsumexp, long)
    assert host.ON_DEVICE or [name for name, *_ in launches if "_part" in name] == ["_part_sums", "_join_part_sums"] * 3


@pytest.mark.parametrize("scale", [1, 50, 400, 3000, 1e7])
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
def test_16_bits_far_apart(dtype, scale):
    """[3] Logits with steps of 1 and more, which cannot be clipped by a logit, and logits far from 0."""
    shifts = (-300, -255, -200, 0, 180, 255, 300) if scale == 1 else (0,)
    for shift in shifts:
        x = (make_logits(4, 9001, np.float32) * np.float32(scale / 4) + np.float32(shift)).astype(dtype)
        x[0, ::2], x[1], x[2] = -INF, abs(x[1]), -abs(x[2])
        y = make_labels(4, 9001)
        y[2:] = x[2:].astype(np.float32).argmax(1)
        check(none, x, y)
    far = 65504 if dtype == np.float16 else 65536  # where bfloat16 has steps of 512 below
    x = (far - 512 * np.random.default_rng(0).integers(1, 50, (1, 9001))).astype(dtype)
    x[0, [0, 8000]] = far
    check(none, x, np.array([1]))


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows, classes, warps", [(18, 8193, 1), (17, 16_391, 1), (9, 33_001, 2)])
def test_gradients_of_many_rows(rows, classes, warps, dtype):
    """More rows than warps, which then take two or three chunks of a row each."""
    x, y = make_logits(rows, classes, dtype), make_labels(rows, classes)
    x[1, 5], y[2], y[3], y[4] = NAN, -100, classes, classes - 1
    grads, launches = nl.value_and_grad(nl.cross_entropy), []
    with host.on_host(launches=launches):
        check(grads, x, y, reduction="none", check_labels="nan")
    assert host.ON_DEVICE or launches[-1] == ("_sparse_xent_grad", rows, 32 * warps)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_subnormal_gradients(dtype):
    """Entries that are 0, subnormal or just not, which a thread may not get by adding exponents, and large ones."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.uniform(low, low + span, 1300) for low, span in ((-80, 20), (-105, 30), (-130, 130), (-9, 9))])
    x = np.concatenate([x, x[3:], x[3:]]).astype(dtype)
    x[:3, 700], x[4, 5:900] = 0, -INF
    y = np.array([700, 3, 700, 3, 1, 3])
    grads = nl.value_and_grad(nl.cross_entropy)
    for upstream in (np.ones(6), np.array([1e-30, 1e20, -1e-8, 1e-38, -3e38, 0.0])):
        check(grads, x, y, reduction="none", upstream=upstream)
        if x.itemsize == 2:
            check(grads, x, y, reduction="none", upstream=upstream, out=np.empty(x.shape, np.float32))
    lone, at = rng.uniform(-9, 9, (32, 1300)).astype(dtype), np.arange(32)
    lone[at, 24 + at // 8 * 256 + at % 8] = -95  # each of what a thread has of 16-bit logits
    check(grads, lone, np.full(32, 3), reduction="none")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes, rows", [(1, 40), (6, 40), (7, 300), (32, 60), (64, 33), (65, 33), (128, 70)])
def test_few_classes(classes, rows, dtype):
    """[1, 2, 12] More than a block's rows; equal logits, zeros of either sign, NaN, infinities; between boundaries."""
    for offset in (0, 3) if classes in (32, 64, 128) else (3,):  # rows of others are not aligned anyway
        x, y = make_logits(rows, classes + offset, dtype, seed=offset)[:, offset:], make_labels(rows, classes)
        x[::3] = np.arange(classes) % 3 - 2
        x[1], x[2, classes // 2], x[4, -1], x[5, 0], x[7], x[8, 0] = -INF, NAN, INF, -INF, -0.0, -NAN
        x[10, ::2] = 0
        y[-1], y[-2] = -100, classes
        check_all(x, y)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [130, 1025, 8200, 17_000])
def test_equal_logits(classes, dtype):
    """The first of the largest is the one that a sum leaves out, in whichever round or chunk it is."""
    for offset in (0, 3) if classes < 8192 else (3,):
        x = make_logits(6, classes + offset, dtype)[:, offset:]
        x[0], x[1], x[2], x[3, -1] = np.arange(classes) % 7 - 9, -0.0, np.arange(classes) % 2 * 0.0 - 0.0, 7
        x[4, classes // 3 :: classes // 5], x[5, :: classes // 2] = 9, NAN
        check(scores, x[:4], make_labels(4, classes))
        for function in (nl.logsumexp, nl.softmax, nl.log_softmax):
            check(function, x)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("classes", [16_384, 32_761])
def test_a_softmax_in_parts(classes, dtype):
    """Rows that end with a part, or begin between boundaries and end behind it."""
    for offset in (0, 3, 7):
        x = make_logits(2, classes + offset, dtype)[:, offset:]
        check(nl.softmax, x)
        check(nl.log_softmax, x)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("unaligned", "big-endian", "read-only")])
def test_layouts(layout):
    """[12] CuPy views; inputs are not written."""
    for dtype in (np.float16, np.float32):
        for rows, classes in ((5, 9), (6, 130), (3, 1030)):
            x = LAYOUTS[layout](make_logits(rows, classes, dtype))
            y = make_labels(rows, classes)
            given = host.to_cupy(x)
            before = host.to_numpy(given)
            for function in (none, scores):
                got = host.results(function(given, host.to_cupy(y)))
                assert_same_bits(got, host.results(function(x, y)), f"{layout}, {rows} x {classes}")
            check(nl.softmax, x)
            assert_same_bits(host.to_numpy(given), before)


@pytest.mark.parametrize("classes", [5, 140, 8200])
def test_strides_beyond_32_bits(classes):
    """[13] Row index times stride."""
    x, y = make_logits(3, classes), make_labels(3, classes)
    given = host.far_apart(x, 2**31 + 64)
    assert_same_bits(host.results(none(given, host.to_cupy(y))), none(x, y))
    assert_same_bits(host.results(nl.logsumexp(given)), nl.logsumexp(x))


def test_axes():
    """Class axis first or in the middle; rows at two strides, and at three, which are copied piece by piece."""
    x = make_logits(24, 140).reshape(4, 6, 140)
    y = make_labels(24, 140).reshape(4, 6)
    for axis in (0, 1):
        moved = np.ascontiguousarray(np.moveaxis(x, -1, axis))
        check(none, moved, y, axis=axis)
        check(nl.softmax, moved, axis=axis)
    check(none, x[:, 1:], y[:, 1:])
    check(none, x.swapaxes(0, 1), y.T)
    check(nl.logsumexp, x, axis=1, keepdims=True)
    if ON_DEVICE:
        deep = x.reshape(4, 3, 2, 140)[::2, ::2, ::2]
        check(none, deep, np.ascontiguousarray(y.reshape(4, 3, 2)[::2, ::2, ::2]))


# -- gradients -----------------------------------------------------------------------------------------------------


def check_grad(x, y, **options):
    check(nl.value_and_grad(nl.cross_entropy), x, y, **{"check_labels": "nan", **options})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 9, 31, 130, 257, 1023, 1025, 8192, 8193, 8200])
def test_gradients(classes, dtype):
    """Reductions and factors, rows that do not count or have no softmax, labels out of range."""
    x, y = make_logits(9, classes, dtype, seed=classes), make_labels(9, classes)
    weights, by_class = np.array([1, 2, 0.5, 0, 3, 1, 1, 1, 1]), np.arange(classes) % 4 / 2
    x[4, classes // 2 :] = -INF
    x[5, -1], x[6, 0] = NAN, INF
    y[7], y[8] = -100, classes
    check_grad(x, y, weights=weights)
    if classes in (9, 130, 8193):
        check_grad(x, y, weights=weights, class_weights=by_class, reduction="sum", upstream=np.float32(-3))
        check_grad(x, y, reduction="none", upstream=np.linspace(-2, 2, 9))
        check(nl.value_and_grad(nl.sparse_softmax_cross_entropy_with_logits), y, x, check_labels="nan")
        check_grad(x[:, 1:], np.minimum(y, classes - 2), reduction="none", upstream=np.broadcast_to(np.float64(2), 9))
        check_grad(np.ascontiguousarray(x.T), y, axis=0)
        check_grad(x[:0], y[:0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_in_place(dtype):
    """out=logits, aligned or not; float32 for 16 bits; other threads first."""
    for classes in (9, 1030, 8200):
        store = make_logits(3, classes + 1, dtype)
        y = make_labels(3, classes)
        for x in (store[:, :classes].copy(), store[:, 1:]):
            want = host.results(nl.value_and_grad(nl.cross_entropy)(x.copy(), y))
            for order in (None, 1) if classes == 1030 else (None,):
                with host.on_host(order):
                    given = host.to_cupy(x)
                    got = nl.value_and_grad(nl.cross_entropy)(given, host.to_cupy(y), out=given)
                    assert got[1] is given
                    assert_same_bits(host.results(got), want)
    if np.dtype(dtype).itemsize == 2:
        wide = host.to_cupy(np.zeros(x.shape, np.float32))
        got = nl.value_and_grad(nl.cross_entropy)(host.to_cupy(x), host.to_cupy(y), out=wide)
        wanted = nl.value_and_grad(nl.cross_entropy)(x, y, out=np.zeros(x.shape, np.float32))
        assert_same_bits(host.results(got), host.results(wanted))


def test_far_gradients():
    """[3] Beyond 2^20."""
    for shift in (1e6, -1.5e6, 1e30):
        for classes in (7, 8200):
            check_grad((make_logits(3, classes) + np.float32(shift)).astype(np.float32), make_labels(3, classes))


# -- special values, labels, weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [10, 130, 1100, 8200])
def test_blocks_of_minus_infinity(classes, dtype):
    """[1] -inf in [0, k) and in [k, V): a load, a step, a round, a chunk; and everywhere."""
    base = make_logits(1, classes, dtype, seed=classes)[0]
    rows, labels = [np.full(classes, -INF, dtype)], [0]
    for k in (1, 7, 8, 9, 256, 512, 1024, 8192, classes - 1):
        for part in (slice(0, k), slice(k, None)):
            if k < classes:
                rows.append(base.copy())
                rows[-1][part] = -INF
                labels.append(k if len(rows) % 4 else k - 1)
    check_most(np.array(rows), np.array(labels))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [5, 140, 8200])
def test_nan_and_infinity(classes, dtype):
    """[2] At the first, the last, the target's and other positions; rows beside them keep their bits."""
    rows = [make_logits(1, classes, dtype)[0]]
    for value in (NAN, -NAN, INF):
        for spot in (0, classes // 2, classes - 1):
            rows.append(rows[0].copy())
            rows[-1][spot] = value
    rows.append(np.full(classes, -INF, dtype))
    rows[-1][1] = NAN
    x = np.array([*rows, rows[0]])
    for label in (0, classes - 1):
        check(none, x, np.full(len(x), label))
    check_most(x, np.full(len(x), 1))


@pytest.mark.parametrize("classes", [4, 150, 8200])
def test_far_and_confident(classes):
    """[3, 4] Shifts to 1e30, targets that lead or lag by far, a maximum that comes late."""
    base = make_logits(1, classes)[0]
    rows, labels = [], []
    for shift in (0, 1e3, 1e6, -1.5e6, 1e30):
        for lead in (5, 17, 90, -1e3, -3e38):
            rows.append(base + np.float32(shift))
            labels.append(len(rows) % classes)
            rows[-1][labels[-1]] += np.float32(lead)
    late = np.full(classes, -200, np.float32)
    late[-1] = 100
    check(none, np.array([*rows, late, late[::-1]]), np.array([*labels, 0, 0]))
    check(none, np.array(rows, np.float64), np.array(labels))
    check_most(np.array([*rows[::6], late, late[::-1]]), np.array([*labels[::6], 0, 0]))


BAD = [-1, -101, 2**31, 2**32 + 3, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("classes", [4, 140, 8200])
def test_labels_out_of_range(classes):
    """[8] NaN, nothing read outside, no waiting; check_labels="raise" raises as on NumPy."""
    x = make_logits(len(BAD) + 3, classes)
    y = np.array([*BAD, classes, classes + 1, 1])
    got = on_cupy(nl.cross_entropy, x, y, reduction="none")
    assert np.isnan(got[:-1]).all() and np.isfinite(got[-1])
    check_most(x, y)
    assert np.isnan(on_cupy(nl.cross_entropy, x, y))
    with pytest.raises(ValueError, match=rf"targets: expected values in \[0, {classes}\), got -1 at position \(0,\)"):
        on_cupy(nl.cross_entropy, x, y, check_labels="raise")
    with pytest.raises(ValueError, match="labels"):
        on_cupy(nl.sparse_softmax_cross_entropy_with_logits, y, x, check_labels="raise")
    on_cupy(nl.cross_entropy, x, y, weights=(y == 1).astype(np.float32), check_labels="raise")
    assert np.isfinite(on_cupy(nl.cross_entropy, x, y, weights=(y == 1).astype(np.float32)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_label_dtypes_and_layouts(dtype):
    """[11] Labels are read where they lie."""
    x, y = make_logits(24, 100), make_labels(24, 100).astype(dtype)
    if dtype == "uint64":
        y[3] = 2**64 - 100  # whose bits are those of -100
    store = np.zeros((24, 3), dtype)
    store[:, 1] = y
    for labels in (y, store[:, 1], np.asfortranarray(y.reshape(6, 4)), store.reshape(6, 4, 3)[:, :, 1], y[::-1]):
        check(none, x.reshape(*labels.shape, 100), labels)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int32", "int64", "uint64", "float16", "float32", "float64"]
)
def test_weight_dtypes(dtype):
    x, y = make_logits(40, 7), make_labels(40, 7)
    weights = (np.arange(40) % 4).astype(dtype)
    if dtype == "uint64":
        weights[5] = 2**63 + 2**11 + 1
    for reduction in ("none", "sum", "mean"):
        check(nl.cross_entropy, x, y, weights=weights, reduction=reduction)
        check(
            nl.cross_entropy, x.reshape(5, 8, 7), y.reshape(5, 8), weights=weights.reshape(8, 5).T, reduction=reduction
        )
    check(nl.cross_entropy, x, y, weights=weights.astype(np.float32).astype(BFLOAT16))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reductions(dtype):
    """[7, 9] Divisors, class weights, ignored rows: none of them, all of them, no rows."""
    x, y = make_logits(300, 12, dtype), make_labels(300, 12)
    y[::7] = -100
    x[::7] = NAN
    weights, by_class = np.arange(300) % 5 / 4, np.arange(12) % 4 / 2
    every = {"weights": weights, "class_weights": by_class}
    for names in ((), ("weights",), ("class_weights",), ("weights", "class_weights")):
        for reduction in ("none", "sum", "mean"):
            check(nl.cross_entropy, x, y, reduction=reduction, **{name: every[name] for name in names})
    check(nl.cross_entropy, x, np.full(300, -100))
    check(nl.cross_entropy, x, y, weights=np.zeros(300))
    check(nl.cross_entropy, x, y, weights=-weights)
    check(nl.cross_entropy, x[:0], y[:0])
    check(none, x[:0], y[:0])
    check(none, x[:0], y[:0], weights=weights[:0])
    check(nl.token_logprobs, x[:0], y[:0])
    check(nl.softmax, x[:0])
    check(nl.cross_entropy, x[1], y[1])
    check(nl.token_logprobs, x, y)


def test_totals_of_any_size():
    """Sums that cancel, overflow or hold infinities; more than one block of the device adds."""
    rng = np.random.default_rng(0)
    x, y = make_logits(5000, 2), make_labels(5000, 2)
    wide = np.ldexp(rng.standard_normal(5000), rng.integers(-300, 300, 5000))
    for weights in (
        rng.standard_normal(5000),
        wide,
        np.where(np.arange(5000) % 2, 1, -1) * 1e300,
        np.full(5000, 1e308),
    ):
        for reduction in ("sum", "mean"):
            check(nl.cross_entropy, x.astype(np.float64), y, weights=weights, reduction=reduction)
    x[5, 1 - y[5]] = INF
    check(nl.cross_entropy, x, y)


def numbers(kind, n):
    """float64 numbers; those of 2^-62 to 2^34 fall into words that a thread has of its own."""
    rng = np.random.default_rng(n)
    normal, odd = rng.standard_normal(n), np.arange(n) % 2 == 1
    return {
        "losses": normal * normal,
        "negative": -np.exp(normal),
        "zeros": np.where(odd, -0.0, 0.0),
        "all exponents": np.ldexp(normal, rng.integers(-1070, 1000, n)),
        "edges": np.ldexp(
            normal / abs(normal) * (1 - rng.integers(0, 2, n) * 2.0**-53), np.resize([-62, -30, 2, 34], n)
        ),
        "apart and back": normal * np.array([1, 1e-30, 1, 1e30, 1e-300])[np.arange(n) // 300 % 5],
        "far but alike": normal * 1e-40,
        "two kinds": np.where(odd, normal, 1e-25),
        "subnormal": np.ldexp(normal, -1070),
        "cancel": np.concatenate([normal[: n // 2], [2.0**-1074], -normal[: n // 2]])[-n:],
        "one infinity": np.where(np.arange(n) == n // 2, -INF, normal),
        "infinities": np.where(odd, INF, -INF),
        "a NaN": np.where(np.arange(n) == n - 1, NAN, normal),
        "overflow": np.full(n, -1e308),
    }[kind]


KINDS = ["losses", "negative", "zeros", "all exponents", "edges", "apart and back", "far but alike", "two kinds"]
KINDS += ["subnormal", "cancel", "one infinity", "infinities", "a NaN", "overflow"]


@pytest.fixture
def two_blocks(monkeypatch):
    """For more than 2,048 numbers."""
    monkeypatch.setattr(cuda_totals, "ALONE", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_totals_of_any_numbers(kind, two_blocks):
    """Of one value and of one and several blocks; the sum, and the quotient by weights of any size."""
    for n in (1, 77, 2100):
        values = numbers(kind, n)
        weights = np.where(np.arange(n) % 3 == 0, 1.0, np.roll(numbers("all exponents", n), 1) ** 2)
        for w, divisor in ((None, NOTHING), (weights, FACTORS), (values, NONZERO_OR_NONE)):
            check_total(values, w, divisor)
        check_total(np.full(n, np.nan), weights, FACTORS_ALONE)  # whatever the values
    check_total(numbers(kind, 2100).astype(np.float32), None, FACTORS)


def test_a_total_rounds_once():
    """Half-way cases, decided by a number in any word below."""
    for e in range(54, 1075, 30):
        for tail in (2.0**-e, -(2.0**-e)):
            check_total(np.array([1.0, 2.0**-53, tail]), None, NOTHING)
            check_total(np.array([-1.0, -3 * 2.0**-53, tail]), None, NOTHING)


@pytest.mark.parametrize("kind", ["losses", "all exponents", "apart and back", "a NaN"])
def test_row_totals_of_any_numbers(kind):
    """Along either axis; a weight of 0 hides a NaN."""
    values, weights = numbers(kind, 600), np.resize([1.0, 0.5, -1e-30, 3.0, 0.0], 600)
    for count, row_step, step in ((200, 200, 1), (200, 1, 3), (3, 3, 1)):
        rows, results = 600 // count, []
        for module, convert in ((cpu_totals, np.asarray), (cuda_totals, host.to_cupy)):
            out = [convert(np.empty(rows)), convert(np.empty(rows))]
            given = convert(values), convert(weights), count, row_step, step, FACTORS
            module.row_totals(600, rows, *given, *out)
            results.append([host.results(x) for x in out])
        for expected, got in zip(*results):
            assert_same_bits(got, expected)


def check_total(values, weights, divisor):
    if weights is not None:
        weights = np.where(np.isfinite(weights), weights, 2.0)
    expected = cpu_totals.total(values, None, weights, None, NO_LABEL, divisor)
    got = on_cupy(cuda_totals.total, values, None, weights, None, NO_LABEL, divisor)
    assert_same_bits(got, host.results(np.asarray(expected)))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_totals_in_any_order(order, two_blocks):
    """Of blocks and of threads."""
    for kind in ("all exponents", "apart and back"):
        values = numbers(kind, 2100)
        with host.on_host(order=order):
            check_total(values, values[::-1].copy(), FACTORS)


def test_grids_of_totals():
    """Few numbers are summed by one block, many by at most one a multiprocessor, of which there are two here."""
    if ON_DEVICE:
        pytest.skip("launches are counted on the host")
    for n, expected in ((1, (1, 64)), (65, (1, 96)), (4096, (1, 1024)), (4097, (2, 1024)), (9000, (2, 1024))):
        assert cuda_totals.grid_for(n, 1024, cupy.empty(n)) == expected
    assert cuda_totals.grid_for(2048, 512, cupy.empty(1)) == (1, 512)
    assert cuda_totals.grid_for(2049, 512, cupy.empty(1)) == (2, 512)


@pytest.mark.parametrize("flags", ["TTFF", "FFTT", "TFFF", "FTFF", "FFTF", "FFFT", "FFFF"])
def test_sequence_loss(flags):
    at, ab, st, sb = (flag == "T" for flag in flags)
    flags = dict(
        zip(
            ("average_across_timesteps", "average_across_batch", "sum_over_timesteps", "sum_over_batch"),
            (at, ab, st, sb),
        )
    )
    x, y = make_logits(77, 20).reshape(11, 7, 20), make_labels(77, 20).reshape(11, 7)
    weights = (np.arange(77) % 3 / 2).reshape(11, 7).astype(np.float32)
    weights[4] = 0
    for w in (weights, np.asfortranarray(weights), np.zeros((11, 7))):
        check(nl.sequence_loss, x, y, w, **flags)
    wide = numbers("apart and back", 400)[-77:].reshape(11, 7)
    check(nl.sequence_loss, x.astype(np.float64), y, np.where(np.arange(7) == 3, wide, weights), **flags)
    soft = np.full(x.shape, 0.05, np.float32)
    check(nl.sequence_loss, x, soft, weights, **flags)
    check(nl.sequence_loss, x[:0], y[:0], weights[:0], **flags)
    own = nl.sparse_softmax_cross_entropy_with_logits
    check(nl.sequence_loss, x, y, weights, softmax_loss_function=own, **flags)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sigmoid(dtype):
    x = make_logits(3, 1100, dtype, scale=20)
    x[0, :3], x[1, :2] = [INF, -INF, NAN], [INF, -INF]
    z = (np.arange(3300) % 5 / 4).reshape(3, 1100).astype(np.float32)
    for labels, logits in ((z, x), (z.T, x.T), (z[:, ::2], x[:, ::2]), (z[0], x[0])):
        check(nl.sigmoid_cross_entropy_with_logits, labels, logits)
        for weight in (3.0, np.float32(0.5), np.full(logits.shape, 1.5, np.float32), z[:1, : logits.shape[-1]]):
            if np.ndim(weight) <= logits.ndim:
                check(nl.weighted_cross_entropy_with_logits, labels, logits, weight)
    check(nl.sigmoid_cross_entropy_with_logits, z[0, :1].reshape(()), x[0, :1].reshape(()))


# -- Evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation():
    """On the device the same words; batches from either side; merged; what is out of range is found at the end."""
    x, y = make_logits(90, 6), make_labels(90, 6)
    y[::11] = -100
    weights = np.arange(90) % 5 / 4
    expected = nl.Evaluation().update(x, y, weights).update(x[:20], y[:20])
    got = ConvertedEvaluation().update(x, y, weights)
    assert got.update(x[:20], y[:20]).to_json() == expected.to_json()
    mixed = nl.Evaluation().update(x[:20], y[:20]).update(host.to_cupy(x), host.to_cupy(y), host.to_cupy(weights))
    assert mixed.result() == expected.result()
    merged = nl.Evaluation().merge(ConvertedEvaluation().update(x, y, weights))
    assert merged.update(x[:20], y[:20]).to_json() == expected.to_json()
    assert json.loads(got.to_json())["tokens"] == expected.result().tokens
    with pytest.raises(ValueError, match=r"targets: .* got 2 out of range"):
        ConvertedEvaluation().update(x[:3], np.array([1, 6, -5])).result()
    with pytest.raises(ValueError, match=r"weights: .* got 2 others"):
        ConvertedEvaluation().update(x[:3], y[:3], np.array([1, -1, NAN])).result()


@pytest.mark.parametrize("kind", ["losses", "all exponents", "apart and back", "a NaN", "one infinity"])
def test_evaluation_of_any_numbers(kind):
    """The same words after two updates of several blocks: sums of wide ranges, with counts of NaN and infinities."""
    n = 2100
    logprob, weights = -abs(numbers(kind, n)), abs(numbers("apart and back", n)) * (np.arange(n) % 5)
    argmax, y = np.arange(n) % 7, np.arange(n) % 3
    weights[::4] = 1.0
    expected, got = nl.Evaluation(), nl.Evaluation()
    for w in (weights, None):
        expected.add(logprob, argmax, y, w)
        got.add(*(None if a is None else host.to_cupy(a) for a in (logprob, argmax, y, w)))
    assert json.loads(got.to_json()) == json.loads(expected.to_json())


# -- behaviour -----------------------------------------------------------------------------------------------------


GRADIENT = nl.value_and_grad(nl.cross_entropy)


def test_kernels_of_a_call():
    """Launches of the usual calls: one for losses, one for their total, none for conversions; and for few rows of many
    classes one for the chunks."""
    if ON_DEVICE:
        pytest.skip("launches are counted on the host")
    x, y = make_logits(20, 200), make_labels(20, 200).astype(np.int32)
    weights, wide = np.ones(20, np.float32), make_logits(1, 20_000, BFLOAT16)
    for expected, call in (
        (["_short_sparse_xent"], lambda: on_cupy(nl.sparse_softmax_cross_entropy_with_logits, y, x)),
        (["_sparse_xent"], lambda: on_cupy(nl.sparse_softmax_cross_entropy_with_logits, y[:1], wide[:, :1030])),
        (["_short_sparse_xent", "_total"], lambda: on_cupy(nl.cross_entropy, x, y, weights=weights)),
        (["_short_sparse_xent", "_scale"], lambda: on_cupy(nl.cross_entropy, x, y, weights=weights, reduction="none")),
        (["_total", "_slopes", "_sparse_xent_grad", "_total"], lambda: on_cupy(GRADIENT, x, y)),
        (["_narrow_sparse_xent", "_total"], lambda: on_cupy(nl.cross_entropy, x[:, :100], np.minimum(y, 99))),
        (["_score"], lambda: on_cupy(nl.score_tokens, x, y, rank=True)),
        (["_narrow_score"], lambda: on_cupy(nl.score_tokens, x[:, :100], np.minimum(y, 99), rank=True, entropy=True)),
        (["_narrow_logsumexp"], lambda: on_cupy(nl.logsumexp, x[:, :100])),
        (["_score", "_entropy"], lambda: on_cupy(nl.score_tokens, x, y, entropy=True)),
        (["_score", "_add_tokens"], lambda: ConvertedEvaluation().update(x, y)),
        (["_chunk_sums", "_join_sums"], lambda: on_cupy(nl.token_logprobs, wide, y[:1])[:0]),
    ):
        launches = []
        with host.on_host(launches=launches):
            call()
        names = [name for name, _, _ in launches if name != "_negate"]
        assert names == expected


@pytest.mark.skipif(ON_DEVICE and cupy.cuda.runtime.getDeviceCount() < 2, reason="one device")
def test_another_device():
    """[21] Arrays on device 1 while device 0 is current: results lie beside them, device 0 is current again."""
    x, y = make_logits(2, 20_000), make_labels(2, 20_000)
    with cupy.cuda.Device(1):
        logits, targets = host.to_cupy(x), host.to_cupy(y)
    for function in (none, nl.cross_entropy, nl.softmax, nl.logsumexp):
        result = function(logits, targets) if function in (none, nl.cross_entropy) else function(logits)
        assert result.device.id == 1
    assert nl.Evaluation().update(logits, targets)._words.device.id == 1
    assert cupy.cuda.runtime.getDevice() == 0


def test_results_are_cupy_arrays():
    x, y = host.to_cupy(make_logits(4, 5)), host.to_cupy(make_labels(4, 5))
    for result in (
        nl.cross_entropy(x, y),
        nl.cross_entropy(x, y, reduction="none"),
        nl.softmax(x),
        *nl.score_tokens(x, y)[:3],
    ):
        assert isinstance(result, cupy.ndarray)
    assert nl.cross_entropy(x, y).shape == ()
    assert nl.cross_entropy(x, [0, 1, 2, -100], weights=2.0).dtype == np.float32
    assert nl.weighted_cross_entropy_with_logits(x, x, 3).shape == (4, 5)


def test_numpy_and_cupy_do_not_mix():
    x, y = make_logits(4, 5), make_labels(4, 5)
    with pytest.raises(TypeError, match="targets: expected a CuPy array as logits is, got a NumPy array"):
        nl.cross_entropy(host.to_cupy(x), y)
    with pytest.raises(TypeError, match="logits: expected a CuPy array as targets is"):
        nl.cross_entropy(x, host.to_cupy(y))
    with pytest.raises(TypeError, match="weights"):
        nl.cross_entropy(host.to_cupy(x), host.to_cupy(y), weights=np.ones(4))
    with pytest.raises(TypeError, match="labels"):
        nl.sigmoid_cross_entropy_with_logits(x, host.to_cupy(x))


def test_errors_are_those_of_numpy():
    x, y = make_logits(4, 5), make_labels(4, 5)
    for arguments in ((x, y[:3]), (x.astype(np.int32), y), (x, y.astype(np.complex64)), (x[:, :0], y)):
        messages = []
        for convert in (np.asarray, host.to_cupy):
            with pytest.raises((TypeError, ValueError)) as error:
                nl.cross_entropy(*map(convert, arguments))
            messages.append((error.type, str(error.value)))
        assert messages[0] == messages[1]


def test_a_device_that_is_too_old(monkeypatch):
    device = types.SimpleNamespace(compute_capability="75")
    monkeypatch.setattr(cupy.cuda, "Device", lambda number: device)
    with pytest.raises(RuntimeError, match=r"device 3: expected compute capability 8.0 or later, got 7.5"):
        host._launch._require(3)


def test_cached_kernels_of_a_kernel_share_a_stamp():
    """They share a file, which a second stamp would empty each time."""
    from numbaloss.cuda.softmax import _sparse_xent

    stamps = {str(form.jit(0)._cache._cache_file._source_stamp) for form in _sparse_xent._for_size.values()}
    assert len(stamps) == 1
    assert "_scalar.py" in stamps.pop()


# -- twins ---------------------------------------------------------------------------------------------------------


def test_one_module_imports_the_cuda_target():
    """numba.cuda has a successor: what will have to change then is in one file."""
    folder = pathlib.Path(inspect.getfile(host._launch)).parent
    imports = re.compile(r"^\s*(from numba import .*\bcuda\b|from numba\.cuda|import numba\.cuda)", re.MULTILINE)
    naming = {path.name for path in folder.glob("*.py") if imports.search(path.read_text())}
    assert naming == {"_launch.py"}


def parameters(x):
    """Those of a kernel, or of the function before it, after the size of its work."""
    if isinstance(x, Kernel):
        return list(inspect.signature(x.function).parameters)[1:]
    names = list(inspect.signature(x).parameters) if inspect.isfunction(x) else []
    return names[2:] if names[:2] == ["work", "items"] else None


@pytest.mark.parametrize("family", ["softmax", "dense", "divergence", "elements", "sigmoid", "totals"])
def test_twins_share_names(family):
    """Every kernel exists in both backends, with the same parameters."""
    cpu, cuda = (__import__(f"numbaloss.{name}.{family}", fromlist=["x"]) for name in ("cpu", "cuda"))
    for_the_host_alone = {"round_total", "merge", "exponentials"}
    ours = {name: parameters(x) for name, x in vars(cpu).items() if name[0] != "_" and name not in for_the_host_alone}
    ours = {name: names for name, names in ours.items() if names}
    assert ours
    for name, names in ours.items():
        assert parameters(vars(cuda)[name]) == names, name
