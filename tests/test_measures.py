"""Measures: against plain loops, saved and restored between blocks that are cut anywhere."""

import json
import math

import numpy as np
import pytest
import reference

from numbaloss.files import measures
from numbaloss.files.measures import ByGroup, ByPosition, Calibration, Mean, Quantiles, Temperature, TopK, Worst
from numbaloss.totals import exp

pytestmark = pytest.mark.usefixtures("one_thread")

N, V, LENGTH = 700, 6, 300
SKETCH = 2.0**-11 + 2.0**-24  # half a bin, and the rounding to float32


class Tokens:
    def __init__(self, n=N, seed=0):
        rng = np.random.default_rng(seed)
        self.row = np.arange(n)
        self.logits = rng.standard_normal((n, V)).astype(np.float32) * 2
        self.y = np.where(rng.random(n) < 0.1, -1, (self.logits + rng.gumbel(size=(n, V))).argmax(1))
        self.loss = np.exp(rng.normal(0, 3, n))
        self.weight = rng.integers(1, 9, n) / 7
        self.correct = rng.integers(0, 2, n).astype(np.float64)
        self.group = rng.integers(-3, 4, n) * (1 << 60)
        self.rank = rng.integers(0, V, n)
        self.confidence = rng.random(n)


def text(result):
    """Equal for equal bits."""
    return json.dumps(result)


