"""Files in, the bits of the arrays out; or one line that says what is wrong with which file."""

import contextlib
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numbaloss
from numbaloss.files import FileError, score
from numbaloss.files.readers import open_array

B, T, V = 3, 7, 11
SMALL = 2 * V * 8 + 100  # bytes of memory: blocks of one or a few rows


def arrays(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((B, T, V)) * 4).astype(dtype)
    targets = rng.integers(0, V, (B, T))
    targets[0, 2] = targets[2, 6] = -100
    weights = rng.integers(0, 3, (B, T)) / 2
    return logits, targets, weights


def save(path, array, version=(1, 0), fortran=False):
    with open(path, "wb") as file:
        np.lib.format.write_array(file, np.asfortranarray(array) if fortran else array, version=version)
    return path


@pytest.fixture
def files(tmp_path):
    logits, targets, weights = arrays()
    return [save(tmp_path / f"{n}.npy", a) for n, a in (("l", logits), ("t", targets), ("w", weights))]


def bits(result):
    return np.array([getattr(result, name) for name in expected_fields], np.float64).view(np.int64).tolist()


expected_fields = ("tokens", "weight", "loss", "perplexity", "bits_per_token", "accuracy", "standard_error")


def evaluate(logits, targets, weights=None, ignore_index=-100):
    return numbaloss.Evaluation(ignore_index=ignore_index).update(logits, targets, weights).result()


def shifted(logits, shift, *others):
    """The definition of shift: the pairs (t, t + shift) that exist."""
    t = np.array([i for i in range(T) if 0 <= i + shift < T], int)
    return (logits[:, t], *(a if a is None else a[:, t + shift] for a in others))


