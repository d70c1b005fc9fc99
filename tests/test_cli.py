"""The command: what it prints, and its exit codes."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import numbaloss
from numbaloss import cli, demo
from numbaloss.files import compare, score

COMMON = {
    *("tokens", "weight", "rows", "complete", "floor"),
    *("shift", "better_shift", "seconds", "bytes", "gb_per_second"),
}
KEYS = COMMON | {
    *("loss", "perplexity", "bits_per_token", "accuracy", "standard_error", "bits_per_byte", "top_k"),
    *("calibration_error", "calibration", "temperature", "groups", "group_standard_error", "by_position", "worst"),
}
COMPARISON = COMMON | {
    *("kl", "reverse_kl", "js", "agreement", "base", "candidate", "difference", "rms_probability_change"),
    *("histogram", "worst"),
}


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(3)
    logits, targets = rng.standard_normal((2, 5, 9)).astype(np.float32), rng.integers(0, 9, (2, 5))
    np.save(tmp_path / "l.npy", logits)
    np.save(tmp_path / "t.npy", targets)
    np.save(tmp_path / "w.npy", rng.random((2, 5)))
    return tmp_path


def command(*arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run([sys.executable, "-m", "numbaloss", *map(str, arguments)], check=False, **options)


def test_json(files, capsys):
    arguments = ["score", str(files / "l.npy"), str(files / "t.npy")]
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    got = json.loads(out)
    assert err == ""
    assert set(got) == KEYS
    want = numbaloss.Evaluation().update(np.load(files / "l.npy"), np.load(files / "t.npy")).result()
    assert got["tokens"] == 10
    assert got["loss"] == float(want.loss)
    assert (got["rows"], got["complete"]) == (10, True)
    assert got["bytes"] == 2 * 5 * (9 * 4 + 8)
    assert cli.main([*arguments, "--json", "--weights", str(files / "w.npy"), "--shift", "-1"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["tokens"], got["shift"]) == (8, -1)
    assert got["weight"] == math.fsum(np.load(files / "w.npy")[:, :-1].ravel())


def test_json_has_no_nan(files, capsys):
    np.save(files / "t.npy", np.full((2, 5), 7))
    assert cli.main(["score", str(files / "l.npy"), str(files / "t.npy"), "--ignore-index", "7", "--json"]) == 0
    got = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert (got["tokens"], got["loss"], got["perplexity"]) == (0, None, None)


def test_plain_lines(files, capsys):
    assert cli.main(["score", str(files / "l.npy"), str(files / "t.npy"), "--per-token", str(files / "o.npy")]) == 0
    out = capsys.readouterr().out
    names = [line[:16].strip() for line in out.splitlines()]
    assert names == [
        *("tokens", "loss", "standard error", "perplexity", "bits per token", "accuracy", "shift", "seconds", "GB/s"),
    ]
    assert np.load(files / "o.npy").shape == (2, 5)


def test_without_rich(files, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["score", str(files / "l.npy"), str(files / "t.npy")]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_with_rich(files, capsys, monkeypatch):
    pytest.importorskip("rich", reason="rich is an optional dependency")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["score", str(files / "l.npy"), str(files / "t.npy")]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_note_on_shift(files, capsys, more):
    targets = np.random.default_rng(0).integers(0, 9, (4, 40))
    np.save(files / "y.npy", targets)
    np.save(files / "x.npy", 9 * np.eye(9, dtype=np.float32)[np.roll(targets, -1, 1)])  # at t it predicts t + 1
    paths = [str(files / "x.npy"), str(files / "y.npy")]
    for arguments in (["score", *paths], ["compare", paths[0], *paths]):
        assert cli.main([*arguments, *more]) == 0
        assert capsys.readouterr().err == "numbaloss: note: --shift 1 fits the first rows far better than 0\n"
        assert cli.main([*arguments, *more, "--shift", "1"]) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.npy", b"", "is empty"),
        ("bad.npy", b"\x93NUMPY\x01\x00", "ends inside the header"),
        ("missing.npy", None, "No such file or directory"),
    ],
)
def test_bad_file(files, name, content, message):
    path = files / name
    if content is not None:
        path.write_bytes(content)
    done = command("score", path, files / "t.npy", "--per-token", files / "out.npy")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"numbaloss: {path}: {message}\n"
    assert not [found for found in os.listdir(files) if "out" in found]


def test_bad_arguments(files, capsys):
    paths = [str(files / "l.npy"), str(files / "t.npy")]
    assert cli.main(["score", *paths, "--shift", "9"]) == 2
    assert capsys.readouterr().err == "numbaloss: shift: expected less than 5 either way, targets (2, 5), got 9\n"
    assert cli.main(["score", paths[0], paths[0]]) == 2
    assert capsys.readouterr().err == f"numbaloss: {paths[0]}: targets: expected integers, got float32\n"
    for arguments in ([], ["score"], ["nothing"], ["score", *paths, "--shift", "x"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_version():
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"numbaloss {numbaloss.__version__}\n")


def test_stdin(files):
    want = json.loads(command("score", files / "l.npy", files / "t.npy", "--json").stdout)["loss"]
    for arguments, source in ((("-", files / "t.npy"), "l.npy"), ((files / "l.npy", "-"), "t.npy")):
        piped = command("score", *arguments, "--json", input=(files / source).read_bytes(), text=False)
        assert piped.returncode == 0
        assert json.loads(piped.stdout)["loss"] == want
        with open(files / source, "rb") as file:
            redirected = command("score", *arguments, "--json", stdin=file)
        assert json.loads(redirected.stdout)["loss"] == want
    closed = command("score", "-", files / "t.npy", input="")
    assert (closed.returncode, closed.stderr) == (2, "numbaloss: -: is empty\n")


INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from numbaloss.cli import main
raise SystemExit(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals and pipes")
def test_interrupt(files):
    started = [sys.executable, "-c", INTERRUPTIBLE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments = ["score", "-", str(files / "t.npy"), "--per-token", str(files / "out.npy")]
    with subprocess.Popen([*started, *arguments], **pipes) as process:
        header = (files / "l.npy").read_bytes()[:150]
        process.stdin.write(header)  # and then nothing: the reader waits inside the first block
        process.stdin.flush()
        deadline = time.monotonic() + 300
        while not any("part" in name for name in os.listdir(files)):  # written when all inputs are open
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
        assert process.stderr.read() in (b"", b"numbaloss: interrupted after 0 rows\n")  # still compiling, or not
    assert sorted(os.listdir(files)) == ["l.npy", "t.npy", "w.npy"]


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals and pipes")
def test_interrupt_prints_the_rows_so_far(files):
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((9000, 9)).astype(np.float32), rng.integers(0, 9, 9000)
    np.save(files / "l.npy", logits)
    np.save(files / "t.npy", targets)
    out = files / "out.npy"
    arguments = ["score", "-", files / "t.npy", "--json", "--memory", "64K", "--per-token", out]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", INTERRUPTIBLE, *map(str, arguments)], **pipes) as process:
        process.stdin.write((files / "l.npy").read_bytes()[: 128 + 8000 * 36])  # and then nothing
        process.stdin.flush()
        deadline = time.monotonic() + 300
        while not any(path.stat().st_size >= 4 * 4096 for path in files.glob("out*.part")):  # what blocks have given
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
        got, err = json.loads(process.stdout.read()), process.stderr.read().decode()
    rows = got["rows"]
    assert 4000 < rows <= 8000
    assert got["complete"] is False
    assert err == f"numbaloss: interrupted after {rows:,} rows\n"
    assert got["loss"] == numbaloss.Evaluation().update(logits[:rows], targets[:rows]).result().loss
    assert got["bytes"] == rows * (9 * 4 + 8)
    assert sorted(os.listdir(files)) == ["l.npy", "t.npy", "w.npy"]


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals and pipes")
def test_broken_pipe(files):
    read, write = os.pipe()
    os.close(read)
    done = command(
        "score", files / "l.npy", files / "t.npy", capture_output=False, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


# -- compare, and the options of both ------------------------------------------------------------------------------


@pytest.fixture
def pair(files):
    logits = np.load(files / "l.npy")
    np.save(files / "c.npy", logits + np.random.default_rng(4).standard_normal(logits.shape).astype(np.float32) / 9)
    return [str(files / f"{name}.npy") for name in ("l", "c", "t")]


def run_json(capsys, *arguments):
    """(exit code, the object, stderr); an object without NaN."""
    code = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out, parse_constant=lambda name: pytest.fail(name)), err


def test_compare_json(files, pair, capsys):
    for paths in (pair, pair[:2]):
        code, got, err = run_json(capsys, "compare", *paths, "--details")
        assert (code, err) == (0, "")
        assert set(got) == COMPARISON
        want = compare(*paths, details=True)._asdict()
        same = COMPARISON - {"seconds", "gb_per_second"}
        assert {name: got[name] for name in same} == json.loads(json.dumps({name: want[name] for name in same}))
        assert (got["base"] is None) is (len(paths) == 2)
        assert set(got["kl"]) == {"mean", "standard_error", "median", "p90", "p95", "p99", "p99_9", "max", "max_at"}
    np.save(files / "t.npy", np.full((2, 5), 7))
    code, got, _ = run_json(capsys, "compare", *pair, "--ignore-index", "7")
    assert (code, got["tokens"]) == (0, 0)
    assert [got["kl"]["mean"], got["agreement"]["top_1"], got["base"]["loss"], got["kl"]["max_at"]] == [None] * 4


def test_compare_table(pair, capsys):
    assert cli.main(["compare", *pair]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line[:18].strip() for line in lines]
    first = ["tokens", "perplexity", "their ratio", "loss difference", "target probability"]
    last = ["KL(base||cand.)", "", "KL(cand.||base)", "", "Jensen-Shannon", "", "agreement", "shift", "seconds", "GB/s"]
    assert names == first + last
    kl = compare(*pair).kl
    assert lines[5].split()[1] == f"{kl['mean']:.6g}"
    assert f"median {kl['median']:.4g}, p90 {kl['p90']:.4g}" in lines[6]
    assert lines[6].endswith(f"max {kl['max']:.4g} at {kl['max_at']}")
    assert lines[11].split(maxsplit=1)[1].startswith("top-1 ")
    assert cli.main(["compare", *pair[:2]]) == 0
    assert [line[:18].strip() for line in capsys.readouterr().out.splitlines()] == [first[0], *last]


def test_score_options(files, pair, capsys):
    asked = ["--groups", pair[2], "--calibration", "--top-k", "1,3", "--bytes", "12", "--details"]
    code, got, err = run_json(capsys, "score", pair[0], pair[2], *asked)
    more = {"groups": pair[2], "calibration": True, "top_k": (1, 3), "text_bytes": 12, "details": True}
    want = score(pair[0], pair[2], **more)._asdict()
    assert (code, err) == (0, "")
    for name in KEYS - {"seconds", "gb_per_second", "group_standard_error"}:
        assert got[name] == json.loads(json.dumps(want[name])), name
    assert cli.main(["score", pair[0], pair[2], *asked]) == 0
    names = [line[:18].strip() for line in capsys.readouterr().out.splitlines()]
    assert names[6:-3] == [
        *("bits per byte", "top-1 accuracy", "top-3 accuracy", "calibration error", "best temperature", "groups"),
        "standard error",
    ]


@pytest.mark.parametrize(
    ("conditions", "code", "failed"),
    [
        (["kl.mean>1"], 0, []),
        (["kl.mean > 0"], 1, ["kl.mean > 0"]),
        (["kl.mean<=0", "agreement.top_1<2", "tokens==10", "tokens>=11"], 1, ["agreement.top_1<2", "tokens==10"]),
        (["candidate.perplexity<1"], 0, []),
        (["better_shift>0"], 1, ["better_shift>0"]),  # null: cannot be told
    ],
)
def test_fail_if(pair, capsys, conditions, code, failed):
    arguments = [x for condition in conditions for x in ("--fail-if", condition)]
    assert cli.main(["compare", *pair, *arguments]) == code
    assert capsys.readouterr().err == "".join(f"numbaloss: failed: {condition}\n" for condition in failed)


def test_fail_if_that_cannot_be_told(files, pair, capsys):
    for name in ("kl.mode", "kl", "kl.max_at", "perplexity"):
        assert cli.main(["compare", *pair, "--fail-if", f"{name}>0"]) == 2
        message = f"numbaloss: --fail-if: expected the name of a number in the JSON, got '{name}>0'\n"
        assert capsys.readouterr().err == message
    for text in ("kl.mean", "kl.mean>x", "kl.mean=>1", ">1", "kl.mean>1>2"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["compare", *pair, "--fail-if", text])
        assert caught.value.code == 2
        assert "expected NAME>NUMBER" in capsys.readouterr().err
    logits = np.load(pair[0])
    logits[0, 0] = np.nan
    np.save(pair[0], logits)
    for sign in "<>":
        assert cli.main(["score", pair[0], pair[2], "--fail-if", f"loss{sign}1"]) == 1
        assert capsys.readouterr().err == f"numbaloss: failed: loss{sign}1\n"


def test_memory(pair, capsys):
    for text, size in (("512K", 1 << 19), ("300", 300), ("1g", 1 << 30), ("2MiB", 1 << 21), ("1 ", 1)):
        assert cli._size(text) == size
    _, want, _ = run_json(capsys, "score", pair[0], pair[2])
    assert run_json(capsys, "score", pair[0], pair[2], "--memory", "512K")[1]["loss"] == want["loss"]
    assert cli.main(["score", pair[0], pair[2], "--memory", "9"]) == 2
    assert (
        capsys.readouterr().err == f"numbaloss: {pair[0]}: expected two rows to fit into 9 bytes, got 36 bytes a row\n"
    )
    for option, text, message in (
        ("--memory", "512Q", "expected bytes as 512M or 4G, got '512Q'"),
        ("--memory", "", "expected bytes as 512M or 4G, got ''"),
        ("--top-k", "1,x", "expected integers with commas between, got '1,x'"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["score", pair[0], pair[2], option, text])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    for option, text, message in (
        ("--top-k", "0", "top_k: expected numbers from 1 on, got (0,)"),
        ("--bytes", "0", "text_bytes: expected a number > 0, got 0"),
    ):
        assert cli.main(["score", pair[0], pair[2], option, text]) == 2
        assert capsys.readouterr().err == f"numbaloss: {message}\n"


def test_raw_files(files, pair, capsys):
    for path in pair[:2]:
        np.load(path).tofile(path + ".bin")
    raw = [pair[0] + ".bin", pair[1] + ".bin", pair[2], "--dtype", "float32"]
    wanted = compare(*raw[:3], dtype="float32", shape=(2, 5, 9)).kl
    for shape in (["--shape", "-1,5,9"], ["--shape=2,-1,9"], ["--shape", "2,5,9"]):
        code, got, _ = run_json(capsys, "compare", *raw, *shape)
        assert (code, got["kl"]) == (0, wanted)


def test_resume(files, pair, capsys):
    for arguments in (["score", pair[0], pair[2], "--per-token", files / "o.npy"], ["compare", *pair]):
        state = files / f"{arguments[0]}.json"
        _, first, _ = run_json(capsys, *arguments, "--resume", state)
        written = state.read_bytes()
        code, again, err = run_json(capsys, *arguments, "--resume", state)
        assert (code, err, state.read_bytes()) == (0, "", written)
        for name in {*first} - {"seconds", "gb_per_second"}:
            assert first[name] == again[name]
        assert cli.main([*map(str, arguments), "--resume", str(state), "--shift", "1"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"numbaloss: {state}: arguments: expected [1, ")
    assert not list(files.glob("*.part"))


def test_report(files, pair, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
    for arguments in (["score", pair[0], pair[2]], ["compare", *pair]):
        path = files / f"{arguments[0]}.html"
        assert cli.main([*arguments, "--report", str(path)]) == 0
        page = path.read_text()
        assert page.startswith("<!DOCTYPE html>")
        assert pair[0] in page
        path.unlink()
    capsys.readouterr()
    for name, message in (("missing/x.html", "its folder does not exist"), ("x.txt", "expected a name that ends in")):
        assert cli.main(["score", pair[0], pair[2], "--report", str(files / name)]) == 2  # before the files are read
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err


def test_demo(capsys):
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "float32 eps" in out
    assert out.endswith("good\n")


def test_demo_can_fail(capsys, monkeypatch):
    right = demo.reference
    monkeypatch.setattr(demo, "reference", lambda *a: (right(*a)[0] * (1 + 1e-6), right(*a)[1]))
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().out.endswith("WRONG\n")


def test_demo_model_is_a_distribution():
    codes = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2])
    logits = demo.next_character(codes, 8, 3)
    assert logits.shape == (4, 3)
    np.testing.assert_allclose(np.exp(logits).sum(1), 1, rtol=1e-14)
    # after "0" in "01201201": three times 1. One kind; the uniform below order 0 is 1/3, and "0" is 3 of 8 there.
    order0 = (np.array([3, 3, 2]) - [1, 0, 0] + 3 / 3) / (7 + 3)  # the first character follows nothing
    order1 = (np.array([0, 3, 0]) + order0) / (3 + 1)
    monkey = demo._ORDERS
    try:
        demo._ORDERS = 2
        np.testing.assert_allclose(np.exp(demo.next_character(codes, 8, 3)[1]), order1, rtol=1e-14)
    finally:
        demo._ORDERS = monkey


def test_doctor():
    done = command("doctor")
    assert done.returncode == 0
    for word in ("versions", "kernels", "threads", "processor", "cache", "GPU", np.__version__, "compile and compute"):
        assert word in done.stdout
    assert "Error" not in done.stdout
    serial = command("doctor", env={**os.environ, "NUMBA_NUM_THREADS": "1"})
    assert serial.returncode == 0
    assert "kernels run serially" in serial.stdout
