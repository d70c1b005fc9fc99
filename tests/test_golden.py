"""Recorded results of TensorFlow and torch (tests/golden).

Our results are float32 for half-precision logits. They are rounded to the recorded dtype to be compared with it, at the
case's own tolerance, and compared unrounded, at float32 accuracy, with the exact ("truth") or float64 ("ref") value.
What is marked "quirk" is compared with the definition (reference.py) instead.

Left out: torch's nll_loss, which takes log-probabilities and picks from them, so there is nothing of ours to compare
(its selection, weights and divisor are those of cross_entropy).
"""

import golden
import numpy as np
import pytest
import reference
from common import BAR, EPS, assert_close, error_in_eps, loss_limit, result_dtype

import numbaloss

pytestmark = pytest.mark.usefixtures("one_thread")

TF = ("sequence_loss", "softmax_cross_entropy_with_logits", "sparse_softmax_cross_entropy_with_logits")
TF += ("sigmoid_cross_entropy_with_logits", "weighted_cross_entropy_with_logits")
TORCH = ("cross_entropy", "binary_cross_entropy_with_logits")

# What they refuse and we take, on purpose.
ACCEPTED = {
    "sce/bad_shape/axis_-2": "any axis, positive or negative",
    "sce/bad_shape/3d_broadcast_inner": "labels broadcast by NumPy's rules",
    "sce/bad_shape/labels_scalar": "labels broadcast by NumPy's rules",
    "seq/adv/bad_label_-1_weight0": "a weight of 0 hides its row, and its label",
    "seq/adv/bad_label_4_weight0": "a weight of 0 hides its row, and its label",
    "ce/bad_target_dtype/int8": "integer labels of any width",
    "ce/bad_target_dtype/int16": "integer labels of any width",
    "ce/bad_target_dtype/int32": "integer labels of any width",
}
# What they read in some way and we refuse: shapes that do not fit, zero classes, a pos_weight that enlarges the result,
# negative smoothing.
REFUSED = ("seq/shape/", "/zero_classes", "/pw_broadcasts_result_up", "ce/bad_label_smoothing/")


def cases(bundle, function, copy):
    return [c for c in golden.load(bundle).cases if (c["function"], c["copy"]) == (function, copy)]


def inputs(bundle, case):
    arrays = {name: golden.load(bundle)[key] for name, key in case["inputs"].items()}
    return arrays, dict(case["kwargs"])


def reduced(losses, weight, reduction, total=np.sum):
    """torch's reduction of an element-wise loss, in float64."""
    values = losses.astype(np.float64) * (1.0 if weight is None else weight.astype(np.float64))
    return values if reduction == "none" else reference.divide(total(values), 1 if reduction == "sum" else values.size)


def ours(bundle, case):
    arrays, options = inputs(bundle, case)
    if case["function"] in TF:
        return getattr(numbaloss, case["function"])(**arrays, **options)
    logits, targets, weight = arrays["input"], arrays["target"], arrays.get("weight")
    if case["function"] == "cross_entropy":
        options |= {"class_weights": weight} if weight is not None else {}
        return numbaloss.cross_entropy(logits, targets, axis=min(1, logits.ndim - 1), **options)
    if "pos_weight" in arrays:
        losses = numbaloss.weighted_cross_entropy_with_logits(targets, logits, arrays["pos_weight"])
    else:
        losses = numbaloss.sigmoid_cross_entropy_with_logits(targets, logits)
    out = reduced(losses, weight, options.get("reduction", "mean"))
    return np.asarray(out).astype(losses.dtype)


def definition(bundle, case, magnitude=False):
    """The reference, or the sum of its terms' magnitudes."""
    arrays, options = inputs(bundle, case)
    function = case["function"]
    if function == "sequence_loss":
        return reference.sequence_loss(**arrays, **options, magnitude=magnitude)
    if function == "sparse_softmax_cross_entropy_with_logits":
        return reference.sparse_losses(**arrays)
    if function == "softmax_cross_entropy_with_logits":
        return reference.dense_losses(**arrays, **options, magnitude=magnitude)
    if function == "sigmoid_cross_entropy_with_logits":
        return reference.sigmoid_losses(**arrays, magnitude=magnitude)
    if function == "weighted_cross_entropy_with_logits":
        return reference.weighted_losses(**arrays, **options, magnitude=magnitude)
    logits, targets, weight = arrays["input"], arrays["target"], arrays.get("weight")
    if function == "cross_entropy":
        options |= {"class_weights": weight, "axis": min(1, logits.ndim - 1), "magnitude": magnitude}
        return reference.cross_entropy(logits, targets, **options)
    losses = reference.weighted_losses(targets, logits, arrays.get("pos_weight", 1.0), magnitude=magnitude)
    return reduced(losses, weight, options.get("reduction", "mean"))


def within(got, expected, rtol, atol):
    got, expected = np.float64(got), np.float64(expected)
    with np.errstate(invalid="ignore"):
        near = np.abs(got - expected) <= atol + rtol * np.abs(expected)
    return bool(np.all(near | (got == expected) | (np.isnan(got) & np.isnan(expected))))


