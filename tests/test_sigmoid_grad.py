"""Derivatives of the sigmoid family, and the focal loss, against 200-bit truths. [n]: a line of docs/PITFALLS.md."""

import mpmath
import numpy as np
import pytest
from common import (
    BFLOAT16,
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_same_bits,
    layouts_for,
    make_logits,
    positive_zero,
    result_dtype,
)

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = np.inf, np.nan
SIGMOID, WEIGHTED = nl.sigmoid_cross_entropy_with_logits, nl.weighted_cross_entropy_with_logits
FOCAL = nl.sigmoid_focal_cross_entropy_with_logits
EVERY = ("logits", "labels", "pos_weight")
LABELS = (0.0, 1.0, 0.5, 0.125, 2.0**-20)


def soft(shape, seed=0):
    return np.asarray(np.random.default_rng(seed).integers(0, 5, shape) / 4, np.float32)


def each(function, *arrays):
    """function(*mpmath numbers) of every element, in 200 bits."""
    with mpmath.workprec(200):
        found = [function(*(mpmath.mpf(float(v)) for v in item)) for item in np.broadcast(*arrays)]
        return np.array([float(v) for v in found]).reshape(np.broadcast(*arrays).shape)


def softplus(x):
    return mpmath.log1p(mpmath.exp(x))


def p(x):
    return 1 / (1 + mpmath.exp(-x))


def logits_for(dtype):
    depth = np.concatenate([np.arange(0, 20, 0.37), np.arange(20, 87, 2.3), [100]])
    return np.concatenate([depth, -depth, [2e4, -2e4]]).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weighted(dtype, record_property):
    """Every derivative, relative to the magnitudes of its two terms, which differ in sign where labels are soft."""
    x, wide = logits_for(dtype), result_dtype(dtype)
    x = x if np.dtype(dtype).itemsize > 2 else x.astype(np.float32)  # not rounded to 16 bits
    run = nl.value_and_grad(WEIGHTED, EVERY)
    for z in LABELS:
        labels = np.full(x.shape, z, wide)
        for q in (1.0, 0.25, 7.25, 0.0):
            weights = np.full(x.shape, q, wide)
            value, (by_logit, by_label, by_weight) = run(labels, x, weights)
            assert_same_bits(value, WEIGHTED(labels, x, weights))
            sums = [each(lambda x, z, q, s=s: (1 - z) * p(x) + s * q * z * p(-x), x, z, q) for s in (-1, 1)]
            worst = assert_close(by_logit, sums[0], magnitude=sums[1], what=f"logits {z} {q}")
            sums = [each(lambda x, q, s=s: q * softplus(-x) + s * softplus(x), x, q) for s in (-1, 1)]
            assert_close(by_label, sums[0], magnitude=sums[1], what=f"labels {z} {q}")
            assert_close(by_weight, each(lambda x, z: z * softplus(-x), x, z), what=f"pos_weight {z} {q}")
            hess = nl.value_grad_hess(WEIGHTED)(labels, x, weights)
            assert_same_bits(hess[:2], (value, by_logit))
            exact = each(lambda x, z, q: (1 - z + q * z) * p(x) * p(-x), x, z, q)
            worst = max(worst, assert_close(hess[2], exact, what=f"Hessian {z} {q}"))
            record_property(f"worst_eps {z} {q}", worst)
        value, (by_logit, by_label) = nl.value_and_grad(SIGMOID, ("logits", "labels"))(labels, x)
        assert_same_bits(value, SIGMOID(labels, x))
        sums = [each(lambda x, z, s=s: (1 - z) * p(x) + s * z * p(-x), x, z) for s in (-1, 1)]
        assert_close(by_logit, sums[0], magnitude=sums[1])
        assert_same_bits(by_label, 0 - x.astype(wide))
        value, grad, hess = nl.value_grad_hess(SIGMOID)(labels, x)
        assert_same_bits((value, grad), nl.value_and_grad(SIGMOID)(labels, x))
        assert_close(hess, each(lambda x: p(x) * p(-x), x))


