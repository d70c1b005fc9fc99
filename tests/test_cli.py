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
from numbaloss.files import Score

KEYS = {
    *("tokens", "weight", "loss", "perplexity", "bits_per_token", "accuracy", "standard_error"),
    *("shift", "better_shift", "seconds", "bytes", "gb_per_second"),
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
    options = {"capture_output": True, "text": True, "timeout": 120, **options}
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


def test_note_on_shift(capsys):
    result = Score(10, 10.0, 5.0, 148.4, 7.2, 0.1, 0.1, 0, 1, 0.5, 1000)
    cli.print_score(result)
    assert "--shift 1 fits the first rows far better than 0" in capsys.readouterr().err


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


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals and pipes")
def test_interrupt(files):
    started = [sys.executable, "-c", "print(flush=True); from numbaloss.cli import main; raise SystemExit(main())"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments = ["score", "-", str(files / "t.npy"), "--per-token", str(files / "out.npy")]
    with subprocess.Popen([*started, *arguments], **pipes) as process:
        header = (files / "l.npy").read_bytes()[:150]
        process.stdin.write(header)  # and then nothing: the reader waits inside the first block
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not any("part" in name for name in os.listdir(files)):  # written when all inputs are open
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""
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
