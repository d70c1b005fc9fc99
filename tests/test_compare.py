"""compare: against plain float64 NumPy, equal files, shapes and floors that do not fit."""

import json
import math
import os
import pathlib
import struct
import threading
import warnings

import llama_writer
import numpy as np
import pytest
import reference

import numbaloss
from numbaloss.files import FileError, compare
from numbaloss.files.compare import DIVERGENCES, QUANTILES
from numbaloss.totals import exp

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = pathlib.Path(__file__).parent / "golden"

B, T, V = 5, 8, 12
IGNORED = 99
EPS = 2.0**-23
MEANS = {"rtol": 8 * EPS, "atol": 1e-14}
SKETCH = 2.0**-11 + 8 * EPS


def arrays(base=np.float32, candidate=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, T, V)) * 3
    y = x + rng.standard_normal(x.shape) * rng.exponential(0.3, (B, T, 1))
    targets = rng.integers(0, V, (B, T))
    targets[0, 3] = targets[4, 7] = IGNORED
    weights = rng.integers(0, 4, (B, T)) / 4
    return {"base": x.astype(base), "candidate": y.astype(candidate), "targets": targets, "weights": weights}


def saved(folder, held):
    for name, array in held.items():
        np.save(folder / f"{name}.npy", array)
    return {name: folder / f"{name}.npy" for name in held}


def plain(result):
    return json.dumps(result._replace(seconds=0)._asdict())


def pairs(held, shift, targets, weights):
    """(places, base, candidate, targets, weights) of the tokens that count, in their order."""
    rows = []
    for b, t in np.ndindex(B, T):
        if 0 <= t + shift < T:
            w = held["weights"][b, t + shift] if weights else 1.0
            y = held["targets"][b, t + shift] if targets else 0
            if y != IGNORED and w:
                rows.append(([b, t], held["base"][b, t], held["candidate"][b, t], y, w))
    places, *arrays = zip(*rows)
    return list(places), *map(np.array, arrays)


def plus(p, log_p, log_q):
    """sum p (log p - log q), 0 where p is."""
    return np.where(p == 0, 0, p * (log_p - log_q)).sum(-1)


def mean_and_error(x, w):
    n, mean = len(x), (w * x).sum() / w.sum()
    return mean, math.sqrt((w**2 * (x - mean) ** 2).sum() * n / (n - 1)) / w.sum()


def divergences(base, candidate):
    log_p, log_q = reference.log_softmax(base), reference.log_softmax(candidate)
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.log((p + q) / 2)
    js = (plus(p, log_p, log_m) + plus(q, log_q, log_m)) / 2
    return dict(zip(DIVERGENCES, (plus(p, log_p, log_q), plus(q, log_q, log_p), js)))


def test_against_scipy(tmp_path):
    special, distance = pytest.importorskip("scipy.special"), pytest.importorskip("scipy.spatial.distance")
    held = arrays()
    got = compare(*(saved(tmp_path, held)[name] for name in ("base", "candidate")))
    p, q = (special.softmax(held[name].astype(np.float64).reshape(-1, V), axis=1) for name in ("base", "candidate"))
    kl, reverse, js = (special.rel_entr(p, q), special.rel_entr(q, p), distance.jensenshannon(p, q, axis=1) ** 2)
    for found, exact in (got.kl, kl.sum(1)), (got.reverse_kl, reverse.sum(1)), (got.js, js):
        np.testing.assert_allclose(found["mean"], exact.mean(), **MEANS)
        np.testing.assert_allclose(found["max"], exact.max(), **MEANS)
        for key, share in QUANTILES.items():
            np.testing.assert_allclose(found[key], np.quantile(exact, share, method="inverted_cdf"), rtol=SKETCH)