def logits_of(bundle, case):
    return golden.load(bundle)[case["inputs"].get("logits") or case["inputs"]["input"]]


def largest_logit(bundle, case):
    logits = logits_of(bundle, case).astype(np.float64)
    return np.abs(np.where(np.isfinite(logits), logits, 0)).max(initial=1)


def misses(bundle, case, got, exact):
    """The worst error in eps if that is over the bar, relative to the sum of the terms' magnitudes where they differ in
    sign. An exact value was computed as lse - x in 200 bits, so below 2^-200 of the logits it is noise."""
    magnitude = np.abs(definition(bundle, case, magnitude=True))
    with np.errstate(invalid="ignore"):
        noise = np.abs(got.astype(np.float64) - exact) <= 2.0**-199 * largest_logit(bundle, case)
    error = np.where(noise, 0, error_in_eps(got, exact, magnitude))
    over = error > loss_limit(exact, got.dtype)
    return f"{error.max():.3g} eps" if np.any(over) else ""


def compare(bundle, case, got):
    """What is wrong with a result that is to be reproduced."""
    g, wrong = golden.load(bundle), []
    expected, tolerance = g[case["expected"]["loss"]], case["tol"]["loss"]
    if np.shape(got) != tuple(case["result_shape"]) or got.dtype != result_dtype(logits_of(bundle, case).dtype):
        return [f"{got.dtype} {np.shape(got)}, expected {case['result_dtype']} {case['result_shape']}"]
    with np.errstate(over="ignore"):
        rounded = got.astype(expected.dtype)
    # torch takes lse - x, in float64 too: 2 eps of the logits, and class weights enter as they are
    factor = np.abs(g[case["inputs"]["weight"]].astype(np.float64)).max() if "weight" in case["inputs"] else 1
    noise = 2.0**-51 * largest_logit(bundle, case) * max(1, factor) if bundle == "torch" else 0
    if not within(rounded, expected, tolerance["rtol"], tolerance["atol"] + noise):
        wrong.append(f"got {got!r}, recorded {expected!r}")
    if "loss" in case.get("truth", {}):
        exact = g[case["truth"]["loss"]]
        error = misses(bundle, case, got, exact)
        wrong += [f"got {got!r}, exact {exact!r}: {error}"] if error else []
    if "loss" in case.get("ref", {}) and got.dtype == np.float32:
        ref = g[case["ref"]["loss"]]
        if not within(got, ref, BAR * EPS[got.dtype], noise):
            wrong.append(f"got {got!r}, in float64 {ref!r}")
    return wrong


def report(failures, total):
    assert total > 0
    assert not failures, f"{len(failures)} of {total}:\n" + "\n".join(failures)


BUNDLES = [("tf", f) for f in TF] + [("torch", f) for f in TORCH]


@pytest.mark.parametrize("bundle, function", BUNDLES)
@pytest.mark.parametrize("who", ["numbaloss", "reference"])
def test_exact(bundle, function, who):
    failures, chosen = [], cases(bundle, function, "exact")
    for case in chosen:
        try:
            if who == "numbaloss":
                wrong = compare(bundle, case, ours(bundle, case))
            else:
                value = np.asarray(definition(bundle, case))
                wrong = compare(bundle, case, value.astype(result_dtype(logits_of(bundle, case).dtype)))
        except Exception as error:
            wrong = [f"raised {error!r}"]
        failures += [f"{case['id']}: {w}" for w in wrong]
    report(failures, len(chosen))


@pytest.mark.parametrize("bundle, function", [b for b in BUNDLES if b[1] != TF[2]])
def test_quirk(bundle, function):
    failures, chosen = [], cases(bundle, function, "quirk")
    for case in chosen:
        try:
            got = ours(bundle, case)
        except ValueError as error:
            if not any(part in case["id"] for part in REFUSED):
                failures.append(f"{case['id']}: raised {error!r}")
            continue
        except Exception as error:
            failures.append(f"{case['id']}: raised {error!r}")
            continue
        if any(part in case["id"] for part in REFUSED):
            failures.append(f"{case['id']}: did not raise, got {got!r}")
            continue
        exact = definition(bundle, case)
        error = misses(bundle, case, got, exact)
        failures += [f"{case['id']}: got {got!r}, expected {exact!r}: {error}"] if error else []
        if "loss" in case.get("truth", {}):
            truth = golden.load(bundle)[case["truth"]["loss"]]
            error = misses(bundle, case, got, truth)
            failures += [f"{case['id']}: got {got!r}, exact {truth!r}: {error}"] if error else []
    report(failures, len(chosen))


