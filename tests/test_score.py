"""What score gives beyond the loss, of files, against plain NumPy."""

import json
import math
import warnings

import numpy as np
import pytest
import reference

import numbaloss
from numbaloss.files import FileError, score

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, V = 4, 6, 9
IGNORED = 77
MEMORY = (2 * V * 8 + 200, 3 * (2 * V * 8 + 200), 1 << 20)  # blocks of a row, of some, of all
EPS = 2.0**-23


def arrays(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((B, T, V)) * 3).astype(dtype)
    logits[1, 2, 4] = logits[3, 0, 0] = -np.inf
    targets = rng.integers(0, V - 1, (B, T))
    targets[targets == 4], targets[targets == 0] = 5, 1
    targets[0, 3] = targets[2, 5] = IGNORED
    weights, groups = rng.integers(0, 4, (B, T)) / 4, rng.integers(-2, 3, (B, T))
    return {"logits": logits, "targets": targets, "weights": weights, "groups": groups}


def saved(folder, held):
    for name, array in held.items():
        np.save(folder / f"{name}.npy", array)
    return {name: folder / f"{name}.npy" for name in held}


def counted(held, shift=0, weighted=True):
    """[(b, t, logits, target, weight, group)] of the tokens that count, in their order."""
    rows = []
    for b, t in np.ndindex(B, T):
        if 0 <= t + shift < T:
            y, w, g = (held[name][b, t + shift] for name in ("targets", "weights", "groups"))
            if y != IGNORED and (w or not weighted):
                rows.append((b, t, held["logits"][b, t], y, w if weighted else 1.0, g))
    return rows


def plain(result):
    """All that does not depend on the time or the arguments, as text: equal for equal bits."""
    return json.dumps(result._replace(seconds=0)._asdict())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shift", [0, 1, -2])
@pytest.mark.parametrize("weighted", [False, True])
def test_extras(tmp_path, dtype, shift, weighted):
    held = arrays(dtype)
    files, rows = saved(tmp_path, held), counted(held, shift, weighted)
    _, _, x, y, w, g = (np.array(column) for column in zip(*rows))
    logprob, _, argmax, rank, _ = reference.score_tokens(x, y)
    loss, total = -logprob, w.sum()
    asked = {"groups": files["groups"], "top_k": (1, 3, V), "details": True, "text_bytes": 33}
    asked["calibration"] = dtype == np.float32  # fewer kernels to compile
    asked |= {"weights": files["weights"] if weighted else None, "shift": shift, "ignore_index": IGNORED}
    got = score(files["logits"], files["targets"], **asked)
    close = {"rtol": 8 * EPS}
    mean = (w * loss).sum() / total
    np.testing.assert_allclose(got.loss, mean, **close)
    assert got.top_k == {str(k): (w * (rank < k)).sum() / total for k in (1, 3, V)}
    assert got.top_k["1"] == got.accuracy
    np.testing.assert_allclose(got.bits_per_byte, (w * loss).sum() / math.log(2) / 33, **close)

    groups, spread = sorted(set(g.tolist())), 0.0
    assert [row["group"] for row in got.groups] == groups
    for row in got.groups:
        own = g == row["group"]
        assert (row["tokens"], row["weight"]) == (own.sum(), w[own].sum())
        assert row["accuracy"] == (w * (argmax == y))[own].sum() / w[own].sum()
        np.testing.assert_allclose(row["loss"], (w * loss)[own].sum() / w[own].sum(), **close)
        np.testing.assert_allclose(row["perplexity"], math.exp(row["loss"]), **close)
        spread += (w * (loss - mean))[own].sum() ** 2
    n = len(groups)
    np.testing.assert_allclose(got.group_standard_error, math.sqrt(spread * n / (n - 1)) / total, rtol=1e-5)

    assert [(row["first"], row["last"]) for row in got.by_position] == [(t, t) for t in range(T)]  # of the logits
    for row in got.by_position:
        own = np.array([t == row["first"] for _, t, *_ in rows])
        assert (row["tokens"], row["weight"]) == (own.sum(), w[own].sum())
        expected = (w * loss)[own].sum() / w[own].sum() if own.any() else math.nan
        np.testing.assert_allclose(row["loss"], expected, **close)

    order = np.argsort(-loss, kind="stable")[:20]
    assert [x["index"] for x in got.worst] == [list(rows[i][:2]) for i in order]
    assert [x["row"] for x in got.worst] == [rows[i][0] * T + rows[i][1] for i in order]
    assert [(x["target"], x["argmax"]) for x in got.worst] == [(y[i], argmax[i]) for i in order]
    np.testing.assert_allclose([x["value"] for x in got.worst], loss[order], **close)

    assert (got.tokens, got.weight) == (len(rows), total)
    if asked["calibration"]:
        confidence = reference.softmax(x).max(1)
        bins = (confidence * 15).astype(int)
        gap = sum(abs((w * (confidence - (argmax == y)))[bins == k].sum()) for k in range(15)) / total
        np.testing.assert_allclose(got.calibration_error, gap, rtol=1e-5)
        assert sum(row["tokens"] for row in got.calibration) == got.tokens
        assert sum(row["weight"] for row in got.calibration) == got.weight

    for memory in MEMORY:
        assert plain(score(files["logits"], files["targets"], **asked, memory=memory)) == plain(got)
    bare = {name: asked[name] for name in ("weights", "shift", "ignore_index")}
    nothing = dict.fromkeys(("bits_per_byte", "top_k", "calibration_error", "calibration", "temperature", "groups"))
    nothing |= dict.fromkeys(("group_standard_error", "by_position", "worst"))
    without = score(files["logits"], files["targets"], **bare)
    assert plain(without) == plain(got._replace(**nothing, bytes=without.bytes))


