"""The report is one well-formed page that loads nothing, and says what the result says."""

import math
import os
import re
import subprocess
import sys
import threading
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest

from numbaloss.files import FileError, score
from numbaloss.files.compare import compare
from numbaloss.files.report import check_path, write_report

matplotlib = pytest.importorskip("matplotlib", reason="the report needs matplotlib")

B, T, V = 45, 9, 11
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VOID = {"meta"}
NAME = "<b>&\"'\udce9\x1b\u202e.npy"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("files")
    logits = rng.standard_normal((B, T, V)).astype(np.float32) * 3
    other = logits + rng.standard_normal(logits.shape).astype(np.float32) * rng.standard_exponential((B, T, 1))
    other[0] = logits[0]  # KL 0
    targets = np.where(rng.random((B, T)) < 0.7, logits.argmax(-1), rng.integers(0, V, (B, T)))
    targets[:, 3] = -100
    arrays = {"logits": logits, "other": other.astype(np.float32), "targets": targets}
    arrays |= {"groups": np.repeat(np.arange(B) - 5, T).reshape(B, T), "weights": rng.integers(1, 3, (B, T)) / 4}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return {name: folder / f"{name}.npy" for name in arrays}


@pytest.fixture(scope="module")
def scored(files):
    more = {"weights": files["weights"], "groups": files["groups"], "top_k": (2, 5), "text_bytes": 999}
    return score(files["logits"], files["targets"], calibration=True, details=True, **more)


@pytest.fixture(scope="module")
def compared(files):
    return compare(files["logits"], files["other"], files["targets"], details=True)


