"""What only a GPU can show: sizes that fill it, streams, calls that do not wait, CUDA graphs, torch's tensors.

test_cuda.py runs on a GPU too. perf/on_device.py starts both, and `few_calls` here under compute-sanitizer.
"""

import time

import numpy as np
import pytest
from common import DTYPES, assert_same_bits, make_labels, make_logits

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host  # noqa: E402

import numbaloss as nl  # noqa: E402

pytestmark = pytest.mark.skipif(not host.ON_DEVICE, reason="no GPU")

NAN = {"check_labels": "nan"}
FUNCTIONS = {  # of logits, labels, weights, class weights, class probabilities
    "none": lambda x, y, w, c, z: nl.cross_entropy(x, y, reduction="none", **NAN),
    "mean": lambda x, y, w, c, z: nl.cross_entropy(x, y, weights=w, class_weights=c, **NAN),
    "score_tokens": lambda x, y, w, c, z: nl.score_tokens(x, y, rank=True, entropy=True, **NAN),
    "logsumexp": lambda x, y, w, c, z: nl.logsumexp(x),
    "weighted none": lambda x, y, w, c, z: nl.cross_entropy(x, y, weights=w, class_weights=c, reduction="none", **NAN),
    "softmax": lambda x, y, w, c, z: nl.softmax(x),
    "log_softmax": lambda x, y, w, c, z: nl.log_softmax(x),
    "dense": lambda x, y, w, c, z: nl.softmax_cross_entropy_with_logits(z, x),
    "dense mean": lambda x, y, w, c, z: nl.cross_entropy(x, z, weights=w, class_weights=c),
    "gradient": lambda x, y, w, c, z: nl.value_and_grad(nl.cross_entropy)(x, y, weights=w, **NAN),
    "gradient none": lambda x, y, w, c, z: nl.value_and_grad(nl.cross_entropy)(x, y, reduction="none", **NAN),
    "options": lambda x, y, w, c, z: nl.value_and_grad(nl.cross_entropy)(
        x, y, weights=w, class_weights=c, label_smoothing=0.1, z_loss=1e-4, softcap=30.0, **NAN
    ),
    "Hessian": lambda x, y, w, c, z: nl.value_grad_hess(nl.cross_entropy)(x, y, weights=w, **NAN),
    "kl": lambda x, y, w, c, z: nl.value_and_grad(nl.kl_divergence, "logits_p")(x, x[::-1], weights=w),
    "js": lambda x, y, w, c, z: nl.value_and_grad(nl.js_divergence, "logits_q")(x, x[::-1], weights=w),
    "sigmoid": lambda x, y, w, c, z: nl.sigmoid_cross_entropy_with_logits(z, x),
    "weighted sigmoid": lambda x, y, w, c, z: nl.weighted_cross_entropy_with_logits(z, x, c),
    "weighted derivatives": lambda x, y, w, c, z: nl.value_grad_hess(nl.weighted_cross_entropy_with_logits)(z, x, c),
    "focal": lambda x, y, w, c, z: nl.value_grad_hess(nl.sigmoid_focal_cross_entropy_with_logits)(z, x, alpha=0.25),
    "sequence_loss": lambda x, y, w, c, z: nl.sequence_loss(x[None], y[None], w[None]),
    "sequence_loss by step": lambda x, y, w, c, z: nl.sequence_loss(x[None], y[None], w[None], False),
}
CLASSES = [1, 2, 3, 10, 100, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025]
CLASSES += [8191, 8192, 8193, 50257, 128256, 262144]


def inputs(rows, classes, dtype, seed=0):
    """Finite losses, with -inf in every fourth row, the label -100 and weight 0 in every fifth."""
    rng = np.random.default_rng([rows, classes, seed])
    x, y = make_logits(rows, classes, DTYPES[dtype], seed), make_labels(rows, classes, seed)
    w, c = rng.integers(1, 9, rows).astype(np.float32) / 4, rng.integers(0, 5, classes).astype(np.float64) / 4
    z = rng.random((rows, classes), dtype=np.float32)
    x[1::4, 1::3], z[:, 1::3] = -np.inf, 0
    y[1::4] -= y[1::4] % 3
    y[2::5], w[2::5] = -100, 0
    return x, y, w, c, z