def test_temperature_of_the_rows_that_count(tmp_path):
    rng = np.random.default_rng(0)
    true = rng.standard_normal((2, 900, V))
    held = {"logits": (true * 2).astype(np.float32), "targets": (true + rng.gumbel(size=true.shape)).argmax(-1)}
    held["weights"] = np.ones((2, 900))
    held["logits"][:, :300], held["targets"][:, 300:500], held["weights"][:, 800:] = -8, IGNORED, 0
    files = saved(tmp_path, held)
    few = saved(tmp_path / "..", {f"{k} few": np.delete(v, np.r_[300:500, 800:900], 1) for k, v in held.items()})
    got = score(files["logits"], files["targets"], weights=files["weights"], ignore_index=IGNORED, calibration=True)
    assert got.temperature == score(few["logits few"], few["targets few"], calibration=True).temperature
    assert abs(got.temperature[0] - 2) < 0.3


@pytest.mark.parametrize("details", [False, True])
def test_infinite_loss(tmp_path, details):
    held = arrays(np.float64)
    held["logits"][1, 1, held["targets"][1, 1]] = held["logits"][2, 3, held["targets"][2, 3]] = -np.inf
    held["logits"][3, 3] = np.nan
    files = saved(tmp_path, {**held, "big": np.tile(held["logits"], (9, 1, 1)), "y": np.tile(held["targets"], (9, 1))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = {"ignore_index": IGNORED, "calibration": details, "details": details, "groups": files["groups"]}
        nan = score(files["logits"], files["targets"], **asked)
        score(files["big"], files["y"], ignore_index=IGNORED)  # enough rows to look for a better shift
        held["targets"][3, 3] = IGNORED
        got = score(files["logits"], saved(tmp_path, held)["targets"], **asked, top_k=(V - 1, V))
    assert math.isnan(nan.loss)
    assert (got.loss, got.perplexity) == (math.inf, math.inf)
    assert math.isfinite(got.accuracy)
    assert got.top_k[str(V)] == 1 > got.top_k[str(V - 1)]
    if details:
        assert [x["value"] for x in got.worst[:3]] == [math.inf, math.inf, got.worst[2]["value"]]
        assert [x["index"] for x in got.worst[:2]] == [[1, 1], [2, 3]]
        assert nan.worst[2]["index"] == [3, 3]
        assert got.temperature is None
        assert math.isnan(nan.calibration_error)
        assert math.isfinite(got.calibration_error)


def test_no_tokens(tmp_path):
    for shape in ((0, 5), (4, 0), (2, 3)):
        files = saved(tmp_path, {"logits": np.zeros((*shape, V), np.float32), "targets": np.full(shape, IGNORED)})
        asked = {"groups": files["targets"], "top_k": (1,), "details": True, "calibration": True, "text_bytes": 9}
        got = score(files["logits"], files["targets"], ignore_index=IGNORED, **asked)
        assert (got.tokens, got.rows, got.complete) == (0, math.prod(shape), True)
        assert [got.groups, got.worst, got.calibration, got.temperature] == [[], [], [], None]
        assert len(got.by_position) == shape[-1]
        numbers = got.loss, got.top_k["1"], got.bits_per_byte, got.calibration_error, got.group_standard_error
        assert np.isnan(numbers).all()


def test_bad_arguments(tmp_path):
    files = saved(tmp_path, arrays())
    for more, message in (
        ({"top_k": (1, 0)}, r"top_k: expected numbers from 1 on, got \(1, 0\)"),
        ({"text_bytes": 0}, "text_bytes: expected a number > 0, got 0"),
        ({"text_bytes": math.nan}, "text_bytes: expected a number > 0, got nan"),
        ({"groups": files["weights"]}, "groups: expected integers, got float64"),
        ({"groups": files["logits"]}, "groups: expected integers, got float32"),
        ({"per_token": tmp_path / "o.parquet", "resume": tmp_path / "s"}, "expected .npy or .jsonl"),
        ({"per_token": tmp_path / "o", "resume": tmp_path / "o"}, "resume: expected another file"),
    ):
        with pytest.raises(ValueError, match=message):
            score(files["logits"], files["targets"], ignore_index=IGNORED, **more)
    np.save(files["groups"], np.zeros((T, B), int))
    with pytest.raises(FileError, match=r"groups.npy: groups: expected shape \(4, 6\) to match logits"):
        score(files["logits"], files["targets"], ignore_index=IGNORED, groups=files["groups"])


def test_targets_beside_the_logits(tmp_path):
    held = arrays()
    files, both = saved(tmp_path, held), tmp_path / "both.npz"
    np.savez(both, logits=held["logits"], targets=held["targets"])
    expected = score(files["logits"], files["targets"], ignore_index=IGNORED)
    assert plain(score(both, ignore_index=IGNORED)) == plain(expected)
    with pytest.raises(FileError, match=r"logits.npy: targets: expected integers, got float32"):
        score(files["logits"])
    with pytest.raises(ValueError, match="-: expected one input on stdin, got more"):
        score("-")


# -- the log probability of each token -----------------------------------------------------------------------------


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_parquet(path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional dependency")
    return parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shift", [0, 1, -2])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npy"])
def test_per_token(tmp_path, dtype, shift, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is an optional dependency")
    held = arrays(dtype)
    held["logits"][1, 3, held["targets"][1, 3 + shift]], held["weights"][1, 3 + shift] = -np.inf, 1
    files, out = saved(tmp_path, held), tmp_path / f"out.{kind}"
    asked = {"weights": files["weights"], "shift": shift, "ignore_index": IGNORED}
    t = np.array([t for t in range(T) if 0 <= t + shift < T])
    labels, weights = held["targets"][:, t + shift], held["weights"][:, t + shift]
    y = np.where(weights == 0, IGNORED, labels)
    scores = numbaloss.score_tokens(np.ascontiguousarray(held["logits"][:, t]), y, ignore_index=IGNORED)
    for memory in MEMORY:
        got = score(files["logits"], files["targets"], **asked, memory=memory, per_token=out)
        assert got.loss == score(files["logits"], files["targets"], **asked).loss
        if kind == "npy":
            written = np.load(out)
            assert written.dtype == scores.logprob.dtype
            assert written.tobytes() == scores.logprob.tobytes()
            continue
        lines = read_jsonl(out) if kind == "jsonl" else read_parquet(out)
        assert [x["index"] for x in lines] == [[b, int(t[i])] for b, i in np.ndindex(labels.shape)]
        assert [x["target"] for x in lines] == labels.ravel().tolist()
        assert [x["argmax"] for x in lines] == scores.argmax.ravel().tolist()
        expected = scores.logprob.ravel().tolist()
        assert -math.inf in expected
        infinite = None if kind == "jsonl" else -math.inf
        assert [x["logprob"] for x in lines] == [x if math.isfinite(x) else infinite for x in expected]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f"{name}.npy" for name in held), out.name])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npy"])
def test_per_token_of_no_rows(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is an optional dependency")
    files = saved(tmp_path, {"logits": np.zeros((0, V), np.float32), "targets": np.zeros(0, int)})
    score(files["logits"], files["targets"], per_token=tmp_path / f"o.{kind}")
    read = {"jsonl": read_jsonl, "parquet": read_parquet, "npy": lambda path: np.load(path).tolist()}
    assert read[kind](tmp_path / f"o.{kind}") == []


def test_parquet_that_fails_leaves_nothing(tmp_path, recwarn):
    pytest.importorskip("pyarrow", reason="pyarrow is an optional dependency")
    held = arrays()
    held["targets"][3, 5] = V
    files = saved(tmp_path, held)
    with pytest.raises(FileError, match="expected a label"):
        score(
            files["logits"],
            files["targets"],
            ignore_index=IGNORED,
            memory=MEMORY[0],
            per_token=tmp_path / "o.parquet",
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.npy" for name in held)
    assert not recwarn.list
