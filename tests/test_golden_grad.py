"""Gradients that TensorFlow and torch recorded, and the exact ones (tests/golden; see test_golden.py).

16-bit logits are widened first: ours are rounded at the end, theirs all the way.
"""

import golden
import numpy as np
import pytest
import reference
from common import BAR, EPS, error_in_eps, loss_limit, result_dtype
from test_golden import TF, inputs, report, within

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("one_thread")


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def sum_to(a, shape):
    """The sum over the axes along which an array of this shape would be broadcast to a."""
    a = a.sum(axis=tuple(range(a.ndim - len(shape))))
    return a.sum(axis=tuple(k for k, size in enumerate(shape) if size == 1), keepdims=True)


@pytest.mark.parametrize("function", TF[3:])
def test_sigmoid_gradients(function):
    """Exact gradients and TensorFlow's; its gradient of sum(u * gradient) is u times the Hessian."""
    g, loss, failures, total, seconds = golden.load("tf"), getattr(nl, function), [], 0, 0
    for case in (c for c in g.cases if c["function"] == function and "dlogits" in c.get("truth", {})):
        arrays, options = inputs("tf", case)
        arrays = {k: v.astype(result_dtype(v.dtype)) for k, v in arrays.items()}  # 16 bits: not rounded
        names = [name for name in arrays if f"d{name}" in case["truth"]]
        upstream = np.float64(g[case["upstream"]]) if "upstream" in case else None
        _, grads = nl.value_and_grad(loss, names)(**arrays, **options, upstream=upstream)
        x, z = (arrays[name].astype(np.float64) for name in ("logits", "labels"))
        q = np.float64(arrays.get("pos_weight", options.get("pos_weight", 1.0)))
        terms = {"logits": np.abs((1 - z) * sigmoid(x)) + np.abs(q * z * sigmoid(-x))}
        terms["labels"] = np.abs(q) * np.logaddexp(0, -x) + np.logaddexp(0, x)
        terms = {k: v * np.abs(1 if upstream is None else upstream) for k, v in terms.items()}
        terms["pos_weight"] = sum_to(np.abs(z * np.logaddexp(0, -x) * (1 if upstream is None else upstream)), q.shape)
        for name, got in zip(names, grads):
            total += 1
            exact, recorded, tol = g[case["truth"][f"d{name}"]], g[case["grads"][name]], case["tol"][f"d{name}"]
            error = error_in_eps(got, exact, terms[name]).max(initial=0)
            failures += [f"{case['id']} {name}: {error:.3g} eps"] if not error <= BAR else []
            if case["copy"] == "exact" and not within(got, recorded, tol["rtol"], tol["atol"]):
                failures.append(f"{case['id']} {name}: got {got!r}, recorded {recorded!r}")
        if "second" in case and case["copy"] == "exact":
            seconds += 1
            tol, expected = case["tol"]["second"], g[case["second"]["expected"]]
            hess = nl.value_grad_hess(loss)(**arrays, **options, upstream=g[case["second"]["u"]])[2]
            if not within(hess, expected, tol["rtol"], tol["atol"]):
                failures.append(f"{case['id']} Hessian: got {hess!r}, recorded {expected!r}")
    assert seconds > 10
    report(failures, total)


def label_terms(arrays, axis, upstream):
    """What an entry of the gradient by labels is a sum of, in magnitude."""
    logits = arrays["logits"].astype(np.float64)
    g = np.broadcast_to(1.0 if upstream is None else np.abs(upstream), np.delete(logits.shape, axis))
    return sum_to(-reference.log_softmax(logits, axis) * np.expand_dims(g, axis), arrays["labels"].shape)


def along_rows(exact, axis=-1):
    """The largest entry of each row, for all its entries."""
    return np.broadcast_to(np.abs(exact).max(axis=axis, keepdims=True, initial=0), exact.shape)


def hessian_product(loss, x, u, options):
    """d sum(u * gradient(x)) / d x by central differences of fourth order; the Hessian is symmetric."""
    h = 1e-3
    steps = [nl.value_and_grad(loss)(logits=x + k * h * u, **options)[1] for k in (-2, -1, 1, 2)]
    return (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h)


def tf_cases(function):
    return [c for c in golden.load("tf").cases if c["function"] == function and "dlogits" in c.get("truth", {})]


