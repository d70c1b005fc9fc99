"""The options of cross_entropy in every combination, focal loss, Hessians: values and gradients against the reference.

[n]: a line of docs/PITFALLS.md.
"""

import itertools

import mpmath
import numba
import numpy as np
import pytest
import reference
from common import BFLOAT16, DTYPES, EPS, LAYOUTS, assert_same_bits, make_labels, make_logits, result_dtype

import numbaloss as nl
from numbaloss import _check

ROWS, CLASSES = 6, 20
CHOICES = {
    "label_smoothing": (0.0, 0.1),
    "z_loss": (0.0, 0.01),
    "softcap": (None, 2.5),
    "temperature": (1.0, 0.7),
    "weights": (None, np.array([1, 0, 0.5, 2, 1, 3.0])),
    "class_weights": (None, np.arange(CLASSES) % 4 / 2),
}
COMBINATIONS = [dict(zip(CHOICES, values)) for values in itertools.product(*CHOICES.values())]


def problem(dtype=np.float64, dense=False):
    x, y = make_logits(ROWS, CLASSES, dtype), make_labels(ROWS, CLASSES)
    y[2] = -100
    if dense:
        y = np.random.default_rng(3).random(x.shape).astype(result_dtype(dtype))
    return x, y


def assert_near(got, exact, eps, scale, what=""):
    error = np.abs(got.astype(np.float64) - exact) / np.maximum(np.abs(scale), 1e-300)
    assert np.all(error <= eps), f"{what}: {np.max(error):.3g}, limit {eps:.3g}"