@pytest.mark.parametrize("bundle, function", BUNDLES)
def test_error(bundle, function):
    failures, chosen = [], cases(bundle, function, "error")
    for case in chosen:
        try:
            got = ours(bundle, case)
        except (ValueError, TypeError) as error:
            kind = TypeError if case["id"].endswith("bad_target_dtype/bool") else ValueError
            kind = (TypeError, ValueError) if case["id"].startswith("ce/bad_target_dtype/float32") else kind
            if case["id"] in ACCEPTED or not isinstance(error, kind) or not str(error):
                failures.append(f"{case['id']}: raised {error!r}")
            continue
        except Exception as error:
            failures.append(f"{case['id']}: raised {error!r}")
            continue
        if case["id"] not in ACCEPTED:
            failures.append(f"{case['id']}: did not raise, got {got!r}")
        elif misses(bundle, case, got, definition(bundle, case)):
            failures.append(f"{case['id']}: got {got!r}, expected {definition(bundle, case)!r}")
    report(failures, len(chosen))


def divisor(case):
    """The sum of weights that tf.contrib divided by, or None."""
    weights, options = golden.load("tf")[case["inputs"]["weights"]].astype(np.float64), case["kwargs"]
    axes = [axis for axis, name in ((0, "batch"), (1, "timesteps")) if options.get(f"average_across_{name}", True)]
    return weights.sum(axis=tuple(axes)) if axes else None


@pytest.mark.parametrize("version", ["113", "115"])
def test_tf1(version):
    """TensorFlow 1.13 added 1e-12 to the divisor."""
    newer = {c["id"]: c for c in golden.load("tf").cases}
    failures, total = [], 0
    for case in golden.read(f"tf1_{version}")["cases"]:
        if newer[case["id"]]["copy"] != "exact" or "error" in case:
            continue
        total += 1
        got = ours("tf", newer[case["id"]])
        loss, tolerance = case["loss"], newer[case["id"]]["tol"]["loss"]
        dtype = golden.ml_dtypes.bfloat16 if loss["dtype"] == "bfloat16" else np.dtype(loss["dtype"])
        expected, rounded = np.reshape(loss["value"], loss["shape"]).astype(np.float64), got.astype(dtype)
        below = divisor(case)
        if version == "113" and below is not None:
            if (np.any(below == 0) and (dtype == np.float16 or np.any(expected))) or np.any(np.isinf(below)):
                continue  # 0 / 0, as 1e-12 is 0 in float16; x / 1e-12; an infinite divisor, which gave 0
            if dtype != np.float16:
                expected = expected * np.where(below == 0, 1, 1 + 1e-12 / np.where(below == 0, 1, below))
        if np.shape(got) != expected.shape or not within(rounded, expected, tolerance["rtol"], tolerance["atol"]):
            failures.append(f"{case['id']}: got {got!r}, recorded {expected!r}")
    report(failures, total)


# -- numbers printed in the documentation of TensorFlow, and in a much-read blog ------------------------------------


def test_documented_sequence_loss():
    logits = np.array([[[1.0, 2], [1, 2]], [[1, 2], [1, 2]]])
    loss = numbaloss.sequence_loss(logits, [[0, 1], [1, 1]], np.ones((2, 2)))
    assert loss == 0.5632616875182228  # the blog prints 0.563261687518082, of TF 1.13
    assert loss.dtype == np.float64


def test_documented_equal_logits():
    """Six rows of four logits 0.5: ln 4."""
    logits = np.full((2, 3, 4), 0.5)
    assert numbaloss.sequence_loss(logits, np.zeros((2, 3), int), np.ones((2, 3))) == 1.3862943611198906
    single = numbaloss.sequence_loss(logits.astype(np.float32), np.zeros((2, 3), int), np.ones((2, 3)))
    assert_close(single, np.float64(1.3862943611198906))


def test_documented_softmax_cross_entropy():
    logits = np.array([[1.0, 2, 3]] * 3, np.float32)
    labels = np.array([[0.0, 0, 1]] * 3, np.float32)
    for losses in (
        numbaloss.softmax_cross_entropy_with_logits(labels=labels, logits=logits),
        numbaloss.sparse_softmax_cross_entropy_with_logits(labels=[2, 2, 2], logits=logits),
    ):
        assert_close(losses, np.full(3, 0.4076059644443804))
        assert_close(losses, np.full(3, 0.40760596), 2)  # printed with eight digits
    total = numbaloss.cross_entropy(logits, [2, 2, 2], reduction="sum")
    assert_close(total, np.float64(3 * 0.4076059644443804))
    assert_close(total, np.float64(1.2228179), 2)


def test_documented_two_sequences():
    logits = [[[0.6, 0.5, 0.3, 0.2], [0.9, 0.5, 0.3, 0.2], [1.0, 0.5, 0.3, 0.2]]]
    logits += [[[0.2, 0.5, 0.3, 0.2], [0.3, 0.5, 0.3, 0.2], [0.4, 0.5, 0.3, 0.2]]]
    targets = [[0, 1, 2], [3, 0, 1]]
    loss = numbaloss.sequence_loss(np.array(logits), targets, np.ones((2, 3)))
    assert round(float(loss), 8) == 1.39813258
    single = numbaloss.sequence_loss(np.array(logits, np.float32), targets, np.ones((2, 3), np.float32))
    assert_close(single, np.float64(1.3981326), 2)  # printed with eight digits
