"""A pass that is broken off, by Ctrl-C, by an error or by kill -9, goes on and ends with the same bits."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from numbaloss.files import FileError, Interrupted, compare, run, score

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, V = 4, 5, 7
IGNORED = 50
MEMORY = 2 * (2 * V * 4) + 250  # blocks of a row of two files
FORMS = ["npy", "jsonl", "compare"]


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((B, T, V)) * 2).astype(np.float32)
    targets = (logits / 1.5 + rng.gumbel(size=logits.shape)).argmax(-1)
    targets[1, 2] = IGNORED
    arrays = {"logits": logits, "other": logits + rng.standard_normal(logits.shape).astype(np.float32) / 9}
    arrays |= {"targets": targets, "weights": rng.integers(0, 4, (B, T)) / 3, "groups": rng.integers(-2, 3, (B, T))}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def a_pass(folder, form, weights="weights", out=None, **more):
    path = {name: folder / f"{name}.npy" for name in ("logits", "other", "targets", "groups", weights)}
    common = {"weights": path[weights], "shift": 1, "ignore_index": IGNORED, "memory": MEMORY, "details": True, **more}
    if form == "compare":
        return compare(path["logits"], path["other"], path["targets"], top_k=(2, 3), **common)
    asked = {"groups": path["groups"], "top_k": (1, 3), "calibration": True, "text_bytes": 99}
    return score(path["logits"], path["targets"], per_token=out and folder / f"{out}.{form}", **asked, **common)


def plain(result, **same):
    return json.dumps(result._replace(seconds=0, **same)._asdict())


def stop(at=None):
    """A callback that is Ctrl-C after a block: the first one of a pass, or that which ends with row `at`."""
    start = []

    def progress(done, total):
        start.append(done)
        if done == at or at is None and done > start[0]:
            raise KeyboardInterrupt

    return progress


def first_rows(folder, form, rows):
    """The result of these rows alone: the others have no weight."""
    weights = np.load(folder / "weights.npy")
    weights.reshape(-1)[rows + 1 :] = 0  # a row's weight stands with its target
    np.save(folder / "fewer.npy", weights)
    return a_pass(folder, form, "fewer")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("every", [0, 10])
def test_interrupted_after_every_block(files, monkeypatch, form, every):
    monkeypatch.setattr(run, "SAVE_SECONDS", every)
    state, out = files / "state.json", files / f"out.{form}"
    whole = a_pass(files, form, out="whole")
    rows, stops = [], 0
    while True:
        try:
            result = a_pass(files, form, out="out", resume=state, progress=stop())
            break
        except Interrupted as interrupted:
            stops, partial = stops + 1, interrupted.result
        rows.append(partial.rows)
        assert partial.complete is (partial.rows == B * T)
        assert not out.exists()
        same = {"rows": 0, "complete": None, "bytes": 0}
        assert plain(partial, **same) == plain(first_rows(files, form, partial.rows), **same)
        assert json.loads(state.read_text())["rows"] == partial.rows
    assert rows == sorted(set(rows))
    assert stops >= 8
    assert plain(result) == plain(whole)
    if form != "compare":
        assert out.read_bytes() == (files / f"whole.{form}").read_bytes()
    assert not list(files.glob("*.part"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("every", [0, math.inf])
def test_broken_off_between_two_saves(files, monkeypatch, form, every):
    """An error saves nothing: what was written after the last save is written again."""
    monkeypatch.setattr(run, "SAVE_SECONDS", every)
    whole, state = a_pass(files, form, out="whole"), files / "state"
    for at in (8, 9, 17, B * T):

        def fail(done, total, at=at):
            if done >= at:
                raise RuntimeError("the machine is gone")

        with pytest.raises(RuntimeError):
            a_pass(files, form, out="out", resume=state, progress=fail)
        assert json.loads(state.read_text())["rows"] == (0 if every else at)
    assert plain(a_pass(files, form, out="out", resume=state)) == plain(whole)
    if form != "compare":
        assert (files / f"out.{form}").read_bytes() == (files / f"whole.{form}").read_bytes()


def test_saved_after_each_block(files, monkeypatch):
    """And then the callback is called."""
    state = files / "state"
    for every in (0, math.inf):
        monkeypatch.setattr(run, "SAVE_SECONDS", every)
        calls = []

        def progress(done, total, calls=calls):
            calls.append((done, json.loads(state.read_text())["rows"]))

        a_pass(files, "npy", resume=state, progress=progress)
        assert len(calls) > 8
        assert all(saved == (0 if every else done) for done, saved in calls)
        assert json.loads(state.read_text())["rows"] == B * T
        state.unlink()


def test_ctrl_c_inside_a_block_waits_for_its_end(files, monkeypatch):
    """All measures are of the same rows, whenever the signal comes."""
    from numbaloss.files import measures

    add, calls = measures.TopK.add, []

    def interrupted_add(self, *arguments):
        calls.append(1)
        if len(calls) == 6:  # two of them rehearse
            signal.raise_signal(signal.SIGINT)
        add(self, *arguments)

    monkeypatch.setattr(measures.TopK, "add", interrupted_add)
    state = files / "state.json"
    before, handler = signal.getsignal(signal.SIGINT), signal.default_int_handler
    signal.signal(signal.SIGINT, handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(Interrupted) as caught:
            a_pass(files, "npy", resume=state)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    partial = caught.value.result
    assert 0 < partial.rows < B * T
    same = {"rows": 0, "complete": None, "bytes": 0}
    assert plain(partial, **same) == plain(first_rows(files, "npy", partial.rows), **same)
    assert plain(a_pass(files, "npy", resume=state)) == plain(a_pass(files, "npy"))


def test_what_the_first_block_showed_is_kept(tmp_path):
    targets = np.random.default_rng(7).integers(0, V, 200)
    paths = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(paths[0], 9 * np.eye(V, dtype=np.float32)[np.roll(targets, -1)])  # at t it predicts t + 1
    np.save(paths[1], targets)
    with pytest.raises(Interrupted) as caught:
        score(*paths, memory=20_000, resume=tmp_path / "state", progress=stop())
    assert caught.value.result.better_shift == 1
    assert score(*paths, memory=20_000, resume=tmp_path / "state").better_shift == 1


def test_from_another_thread(files):
    """Where there are no signals."""
    results = []
    thread = threading.Thread(target=lambda: results.append(a_pass(files, "compare", resume=files / "state")))
    thread.start()
    thread.join()
    assert plain(results[0]) == plain(a_pass(files, "compare"))


@pytest.mark.parametrize("form", FORMS)
def test_finished_state_gives_the_result(files, form):
    state, out = files / "state.json", files / f"out.{form}"
    whole = a_pass(files, form, out="out", resume=state)
    before = state.read_bytes(), out.read_bytes() if form != "compare" else None
    calls = []
    again = a_pass(files, form, out="out", resume=state, progress=lambda *call: calls.append(call))
    assert calls == [(B * T, B * T)]
    assert plain(again) == plain(whole)
    assert again.seconds < 2 * whole.seconds + 1
    assert before == (state.read_bytes(), out.read_bytes() if form != "compare" else None)
    assert not list(files.glob("*.part"))


def test_killed_between_the_last_save_and_the_end(files, monkeypatch):
    """The state says that all is done, the file has not got its name yet."""
    state, out = files / "state.json", files / "out.npy"
    with monkeypatch.context() as patch:
        patch.setattr(run.Output, "finish", lambda self: None)
        a_pass(files, "npy", out="out", resume=state)
    assert not out.exists()
    a_pass(files, "npy", out="out", resume=state)
    a_pass(files, "npy", out="whole")
    assert out.read_bytes() == (files / "whole.npy").read_bytes()


def test_what_an_older_pass_left_behind(files):
    """Its state was removed: none of it gets into the new file."""
    (files / "out.jsonl.part").write_bytes(b"old\n" * 10_000)
    a_pass(files, "jsonl", out="out", resume=files / "state.json")
    a_pass(files, "jsonl", out="whole")
    assert (files / "out.jsonl").read_bytes() == (files / "whole.jsonl").read_bytes()


# -- kill -9 -------------------------------------------------------------------------------------------------------

TIMES = 12  # as many blocks, of at least 3 ms: longer than all kills wait together
KILLED = """
import json, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, {tests!r})
import test_resume
from numbaloss.files import run