SOME = [("float32", False), ("float64", False), ("float64", True), ("bfloat16", False), ("float16", True)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype, dense", SOME)
def test_every_combination(dtype, dense, reduction):
    """[5, 7, 9, 10] Two roundings of each logit, and what a loss and a gradient may be off."""
    x, y = problem(DTYPES[dtype], dense)
    upstream = np.array([1, 2, -1, 0.5, 3, 1.0]) if reduction == "none" else np.float64(1.5)
    eps, wide = EPS[result_dtype(x.dtype)], x.astype(np.float64)
    rounding = {np.dtype(np.float16): 2.0**-11, np.dtype(BFLOAT16): 2.0**-8}.get(x.dtype, 0.0)
    for options in COMBINATIONS:
        value, grad = nl.value_and_grad(nl.cross_entropy)(x, y, reduction=reduction, upstream=upstream, **options)
        assert_same_bits(value, nl.cross_entropy(x, y, reduction=reduction, **options))
        assert grad.dtype == x.dtype and grad.shape == x.shape
        exact = reference.cross_entropy(wide, y, reduction=reduction, **options)
        assert_near(np.asarray(value), exact, 16 * eps, np.maximum(exact, 0.1), f"value {options}")
        exact = reference.cross_entropy_gradient(wide, y, upstream, reduction, **options)
        scale = np.abs(exact).max(-1, keepdims=True)
        assert_near(grad, exact, 16 * eps + rounding, scale, f"gradient {options}")
        if options["weights"] is not None or not dense:
            still = options["weights"] == 0 if options["weights"] is not None else np.zeros(ROWS, bool)
            still = still | (y == -100) if not dense else still
            assert (grad[still] == 0).all() and not np.signbit(grad[still]).any()


def differences(function, x, step=1e-5):
    """Central differences of a scalar function of an array."""
    result = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        shift = np.zeros(x.shape)
        shift[i] = step
        result[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return result


@pytest.mark.parametrize("dense", [False, True], ids=["labels", "probabilities"])
def test_by_weights_and_targets(dense):
    """By the weights, 0 where they are 0, and by probabilities; a tuple of names; the divisor is differentiated too."""
    x, y = problem(dense=dense)
    w = np.array([1, 0, 0.5, 2, 1, 3.0])
    names = ("weights", "logits", "targets") if dense else ("weights", "logits")
    for options in COMBINATIONS[::4]:
        options = options | {"weights": w}
        for reduction in ("mean", "sum"):
            run = nl.value_and_grad(nl.cross_entropy, names)
            value, grads = run(x, y, reduction=reduction, **options)
            assert_same_bits(grads[1], nl.value_and_grad(nl.cross_entropy)(x, y, reduction=reduction, **options)[1])

            def at(weights, y=y, options=options, reduction=reduction):
                return nl.cross_entropy(x, y, reduction=reduction, **options | {"weights": weights})

            exact = np.where(w == 0, 0, differences(at, w))
            np.testing.assert_allclose(grads[0], exact, atol=1e-8 * max(1, value))
            if dense:
                exact = differences(lambda y, at=at: at(w, y), y)
                np.testing.assert_allclose(grads[2], exact, atol=1e-8 * max(1, value))


def test_broadcast_labels():
    """The gradient of labels that broadcast is summed back; the true derivative by name."""
    x, rng = make_logits(4, 7, np.float64).reshape(2, 2, 7), np.random.default_rng(0)
    g = rng.random((2, 2))
    for shape in ((2, 2, 7), (7,), (1, 2, 7), (2, 1, 1), ()):
        labels = rng.random(shape)
        run = nl.value_and_grad(nl.softmax_cross_entropy_with_logits, ("labels", "logits"), derivative="true")
        _, (by_label, by_logit) = run(labels, x, upstream=g)

        def total(labels, x=x):
            return (nl.softmax_cross_entropy_with_logits(labels, x) * g).sum()

        assert np.shape(by_label) == shape
        np.testing.assert_allclose(by_label, differences(total, labels), atol=1e-8)
        np.testing.assert_allclose(by_logit, differences(lambda x, y=labels: total(y, x), x), atol=1e-8)
        default = nl.value_and_grad(nl.softmax_cross_entropy_with_logits)(labels, x, upstream=g)[1]
        np.testing.assert_allclose(default, g[..., None] * (reference.softmax(x) - labels), atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_minus_infinity(dtype):
    """[1, 5] A class that is absent: smoothing over it is an infinite loss unless its class weight is 0; the gradient
    is finite, and a softcap leaves it absent."""
    x, y = make_logits(3, 9, dtype), np.array([1, 2, 3])
    x[0, 5] = x[1, 8] = -np.inf
    by_class = np.array([1, 1, 1, 1, 1, 0, 1, 1, 0.0])
    for cap in (None, 4.0):
        run = nl.value_and_grad(nl.cross_entropy)
        value, grad = run(x, y, label_smoothing=0.1, softcap=cap, reduction="none")
        assert np.isinf(value[:2]).all() and np.isfinite(value[2])
        assert np.isfinite(grad.astype(np.float64)).all()
        value, grad = run(x, y, label_smoothing=0.1, softcap=cap, class_weights=by_class, reduction="none")
        assert np.isfinite(value).all() and grad[0, 5] == 0 and grad[1, 8] == 0
    x[0, 0], x[1] = np.nan, -np.inf
    value, grad = nl.value_and_grad(nl.cross_entropy)(x, y, z_loss=0.1, softcap=3.0, reduction="none")
    assert np.isnan(value[:2]).all() and np.isnan(grad[:2].astype(np.float64)).all() and np.isfinite(value[2])


@pytest.mark.parametrize("lead", [1.0, 20.0, 40.0, 80.0])
def test_confident_rows(lead):
    """[3] Relatively right where one class leads by far, its entry of the gradient too, also of dense labels."""
    x = make_logits(1, 9, np.float64, scale=1.0)
    x[0, 3] = lead
    with mpmath.workdps(60):
        for temperature in (1.0, 0.7):
            terms = [mpmath.exp((mpmath.mpf(v) - mpmath.mpf(x[0, 3])) / mpmath.mpf(temperature)) for v in x[0]]
            others = mpmath.fsum(t for j, t in enumerate(terms) if j != 3)
            loss, entry = float(mpmath.log1p(others)), -float(others / (1 + others) / mpmath.mpf(temperature))
            hot = np.eye(9)[[3]]
            for y in ([3], hot):
                run = nl.value_and_grad(nl.cross_entropy)
                value, grad = run(x, y, temperature=temperature, z_loss=0.0)
                limit = (8 + 2 * lead) * 2.0**-52
                assert abs(value - loss) <= limit * loss and abs(grad[0, 3] - entry) <= limit * abs(entry)


@pytest.mark.parametrize("options", [{"z_loss": 0.1, "label_smoothing": 0.2}, {"softcap": 5.0}, {"temperature": 3.0}])
@pytest.mark.parametrize("dense", [False, True], ids=["labels", "probabilities"])
def test_threads_pieces_and_layouts(options, dense, monkeypatch):
    """[12, 16] Whole or in pieces, alone or among others, in place, strided: the same bits."""
    x, y = make_logits(400, 301), make_labels(400, 301)
    y = np.random.default_rng(0).random(x.shape, np.float32) if dense else y
    run = nl.value_and_grad(nl.cross_entropy)
    want = run(x, y, reduction="none", **options)
    first = run(x[7:9], y[7:9], reduction="none", **options)
    assert_same_bits(first, tuple(a[7:9] for a in want))
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert_same_bits(run(x, y, reduction="none", **options), want)
    finally:
        numba.set_num_threads(before)
    monkeypatch.setitem(_check.PIECE, "numpy", 5000)
    for layout in ("unaligned", "every second class", "fortran", "big-endian", "classes reversed"):
        assert_same_bits(run(LAYOUTS[layout](x), y, reduction="none", **options), want, layout)
    cube, targets = x.reshape(5, 80, 301), y.reshape(5, 80, *y.shape[1:])
    got = run(
        np.moveaxis(cube, -1, 1), np.moveaxis(targets, -1, 1) if dense else targets, axis=1, reduction="none", **options
    )
    assert_same_bits(np.moveaxis(got[1], 1, -1).reshape(x.shape), want[1])
    place = x.copy()
    assert run(place, y, reduction="none", out=place, **options)[1] is place
    assert_same_bits(place, want[1])


@pytest.mark.parametrize("classes", [1, 2, 1024, 1025, 8193, 20_000])
def test_many_classes(classes):
    x, y = make_logits(3, classes, np.float64), make_labels(3, classes)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0}
    value, grad = nl.value_and_grad(nl.cross_entropy)(x, y, **options)
    np.testing.assert_allclose(value, reference.cross_entropy(x, y, **options), rtol=1e-14, atol=1e-15)
    exact = reference.cross_entropy_gradient(x, y, **options)
    np.testing.assert_allclose(grad, exact, atol=1e-14 * max(1, np.abs(exact).max()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal(gamma):
    """[3] By 50 digits: right relatively for targets that are all but certain, and those that are hopeless."""
    x, y = make_logits(6, 9, np.float64, scale=1.0), np.arange(6)
    for r, lead in enumerate((1, 10, 30, -10, -300, 0)):
        x[r, r] = lead
    value, grad = nl.value_and_grad(nl.focal_loss)(x, y, gamma=gamma, reduction="none")
    assert_same_bits(value, nl.focal_loss(x, y, gamma=gamma, reduction="none"))
    if gamma == 0:
        assert_same_bits((value, grad), nl.value_and_grad(nl.cross_entropy)(x, y, reduction="none"))
    with mpmath.workdps(50):
        for r in range(6):
            terms = [mpmath.exp(mpmath.mpf(v)) for v in x[r]]
            total = mpmath.fsum(terms)
            p, q = terms[r] / total, mpmath.fsum(t for j, t in enumerate(terms) if j != r) / total
            loss = -mpmath.log(p) * q**gamma
            limit = (gamma + 1) * 2.0**-52 * (8 + 2 * abs(float(x[r, r])))
            assert abs(value[r] - float(loss)) <= limit * float(loss)
            slope = q**gamma * (1 - gamma * p * mpmath.log(p) / q)
            for j in range(9):
                entry = float(slope * (-q if j == r else terms[j] / total))
                assert abs(grad[r, j] - entry) <= limit * float(slope * q)


def test_hessians():
    """[22] The diagonal by differences of the gradient, and the bound, which is twice it."""
    x, y = problem()
    y = np.where(y < 0, 0, y)
    dense = np.random.default_rng(0).random(x.shape)
    for targets in (y, dense):
        for options in (
            {},
            {"label_smoothing": 0.1, "z_loss": 0.3, "class_weights": np.arange(20.0)},
            {"temperature": 0.7},
        ):
            value, grad, hess = nl.value_grad_hess(nl.cross_entropy)(x, targets, **options)
            assert_same_bits((value, grad), nl.value_and_grad(nl.cross_entropy)(x, targets, **options))
            step, exact = 1e-5, np.empty(x.shape)
            for i in np.ndindex(x.shape):
                shift = np.zeros(x.shape)
                shift[i] = step
                slopes = [nl.value_and_grad(nl.cross_entropy)(x + s * shift, targets, **options)[1][i] for s in (1, -1)]
                exact[i] = (slopes[0] - slopes[1]) / (2 * step)
            np.testing.assert_allclose(hess, exact, atol=1e-8)
            bound = nl.value_grad_hess(nl.cross_entropy, "upper_bound")(x, targets, **options)[2]
            assert_same_bits(bound, 2 * hess)
    p = reference.softmax(x)
    hess = nl.value_grad_hess(nl.sparse_softmax_cross_entropy_with_logits)(y, x.astype(np.float32))[2]
    assert hess.dtype == np.float32
    np.testing.assert_allclose(hess, p * (1 - p), rtol=1e-5, atol=1e-6)
    x[0, 3] = 60.0  # 1 - p of the largest class without cancellation
    hess = nl.value_grad_hess(nl.softmax_cross_entropy_with_logits)(np.eye(20)[y], x)[2]
    exact = np.exp(np.delete(x[0], 3) - 60.0).sum()
    np.testing.assert_allclose(hess[0, 3], exact, rtol=1e-13)


def test_errors():
    x, y = problem()
    run = nl.value_and_grad(nl.cross_entropy)
    for error, message, call in (
        (
            ValueError,
            r"label_smoothing: expected a finite number in \[0, 1\], got 1.5",
            lambda: run(x, y, label_smoothing=1.5),
        ),
        (ValueError, "z_loss: expected a finite number from 0 on, got -1", lambda: nl.cross_entropy(x, y, z_loss=-1)),
        (ValueError, "softcap: expected a finite number above 0, got 0", lambda: nl.cross_entropy(x, y, softcap=0)),
        (ValueError, "temperature: .* above 0, got nan", lambda: nl.cross_entropy(x, y, temperature=np.nan)),
        (TypeError, "temperature: expected a real number, got str", lambda: nl.cross_entropy(x, y, temperature="hot")),
        (ValueError, "gamma: expected a finite number", lambda: nl.focal_loss(x, y, gamma=-1)),
        (TypeError, "targets: expected integers, got dtype float64", lambda: nl.focal_loss(x, x)),
        (
            ValueError,
            "weights: expected an argument to differentiate by",
            lambda: nl.value_and_grad(nl.cross_entropy, "weights")(x, y),
        ),
        (
            TypeError,
            "targets: expected class probabilities",
            lambda: nl.value_and_grad(nl.cross_entropy, "targets")(x, y),
        ),
        (
            ValueError,
            "derivative: expected None for cross_entropy",
            lambda: nl.value_and_grad(nl.cross_entropy, derivative="true"),
        ),
        (
            TypeError,
            "out: expected a tuple of 2",
            lambda: nl.value_and_grad(nl.cross_entropy, ("logits", "weights"))(x, y, out=x),
        ),
        (
            ValueError,
            "softcap: expected None for a Hessian",
            lambda: nl.value_grad_hess(nl.cross_entropy)(x, y, softcap=2.0),
        ),
        (
            TypeError,
            "out: expected dtype float64, got int64",
            lambda: nl.value_and_grad(nl.cross_entropy, "weights")(x, y, weights=np.ones(6), out=np.zeros(6, np.int64)),
        ),
        (ValueError, "hessian: expected one of", lambda: nl.value_grad_hess(nl.cross_entropy, "exact")(x, y)),
    ):
        before = x.copy()
        with pytest.raises(error, match=message):
            call()
        assert_same_bits(x, before)