class Page(HTMLParser):
    """A page whose tags are balanced, and its texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def __contains__(self, text):
        return text in " ".join("".join(self.texts).split())

    def count(self, tag):
        return sum(t == tag for t, _ in self.tags)


def report(folder, result, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(folder / "report.html", result, *arguments, **options)
    assert os.listdir(folder) == ["report.html"]
    text = (folder / "report.html").read_text("utf-8")
    assert len(text) < 300_000
    assert not re.search(r"None|&amp;amp;|#0[1-4]0[1-4]0[1-4]|\bnan\b", text)
    return Page(text)


def test_of_a_score(tmp_path, scored):
    page = report(tmp_path, scored, "Wiki text", names=["a.npy", "b.npy", None, "d.npy"])
    assert page.count("svg") == 3 and page.count("h1") == 1
    for text in (
        "Wiki text",
        "logitsa.npytargetsb.npygroupsd.npy",
        f"tokens{scored.tokens:,}",
        f"sum of weights{scored.weight:.9g}",
        f"loss{scored.loss:.9g} ± {scored.standard_error:.3g} nats",
        f"± {scored.group_standard_error:.3g} (clustered, 45 groups)",
        f"perplexity{scored.perplexity:.7g}",
        f"bits per token{scored.bits_per_token:.7g}",
        f"bits per byte{scored.bits_per_byte:.7g}",
        f"accuracy{scored.accuracy:.4%}",
        f"top-2 accuracy{scored.top_k['2']:.4%}",
        f"top-5 accuracy{scored.top_k['5']:.4%}",
        f"calibration error{scored.calibration_error:.4g} ({len(scored.calibration)} bins)",
        "best temperature{:.4f} (95 % interval {:.4f} to {:.4f})".format(*scored.temperature),
        "The 40 of 45 groups",
    ):
        assert text in page, text
    worst = scored.worst[0]
    assert f"{worst['index']}{worst['target']}{worst['argmax']}{worst['value']:#.6g}" in page
    largest, least = (f(scored.groups, key=lambda x: x["loss"]) for f in (max, min))
    assert f"{largest['group']}{largest['tokens']}{largest['loss']:#.6g}" in page
    assert f"{least['loss']:#.6g}" not in page


def test_of_a_comparison(tmp_path, compared):
    page = report(tmp_path, compared, names=["a.npy", "b.npy"])
    assert page.count("svg") == 1
    for text in (
        "Comparison",
        "basea.npycandidateb.npy",
        *(f"{x['loss']:.9g} ± {x['standard_error']:.3g}" for x in (compared.base, compared.candidate)),
        f"perplexity{compared.base['perplexity']:.7g}{compared.candidate['perplexity']:.7g}",
        f"{compared.difference['mean']:.7g} ± {compared.difference['standard_error']:.3g} nats",
        f"ratio of the perplexities{compared.difference['perplexity_ratio']:.7g}",
        f"probability{compared.rms_probability_change:.4%}",
        f"{compared.agreement['top_1']:.4%} ± {compared.agreement['standard_error']:.2%}",
        f"top 5{compared.agreement['top_5']:.4%}",
        f"top 10{compared.agreement['top_10']:.4%}",
        "8 whose KL is 0",
    ):
        assert text in page, text
    found = [compared.kl, compared.reverse_kl, compared.js]
    assert "mean" + "".join(f"{x['mean']:.7g} ± {x['standard_error']:.2g}" for x in found) in page
    columns = {"median": "median", "90 %": "p90", "95 %": "p95", "99 %": "p99", "99.9 %": "p99_9", "largest": "max"}
    for what, name in columns.items():
        assert what + "".join(f"{x[name]:.4g}" for x in found) in page
    assert "at" + "".join(str(x["max_at"]) for x in found) in page
    worst = compared.worst[0]
    assert f"{worst['index']}{worst['base']}{worst['candidate']}{worst['value']:#.6g}" in page


def test_it_loads_and_runs_nothing(tmp_path, scored, compared):
    for result in (scored, compared):
        page = report(tmp_path, result)
        assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "image", "object", "base", "a"}
        for _, attributes in page.tags:
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert name not in ("src", "srcset", "data", "action")
                assert "href" not in name or value.removeprefix("#") in page.ids
                assert all(at in page.ids for at in re.findall(r"url\(#([^)]*)\)", value))
        text = (tmp_path / "report.html").read_text("utf-8")
        assert not re.search(r"https?:|@import|url\([^#]", text)


def test_names_and_titles_are_escaped(tmp_path, scored, compared):
    for result in (scored, compared):
        page = report(tmp_path, result, NAME, names=[NAME, NAME.encode("utf-8", "surrogateescape")])
        text = (tmp_path / "report.html").read_text("utf-8")
        assert page.count("b") == 0 and text.count("&lt;b&gt;&amp;&quot;&#x27;") == 4
        assert "\x1b" not in text


def test_what_was_not_asked_for_is_left_out(tmp_path, files):
    page = report(tmp_path, score(files["logits"], files["targets"]))
    for text in ("byte", "top-", "alibration", "temperature", "roup", "position t +", "largest", "weight", "cpp"):
        assert text not in page
    assert page.count("svg") == page.count("p") - 2 == 0
    page = report(tmp_path, compare(files["logits"], files["other"], top_k=()))
    for text in ("Loss", "perplexit", "RMS", "top ", "Distribution"):
        assert text not in page
    assert page.count("svg") == 0


def test_notes(tmp_path, scored, compared):
    for result in (scored._replace(calibration=None, groups=None, by_position=None), compared._replace(histogram=None)):
        assert "Interrupted" not in report(tmp_path, result)
        page = report(tmp_path, result._replace(complete=False, rows=1234))
        assert "Interrupted: these are the figures of the first 1,234 rows" in page
        page = report(tmp_path, result._replace(shift=-1, better_shift=0))
        assert "Shift 0 fits the first rows far better than -1" in page and "the target at t - 1" in page
        assert "more than 15.998 nats below" in report(tmp_path, result._replace(floor=15.998))


def test_numbers_that_are_none(tmp_path, scored, compared):
    bad = {"loss": math.nan, "perplexity": math.inf, "standard_error": math.nan, "calibration_error": math.nan}
    groups = [{**x, "loss": y} for x, y in zip(scored.groups, (math.inf, math.nan, -math.inf))]
    bins = [{**x, "loss": y} for x, y in zip(scored.by_position, (math.nan, math.inf, 1.0, 2.0, 1e300, 0.0))]
    worst = [{**scored.worst[0], "value": math.inf}]
    page = report(tmp_path, scored._replace(**bad, temperature=None, groups=groups, by_position=bins, worst=worst))
    for text in ("lossNaN ± NaN nats", "perplexityinf", "none from 1/4 to 4", "-inf"):
        assert text in page
    assert page.count("svg") == 2  # groups without a finite loss are a table only
    kl = {**dict.fromkeys(compared.kl, math.nan), "max": math.inf, "max_at": None}
    histogram = [(0.0, 2e-39, 5), (0.5, 0.625, 10), (2.0**127, 1.25 * 2.0**127, 1), (math.inf, math.inf, 3)]
    page = report(tmp_path, compared._replace(kl=kl, histogram=histogram))
    assert "3 whose KL is infinite" in page and page.count("svg") == 1


def test_of_nothing(tmp_path, scored, compared):
    empty = {"top_k": {}, "calibration": [], "groups": [], "by_position": [], "worst": []}
    assert report(tmp_path, scored._replace(tokens=0, loss=math.nan, seconds=0.0, **empty)).count("svg") == 0
    page = report(tmp_path, compared._replace(tokens=0, rows=0, histogram=[], worst=[]))
    assert page.count("svg") == 0
    assert report(tmp_path, compared._replace(histogram=[(0.0, 2e-39, 9)])).count("svg") == 0


def test_of_little(tmp_path, scored, compared):
    one = {"calibration": scored.calibration[:1], "groups": scored.groups[:1], "by_position": scored.by_position[:2]}
    assert report(tmp_path, scored._replace(**one)).count("svg") == 2
    same = [{**x, "loss": 0.0} for x in scored.by_position]
    assert report(tmp_path, scored._replace(by_position=same, loss=0.0)).count("svg") == 3
    assert report(tmp_path, compared._replace(histogram=[(0.5, 0.625, 1)])).count("svg") == 1


def test_positions_without_weight_are_a_gap(tmp_path, scored):
    assert scored.by_position[3]["weight"] == 0
    text = []
    for bins in (scored.by_position, [{**x, "weight": 1.0, "loss": 1.0} for x in scored.by_position]):
        report(tmp_path, scored._replace(by_position=bins, calibration=None, groups=None))
        line = re.search(r'd="([^"]*)"[^>]*var\(--line\)', (tmp_path / "report.html").read_text("utf-8"))[1]
        text.append(line.count("M"))
    assert text == [2, 1]


def test_same_result_same_bytes(tmp_path, scored, compared):
    """Also in another thread and style."""
    for result in (scored, compared):
        report(tmp_path, result)
        expected = (tmp_path / "report.html").read_bytes()
        with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "lines.linewidth": 9}):
            before = dict(matplotlib.rcParams)
            report(tmp_path, result)
            assert (tmp_path / "report.html").read_bytes() == expected
            assert dict(matplotlib.rcParams) == before
        thread = threading.Thread(target=report, args=(tmp_path, result))
        thread.start()
        thread.join()
        assert (tmp_path / "report.html").read_bytes() == expected


def test_pyplot_is_left_alone(tmp_path):
    code = """if True:
        import sys
        import numbaloss.files.report
        assert "matplotlib" not in sys.modules
        numbaloss.files.report.check_path("a.html")
        assert "matplotlib.pyplot" not in sys.modules
        sys.modules["matplotlib"] = None
        try:
            numbaloss.files.report.check_path("a.html")
        except ImportError as error:
            assert str(error) == 'report: needs matplotlib: pip install "numbaloss[cli]"', error
        else:
            raise SystemExit("expected an ImportError")
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT})


def test_bad_arguments(tmp_path, scored):
    with pytest.raises(TypeError, match="result: expected a Score or a Comparison, got tuple"):
        write_report(tmp_path / "a.html", tuple(scored))
    with pytest.raises(TypeError, match="names: expected a sequence of names, got str"):
        write_report(tmp_path / "a.html", scored, names="a.npy")
    with pytest.raises(ValueError, match="names: expected at most 4, for logits, targets, weights, groups, got 5"):
        write_report(tmp_path / "a.html", scored, names=["a.npy"] * 5)
    with pytest.raises(ValueError, match=r"report: expected a name that ends in \.html, got 'logits\.npy'"):
        write_report("logits.npy", scored)
    assert not os.listdir(tmp_path)


def test_a_report_that_cannot_be_written(tmp_path, scored, monkeypatch):
    with pytest.raises(FileError, match=r"none/a\.html: cannot be written: its folder does not exist"):
        check_path(tmp_path / "none" / "a.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(FileError, match="expected a file name to write to"):
        write_report(tmp_path / "folder.html", scored)
    path = tmp_path / "a.html"
    path.write_text("old")

    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(FileError, match=r"a\.html: cannot be written: No space left on device"):
        write_report(path, scored)
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.html", "folder.html"]