def unchanged(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("memory", [SMALL, 4 * SMALL, 1 << 20])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_same_bits_as_arrays(tmp_path, dtype, memory, version):
    logits, targets, weights = arrays(dtype)
    paths = [save(tmp_path / n, a, version) for n, a in (("l", logits), ("t", targets), ("w", weights))]
    native = logits.astype(logits.dtype.newbyteorder("="))
    assert bits(score(*paths[:2], memory=memory)) == bits(evaluate(native, targets))
    assert bits(score(*paths[:2], weights=paths[2], memory=memory)) == bits(evaluate(native, targets, weights))


@pytest.mark.parametrize("kind", ["i1", "i2", "<i4", ">i4", "<i8", ">i8", "u1", "u2", ">u4", "u8"])
@pytest.mark.parametrize("weight_kind", ["?", "i1", "u8", ">f2", "f4", "f8"])
def test_label_and_weight_dtypes(tmp_path, kind, weight_kind):
    logits, targets, weights = arrays()
    targets = np.where(targets < 0, 4, targets).astype(kind)
    weights = weights.astype(weight_kind)
    paths = [save(tmp_path / n, a) for n, a in (("l", logits), ("t", targets), ("w", weights))]
    for shift in (0, 1):
        moved = shifted(logits, shift, targets.astype(np.int64), weights.astype(np.float64))
        got = score(*paths[:2], weights=paths[2], ignore_index=4, shift=shift, memory=3 * SMALL)
        assert bits(got) == bits(evaluate(*moved, ignore_index=4))


@pytest.mark.parametrize("shift", [-6, -2, -1, 0, 1, 3, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_shift_and_per_token(files, tmp_path, shift, weighted):
    logits, targets, weights = arrays()
    out = tmp_path / "out.npy"
    expected_logits, labels, weights = shifted(logits, shift, targets, weights if weighted else None)
    expected = numbaloss.token_logprobs(np.ascontiguousarray(expected_logits), labels)
    if weighted:
        expected[weights == 0] = 0
    for memory in (SMALL, 3 * SMALL, 1 << 20):
        got = score(*files[:2], weights=files[2] if weighted else None, shift=shift, memory=memory, per_token=out)
        assert bits(got) == bits(evaluate(expected_logits, labels, weights))
        assert got.shift == shift
        written = np.load(out)
        assert written.dtype == np.float32
        assert written.shape == (B, T - abs(shift))
        assert np.array_equal(written.view(np.int32), expected.view(np.int32))
    assert sorted(os.listdir(tmp_path)) == ["l.npy", "out.npy", "t.npy", "w.npy"]


@pytest.mark.parametrize("shift", [7, -7, 10**30])
def test_shift_too_far(files, shift):
    with pytest.raises(ValueError, match="shift: expected less than 7"):
        score(*files[:2], shift=shift)


@pytest.mark.parametrize("memory", [SMALL, 300, 1 << 20])
def test_fortran_order(tmp_path, memory):
    logits, targets, _ = arrays()
    flat = save(tmp_path / "l", logits.reshape(-1, V), fortran=True), save(tmp_path / "t", targets.reshape(-1))
    assert bits(score(*flat, memory=memory)) == bits(evaluate(logits, targets))
    with open_array(flat[0], "logits") as file:
        assert file.by_column
    logits_file, targets_file = save(tmp_path / "l", logits), save(tmp_path / "t", targets, fortran=True)
    for shift in (0, 2, -3):
        got = score(logits_file, targets_file, memory=memory, shift=shift)
        assert bits(got) == bits(evaluate(*shifted(logits, shift, targets)))
    with pytest.raises(FileError, match=r"two-dimensional .npy files only, got shape \(3, 7, 11\)"):
        score(save(tmp_path / "l", logits, fortran=True), targets_file)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_npz(tmp_path, writer):
    logits, targets, weights = arrays()
    path = tmp_path / "all.npz"
    writer(path, other=weights, logits=logits, targets=targets, weights=weights)
    want = bits(evaluate(logits, targets, weights))
    for memory in (SMALL, 1 << 20):
        assert bits(score(path, path, weights=path, memory=memory)) == want
        assert bits(score(f"{path}:logits", f"{path}:targets", weights=f"{path}:other", memory=memory)) == want
    single = tmp_path / "single.npz"
    writer(single, anything=logits)
    assert bits(score(single, path, weights=path)) == want
    with pytest.raises(FileError, match="expected a member called 'x', found other, logits, targets, weights"):
        score(f"{path}:x", path)
    if os.name == "posix":  # a file that is called so comes first
        save(tmp_path / "all.npz:x", logits)
        assert bits(score(f"{path}:x", path, weights=path)) == want
    with pytest.raises(FileError, match=r"not a \.npz file"):
        np.save(tmp_path / "array.npz.npy", logits)
        os.rename(tmp_path / "array.npz.npy", tmp_path / "array.npz")
        score(f"{tmp_path / 'array.npz'}:x", path)


def test_rank_one_and_empty(tmp_path):
    rng = np.random.default_rng(5)
    row = rng.standard_normal(V).astype(np.float32)
    got = score(save(tmp_path / "l", row), save(tmp_path / "t", np.array(3)), per_token=tmp_path / "o")
    assert bits(got) == bits(evaluate(row[None], np.array([3])))
    assert np.load(tmp_path / "o").shape == ()
    for shape in ((0,), (4, 0), (0, 5)):
        paths = save(tmp_path / "l", np.zeros((*shape, V), np.float64)), save(tmp_path / "t", np.zeros(shape, int))
        got = score(*paths, per_token=tmp_path / "o")
        assert got.tokens == 0
        assert np.isnan(got.loss)
        assert np.load(tmp_path / "o").shape == shape
        assert np.load(tmp_path / "o").dtype == np.float64


def test_nan_row_counts_only_where_it_counts(tmp_path):
    logits, targets, _ = arrays()
    logits[1, 3] = np.nan
    paths = save(tmp_path / "l", logits), save(tmp_path / "t", targets)
    assert np.isnan(score(*paths).loss)
    weights = np.ones((B, T))
    weights[1, 3] = 0
    got = score(*paths, weights=save(tmp_path / "w", weights), per_token=tmp_path / "o")
    assert np.isfinite(got.loss)
    assert np.load(tmp_path / "o")[1, 3] == 0


# What is wrong with a file


@pytest.mark.parametrize("bad", [V, -1, 2**31, 2**32 + 3, -(2**63)])
@pytest.mark.parametrize("shift", [0, 1])
def test_label_out_of_range(files, tmp_path, bad, shift):
    _, targets, weights = arrays()
    targets[2, 5] = bad
    save(files[1], targets)
    before = unchanged(tmp_path)
    pattern = rf"t\.npy: targets\[2, 5\]: expected a label in \[0, 11\) or -100, got {bad}$"
    for memory in (SMALL, 1 << 20):
        with pytest.raises(FileError, match=pattern):
            score(*files[:2], shift=shift, memory=memory, per_token=tmp_path / "out.npy")
    assert unchanged(tmp_path) == before
    weights[2, 5] = 0
    save(files[2], weights)
    got = score(*files[:2], weights=files[2], shift=shift, per_token=tmp_path / "out.npy")  # weight 0: not looked at
    assert np.isfinite(got.loss)
    assert np.load(tmp_path / "out.npy")[2, 5 - shift] == 0


@pytest.mark.parametrize("bad", [-0.5, np.nan, np.inf])
def test_weight_out_of_range(files, bad):
    weights = arrays()[2]
    weights[1, 4] = bad
    save(files[2], weights)
    with pytest.raises(FileError, match=rf"w\.npy: weights\[1, 4\]: expected a finite number >= 0, got {bad}$"):
        score(*files[:2], weights=files[2], shift=-1)
    weights[1, 4], weights[1, 6] = 1, bad
    save(files[2], weights)
    assert np.isfinite(score(*files[:2], weights=files[2], shift=-1).loss)  # the last position is not scored then


def test_progress(files):
    for memory, least in ((SMALL, B * T // 2), (1 << 20, 1)):  # blocks of one or two rows; one block
        calls = []
        score(*files[:2], memory=memory, progress=lambda *call, calls=calls: calls.append(call))
        assert calls[0] == (0, B * T)
        assert calls[-1] == (B * T, B * T)
        assert len(calls) > least
        assert calls == sorted(set(calls))


def test_unsigned_labels_do_not_wrap(files):
    targets = np.full((B, T), 2**64 - 100, np.uint64)
    with pytest.raises(FileError, match=r"targets\[0, 0\]: .* got 18446744073709551516"):
        score(files[0], save(files[1], targets))


def npy(descr="'<f4'", shape="(2, 3)", order="False", data=24 * b"\0", version=1, length=None):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    length = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2 if version == 1 else 4, "little") + text + data


BAD_LOGITS = [
    ("is empty", b""),
    ("is a directory", None),
    ("not a .npy, .npz, .safetensors or llama.cpp file: it begins with b'hello, w'", b"hello, world"),
    ("a pickle; pickles are not read", pickle.dumps(np.zeros(3), protocol=4)),
    ("expected float16, bfloat16, float32 or float64, got pickled objects", npy("'|O'", data=pickle.dumps([1, 2]))),
    ("expected float16, bfloat16, float32 or float64, got complex64", npy("'<c8'", data=b"\0" * 48)),
    ("expected float16, bfloat16, float32 or float64, got int32", npy("'<i4'")),
    ("expected float16, bfloat16, float32 or float64, got bool", npy("'|b1'")),
    ("expected float16, bfloat16, float32 or float64, got |S4", npy("'|S4'")),
    (r"expected float16, bfloat16, float32 or float64, got [('a', '<f4')]", npy("[('a', '<f4')]")),
    ("expected float16, bfloat16, float32 or float64, got ('<f4', (2,))", npy("('<f4', (2,))")),
    ("got |V2; if these are bfloat16: --dtype bfloat16", npy("'<V2'")),
    ("got uint16; if these are bfloat16: --dtype bfloat16", npy("'<u2'")),
    ("damaged: a header of 4294967295 bytes, expected at most 10000", npy(version=2, length=2**32 - 1)),
    ("damaged: a header of 65535 bytes", npy(length=65535)),
    ("ends inside the header", npy(length=9000)),
    ("expected .npy version 1, 2 or 3, got 9", npy(version=9)),
    ("damaged header: shape (-1, 3)", npy(shape="(-1, 3)")),
    ("damaged header: more than", npy(shape="(4294967296, 4294967296)")),
    ("damaged header: more than 9", npy(shape="(0, 99999999999999999999)")),
    ("damaged header: shape is not valid", npy(shape="[2, 3]")),
    ("damaged header: ", npy(shape="(2, 3")),
    ("damaged header: descr is not a valid", npy(descr="'<q9'")),
    ("damaged header: fortran_order", npy(order="1")),
    ("damaged header: ", npy(shape="(" * 2000 + ")" * 2000)),
    ("damaged header: ", npy(shape="(" + "9" * 5000 + ",)")),
    ("truncated: expected 40000000000000 bytes", npy(shape="(1000000000000, 10)")),
    ("truncated: expected 24 bytes of data for shape (2, 3) float32, got 23", npy(data=23 * b"\0")),
    ("classes > 0, got (2, 0)", npy(shape="(2, 0)")),
    ("classes > 0, got ()", npy(shape="()")),
    ("not a .npz file, or a damaged one", b"PK\x03\x04" + b"\0" * 100),
]


@pytest.mark.parametrize(("message", "content"), BAD_LOGITS, ids=range(len(BAD_LOGITS)))
def test_bad_logits(tmp_path, message, content):
    path, out = tmp_path / "bad.npy", tmp_path / "out.npy"
    path.mkdir() if content is None else path.write_bytes(content)
    targets = save(tmp_path / "t.npy", np.zeros(2, int))
    with pytest.raises(FileError) as caught:
        score(path, targets, per_token=out)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message.lower() in text.lower()
    assert "\n" not in text
    assert len(text) < 700
    assert sorted(os.listdir(tmp_path)) == ["bad.npy", "t.npy"]


def test_header_of_python_2(tmp_path):
    path, targets = tmp_path / "old.npy", save(tmp_path / "t.npy", np.zeros(2, int))
    path.write_bytes(npy(shape="(2L, 3L)"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(path, targets).tokens == 2


def test_other_bad_arguments(files, tmp_path):
    logits, targets, _ = files
    missing = tmp_path / "missing.npy"
    for arguments, message in (
        ({"logits": missing}, f"{missing}: No such file"),
        ({"targets": logits}, "targets: expected integers, got float32"),
        ({"weights": save(tmp_path / "c", np.zeros((B, T), complex))}, "weights: expected numbers, got complex128"),
        ({"targets": save(tmp_path / "T", np.zeros((T, B), int))}, "to match logits (3, 7, 11), got (7, 3)"),
        ({"weights": save(tmp_path / "W", np.zeros(B))}, "weights: expected shape (3, 7) to match"),
        ({"logits": "-", "targets": "-"}, "-: expected one input on stdin, got more"),
        ({"memory": 60}, "two rows to fit into 60 bytes, got 44 bytes a row"),
        ({"per_token": logits}, f"{logits}: would replace an input"),
        ({"per_token": tmp_path}, "something else that exists"),
        ({"per_token": missing / "out.npy"}, "out.npy: cannot be written: No such file"),
    ):
        before = os.listdir(tmp_path), logits.read_bytes()
        with pytest.raises(ValueError) as caught:
            score(**{"logits": logits, "targets": targets, **arguments})
        assert message in str(caught.value)
        assert before == (os.listdir(tmp_path), logits.read_bytes())
    for arguments in ({"shift": 1.0}, {"ignore_index": "x"}, {"logits": 3.5}):
        with pytest.raises(TypeError):
            score(**{"logits": logits, "targets": targets, **arguments})


@pytest.mark.parametrize("version", [1, 2, 3])
def test_truncated_anywhere(tmp_path, version):
    whole = npy(version=version)
    targets = save(tmp_path / "t.npy", np.zeros(2, int))
    path = tmp_path / "cut.npy"
    path.write_bytes(whole)
    assert score(path, targets).tokens == 2
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FileError, match=r"cut\.npy: (is empty|ends inside the header|truncated)"):
            score(path, targets)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_npz_truncated_anywhere(tmp_path, writer):
    path, targets = tmp_path / "cut.npz", save(tmp_path / "t.npy", np.zeros(2, int))
    writer(path, logits=np.ones((2, 3), np.float32))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FileError, match=r"cut\.npz: "):
            score(path, targets)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["npy", "npz", "deflated"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1),
)
def test_damaged_bytes_never_crash(tmp_path_factory, kind, changes):
    folder = tmp_path_factory.getbasetemp()
    buffer = io.BytesIO()
    writer = {"npy": np.save, "npz": lambda f, a: np.savez(f, logits=a)}.get(kind) or np.savez_compressed
    writer(buffer, np.ones((2, 3), np.float32))
    data = bytearray(buffer.getvalue())
    for at, value in changes:
        data[at % len(data)] = value
    path = folder / "damaged"
    path.write_bytes(data)
    targets = save(folder / "damaged.targets", np.zeros(2, int))
    try:
        assert score(path, targets).tokens == 2
    except FileError as error:
        assert str(error).startswith(f"{path}: ") or "targets" in str(error)


def zipped(path, content, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("logits.npy", content)
    return path


def test_npz_that_lies(tmp_path):
    targets = save(tmp_path / "t.npy", np.zeros(10**5, np.int8))
    short = zipped(tmp_path / "short.npz", npy(shape="(100000, 64)", data=b"\0" * 9999))
    with pytest.raises(FileError, match=r"short\.npz: ends after 9999 of 25600000 bytes of data"):
        score(short, targets)
    bomb = zipped(tmp_path / "bomb.npz", npy(shape="(1, 10000000000)"))
    with pytest.raises(FileError, match="expected two rows to fit into 268435456 bytes"):
        score(bomb, save(tmp_path / "one.npy", np.zeros(1, int)))
    header = zipped(tmp_path / "header.npz", npy(version=2, length=2**31))
    with pytest.raises(FileError, match="a header of 2147483648 bytes"):
        score(header, targets)
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        other = zipped(tmp_path / "other.npz", npy(), method)
        with pytest.raises(FileError, match="expected stored or deflated"):
            score(other, targets)
    stored = zipped(tmp_path / "stored.npz", npy(shape="(5000, 3)", data=b"\0" * 60_000), zipfile.ZIP_STORED)
    content = bytearray(stored.read_bytes())
    content[30_000] ^= 1  # a checksum is known to be wrong when the last element has been read
    stored.write_bytes(content)
    with pytest.raises(FileError, match=r"stored\.npz: cannot be read .* CRC"):
        score(stored, save(tmp_path / "many.npy", np.zeros(5000, int)))
    fortran = zipped(tmp_path / "fortran.npz", npy(order="True"))
    with pytest.raises(FileError, match="Fortran order"):
        score(fortran, save(tmp_path / "two.npy", np.zeros(2, int)))


def test_file_cut_while_it_is_read(tmp_path):
    rows = 5000
    logits, targets = (
        save(tmp_path / "l.npy", np.zeros((rows, V), np.float32)),
        save(tmp_path / "t.npy", np.zeros(rows, int)),
    )
    keep = 128 + 3000 * V * 4 + 5

    def cut(done, total):
        assert total == rows
        if done:
            os.truncate(logits, min(os.path.getsize(logits), keep))

    with pytest.raises(FileError, match=rf"l\.npy: ends after {3000 * V * 4 + 5} of {rows * V * 4} bytes of data"):
        score(logits, targets, memory=20_000, progress=cut, per_token=tmp_path / "out.npy")
    assert sorted(os.listdir(tmp_path)) == ["l.npy", "t.npy"]


def test_interrupted_leaves_nothing(files, tmp_path):
    old = tmp_path / "out.npy"
    old.write_bytes(b"old")
    before = unchanged(tmp_path)

    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(*files[:2], memory=SMALL, progress=interrupt, per_token=old)
    assert unchanged(tmp_path) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "numbaloss reader"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_fifo(files, tmp_path):
    logits, targets, _ = arrays()
    pipes = tmp_path / "lp", tmp_path / "tp"
    for pipe in pipes:
        os.mkfifo(pipe)

    def feed(cut):
        # each in its own thread: whoever opens a pipe waits for the other end
        def write(source, pipe, count):
            with contextlib.suppress(BrokenPipeError):  # the other file was refused first
                pipe.write_bytes(source.read_bytes()[:count])

        counts = (128 + cut, None) if cut else (None, None)
        threads = [threading.Thread(target=write, args=a) for a in zip(files, pipes, counts, strict=False)]
        for thread in threads:
            thread.start()
        return threads

    threads = feed(None)
    assert bits(score(*pipes, memory=SMALL)) == bits(evaluate(logits, targets))
    for thread in threads:
        thread.join()
    threads = feed(100)
    with pytest.raises(FileError, match="lp: ends after 100 of 924 bytes of data"):
        score(*pipes, memory=SMALL)
    for thread in threads:
        thread.join()


def test_another_shift_is_noticed(tmp_path):
    rng = np.random.default_rng(7)
    targets = rng.integers(0, V, (4, 40))
    logits = np.zeros((4, 40, V), np.float32)
    np.put_along_axis(logits, np.roll(targets, -1, 1)[..., None], 9, 2)  # at t it predicts t + 1
    paths = save(tmp_path / "l", logits), save(tmp_path / "t", targets)
    assert score(*paths).better_shift == 1
    assert score(*paths, shift=-1).better_shift == 1
    assert score(*paths, shift=1).better_shift is None
    paths = save(tmp_path / "l", logits[0, :9]), save(tmp_path / "t", targets[0, :9])
    assert score(*paths).better_shift is None  # too few to say
    for _ in range(20):  # chance does not count
        logits = (rng.standard_normal((1, 40, V)) * 16).astype(np.float32)
        paths = save(tmp_path / "l", logits), save(tmp_path / "t", rng.integers(0, V, (1, 40)))
        assert [score(*paths, shift=shift).better_shift for shift in (-1, 0, 1, 2)] == [None] * 4


BOUNDED = """
import resource, sys
from numbaloss.files import score
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
small, targets, large, many = sys.argv[1:]
score(small, targets, memory=32 << 20, per_token=small + ".out")
before = peak()
result = score(large, many, memory=32 << 20, per_token=large + ".out")
print(result.tokens, result.bytes, result.loss, peak() - before)
"""


def sparse(path, shape, dtype):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource.getrusage")
def test_memory_is_bounded(tmp_path):
    rows, classes = 1 << 18, 1 << 12
    paths = [
        sparse(tmp_path / "small", (64, classes), "<f4"),
        sparse(tmp_path / "few", (64,), "<i8"),
        sparse(tmp_path / "large", (rows, classes), "<f4"),  # 4 GiB
        sparse(tmp_path / "many", (rows,), "<i8"),
    ]
    done = subprocess.run([sys.executable, "-c", BOUNDED, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens, size, loss, grown = map(float, done.stdout.split())
    assert tokens == rows
    assert size == rows * (4 * classes + 8)
    assert abs(loss / np.log(classes) - 1) <= 4 * np.finfo(np.float32).eps
    assert grown < 128 << 20
