"""Functions of one number against mpmath, over all magnitudes, and the same bits from vectors."""

import mpmath
import numpy as np
import pytest
from common import EPS, TINY, assert_same_bits
from numba import njit

from numbaloss import _typed
from numbaloss._scalar import BIAS, clipped_power_32, frame_32, normal_product_32
from numbaloss._vector import WIDTH
from numbaloss.cpu._memory import load, store

FUNCTIONS = {
    "tanh": (_typed.tanh, mpmath.tanh, 1.5),
    "tanh_slope": (_typed.tanh_slope, lambda v: mpmath.sech(v) ** 2, 4),
}


def magnitudes(dtype, edges):
    """Numbers of both signs, of all exponents, and around the edges of a formula's cases."""
    rng = np.random.default_rng(0)
    info = np.finfo(dtype)
    wide = np.exp2(rng.uniform(np.log2(float(info.tiny)) - 10, np.log2(float(info.max)), 800))
    close = [np.nextafter(dtype(edge), dtype(to)) for edge in edges for to in (0, edge, np.inf)]
    x = np.concatenate([wide, rng.uniform(0, 1, 1600), rng.uniform(1, 60, 1600), rng.uniform(0, 380, 200), close])
    x = np.concatenate([x, [0, 1e-300 if dtype is np.float64 else 1e-45, np.inf]]).astype(dtype)
    return np.concatenate([x, -x])


def compiled(function):
    """(a function of an array, the same by vectors)."""

    @njit
    def scalars(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    @njit
    def vectors(x, out):
        size = WIDTH * x.itemsize
        for i in range(x.size // WIDTH):
            store(np.int64(out.ctypes.data) + i * size, function(load(x[0], np.int64(x.ctypes.data) + i * size)))

    def of(run):
        def call(x):
            out = np.empty_like(x)
            run(x, out)
            return out

        return call

    return of(scalars), of(vectors)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(name, dtype):
    """Within the stated eps of the exact value, or a step of the subnormal numbers."""
    function, truth, limit = FUNCTIONS[name]
    scalars, vectors = compiled(function)
    x = magnitudes(dtype, [0.625])
    x = x[: x.size // WIDTH * WIDTH]
    got = scalars(x)
    assert_same_bits(vectors(x), got, "vectors")
    eps, tiny = EPS[np.dtype(dtype)], TINY[np.dtype(dtype)]
    with mpmath.workdps(60):
        for v, result in zip(x, got):
            exact = truth(mpmath.mpf(float(v)))
            off = abs(mpmath.mpf(float(result)) - exact)
            assert off <= max(limit * eps * abs(exact), 2 * tiny), f"{v!r}: {result!r}, off by {float(off)}"
    assert np.isnan(scalars(np.full(1, np.nan, dtype))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh_is_odd_and_bounded(dtype):
    scalars, _ = compiled(_typed.tanh)
    x = magnitudes(dtype, [0.625])
    assert_same_bits(scalars(-x[x != 0]), -scalars(x[x != 0]))
    assert (np.abs(scalars(x)) <= 1).all() and (scalars(x[x > 20]) == 1).all()


def test_powers_of_two_are_added():
    """Gradients on CUDA add exponents in place of a product; the same bits wherever nothing is subnormal."""

    @njit(error_model="numpy")
    def both(x, m, factor, added, product):
        for i in range(x.size):
            added[i] = normal_product_32(x[i], m - BIAS, factor)
            p, power, _ = clipped_power_32(x[i], m, factor)
            product[i] = p * power

    rng = np.random.default_rng(0)
    for ref, n, more, factor in ((0, 0, 0, 1.5), (-37, -20, 24, -2.9 * 2**-24), (1_500_000, 100, 24, 2.0**-24)):
        m, low = frame_32(np.float32(ref), BIAS + np.float32(n + more))
        x = np.concatenate([rng.uniform(low + np.float32(20), ref * np.log(2), 200_000), [low + 20, ref * np.log(2)]])
        x = x.astype(np.float32)
        added, product = np.empty_like(x), np.empty_like(x)
        both(x, np.float32(m), np.float32(factor), added, product)
        assert (np.abs(product) >= np.finfo(np.float32).tiny).all()
        assert_same_bits(added, product, (ref, n))