def on_device(rows=64, classes=1000, dtype="float32", seed=0):
    return [host.to_cupy(a) for a in inputs(rows, classes, dtype, seed)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_many_rows(classes, dtype):
    """Blocks in many waves: enough rows for the kernels that take several, and for those of long rows."""
    rows = 9000 if classes <= 1025 else 600 if classes <= 8192 else 300
    arrays = inputs(rows, classes, dtype)
    given = [host.to_cupy(a) for a in arrays]
    for name in list(FUNCTIONS)[: 4 if rows * classes > 1 << 24 else None]:
        expected = host.results(FUNCTIONS[name](*arrays))
        assert_same_bits(host.results(FUNCTIONS[name](*given)), expected, f"{name} {rows}x{classes} {dtype}")


def spin(seconds):
    """Keep the current stream busy."""
    code = r"""extern "C" __global__ void spin(unsigned long long nanoseconds) {
        unsigned long long now, start;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
        do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
    }"""
    cupy.RawKernel(code, "spin")((1,), (1,), (np.uint64(seconds * 1e9),))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stream(name):
    """On a stream of its own: a call returns while that is busy, its work waits there and gives the same bits."""
    arrays = on_device()
    want = host.results(FUNCTIONS[name](*arrays))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        FUNCTIONS[name](*arrays)  # compiled and allocated before
        stream.synchronize()
        spin(0.5)
        begin = time.perf_counter()
        got = FUNCTIONS[name](*arrays)
        took, busy = time.perf_counter() - begin, not stream.done
        assert busy and took < 0.25, f"{took:.3f} s"
        stream.synchronize()
        assert_same_bits(host.results(got), want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_graph(name):
    """Captured after a call, replayed twice on other numbers."""
    others, stream = on_device(seed=1), cupy.cuda.Stream(non_blocking=True)
    want = host.results(FUNCTIONS[name](*others))
    with stream:
        arrays = on_device()
        FUNCTIONS[name](*arrays)
        stream.synchronize()
        stream.begin_capture()
        got = FUNCTIONS[name](*arrays)
        graph = stream.end_capture()
        for a, b in zip(arrays, others):
            cupy.copyto(a, b)
        for _ in range(2):
            graph.launch(stream)
        stream.synchronize()
        assert_same_bits(host.results(got), want)


def test_torch():
    """A torch tensor on the GPU is read through DLPack."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, y, *_ = on_device()
    want = host.results(nl.cross_entropy(x, y, reduction="none"))
    got = nl.cross_entropy(torch.from_dlpack(x), torch.from_dlpack(y), reduction="none")
    assert_same_bits(host.results(got), want)


def test_few_calls():
    """Every kernel, without CuPy's memory pool, which would hide from a sanitizer what is read out of bounds."""
    cupy.cuda.set_allocator(None)
    try:
        for dtype in ("bfloat16", "float32"):
            for rows, classes in ((40, 10), (70, 129), (70, 1000), (70, 1025), (3, 8200), (270, 8200), (3, 33_000)):
                arrays = on_device(rows, classes, dtype)
                for function in FUNCTIONS.values():
                    host.results(function(*arrays))
        for dtype, classes in (("bfloat16", 9001), ("float32", 1101)):  # unaligned rows, of which a warp takes several
            arrays = on_device(5000, classes, dtype)
            for name in ("none", "gradient none", "logsumexp"):
                host.results(FUNCTIONS[name](*arrays))
        nl.cross_entropy(arrays[0][:, 1:], arrays[1] % 100, reduction="none")
        assert nl.Evaluation().update(*arrays[:3]).result().tokens > 0
    finally:
        cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