@pytest.mark.parametrize("function", TF[:3])
def test_softmax_gradients(function):
    g, loss, failures, total = golden.load("tf"), getattr(nl, function), [], 0
    for case in tf_cases(function):
        arrays, options = inputs("tf", case)
        arrays = {k: v.astype(result_dtype(v.dtype)) if v.dtype.kind not in "iu" else v for k, v in arrays.items()}
        names = tuple(n for n in arrays if f"d{n}" in case["truth"])
        upstream = np.float64(g[case["upstream"]]) if "upstream" in case else None
        _, grads = nl.value_and_grad(loss, names)(**arrays, **options, upstream=upstream)
        for name, got in zip(names, grads):
            total += 1
            exact, tol = g[case["truth"][f"d{name}"]], case["tol"][f"d{name}"]
            recorded = g[case["grads"][name]] if name in case["grads"] and case["copy"] == "exact" else None
            axis = options.get("axis", options.get("dim", -1))
            if name == "weights":  # the entry of a weight of 0 is 0
                counts = arrays["weights"] != 0
                wrong = not within(got[counts], exact[counts], tol["rtol"], tol["atol"]) or np.any(got[~counts])
                recorded = np.where(counts, recorded, recorded.dtype.type(0)) if recorded is not None else None
            else:
                scale = label_terms(arrays, axis, upstream) if name == "labels" else along_rows(exact, axis)
                kind = result_dtype(arrays["logits"].dtype)  # float64 labels of float32 logits get its accuracy
                limit = np.maximum(2 * BAR, loss_limit(exact, kind))  # exp(-70) of rounded -70
                noise = np.abs(got - exact) < 2.0**-180  # the exact values have 200 bits
                wrong = not np.all(noise | (error_in_eps(got.astype(kind), exact, scale) <= limit))
            failures += [f"{case['id']} {name}: got {got!r}, exact {exact!r}"] if wrong else []
            if recorded is not None and not within(got, recorded, tol["rtol"], tol["atol"]):
                failures.append(f"{case['id']} {name}: got {got!r}, recorded {recorded!r}")
        if "dlogits_autodiff" in case["truth"]:
            got = nl.value_and_grad(loss, derivative="true")(**arrays, **options, upstream=upstream)[1]
            exact = g[case["truth"]["dlogits_autodiff"]]
            error = error_in_eps(got, exact, along_rows(exact, options.get("axis", -1))).max(initial=0)
            failures += [f"{case['id']} true derivative: {error:.3g} eps"] if not error <= 2 * BAR else []
    report(failures, total)


@pytest.mark.parametrize("function", TF[:3])
def test_second_order(function):
    """TensorFlow's products of a Hessian and a vector, by differences of our gradients in float64."""
    g, loss, failures, total = golden.load("tf"), getattr(nl, function), [], 0
    for case in tf_cases(function):
        if "second" not in case or case["copy"] != "exact" or case["dtype"] not in ("float32", "float64"):
            continue
        arrays, options = inputs("tf", case)
        arrays = {k: v.astype(np.float64) if v.dtype.kind not in "iu" else v for k, v in arrays.items()}
        x, u = arrays.pop("logits"), g[case["second"]["u"]].astype(np.float64)

        total += 1
        got, expected = hessian_product(loss, x, u, arrays | options), g[case["second"]["expected"]].astype(np.float64)
        tol = case["tol"]["second"]
        if not within(got, expected, max(tol["rtol"], 1e-9), tol["atol"] + 1e-9):
            failures.append(f"{case['id']}: got {got!r}, recorded {expected!r}")
    assert total > 10
    report(failures, total)


def test_torch():
    """cross_entropy with class weights, smoothing, ignore_index, probabilities; the reference is torch's in float64."""
    g, failures, total = golden.load("torch"), [], 0
    for case in g.cases:
        if case["function"] != "cross_entropy" or "dinput" not in case.get("ref", {}) or case["copy"] != "exact":
            continue
        arrays, options = inputs("torch", case)
        logits = arrays["input"].astype(result_dtype(arrays["input"].dtype))
        options |= {"class_weights": arrays["weight"]} if "weight" in arrays else {}
        upstream = g[case["upstream"]].astype(np.float64) if "upstream" in case else None
        axis = min(1, logits.ndim - 1)
        _, got = nl.value_and_grad(nl.cross_entropy)(logits, arrays["target"], axis=axis, upstream=upstream, **options)
        exact = g[case["ref"]["dinput"]].astype(np.float64)
        scale = along_rows(exact, axis)
        with np.errstate(invalid="ignore"):
            near = np.abs(got - exact) <= 2 * BAR * EPS[got.dtype] * scale + 2.0**-51 * np.abs(scale).max(initial=0)
        total += 1
        if not np.all(near | (np.isnan(got) & np.isnan(exact))):
            failures.append(f"{case['id']}: got {got!r}, in float64 {exact!r}")
    assert total > 500
    report(failures, total)