@pytest.mark.parametrize("dtypes", [("f4", "f4"), ("f2", "f4"), ("f8", "f8"), ("f4", "f8")], ids="-".join)
@pytest.mark.parametrize("shift", [0, 1, -3])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("targets", [False, True])
def test_against_float64(tmp_path, dtypes, shift, weights, targets):
    held = arrays(*dtypes)
    files = saved(tmp_path, held)
    asked = {"shift": shift, "ignore_index": IGNORED, "top_k": (2, 5), "details": True}
    asked |= {"weights": files["weights"] if weights else None, "targets": files["targets"] if targets else None}
    got = compare(files["base"], files["candidate"], **asked)
    places, base, candidate, y, w = pairs(held, shift, targets, weights)
    assert (got.tokens, got.weight, got.rows, got.complete, got.shift) == (len(w), w.sum(), B * T, True, shift)
    for name, exact in divergences(base, candidate).items():
        found = getattr(got, name)
        np.testing.assert_allclose((found["mean"], found["standard_error"]), mean_and_error(exact, w), **MEANS)
        for key, q in QUANTILES.items():
            np.testing.assert_allclose(found[key], np.quantile(exact, q, method="inverted_cdf"), rtol=SKETCH)
        np.testing.assert_allclose(found["max"], exact.max(), **MEANS)
        assert found["max_at"] == places[exact.argmax()]
    top, other = base.argmax(1), candidate.argmax(1)
    same, error = mean_and_error((top == other).astype(float), w)
    np.testing.assert_allclose((got.agreement["top_1"], got.agreement["standard_error"]), (same, error), rtol=1e-13)
    rank = (candidate > np.take_along_axis(candidate, top[:, None], 1)).sum(1)
    for k in (2, 5):
        assert got.agreement[f"top_{k}"] == (w * (rank < k)).sum() / w.sum()

    kl = divergences(base, candidate)["kl"]
    order = np.argsort(-kl)[:20]
    assert [x["index"] for x in got.worst] == [places[i] for i in order]
    assert [(x["base"], x["candidate"]) for x in got.worst] == [(top[i], other[i]) for i in order]
    np.testing.assert_allclose([x["value"] for x in got.worst], kl[order], **MEANS)
    assert sum(n for *_, n in got.histogram) == len(w)

    if targets:
        a, b = reference.sparse_losses(base, y), reference.sparse_losses(candidate, y)
        for name, x in ("base", base), ("candidate", candidate):
            assert getattr(got, name) == numbaloss.Evaluation().update(x, y, w).result()._asdict()
        mean, error = mean_and_error(b - a, w)
        np.testing.assert_allclose(got.difference["mean"], mean, rtol=0, atol=EPS * max(a.max(), b.max()))
        np.testing.assert_allclose(got.difference["standard_error"], error, rtol=1e-5)
        assert got.difference["perplexity_ratio"] == exp(got.difference["mean"])
        change = math.sqrt((w * (np.exp(-a) - np.exp(-b)) ** 2).sum() / w.sum())
        np.testing.assert_allclose(got.rms_probability_change, change, rtol=1e-5)
    else:
        assert [got.base, got.candidate, got.difference, got.rms_probability_change, got.better_shift] == [None] * 5
    for memory in (2 * 2 * V * 8 + 200, 3000):
        assert plain(compare(files["base"], files["candidate"], **asked, memory=memory)) == plain(got)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_file_and_itself(tmp_path, dtype):
    held = arrays(dtype, dtype)
    held["base"][2, 2, 3] = -np.inf
    held["base"][2, 3, :5] = held["base"][2, 3].max()  # ties
    files = saved(tmp_path, held)
    got = compare(files["base"], files["base"], files["targets"], ignore_index=IGNORED, details=True)
    for name in DIVERGENCES:
        found = dict(getattr(got, name))
        assert found.pop("max_at") == [0, 0]
        assert set(found.values()) == {0.0}
    assert got.agreement == {"top_1": 1, "standard_error": 0, "top_5": 1, "top_10": 1}
    assert got.difference == {"mean": 0, "standard_error": 0, "perplexity_ratio": 1}
    assert got.rms_probability_change == 0
    assert got.base == got.candidate
    ((low, _, count),) = got.histogram
    assert (low, count) == (0, got.tokens)
    wide = saved(tmp_path, {"wide": held["base"].astype(np.float64)})["wide"]  # the same numbers
    found = compare(files["base"], wide, ignore_index=IGNORED)
    assert {found.kl["max"], found.reverse_kl["max"], found.js["max"]} == {0.0}