CASES = {  # make, add items s, what result() needs
    "mean": (Mean, lambda m, d, s: m.add(d.loss[s], d.weight[s], d.correct[s] > 0), ()),
    "mean, no weights": (Mean, lambda m, d, s: m.add(d.loss[s], None), ()),
    "position": (
        lambda: ByPosition(LENGTH),
        lambda m, d, s: m.add(d.row[s] % LENGTH, d.loss[s], d.weight[s]),
        (),
    ),
    "group": (ByGroup, lambda m, d, s: m.add(d.group[s], d.loss[s], d.weight[s], d.correct[s]), (1.5, 700.0)),
    "top_k": (lambda: TopK((1, 3)), lambda m, d, s: m.add(d.rank[s], d.weight[s]), ()),
    "quantiles": (Quantiles, lambda m, d, s: m.add(d.loss[s]), (0.9,)),
    "worst": (
        Worst,
        lambda m, d, s: m.add(d.row[s], d.loss[s], lambda i: {"index": [int(d.row[s][i])]}),
        (),
    ),
    "calibration": (Calibration, lambda m, d, s: m.add(d.confidence[s], d.correct[s], d.weight[s]), ()),
    "temperature": (
        lambda: Temperature(N),
        lambda m, d, s: m.add(s.start, d.logits[s], d.y[s], d.weight[s]),
        (),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_bits_saved_and_restored_anywhere(name, monkeypatch):
    monkeypatch.setattr(measures, "SAMPLE", 250)  # every third row
    make, add, asked = CASES[name]
    tokens, rng = Tokens(), np.random.default_rng(1)
    whole = make()
    add(whole, tokens, slice(0, N))
    expected = text(whole.result(*asked))
    assert expected != text(make().result(*asked))
    for cuts in ([], [1], [N - 1], *(sorted(rng.choice(N + 1, 6).tolist()) for _ in range(4))):  # empty blocks, too
        measure = make()
        for first, end in zip([0, *cuts], [*cuts, N]):
            add(measure, tokens, slice(first, end))
            state = json.dumps(measure.state())
            measure = make()
            measure.restore(json.loads(state))
            assert json.dumps(measure.state()) == state
        assert text(measure.result(*asked)) == expected
        if name == "quantiles":
            assert measure.histogram() == whole.histogram()


def test_mean():
    tokens, mean = Tokens(), Mean()
    mean.add(tokens.loss, tokens.weight, tokens.correct > 0)
    w, x = tokens.weight, tokens.loss
    average = math.fsum(w * x) / math.fsum(w)
    error = math.sqrt(math.fsum(w**2 * (x - average) ** 2) * N / (N - 1)) / math.fsum(w)
    np.testing.assert_allclose(mean.result(), (average, error, (w * tokens.correct).sum() / w.sum()), rtol=1e-13)
    assert np.isnan(Mean().result()).all()


# -- quantiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 9999])
def test_quantiles(count):
    rng = np.random.default_rng(count)
    values = 10 ** rng.uniform(-30, 30, count)
    values[rng.random(count) < 0.1] = 0
    values[rng.random(count) < 0.002] = np.inf
    quantiles = Quantiles()
    for part in np.array_split(values, 3):
        quantiles.add(part)
    for q in (0, 0.05, 1 / 3, 0.5, 0.9, 0.95, 0.99, 0.999, 1):
        expected = np.quantile(values, q, method="inverted_cdf")
        got = quantiles.result(q)
        assert got == expected or abs(got - expected) <= SKETCH * expected < np.inf


def test_quantiles_of_special_values():
    def of(*values):
        quantiles = Quantiles()
        quantiles.add(np.array(values, np.float64))
        return quantiles.result(0.5)

    assert math.isnan(of())
    assert math.isnan(of(1.0, 2.0, math.nan))
    assert math.copysign(1, of(-0.0, 0.0)) == 1
    assert of(0.0) == 0
    assert of(math.inf, math.inf, 1.0) == math.inf
    assert of(1e300) == math.inf  # of float32
    assert of(2.0**-149) < 2.0**-135


def test_histogram():
    rng = np.random.default_rng(3)
    values = np.concatenate([10 ** rng.uniform(-30, 30, 3000), [0.0, 0.0, np.inf, 1.0, 1.25, 2.0]]).astype(np.float32)
    quantiles = Quantiles()
    assert quantiles.histogram() == []
    quantiles.add(np.append(values, np.nan))
    bins = quantiles.histogram()
    assert sum(n for _, _, n in bins) == len(values)
    assert bins[0][0] == 0
    for low, high, n in bins[:-1]:
        assert n == ((values >= low) & (values < high)).sum() > 0
        assert low == 0 or high / low in (5 / 4, 6 / 5, 7 / 6, 8 / 7)
    assert bins[-1] == (math.inf, math.inf, 1)
    assert bins == sorted(bins)


# -- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 700, 1000])
def test_by_position(length):
    tokens, measure = Tokens(), ByPosition(length)
    position = np.random.default_rng(2).integers(0, length, N)
    measure.add(position, tokens.loss, tokens.weight)
    found = measure.result()
    assert len(found) == min(length, 256)
    assert [x["first"] for x in found] == [0, *(x["last"] + 1 for x in found[:-1])]
    assert found[-1]["last"] == length - 1
    sizes = [x["last"] - x["first"] + 1 for x in found]
    assert max(sizes) - min(sizes) <= 1
    for x in found:
        inside = [i for i in range(N) if x["first"] <= position[i] <= x["last"]]
        weight = sum((tokens.weight[i] for i in inside), 0.0)  # in the order of the tokens: the same bits
        total = sum((tokens.weight[i] * tokens.loss[i] for i in inside), 0.0)
        assert (x["tokens"], x["weight"]) == (len(inside), weight)
        assert x["loss"] == total / weight if inside else math.isnan(x["loss"])
    assert ByPosition(0).result() == []


@pytest.mark.parametrize(
    ("dtype", "ids"),
    [
        (np.int64, [-(2**63), -1, 0, 5, 2**63 - 1]),
        (np.uint64, [0, 2**63, 2**64 - 1]),
        (np.int8, [-128, 127]),
        (np.int32, [7]),
    ],
)
def test_by_group(dtype, ids):
    tokens, measure = Tokens(), ByGroup()
    groups = np.array(ids, dtype)[np.random.default_rng(4).integers(0, len(ids), N)]
    w, x = tokens.weight, tokens.loss
    for s in (slice(0, 100), slice(100, N)):
        measure.add(groups[s], x[s], w[s], tokens.correct[s])
    mean = (w * x).sum() / w.sum()
    rows, error = measure.result(mean, w.sum())
    assert [row["group"] for row in rows] == ids
    spread = 0.0
    for row in rows:
        own = [i for i in range(N) if int(groups[i]) == row["group"]]
        weight = sum((w[i] for i in own), 0.0)
        loss = sum((w[i] * x[i] for i in own), 0.0) / weight
        correct = sum((w[i] * tokens.correct[i] for i in own), 0.0) / weight
        expected = {"tokens": len(own), "weight": weight, "loss": loss, "perplexity": float(exp(loss))}
        assert row == {"group": row["group"], **expected, "accuracy": correct}
        spread += sum(w[i] * (x[i] - mean) for i in own) ** 2
    n = len(ids)
    if n > 1:
        np.testing.assert_allclose(error, math.sqrt(spread * n / (n - 1)) / w.sum(), rtol=1e-12)
    else:
        assert math.isnan(error)


def test_group_of_each_token_gives_the_plain_error():
    tokens, measure, mean = Tokens(), ByGroup(), Mean()
    measure.add(tokens.row, tokens.loss, tokens.weight, tokens.correct)
    mean.add(tokens.loss, tokens.weight)
    average, error, _ = mean.result()
    np.testing.assert_allclose(measure.result(average, tokens.weight.sum())[1], error, rtol=1e-12)


def test_group_of_huge_losses():
    measure = ByGroup()
    measure.add(np.array([1, 2]), np.array([1e200, 0.0]), np.ones(2), np.ones(2))
    rows, error = measure.result(5e199, 2.0)
    assert (rows[0]["perplexity"], error) == (math.inf, math.inf)
    assert ByGroup().result(math.nan, 0.0)[0] == []


def test_top_k():
    tokens, measure = Tokens(), TopK((1, 2, V))
    measure.add(tokens.rank, tokens.weight)
    total = np.cumsum(tokens.weight)[-1]  # one after the other; from Python 3.12 on sum() is exact
    shares = {str(k): np.cumsum(tokens.weight[tokens.rank < k])[-1] / total for k in (1, 2, V)}
    assert measure.result() == shares
    assert shares[str(V)] == 1
    assert math.isnan(TopK((1,)).result()["1"])


# -- the worst -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [3, 1000])
def test_worst(kinds):
    rng = np.random.default_rng(kinds)
    values = rng.integers(0, kinds, N).astype(np.float64)
    values[rng.random(N) < 0.01] = np.nan
    values[rng.random(N) < 0.005] = np.inf
    measure = Worst()
    for rows in np.array_split(np.arange(N), 9):
        measure.add(rows, values[rows], lambda i, rows=rows: {"told": int(rows[i])})
    order = sorted(range(N), key=lambda i: (-math.inf if math.isnan(values[i]) else -values[i], i))
    found = measure.result()
    assert [x["row"] for x in found] == [x["told"] for x in found] == order[:20]
    assert [x["value"] for x in found] == [math.inf if math.isnan(values[i]) else values[i] for i in order[:20]]


# -- calibration ---------------------------------------------------------------------------------------------------


def test_calibration():
    tokens, measure = Tokens(), Calibration()
    tokens.confidence[:4] = 0, 1, 1 + 1e-6, 14 / 15
    measure.add(tokens.confidence, tokens.correct, tokens.weight)
    sums = {}
    for c, right, w in zip(tokens.confidence, tokens.correct, tokens.weight):
        x = sums.setdefault(min(int(c * 15), 14), [0, 0.0, 0.0, 0.0])
        x[:] = x[0] + 1, x[1] + w, x[2] + w * c, x[3] + w * right
    error, bins = measure.result()
    assert bins == [
        {"confidence": c / w, "accuracy": right / w, "tokens": n, "weight": w}
        for _, (n, w, c, right) in sorted(sums.items())
    ]
    gap = sum(abs(c - right) for _, _, c, right in sums.values()) / tokens.weight.sum()
    np.testing.assert_allclose(error, gap, rtol=1e-12)


def test_calibration_error_that_is_known():
    measure = Calibration()
    measure.add(np.array([0.7, 0.7, 0.99, 0.99]), np.array([0.0, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 3.0]))
    np.testing.assert_allclose(measure.result()[0], (2 * 0.2 + 4 * 0.01) / 6, rtol=1e-12)
    assert math.isnan(Calibration().result()[0])
    measure.add(np.array([np.nan]), np.zeros(1), np.ones(1))
    assert math.isnan(measure.result()[0])


# -- temperature ---------------------------------------------------------------------------------------------------


def drawn(seed, scale, n=400, spread=1.5):
    """Logits `scale` times those that the labels are drawn from."""
    rng = np.random.default_rng(seed)
    true = rng.standard_normal((n, V)) * spread
    y = (true + rng.gumbel(size=true.shape)).argmax(1)
    return (scale * true).astype(np.float32), y, rng.integers(1, 4, n) / 2


def temperature(logits, y, weights, cuts=1):
    measure = Temperature(len(y))
    for rows in np.array_split(np.arange(len(y)), cuts):
        measure.add(int(rows[0]), logits[rows], y[rows], weights[rows])
    return measure.result()


def golden_section(loss, low, high):
    """The minimum of a function that has one, of log(x)."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    while b - a > 1e-9:
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        a, b = (a, d) if loss(math.exp(c)) < loss(math.exp(d)) else (c, b)
    return math.exp((a + b) / 2)


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 1.7, 3.5])
def test_temperature(scale):
    logits, y, weights = drawn(5, scale, n=3000)
    y[::7] = -1  # these do not count
    weights = weights * (y >= 0)
    best, low, high = temperature(logits, y, weights, cuts=3)

    def loss(t):
        x = logits.astype(np.float64) / t
        return (weights * (np.log(np.exp(x).sum(1)) - x[np.arange(len(y)), y])).sum()

    exact = golden_section(loss, 0.25, 4)
    assert abs(best / exact - 1) <= 1e-4
    assert abs(best / scale - 1) < 0.1
    assert low < best < high
    # the standard error of a root of the mean slope, by log(temperature)
    x, h = logits.astype(np.float64) / exact, 1e-3
    p = reference.softmax(x)
    slopes = weights * (x[np.arange(len(y)), y] - (p * x).sum(1))
    curvature = (loss(exact * math.exp(h)) - 2 * loss(exact) + loss(exact * math.exp(-h))) / h**2
    width = 2 * 1.96 * math.sqrt((slopes**2).sum()) / curvature
    np.testing.assert_allclose(math.log(high / low), width, rtol=1e-3)  # taken at `best`, which is 1e-4 off


def test_temperature_interval():
    """Of 60 intervals of 95 %, fewer than 50 hold the truth once in 10^7 times."""
    held = 0
    for seed in range(60):
        scale = (0.5, 1.0, 2.0)[seed % 3]
        logits, y, _ = drawn(seed, scale, n=300)
        _, low, high = temperature(logits, y, np.ones(len(y)))
        held += low <= scale <= high
    assert 50 <= held <= 60


def test_temperature_of_a_sample():
    """Every third row and no other."""
    logits, y, weights = drawn(1, 1.5, n=3 * 8192 - 2)
    rows = slice(0, None, 3)
    found = temperature(logits, y, weights, cuts=5)
    some = Temperature(1)
    some.add(0, logits[rows], y[rows], weights[rows])
    assert found == some.result()
    assert found != temperature(logits[1:], y[1:], weights[1:])


def test_temperature_on_any_processor():
    """Of numbers that come from integers: its bits are these."""
    raw = np.random.PCG64(3).random_raw(40 * 100) % 2**12
    logits = (raw.reshape(100, 40).astype(np.float32) - 2**11) / 2**9
    y = (logits + (raw[::-1].reshape(100, 40) % 2**11).astype(np.float32) / 2**8).argmax(1)
    np.testing.assert_allclose(Temperature.POINTS, np.cos(np.pi * (np.arange(13) + 0.5) / 13), rtol=0, atol=2.0**-51)
    assert [x.hex() for x in temperature(logits, y, np.arange(100) / 64)] == [
        "0x1.a45664e53a8c4p-1",
        "0x1.5f31b65b3c5e2p-1",
        "0x1.f717febab411ap-1",
    ]


def test_temperature_of_huge_losses():
    """Their squares overflow: nothing is known of the error."""
    logits, y, weights = drawn(2, 1.0)
    best, low, high = temperature(logits, y, weights * 2.0**660)
    assert (low, high) == (0.0, math.inf) and best == temperature(logits, y, weights)[0]


def test_no_temperature():
    logits, y, weights = drawn(2, 1.0)
    assert Temperature(10).result() is None
    assert temperature(np.zeros_like(logits), y, weights) is None  # all are equally good
    assert temperature(logits * 0.1, y, weights) is None  # 0.1 would be
    assert temperature(logits * 10, y, weights) is None
    sure = np.full_like(logits, -6)
    sure[np.arange(len(y)), y] = 6
    assert temperature(sure + logits, y, weights) is None  # the colder the better
    logits[3, y[3]] = -np.inf
    assert temperature(logits, y, weights) is None  # infinite at all