def focal(x, z, a1, a0, gamma):
    return z * a1 * p(-x) ** gamma * softplus(-x) + (1 - z) * a0 * p(x) ** gamma * softplus(x)


def focal_terms(x, z, a1, a0, gamma):
    """The magnitudes of the terms of the second derivative."""

    def part(s):
        inner = gamma * softplus(-s) * (gamma * p(s) + p(-s)) + p(-s) * (2 * gamma + 1)
        return p(-s) ** gamma * p(s) * inner

    return z * a1 * part(x) + (1 - z) * a0 * part(-x)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_focal(dtype, gamma, record_property):
    """Derivatives are those that mpmath finds by differences in 200 bits and more."""
    x = logits_for(dtype)[::3]
    x = x[np.abs(x) < (80 if dtype == np.float32 else 650) / (1 + gamma)]  # results that are normal numbers
    for z in (0.0, 1.0, 0.25):
        for alpha in (None, 0.25):
            labels, options = np.full(x.shape, z, dtype), {"alpha": alpha, "gamma": gamma}
            factors = (1.0, 1.0, gamma) if alpha is None else (alpha, 1 - alpha, gamma)
            value, grad, hess = nl.value_grad_hess(FOCAL)(labels, x, **options)
            assert_same_bits((value, grad), nl.value_and_grad(FOCAL)(labels, x, **options))
            assert_same_bits(value, FOCAL(labels, x, **options))
            worst = assert_close(value, each(focal, x, z, *factors), what=f"value {z} {alpha}")
            by_sign = [
                each(lambda v, *r, s=s: s * mpmath.diff(lambda t: focal(t, *r), v), x, sign, *factors)
                for s, sign in ((z, 1.0), (1 - z, 0.0))
            ]
            worst = max(
                worst, assert_close(grad, sum(by_sign), magnitude=sum(map(abs, by_sign)), what=f"grad {z} {alpha}")
            )
            exact = each(lambda v, *r: mpmath.diff(lambda t: focal(t, *r), v, 2), x, z, *factors)
            terms = each(focal_terms, x, z, *factors)
            worst = max(worst, assert_close(hess, exact, magnitude=terms, what=f"Hessian {z} {alpha}"))
            by_label = nl.value_and_grad(FOCAL, "labels")(labels, x, **options)[1]
            parts = [each(focal, x, sign, *factors) for sign in (1.0, 0.0)]
            assert_close(by_label, parts[0] - parts[1], magnitude=sum(parts), what="labels")
            record_property(f"worst_eps {z} {alpha}", worst)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes(dtype):
    """16-bit logits are exact numbers; their gradient is rounded once, or float32 by `out`; the others' are float32."""
    x = make_logits(3, 50, dtype)
    z, wide = soft(x.shape), result_dtype(dtype)
    value, (by_logit, by_label) = nl.value_and_grad(SIGMOID, ("logits", "labels"))(z, x)
    exact = nl.value_and_grad(SIGMOID)(z, x.astype(wide))
    assert_same_bits(value, exact[0])
    assert by_logit.dtype == x.dtype and by_label.dtype == np.float32
    assert_same_bits(by_logit, exact[1].astype(dtype))
    assert nl.value_grad_hess(SIGMOID)(z, x)[2].dtype == wide
    if np.dtype(dtype).itemsize == 2:
        out = np.empty(x.shape, np.float32)
        assert nl.value_and_grad(SIGMOID)(z, x, out=out)[1] is out
        assert_same_bits(out, exact[1])
    kind = {np.float16: np.float64, BFLOAT16: np.float16, np.float32: BFLOAT16, np.float64: np.float16}[dtype]
    q = soft(50).astype(kind)
    by_label, by_weight = nl.value_and_grad(WEIGHTED, EVERY[1:])(z.astype(kind), x, q)[1]
    assert by_label.dtype == kind and by_weight.dtype == kind and by_weight.shape == (50,)
    by_label, by_weight = nl.value_and_grad(WEIGHTED, EVERY[1:])((z > 0.5).tolist(), x, 2)[1]
    assert by_label.dtype == wide and by_weight.dtype == wide and by_weight.shape == ()


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (4, 1), (3, 1, 1), (3, 1, 5), (1, 4, 1), (3, 4, 5), (1,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pos_weight_is_summed_exactly(shape, dtype):
    """Over the axes along which it was broadcast: the sum of the elements' gradients, rounded once, in any order."""
    x = make_logits(12, 5, dtype, scale=9.0).reshape(3, 4, 5)
    z, upstream = soft(x.shape), make_logits(12, 5, seed=1).reshape(3, 4, 5)
    q = np.asarray(soft(shape) + dtype(0.25), dtype)
    run = nl.value_and_grad(WEIGHTED, EVERY)
    value, grads = run(z, x, q, upstream=upstream)
    wide = run(z, x, np.broadcast_to(q, x.shape).copy(), upstream=upstream)
    assert_same_bits((value, *grads[:2]), (wide[0], *wide[1][:2]))
    for at in np.ndindex(q.shape):
        taken = np.zeros(q.shape, bool)
        taken[at] = True
        terms = wide[1][2][np.broadcast_to(taken, x.shape)]
        assert grads[2][at] == dtype(mpmath.fsum(map(float, terms)))
    order = np.random.default_rng(0).permutation(3)
    if q.ndim < 3 or q.shape[0] == 1:
        assert_same_bits(run(z[order], x[order], q, upstream=upstream[order])[1][2], grads[2])
    for moved in (np.asfortranarray, lambda a: a[::-1][::-1]):
        assert_same_bits(run(moved(z), moved(x), q, upstream=moved(upstream))[1][2], grads[2])
    out = np.empty(q.shape, dtype)
    assert nl.value_and_grad(WEIGHTED, "pos_weight")(z, x, q, upstream=upstream, out=out)[1] is out
    assert_same_bits(out, np.asarray(grads[2]))


def central(function, args, k, at, step=1e-5):
    """The slope of function(*args) by entry `at` of argument k."""
    both = []
    for h in (step, -step):
        moved = [a.copy() for a in args]
        moved[k][at] += h
        both.append(function(*moved))
    return (both[0] - both[1]) / (2 * step)


@pytest.mark.parametrize("loss, options", [(SIGMOID, {}), (WEIGHTED, {}), (FOCAL, {"alpha": 0.3})])
def test_central_differences(loss, options):
    x, z, q = make_logits(4, 6, np.float64), soft((4, 6)).astype(np.float64), soft(6).astype(np.float64) + 0.5
    args, g = (z, x, q)[: 3 if loss is WEIGHTED else 2], make_logits(4, 6, np.float64, seed=2)
    names, options = ("labels", "logits", "pos_weight")[: len(args)], options | {"upstream": g}
    grads, hess = nl.value_and_grad(loss, names)(*args, **options)[1], nl.value_grad_hess(loss)(*args, **options)[2]
    for k, grad in enumerate(grads):
        for at in ((0, 0), (3, 5), (1, 2)):
            at = at[-grad.ndim :]
            total = central(lambda *a: (g * nl.value_and_grad(loss)(*a, **options)[0]).sum(), args, k, at)
            assert abs(total - grad[at]) < 1e-8
    for at in ((0, 0), (3, 5), (1, 2)):
        slope = central(lambda *a, at=at: nl.value_and_grad(loss)(*a, **options)[1][at], args, 1, at)
        assert abs(slope - hess[at]) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_layouts(dtype):
    """[12] Views of any operand give the bits of copies; nothing but `out` is written."""
    for rows, classes in ((5, 9), (3, 1030)):
        x, g = make_logits(rows, classes, dtype), make_logits(rows, classes, seed=1)
        z, q = soft(x.shape).astype(dtype), soft(x.shape, 1)
        run = nl.value_and_grad(WEIGHTED, EVERY)
        want = run(z, x, q, upstream=g)
        for name, layout in layouts_for(dtype).items():
            given = layout(x.copy())
            assert_same_bits(run(z, given, q, upstream=g)[1], want[1], name)
            assert_same_bits(np.array(given, dtype), x)
            assert_same_bits(run(layout(z.copy()), given, q, upstream=g)[1], want[1], name)
            assert_same_bits(run(z, x, LAYOUTS[name](q.copy()), upstream=LAYOUTS[name](g.copy()))[1], want[1], name)
        for k, name in enumerate(("labels", "logits")):
            args = [z, x, q]
            args[k] = args[k].copy()
            assert nl.value_and_grad(WEIGHTED, name)(*args, upstream=g, out=args[k])[1] is args[k]
            assert_same_bits(args[k], want[1][1 - k], f"{name} in place")
        every_third = np.zeros((rows, 3 * classes), dtype)
        got = run(z, x, q, upstream=g, out=(every_third[:, 1::3], None, None))[1]
        assert_same_bits((every_third[:, 1::3].copy(), *got[1:]), want[1])
        assert not every_third[:, ::3].any() and not every_third[:, 2::3].any()


def test_upstream():
    """[10] Numbers, integers, broadcast and strided arrays; 0 hides an element; zeros have no sign."""
    x, z = make_logits(6, 7), soft((6, 7))
    run = nl.value_grad_hess(WEIGHTED)
    for g in (3, 0.25, np.arange(7), soft((6, 1)), soft((6, 14))[:, ::2], soft((7, 6)).T, [[2.0]]):
        wide = np.broadcast_to(np.asarray(g, np.float32), x.shape).copy()
        assert_same_bits(run(z, x, 2.0, upstream=g), run(z, x, 2.0, upstream=wide))
        once = run(z, x, 2.0)
        assert_same_bits(run(z, x, 2.0, upstream=g)[2], once[2] * wide)
    x[2, 3], x[4, 4], x[0, 0], z[0, 0] = NAN, INF, -INF, 0
    g = np.full(x.shape, -1.0)
    g[2, 3] = g[4, 4] = 0
    grads = nl.value_and_grad(WEIGHTED, EVERY)(z, x, np.full(x.shape, 2.0), upstream=g)[1]
    for a in (*grads, run(z, x, 2.0, upstream=g)[2]):
        assert np.isfinite(np.delete(a, 0)).all()
        assert (positive_zero(a) | (a != 0)).all() and positive_zero(a[2, 3]) and positive_zero(a[4, 4])


def test_limits():
    """[2] Infinite logits."""
    x, z = np.array([-INF, INF, -INF, INF, -INF, INF, NAN]), np.array([0, 1, 1, 0, 0.5, 0.5, 1])
    for dtype in (np.float32, np.float64):
        z = z.astype(dtype)
        for loss, args in ((SIGMOID, ()), (WEIGHTED, (2.0,)), (FOCAL, ())):
            q = 2.0 if args else 1.0
            value, grad, hess = nl.value_grad_hess(loss)(z, x.astype(dtype), *args)
            assert_close(grad, np.array([0, 0, -q, 1, -q / 2, 0.5, NAN]))
            assert_close(hess, np.array([0, 0, 0, 0, 0, 0, NAN]))
            assert_same_bits(value, loss(z, x.astype(dtype), *args))
        by_label, by_weight = nl.value_and_grad(WEIGHTED, EVERY[1:])(z, x.astype(dtype), np.full(7, dtype(2)))[1]
        assert_close(by_label, np.array([INF, -INF, INF, -INF, INF, -INF, NAN], dtype))
        assert_close(by_weight, np.array([0, 0, INF, 0, INF, 0, NAN], dtype))
        by_label = nl.value_and_grad(WEIGHTED, "labels")(z[:1], x[:1].astype(dtype), 0.0)[1]
        assert by_label == 0
        assert_close(FOCAL(z, x.astype(dtype), gamma=0), np.array([0, 0, INF, INF, INF, INF, NAN], dtype))


def test_labels_outside_0_1():
    x, z = make_logits(5, 40, np.float64), soft((5, 40)) * 8 - 4
    value, grad, hess = nl.value_grad_hess(WEIGHTED)(z, x, 3.0)
    sums = [each(lambda x, z, s=s: abs(1 - z) * p(x) + s * abs(3 * z) * p(-x), x, z) for s in (1,)]
    assert_close(grad, each(lambda x, z: (1 - z) * p(x) - 3 * z * p(-x), x, z), magnitude=sums[0])
    assert_close(hess, each(lambda x, z: (1 - z + 3 * z) * p(x) * p(-x), x, z), 8)


def test_shapes_and_old_names():
    for shape in ((), (0, 3), (4, 0), (1,), (2, 3, 4)):
        x, z = make_logits(1, int(np.prod(shape))).reshape(shape), soft(shape)
        value, grads = nl.value_and_grad(WEIGHTED, EVERY)(z, x, 2.0)
        assert all(np.shape(a) == shape for a in (value, *grads[:2])) and np.shape(grads[2]) == ()
        assert_same_bits(nl.value_and_grad(WEIGHTED, EVERY)(targets=z, logits=x, pos_weight=2.0)[1], grads)
        assert np.shape(nl.value_and_grad(WEIGHTED, "pos_weight")(z, x, np.ones(shape))[1]) == shape
        assert all(np.shape(a) == shape for a in nl.value_grad_hess(FOCAL)(z, x))


def test_threads_and_batches():
    """[16] An element alone, in another order, one thread or several."""
    import numba

    x, z = make_logits(40, 3000), soft((40, 3000))
    run = nl.value_and_grad(WEIGHTED, EVERY)
    q = soft(3000, 1)
    want = run(z, x, q)
    order = np.random.default_rng(0).permutation(40)
    got = run(z[order], x[order], q)
    assert_same_bits((got[0], *got[1]), (want[0][order], want[1][0][order], want[1][1][order], want[1][2]))
    assert_same_bits(run(z[3, 5], x[3:4, 5].reshape(()), q[5])[1][:2], (want[1][0][3, 5], want[1][1][3, 5]))
    numba.set_num_threads(2)
    got = run(z, x, q)
    assert_same_bits((got[0], *got[1]), (want[0], *want[1]))


def test_errors():
    """Bad input raises before anything is written."""
    x, z = make_logits(4, 10), soft((4, 10))
    before, run = x.copy(), nl.value_and_grad(WEIGHTED)
    for error, match, call in (
        (ValueError, r"out: expected shape \(4, 10\) to match logits, got \(10, 4\)", lambda: run(z, x, 2.0, out=x.T)),
        (TypeError, "out: expected dtype float32, got float64", lambda: run(z, x, 2.0, out=np.empty((4, 10)))),
        (ValueError, "out: .* read-only", lambda: run(z, x, 2.0, out=np.broadcast_to(np.float32(0), (4, 10)))),
        (ValueError, "upstream: expected a shape that broad", lambda: run(z, x, 2.0, upstream=np.ones(4), out=x)),
        (ValueError, "pos_weight: expected a shape", lambda: run(z, x, np.ones(4), out=x)),
        (ValueError, "pos_weight: expected a number", lambda: run(z, x, out=x)),
        (ValueError, "labels: expected shape", lambda: run(z[0], x, 2.0, out=x)),
        (ValueError, "wrt: expected one of 'logits', 'labels'", lambda: nl.value_and_grad(SIGMOID, "pos_weight")),
        (ValueError, "hessian: expected one of 'diag", lambda: nl.value_grad_hess(SIGMOID, "upper_bound")(z, x)),
        (TypeError, "loss: expected one of .*, got 'softmax'", lambda: nl.value_grad_hess(nl.softmax)),
        (ValueError, r"gamma: expected a finite number in \[0, 1e\+06\], got -1", lambda: FOCAL(z, x, gamma=-1)),
        (ValueError, "gamma: expected a finite number", lambda: FOCAL(z, x, gamma=NAN)),
        (ValueError, r"alpha: expected a finite number in \[0, 1\], got 2", lambda: FOCAL(z, x, alpha=2)),
        (TypeError, "alpha: expected a real number, got str", lambda: FOCAL(z, x, alpha="balanced")),
    ):
        with pytest.raises(error, match=match):
            call()
    assert_same_bits(x, before)