def test_never_negative(tmp_path):
    """Logits that differ by an ulp, or by a shift of the whole row."""
    held = arrays()
    up = np.nextafter(held["base"], np.float32(np.inf))
    files = saved(tmp_path, {**held, "up": up, "moved": held["base"] + np.float32(100)})
    for other in ("up", "moved"):
        got = compare(files["base"], files[other], details=True)
        for name in DIVERGENCES:
            found = getattr(got, name)
            assert 0 <= found["mean"] < 1e-9
            assert 0 <= found["median"] <= found["p99_9"] < 1e-9
        assert min(low for low, *_ in got.histogram) >= 0


def test_ties_in_the_largest(tmp_path):
    """top_1 compares classes, top_k counts larger logits; top_k=(1,) does not change what top_1 means."""
    files = saved(tmp_path, {"a": np.array([[0.0, 2, 1], [3, 0, 0]]), "b": np.array([[5.0, 5, 1], [3, 0, 0]])})
    for ks in ((1, 2), (2,)):
        got = compare(files["a"], files["b"], top_k=ks).agreement
        assert (got["top_1"], got["standard_error"], got["top_2"]) == (0.5, 0.5, 1)


def test_infinities(tmp_path):
    base, candidate = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    candidate[1, 2] = -np.inf
    files = saved(tmp_path, {"base": base, "candidate": candidate, "targets": np.array([0, 2, 1])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compare(files["base"], files["candidate"], files["targets"], details=True)
        back = compare(files["candidate"], files["base"], files["targets"])
        both = compare(files["candidate"], files["candidate"], files["targets"])
    assert (got.kl["mean"], got.kl["max"], got.kl["max_at"], got.kl["median"]) == (math.inf, math.inf, [1], 0)
    np.testing.assert_allclose(got.reverse_kl["max"], math.log(4 / 3), rtol=4 * EPS)
    assert got.js["max"] < math.log(2)
    assert got.histogram[-1] == (math.inf, math.inf, 1)
    assert (got.difference["mean"], got.difference["perplexity_ratio"]) == (math.inf, math.inf)
    assert (back.difference["mean"], back.difference["perplexity_ratio"]) == (-math.inf, 0)
    assert math.isnan(both.difference["mean"])
    assert both.kl["max"] == 0


def test_no_tokens(tmp_path):
    files = saved(tmp_path, {"x": np.zeros((0, 3), np.float32), "y": np.zeros(0, int)})
    got = compare(files["x"], files["x"], files["y"], details=True)
    assert got.tokens == 0
    numbers = [got.kl[key] for key in ("mean", "median", "max")] + [got.agreement["top_1"], got.difference["mean"]]
    assert np.isnan(numbers).all()
    assert (got.kl["max_at"], got.worst, got.histogram) == (None, [], [])


def test_another_shift_is_noticed(tmp_path):
    rng = np.random.default_rng(7)
    targets, logits = rng.integers(0, V, (4, 40)), rng.random((4, 40, V)).astype(np.float32)
    np.put_along_axis(logits, np.roll(targets, -1, 1)[..., None], 9, 2)  # at t it predicts t + 1
    files = saved(tmp_path, {"x": logits, "y": targets})
    assert compare(files["x"], files["x"], files["y"]).better_shift == 1
    assert compare(files["x"], files["x"], files["y"], shift=1).better_shift is None
    assert compare(files["x"], files["x"]).better_shift is None


# -- files that do not fit -----------------------------------------------------------------------------------------


def test_bad_arguments(tmp_path):
    held = arrays()
    files = saved(tmp_path, {**held, "short": held["base"][:, 1:], "narrow": held["base"][..., 1:]})
    shapes = rf"expected shape \({B}, {T}, {V}\) as .*base.npy, got"
    for candidate, more, message in (
        ("short", {}, rf"short.npy: candidate: {shapes} \({B}, {T - 1}, {V}\)$"),
        ("narrow", {}, rf"narrow.npy: candidate: {shapes} \({B}, {T}, {V - 1}\)$"),
        ("targets", {}, "targets.npy: logits: expected float16, .* got int64$"),
        ("candidate", {"targets": files["narrow"]}, "narrow.npy: targets: expected integers, got float32$"),
        ("candidate", {"targets": files["targets"]}, r"targets.npy: targets\[0, 3\]: expected a label .* got 99$"),
        ("candidate", {"top_k": (0,)}, r"^top_k: expected numbers from 1 on, got \(0,\)$"),
        ("candidate", {"shift": T}, "^shift: expected less than 8 either way"),
        ("candidate", {"memory": 100}, "base.npy: expected two rows to fit into 100 bytes, got 96 bytes a row$"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            compare(files["base"], files[candidate], **more)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="-: expected one input on stdin, got more"):
        compare("-", "-")


def llama(path, seed=0):
    rng = np.random.default_rng(seed)
    context, chunks, classes = 12, 3, 5
    tokens = np.random.default_rng(1).integers(0, classes, (chunks, context)).tolist()
    logits = (rng.standard_normal((chunks, context, classes)) * 2).astype(np.float32)
    logits[0, 6, 0] = 30  # the others are more than 16 nats below
    rows, targets = llama_writer.write(path, context, classes, tokens, logits.tolist())
    return np.array(rows, np.float32).reshape(chunks, -1, classes), np.array(targets).reshape(chunks, -1)


def test_llama_files_have_targets(tmp_path):
    (base, targets), (candidate, _) = llama(tmp_path / "base.kld"), llama(tmp_path / "candidate.kld", 2)
    files = saved(tmp_path, {"base": base, "candidate": candidate, "targets": targets})
    got = compare(tmp_path / "base.kld", tmp_path / "candidate.kld")
    assert got.floor == 16
    expected = compare(files["base"], files["candidate"], files["targets"])
    assert plain(got._replace(floor=None, bytes=0)) == plain(expected._replace(bytes=0))


def test_floors_that_differ(tmp_path):
    base, _ = llama(tmp_path / "base.kld")
    files = saved(tmp_path, {"plain": base})
    wide = bytearray((tmp_path / "base.kld").read_bytes())
    first = 8 + 12 + 4 * 3 * 12  # of the rows
    wide[first : first + 4] = struct.pack("<f", 24 / 65535)
    (tmp_path / "wide.kld").write_bytes(wide)
    for other, got in ((files["plain"], "None"), (tmp_path / "wide.kld", "24.0")):
        message = rf"candidate: expected a floor of 16.0 nats as .*base.kld, got {got}$"
        with pytest.raises(FileError, match=message) as caught:
            compare(tmp_path / "base.kld", other)
        assert str(caught.value).startswith(f"{other}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_base_from_a_pipe(tmp_path):
    """It is opened once."""
    files = saved(tmp_path, arrays())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: pipe.write_bytes(files["base"].read_bytes()))
    thread.start()
    got = compare(pipe, files["candidate"])
    thread.join()
    assert plain(got) == plain(compare(files["base"], files["candidate"]))


def test_files_that_llama_cpp_wrote():
    """By llama.cpp 0c1e57098: a model of random weights with 321 tokens, one with some noise; n_ctx 32, 3 chunks. The
    numbers are what `llama-perplexity` printed; it takes the candidate's own logits, and renormalises nothing."""
    result = compare(*(GOLDEN / f"llama_{name}.kld" for name in ("base", "candidate")))
    assert (result.tokens, result.floor) == (45, 16.0)
    assert abs(result.base["perplexity"] / 1836.8765 - 1) < 1e-5
    assert abs(result.candidate["perplexity"] / 1939.4709 - 1) < 1e-5
    printed = [
        *(result.kl["mean"], result.kl["standard_error"], result.difference["mean"]),
        *(100 * result.rms_probability_change, 100 * result.agreement["top_1"]),
    ]
    assert np.allclose(printed, [0.11936, 0.01427, 0.05435, 0.217, 55.556], rtol=0, atol=[1e-5, 1e-5, 1e-5, 1e-3, 1e-3])