run.SAVE_SECONDS = 0
folder, form = Path(sys.argv[1]), sys.argv[2]
whole = test_resume.a_pass(folder, form, out="whole")
delays, rows = test_resume.np.random.default_rng(8).uniform(0, 0.03, 20), []
for delay in delays:
    begun, begin = os.pipe()
    child = os.fork()
    if not child:

        def slowly(done, total):
            if done:
                time.sleep(0.003)
            os.write(begin, b"x")

        test_resume.a_pass(folder, form, out="out", resume=folder / "state", progress=slowly)
        os._exit(7)
    os.read(begun, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    rows.append(json.loads((folder / "state").read_text())["rows"])
result = test_resume.a_pass(folder, form, out="out", resume=folder / "state")
assert test_resume.plain(result) == test_resume.plain(whole)
print(json.dumps(rows))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes to fork and kill on this system")
@pytest.mark.parametrize("form", ["jsonl", "compare"])
def test_kill(files, form):
    """At 20 points: a process that has compiled forks one for each attempt, and kills it."""
    for name in ("logits", "other", "targets", "weights", "groups"):
        array = np.load(files / f"{name}.npy")
        np.save(files / f"{name}.npy", np.tile(array, (TIMES, *[1] * (array.ndim - 1))))
    arguments = [sys.executable, "-c", KILLED.format(tests=os.path.dirname(__file__)), files, form]
    done = subprocess.run(
        arguments, env={**os.environ, "NUMBA_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows == sorted(rows)
    assert len(rows) == 20
    assert rows[-1] < TIMES * B * T  # every kill came before the end
    if form != "compare":
        assert (files / f"out.{form}").read_bytes() == (files / f"whole.{form}").read_bytes()
    assert not list(files.glob("*.part"))


# -- states that do not fit ----------------------------------------------------------------------------------------


@pytest.fixture
def stopped(files):
    with pytest.raises(Interrupted):
        a_pass(files, "npy", out="out", resume=files / "state", progress=stop(at=8))
    return files


def refused(folder, *problems, **more):
    """The pass is refused in one line that names the state, and leaves it as it was."""
    before = (folder / "state").read_bytes()
    with pytest.raises(FileError) as caught:
        a_pass(folder, "npy", **{"out": "out", "resume": folder / "state", **more})
    text = str(caught.value)
    assert "\n" not in text
    assert all(problem in text for problem in problems), text
    assert (folder / "state").read_bytes() == before
    return text


def test_damaged_state(stopped):
    path = stopped / "state"
    good = path.read_bytes()
    state = json.loads(good)
    for size in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        refused(stopped, f"{path}: not the state of such a pass")
    for bad in (b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"7", b'"text"', b"null", b"{}"):
        path.write_bytes(bad)
        refused(stopped, f"{path}: not the state of such a pass")
    assert state["rows"] == 8
    for name in ("rows", "seconds", "notes", "measures", "written"):
        for value in (None, [], {}, "x", -1, 1e999):
            if (name, value) not in (("notes", {}), ("notes", []), ("seconds", -1), ("seconds", 1e999)):
                path.write_text(json.dumps({**state, name: value}))
                refused(stopped, f"{path}: not the state of such a pass")
        path.write_text(json.dumps({k: v for k, v in state.items() if k != name}))
        refused(stopped, f"{path}: not the state of such a pass ('{name}')")
    path.write_text(json.dumps({**state, "rows": B * T + 1}))
    refused(stopped, f"{path}: not the state of such a pass (21 rows of 20, ")
    for name in state["measures"]:
        for value in (None, {}, 5, "x", {key: [1e9] for key in ("tokens", "weight", "loss", "at", "count")}):
            if (name, value) != ("groups", {}) and (name, value) != ("worst", {}):
                path.write_text(json.dumps({**state, "measures": {**state["measures"], name: value}}))
                refused(stopped, f"{path}: not the state of such a pass")
    path.write_bytes(good)
    assert plain(a_pass(stopped, "npy", out="out", resume=path)) == plain(a_pass(stopped, "npy"))


def test_another_pass(stopped):
    path = stopped / "state"
    refused(stopped, f"{path}: arguments: expected [2, 50, ", "got [1, 50, ", shift=2)
    refused(stopped, f"{path}: arguments: ", ignore_index=51)
    refused(stopped, f"{path}: arguments: ", details=False)
    with pytest.raises(FileError, match="state: arguments: expected"):
        a_pass(stopped, "compare", resume=path)
    logits = stopped / "logits.npy"
    content, times = logits.read_bytes(), logits.stat()
    os.utime(logits, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    refused(stopped, f"{path}: files: expected ", "logits.npy")
    logits.write_bytes(content + b"\0")
    os.utime(logits, ns=(times.st_atime_ns, times.st_mtime_ns))
    refused(stopped, f"{path}: files: expected ")
    logits.write_bytes(content)
    os.utime(logits, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert plain(a_pass(stopped, "npy", out="out", resume=path)) == plain(a_pass(stopped, "npy"))


@pytest.mark.parametrize("memory", [3 * MEMORY, 1 << 20])
def test_other_blocks(stopped, memory):
    """A pass goes on with more memory."""
    got = a_pass(stopped, "npy", out="out", resume=stopped / "state", memory=memory)
    assert plain(got) == plain(a_pass(stopped, "npy", out="whole"))
    assert (stopped / "out.npy").read_bytes() == (stopped / "whole.npy").read_bytes()


def test_truncated_output(stopped):
    part, state = stopped / "out.npy.part", json.loads((stopped / "state").read_text())
    content = part.read_bytes()
    assert len(content) == state["written"]
    part.write_bytes(content[:-1])
    refused(stopped, f"{stopped / 'out.npy'}: expected {len(content)} bytes in {part} to go on with, got fewer")
    part.unlink()
    refused(stopped, "to go on with, got fewer")
    part.write_bytes(content + b"more")
    a_pass(stopped, "npy", out="out", resume=stopped / "state")
    a_pass(stopped, "npy", out="whole")
    assert (stopped / "out.npy").read_bytes() == (stopped / "whole.npy").read_bytes()


def test_state_that_cannot_be_written(files):
    with pytest.raises(FileError, match=r"state: cannot be written: No such file or directory$"):
        a_pass(files, "npy", resume=files / "missing" / "state")
    with pytest.raises(FileError, match=r"not the state of such a pass \(Is a directory\)"):
        a_pass(files, "npy", resume=files)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipe(files):
    pipe, content = files / "pipe", (files / "logits.npy").read_bytes()
    os.mkfifo(pipe)

    def feed():
        with contextlib.suppress(BrokenPipeError):  # it was refused
            pipe.write_bytes(content)

    thread = threading.Thread(target=feed)
    thread.start()
    with pytest.raises(ValueError, match=r"^resume: expected files, got a pipe$"):
        score(pipe, files / "targets.npy", resume=files / "state")
    thread.join()
    assert not (files / "state").exists()
