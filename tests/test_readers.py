"""Every kind of file gives back what was written into it, or one line that says what is wrong with it."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import threading
import zipfile

import llama_writer
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numbaloss as nl
from numbaloss import files
from numbaloss.files.readers import FileError, open_array

FOLDER = pathlib.Path(__file__).parent / "golden"
BF16 = np.dtype(ml_dtypes.bfloat16)
CODES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?", "BF16": BF16}
CODES |= {f"{k}{8 * n}": f"<{k.lower()}{n}" for k in "IU" for n in (1, 2, 4, 8)}


def values(shape=(3, 5, 7), dtype=np.float32, seed=0):
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def safetensors(arrays, codes=None, pad=0, **changes):
    """The bytes of a file, as the format's page says; `changes` replace fields of the first entry."""
    header, data = {"__metadata__": {"format": "np"}}, b""
    for name, array in arrays.items():
        code = next(code for code, dtype in CODES.items() if np.dtype(dtype) == array.dtype)
        entry = {"dtype": code, "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
        header[name] = entry | (changes if not data else {})
        data += array.tobytes()
    text = json.dumps(header).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def npy(array, fortran=False):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asfortranarray(array) if fortran else array)
    return buffer.getvalue()


def put(path, content):
    path.write_bytes(content)
    return path


def llama(path, context=8, classes=5, chunks=3, seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((chunks, context, classes)) * spread).astype(np.float32)
    tokens = rng.integers(0, classes, (chunks, context)).tolist()
    rows, targets = llama_writer.write(path, context, classes, tokens, logits.tolist())
    shape = chunks, context - 1 - context // 2
    return np.array(rows, np.float32).reshape(*shape, classes), np.array(targets, np.int32).reshape(shape)


def whole(path, argument="logits", block=None, unit=1, **options):
    """The array, read in blocks of `block` units of `unit` elements."""
    with open_array(path, argument, **options) as file:
        out = np.empty(file.size, file.dtype)
        step = (block or max(1, file.size)) * unit
        for first in range(0, file.size, step):
            file.read(out[first : first + step])
        return out.reshape(file.shape)


def assert_reads(path, expected, argument="logits", unit=1, **options):
    """The array read in blocks of several sizes, and with parts skipped, has the bits of `expected`."""
    native = expected.astype(expected.dtype.newbyteorder("=")) if expected.dtype != BF16 else expected
    for block in (None, 1, 2, 13):
        got = whole(path, argument, block, unit, **options)
        assert got.dtype == native.dtype
        assert got.shape == native.shape
        assert got.tobytes() == native.tobytes()
    flat, rng = native.reshape(-1), np.random.default_rng(1)
    for _ in range(5):
        with open_array(path, argument, **options) as file:
            at = 0
            while at < file.size:
                count = min(int(rng.integers(0, 9)) * unit, file.size - at)
                if rng.integers(2):
                    file.skip(count)
                else:
                    out = np.empty(count, file.dtype)
                    file.read(out)
                    assert out.tobytes() == flat[at : at + count].tobytes()
                at += count


def refuses(message, path, argument="logits", **options):
    """Opening and reading fails with one line that begins with the name of the file."""
    with pytest.raises(FileError) as caught:
        whole(path, argument, **options)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    return text


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    folder = "/proc/self/fd"
    before = len(os.listdir(folder)) if os.path.isdir(folder) else None
    yield
    assert before is None or len(os.listdir(folder)) == before


# What was written comes back


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
def test_npy_and_npz(tmp_path, dtype):
    array = values(dtype=dtype)
    assert_reads(put(tmp_path / "a.npy", npy(array)), array)
    assert_reads(put(tmp_path / "f.npy", npy(array[0], fortran=True)), array[0])
    np.savez(tmp_path / "s.npz", logits=array, other=array + 1)
    np.savez_compressed(tmp_path / "d.npz", logits=array, other=array + 1)
    for name in ("s.npz", "d.npz"):
        assert_reads(tmp_path / name, array)
        assert_reads(f"{tmp_path / name}:other", array + np.ones((), dtype))


@pytest.mark.parametrize("argument", ["logits", "weights"])
def test_bfloat16(tmp_path, argument):
    array = values(dtype=BF16)
    for dtype in (np.dtype("V2"), np.uint16, np.int16):
        path = put(tmp_path / "a.npy", npy(array.view(dtype)))
        assert_reads(path, array, argument, dtype="bfloat16")
        assert_reads(path, array, argument, dtype=ml_dtypes.bfloat16)
    assert_reads(put(tmp_path / "f.npy", npy(array[0].view("V2"), fortran=True)), array[0], dtype="bfloat16")
    path = put(tmp_path / "a.safetensors", safetensors({"x": array}))
    assert_reads(path, array, argument)
    assert_reads(path, array, argument, dtype="bfloat16")
    path = put(tmp_path / "u.safetensors", safetensors({"x": array.view(np.uint16)}))
    assert_reads(path, array, argument, dtype="bfloat16")
    refuses("targets: expected integers, got bfloat16", path, "targets", dtype="bfloat16")
    for held in (values(dtype=np.float16), values(dtype=np.uint32), values(dtype=">u2")):
        refuses("expected", put(tmp_path / "other.npy", npy(held)), dtype="bfloat16")
    fields = np.zeros(3, [("a", "i1"), ("b", "i1")])
    refuses("expected", put(tmp_path / "other.npy", npy(fields)), dtype="bfloat16")


def test_bfloat16_without_its_package(tmp_path, monkeypatch):
    path = put(tmp_path / "a.safetensors", safetensors({"x": values(dtype=BF16)}))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert refuses("pip install ml_dtypes", path).startswith(str(path))
    refuses("pip install ml_dtypes", tmp_path / "any", dtype="bfloat16")


def test_dtype_is_checked(tmp_path):
    path = put(tmp_path / "a.npy", npy(values()))
    assert_reads(path, values(), dtype="float32")
    assert_reads(put(tmp_path / "b.npy", npy(values(dtype=">f4"))), values(), dtype=np.float32)
    refuses("dtype: expected float16, got float32", path, dtype="float16")
    for dtype in ("float33", "f4,,", object(), "V2", "O", "S3", "complex64"):
        refuses("expected", path, dtype=dtype)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (4,), (0, 3), ()])
def test_safetensors(tmp_path, code, shape):
    array = values(shape, CODES[code])
    kind = "f" if array.dtype == BF16 else array.dtype.kind
    path = put(tmp_path / "a.safetensors", safetensors({"other": values(3), "x": array, "last": values(2)}, pad=3))
    for argument, kinds in (("logits", "f"), ("targets", "iu"), ("groups", "iu"), ("weights", "fiub")):
        if kind in kinds:
            assert_reads(f"{path}:x", array, argument)
        else:
            refuses(f"{argument}: expected ", f"{path}:x", argument)


def test_safetensors_names(tmp_path):
    path = put(tmp_path / "a.safetensors", safetensors({"b": values(3), "logits": values(4)}))
    assert_reads(path, values(4))
    assert_reads(f"{path}:b", values(3))
    refuses("expected a member called 'weights', found b, logits; choose with FILE.safetensors:NAME", path, "weights")
    assert_reads(put(tmp_path / "without a suffix", safetensors({"b": values(3)})), values(3))
    assert_reads(put(tmp_path / "A.SafeTensors", safetensors({"b:c.npz": values(3)})), values(3))
    assert_reads(f"{tmp_path / 'A.SafeTensors'}:b:c.npz", values(3))
    refuses("not a safetensors file", f"{put(tmp_path / 'n.safetensors', npy(values(3)))}:b")
    names = put(tmp_path / "n.safetensors", safetensors({"\ud800\x1b": values(3), "c": values(3)}))
    refuses(r"found '\ud800\x1b', c;", names).encode()
    refuses("found nothing", put(tmp_path / "n.safetensors", safetensors({})))


def test_length_that_looks_like_another_kind(tmp_path):
    """The first bytes of the file are the length of its header: those of a pickle, of .npy, of a zip archive."""
    length = int.from_bytes(safetensors({"x": values(3)})[:8], "little")
    for first in (b"\x80\x02", b"\x80\x04", b"\x93\x4e", b"PK"):
        content = safetensors({"x": values(3)}, pad=int.from_bytes(first, "little") - length)
        assert content[:2] == first
        assert_reads(put(tmp_path / "a", content), values(3))


def test_files_of_the_safetensors_package():
    """Written by safetensors 0.8.0 and huggingface_hub 2.4.0 from torch.randn(2, 5, 7), seed 0."""
    one, index = FOLDER / "safetensors" / "one.safetensors", FOLDER / "safetensors" / "sharded.safetensors.index.json"
    exact = whole(f"{index}:other")
    assert exact.shape == (2, 5, 7)
    assert exact[0, 0, :3].round(4).tolist() == np.float32([-1.1258, -1.1524, -0.2506]).tolist()
    assert_reads(f"{index}:other", exact)
    assert_reads(index, exact.astype(np.float16))
    assert_reads(one, exact.astype(BF16))
    targets, weights = whole(one, "targets"), whole(one, "weights")
    assert weights.sum() == 8
    assert whole(index, "targets").tolist() == targets.tolist()
    want = nl.cross_entropy(exact.astype(BF16), targets, weights=weights)
    assert np.float32(files.score(one, weights=one).loss) == want


def test_index(tmp_path):
    put(tmp_path / "one.safetensors", safetensors({"a": values(3), "b": values(4)}))
    put(tmp_path / "two.safetensors", safetensors({"logits": values(5)}))
    index = tmp_path / "model.safetensors.index.json"

    def places(**places):
        return put(index, json.dumps({"metadata": {}, "weight_map": places}).encode())

    places(a="one.safetensors", b="one.safetensors", logits="two.safetensors")
    assert_reads(index, values(5))
    assert_reads(f"{index}:b", values(4))
    refuses("expected a member called 'c', found a, b, logits", f"{index}:c")
    for place in ("../one.safetensors", str(tmp_path / "one.safetensors"), "c:one.safetensors", "one.npy", 3, "\0"):
        refuses("in the same folder", places(a=place))
    assert refuses("found a, c", places(a="two.safetensors", c="one.safetensors"), "weights").startswith(str(index))
    places(b="two.safetensors")
    assert refuses("expected a member called 'b', found logits", index).startswith(str(tmp_path / "two.safetensors"))
    refuses("No such file", places(b="three.safetensors"))
    for content in (
        b"",
        b"[]",
        b"{",
        b'{"weight_map": []}',
        b"\xff",
        b'{"weight_map": {"a": 1, "a": 2}}',
        b"[" * 99999,
    ):
        refuses("index.json: ", put(index, content))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "float16", "bfloat16"])
def test_raw(tmp_path, dtype):
    array = values(dtype=BF16 if dtype == "bfloat16" else dtype)
    path = put(tmp_path / "a.bin", array.tobytes())
    for shape in ((3, 5, 7), (-1, 5, 7), (3, -1, 7), (3, 5, -1)):
        assert_reads(path, array, dtype=dtype, shape=shape)
    assert_reads(path, array.reshape(-1), dtype=dtype, shape=(-1,))
    size = array.dtype.itemsize
    refuses(f"truncated: expected {4 * 35 * size} bytes for shape (4, 5, 7)", path, dtype=dtype, shape=(4, 5, 7))
    refuses(f"bin: expected {2 * 35 * size} bytes", path, dtype=dtype, shape=(2, 5, 7))
    refuses(f"expected a multiple of {11 * size} bytes", path, dtype=dtype, shape=(-1, 11))
    refuses("expected a multiple of 0 bytes", path, dtype=dtype, shape=(-1, 0))
    refuses("targets: expected integers", path, "targets", dtype=dtype, shape=(-1,))
    for shape in ((-1, -1), (-2, 3), (2**70, 2**70)):
        refuses("expected", path, dtype=dtype, shape=shape)


def test_raw_is_not_another_kind(tmp_path):
    array = values((64, 32))  # rows of 128 bytes, as long as the header
    path = put(tmp_path / "a", npy(array))
    refuses("expected a file without a header", path, dtype="float32", shape=(-1, 32))
    for name in ("a.npz", "a.safetensors"):
        refuses("without a header", put(tmp_path / name, array.tobytes()), dtype="float32", shape=(64, 32))
    llama(tmp_path / "l")
    refuses("without a header", tmp_path / "l", dtype="uint8", shape=(-1,))
    refuses("shape: expected dtype with it", path, shape=(64, 32))
    refuses("needs dtype and shape", put(tmp_path / "b", b"abcdefghijkl"))
    refuses("needs dtype and shape", put(tmp_path / "b", values(20, np.int32).tobytes()))
    refuses("needs dtype and shape", put(tmp_path / "b", b"\0"))
    refuses("is empty", put(tmp_path / "b", b""))
    refuses("truncated: expected 4 bytes", tmp_path / "b", dtype="float32", shape=())


# Shards


def shards(folder, count=11, **options):
    """(count files, the whole array). shard10 follows shard9, and one has no rows."""
    folder.mkdir()
    pieces = [values((0 if i == 2 else i % 3 + 1, 5), seed=i, **options) for i in range(count)]
    for i, piece in enumerate(pieces):
        put(folder / f"shard{i}.npy", npy(piece))
    return np.concatenate(pieces)


def test_shards(tmp_path):
    array = shards(tmp_path / "s")
    put(tmp_path / "s" / ".hidden.npy", b"")
    put(tmp_path / "s" / "README.txt", b"")
    (tmp_path / "s" / "folder.npy").mkdir()
    assert_reads(tmp_path / "s", array)
    assert_reads(tmp_path / "s" / "sh*[0-9].npy", array)
    assert_reads(tmp_path / "**" / "shard*", array)
    with open_array(tmp_path / "s", "logits") as file:
        assert file.name == str(tmp_path / "s")
        assert file.nbytes == array.nbytes
        assert [os.path.basename(name) for name, _, _ in file.identity()] == [f"shard{i}.npy" for i in range(11)]
        json.dumps(file.identity())
        assert file.is_file(tmp_path / "s" / "shard7.npy")
        assert not file.is_file(__file__)
    refuses("no file matches", tmp_path / "s" / "none*.npy")
    refuses("is a directory without .npy, .npz, .safetensors files", tmp_path / "s" / "folder.npy")
    put(tmp_path / "[x].npy", npy(values(3)))  # a file that is called so comes first
    assert_reads(tmp_path / "[x].npy", values(3))


@pytest.mark.parametrize("fortran", [False, True])
def test_shards_of_several_kinds(tmp_path, fortran):
    pieces = [values((n, 5), seed=n) for n in (3, 1, 4, 2)]
    put(tmp_path / "1.npy", npy(pieces[0], fortran))
    np.savez_compressed(tmp_path / "2.npz", logits=pieces[1], other=values(3))
    put(tmp_path / "3.safetensors", safetensors({"other": values(3), "logits": pieces[2]}))
    put(tmp_path / "10.npy", npy(pieces[3].astype(">f4")))
    assert_reads(tmp_path, np.concatenate(pieces))
    with open_array(tmp_path, "logits") as file:
        assert file.by_column == fortran
    assert_reads(f"{tmp_path / '*.safetensors'}:other", values(3))
    raw = tmp_path / "raw"
    raw.mkdir()
    for i, piece in enumerate(pieces):
        put(raw / f"{i}.bin", piece.tobytes())
    assert_reads(raw, np.concatenate(pieces), dtype="float32", shape=(-1, 5))
    refuses("1.bin: truncated: expected 60 bytes for shape (3, 5) float32, got 20", raw, dtype="float32", shape=(3, 5))


def test_shards_that_differ(tmp_path):
    shards(tmp_path / "s")
    for other in (values((2, 6)), values((2, 5), np.float64), values((2, 5, 1)), values(5)):
        put(tmp_path / "s" / "shard4.npy", npy(other))
        text = refuses("expected shape (*, 5) float32 as in ", tmp_path / "s")
        assert text.startswith(str(tmp_path / "s" / "shard4.npy"))
    put(tmp_path / "s" / "shard4.npy", npy(values(())))
    refuses("expected an array with an axis", tmp_path / "s")
    put(tmp_path / "s" / "shard4.npy", b"nonsense")
    assert refuses("not a .npy", tmp_path / "s").startswith(str(tmp_path / "s" / "shard4.npy"))


@pytest.mark.parametrize("skip", [False, True])
def test_shard_that_changes(tmp_path, skip):
    array = shards(tmp_path / "s")
    path = tmp_path / "s" / "shard4.npy"
    content = path.read_bytes()

    def touch():
        put(path, content)
        os.utime(path, ns=(0, 1))

    for change in (None, touch, lambda: put(path, content + b"\0"), lambda: put(path, content[:-1]), path.unlink):
        with open_array(tmp_path / "s", "logits") as file:
            out = np.empty(10, np.float32)
            file.read(out)
            rest = np.empty(array.size - 10, np.float32)
            if change is None:
                file.skip(len(rest)) if skip else file.read(rest)
                continue
            change()
            with pytest.raises(FileError, match="changed while it was read") as caught:
                file.skip(len(rest)) if skip else file.read(rest)
        assert str(caught.value).startswith(str(path))
        put(path, content)


@pytest.mark.parametrize("skip", [False, True])
def test_file_that_changes(tmp_path, skip):
    array = values((40, 5))
    contents = {"a.npy": npy(array), "f.npy": npy(array, fortran=True), "a.safetensors": safetensors({"x": array})}
    for name, content in contents.items():
        path = put(tmp_path / name, content)
        os.utime(path, ns=(0, 1))
        with open_array(path, "logits") as file:
            file.read(np.empty(5, np.float32))
            put(path, content)
            with pytest.raises(FileError, match="changed while it was read"):
                file.skip(195) if skip else file.read(np.empty(195, np.float32))


def test_many_shards_need_few_descriptors(tmp_path):
    resource = pytest.importorskip("resource", reason="no limit to set on this system")
    for i in range(300):
        put(tmp_path / f"{i}.npy", npy(values((1, 2), seed=i)))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, limits[1]), limits[1]))
    try:
        got = whole(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert np.array_equal(got, np.concatenate([values((1, 2), seed=i) for i in range(300)]))


# llama.cpp


@pytest.mark.parametrize("context", [3, 4, 7, 8])
@pytest.mark.parametrize("classes", [1, 2, 5, 8])
@pytest.mark.parametrize("chunks", [1, 3])
def test_llama(tmp_path, context, classes, chunks):
    path = tmp_path / "base.kld"
    rows, targets = llama(path, context, classes, chunks)
    assert_reads(path, rows, unit=classes)
    assert_reads(path, targets, "targets")
    with open_array(path, "logits") as file, open_array(path, "targets") as tokens:
        assert file.shape[:-1] == tokens.shape
        assert file.identity() == tokens.identity()
        assert tokens.floor is None
        if classes > 1:
            with pytest.raises(ValueError, match=f"expected whole rows of {classes} elements, got {classes + 1}"):
                file.read(np.empty(classes + 1, np.float32))
            with pytest.raises(ValueError, match=f"expected a multiple of {classes}, got 1"):
                file.skip(1)


def test_llama_golden(tmp_path):
    """Bytes written by hand: n_ctx 4, 3 tokens in the vocabulary, 2 chunks; one row a chunk, which predicts token 3."""
    head = b"_logits_" + struct.pack("<3i", 4, 3, 2) + struct.pack("<8i", 0, 1, 2, 1, 2, 2, 0, 2)
    rows = struct.pack("<2f4H", 2**-13, -8.0, 0, 65535, 8192, 7), struct.pack("<2f4H", 0.0, -1.5, 0, 0, 0, 0)
    path = put(tmp_path / "a", head + b"".join(rows))
    assert whole(path).tolist() == [[[-8.0, -(2.0**-13), -7.0]], [[-1.5, -1.5, -1.5]]]
    assert whole(path, "targets").tolist() == [[1], [2]]
    with open_array(path, "logits") as file:
        assert file.floor == 16
        assert file.nbytes == 32


def test_llama_floor(tmp_path):
    """That of llama.cpp, or of ik_llama.cpp, by the widest of the rows looked at first; the others keep to it."""
    path = tmp_path / "a"
    for spread in (0, 0.1, 100):
        llama(path, spread=spread)
        with open_array(path, "logits") as file:
            assert file.floor == 16
    llama(path, context=200, classes=2, chunks=2, spread=0.1)
    content = bytearray(path.read_bytes())

    def widen(row, nats):
        at = len(content) + (row - 198) * 12
        content[at : at + 4] = struct.pack("<f", nats / 65535)
        return put(path, content)

    with open_array(widen(161, 24), "logits") as file:  # none of those looked at first
        assert file.floor == 16
        file.read(np.empty(2 * 161, np.float32))
        with pytest.raises(FileError, match=r"expected rows 16\.0 nats wide at most, as others, got 24\.0"):
            file.read(np.empty(2, np.float32))
    for nats, floor in ((24, 24), (20, 24), (100, 100)):
        with open_array(widen(0, nats), "logits") as file:
            assert file.floor == floor
    llama(tmp_path / "b", context=200, classes=2, chunks=2)
    refuses("expected a floor of 100.0 nats as in ", tmp_path / "[ab]", "logits")


@pytest.mark.parametrize("skip", [False, True])
def test_llama_row_that_is_wrong(tmp_path, skip):
    """Its place is right whatever was read before. (It is none of the rows that are looked at first.)"""
    path = tmp_path / "a"
    llama(path, context=200, classes=2, chunks=2)
    content = bytearray(path.read_bytes())
    at = len(content) - 37 * 12
    content[at : at + 4] = struct.pack("<f", -1)
    with open_array(put(path, content), "logits") as file:
        for _ in range(198 - 37):
            file.skip(2) if skip else file.read(np.empty(2, np.float32))
        with pytest.raises(FileError, match=r"a: logits\[1, 62\]: expected a scale in \[0, 1\] .*, got -1.0 and"):
            file.read(np.empty(2, np.float32))


def test_llama_large_blocks(tmp_path):
    """More rows than are widened at once."""
    path = tmp_path / "a"
    context, classes = 2200, 600
    codes = np.random.default_rng(0).integers(0, 2**16, (context // 2 - 1, classes), dtype=np.uint16)
    heads = np.tile(np.array([2.0**-12, -16], np.float32).view(np.uint16), (len(codes), 1))
    head = b"_logits_" + struct.pack("<3i", context, classes, 1) + np.arange(context, dtype="<i4").tobytes()
    put(path, head + np.hstack([heads, codes]).tobytes())
    expected = codes.astype(np.float32) * np.float32(2.0**-12) - np.float32(16)
    assert np.array_equal(whole(path)[0], expected)
    refuses("targets[0, 0]: expected a token in [0, 600), got 1101", path, "targets")


def test_llama_shards(tmp_path):
    parts = [llama(tmp_path / f"base{i}.kld", chunks=i, seed=i) for i in (1, 2, 3)]
    rows, targets = (np.concatenate(p) for p in zip(*parts))
    assert_reads(tmp_path / "*.kld", rows, unit=5)
    assert_reads(tmp_path / "*.kld", targets, "targets")
    with open_array(tmp_path / "*.kld", "logits") as file:
        assert file.floor == 16


def test_bad_llama(tmp_path):
    path = tmp_path / "a"
    llama(path)
    good = path.read_bytes()
    for at in (8, 12, 16):
        for number in (-1, 0, -(2**31), 2**31 - 1, 1, 1000):
            changed = good[:at] + struct.pack("<i", number) + good[at + 4 :]
            refuses("expected", put(path, changed)) if changed != good else None
    refuses(f"truncated: expected {len(good)} bytes, got {len(good) - 1}", put(path, good[:-1]))
    refuses(f"damaged: expected {len(good)} bytes, got {len(good) + 1}", put(path, good + b"\0"))
    first = 20 + 4 * 24
    for scale in (-1e-9, np.nan, np.inf, 1.5):
        put(path, good[: first + 20] + struct.pack("<f", scale) + good[first + 24 :])
        refuses("a: logits[0, 1]: expected a scale in [0, 1]", path)
    put(path, good[: first + 24] + struct.pack("<f", np.inf) + good[first + 28 :])
    refuses("a: logits[0, 1]: expected a scale in [0, 1] and a finite", path)
    put(path, good[:8] + struct.pack("<3i", 2, 5, 3) + bytes(24))
    refuses("damaged header: expected n_ctx > 2", path)
    for token in (-1, 5):
        put(path, good[: 20 + 4 * 14] + struct.pack("<i", token) + good[20 + 4 * 15 :])
        refuses(f"a: targets[1, 1]: expected a token in [0, 5), got {token}", path, "targets")
        whole(path)  # the logits are fine
    put(path, good)
    refuses("weights: expected an array, got a llama.cpp file", path, "weights")
    refuses("dtype: expected none for a llama.cpp file", path, dtype="float16")


# What is wrong with a file


KINDS = {
    "a.npy": npy(values((2, 3))),
    "a.safetensors": safetensors({"b": values(3), "logits": values((2, 3))}),
    "without suffix": safetensors({"b": values(3), "logits": values((2, 3))}),
}


@pytest.mark.parametrize("name", [*KINDS, "llama", "npz", "deflated"])
def test_truncated_anywhere(tmp_path, name):
    path = tmp_path / name
    if name == "llama":
        llama(path, chunks=1)
    elif name in ("npz", "deflated"):
        with open(path, "wb") as file:
            (np.savez if name == "npz" else np.savez_compressed)(file, logits=values((2, 3)))
    else:
        put(path, KINDS[name])
    content = path.read_bytes()
    whole(path)
    for size in range(len(content)):
        assert refuses("", put(path, content[:size])).startswith(f"{path}: ")


def test_index_truncated_anywhere(tmp_path):
    put(tmp_path / "a.safetensors", safetensors({"a": values(3)}))
    content = json.dumps({"weight_map": {"a": "a.safetensors"}}).encode()
    path = put(tmp_path / "x.safetensors.index.json", content)
    whole(path)
    for size in range(len(content)):
        assert refuses("", put(path, content[:size])).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_offsets": [0, 25]}, "expected a tensor from byte 25 on"),
        ({"data_offsets": [0, 23]}, "expected a tensor from byte 23 on"),
        ({"data_offsets": [4, 28]}, "expected a tensor from byte 0 on"),
        ({"data_offsets": [0, 36]}, "expected a tensor from byte "),
        ({"data_offsets": [24, 0]}, "expected a tensor from byte "),
        ({"data_offsets": [-24, 0]}, "expected dtype, shape and data_offsets for 'logits'"),
        ({"data_offsets": [0, 2**70]}, "expected dtype, shape and data_offsets for 'logits'"),
        ({"data_offsets": [0, 24.0]}, "expected dtype, shape and data_offsets for 'logits'"),
        ({"data_offsets": [False, 24]}, "expected dtype, shape and data_offsets for 'logits'"),
        ({"data_offsets": [0]}, "data_offsets [0]"),
        ({"data_offsets": []}, "data_offsets []"),
        ({"data_offsets": [0, 24, 36]}, "data_offsets [0, 24, 36]"),
        ({"data_offsets": "ab"}, "expected dtype, shape and data_offsets"),
        ({"more": 1}, "expected dtype, shape and data_offsets"),
        ({"shape": [2, 4]}, "'logits' has shape [2, 4], F32, in 24 bytes"),
        ({"shape": [-2, -3]}, "'logits' has shape [-2, -3]"),
        ({"shape": [2**62, 2**62]}, "'logits' has shape"),
        ({"shape": [2.0, 3]}, "'logits' has shape"),
        ({"shape": [2, 3, *[1] * 63]}, "'logits' has shape"),
        ({"shape": 6}, "'logits' has shape"),
        ({"dtype": "F64"}, "'logits' has shape [2, 3], F64, in 24 bytes"),
        ({"dtype": "F8_E4M3"}, "'logits': expected BF16, F16, "),
        ({"dtype": ["F32"]}, "'logits': expected BF16, F16, "),
        ({"dtype": None}, "'logits': expected BF16, F16, "),
    ],
)
def test_bad_safetensors(tmp_path, changes, message):
    path = put(tmp_path / "a.safetensors", safetensors({"logits": values((2, 3)), "b": values(3)}, **changes))
    refuses(message, path)


def test_bad_safetensors_headers(tmp_path):
    path = tmp_path / "a.safetensors"

    def header(text, length=None, data=b""):
        return put(path, (len(text) if length is None else length).to_bytes(8, "little") + text + data)

    entry = b'"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    whole(header(b"{" + entry + b"}", data=b"1234"))
    refuses("a name is there twice", header(b"{" + entry + b", " + entry + b"}", data=b"1234"))
    refuses("a name is there twice", header(b"{" + entry[:-1] + b', "shape": [1]}}', data=b"1234"))
    refuses("truncated: expected 4 bytes of tensors, got 3", header(b"{" + entry + b"}", data=b"123"))
    refuses("damaged: expected 4 bytes of tensors, got 5", header(b"{" + entry + b"}", data=b"12345"))
    two = b', "y": {"dtype": "F32", "shape": [], "data_offsets": [4, 0]}'
    refuses("from byte 4 on, got data_offsets [4, 0]", header(b"{" + entry + two + b"}"))
    refuses("begins with b'{'", header(b" {" + entry + b"}", data=b"1234"))
    refuses("begins with b'{'", header(b"", data=b"1234"))
    for text in (b"{", b"{]", b"{\xff}", b'{"a"}', b'{"a": ' + b"[" * 99999, b'{"a": ' + b"9" * 5000 + b"}", b"{} x"):
        refuses("damaged header: ", header(text))
    for text in (b'{"x": 3}', b'{"x": []}', b'{"x": {}}', b'{"x": null}'):
        refuses("expected dtype, shape and data_offsets for 'x'", header(text))
    refuses("ends inside the header", header(b"{" + entry + b"}", 10**8, b"1234"))
    for length in (10**8 + 1, 2**63, 2**64 - 1):
        expected = f"a header of {length} bytes, expected at most 100000000"
        refuses(expected, header(b"{" + entry + b"}", length, b"1234"))


@settings(max_examples=300)
@given(st.sampled_from(["llama", *KINDS]), st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), min_size=1))
def test_damaged_bytes_never_crash(tmp_path_factory, kind, changes):
    path = tmp_path_factory.getbasetemp() / f"damaged {kind}"
    if kind == "llama":
        llama(path, chunks=1)
    data = bytearray(KINDS.get(kind) or path.read_bytes())
    for at, value in changes:
        data[at % len(data)] = value
    put(path, data)
    for argument in ("logits", "targets"):
        try:
            whole(path, argument)
        except FileError as error:
            assert str(error).startswith(f"{path}: ")


def test_pickles(tmp_path):
    path = put(tmp_path / "a.npy", npy(np.array([1, None])))
    line = f"np.save('plain.npy', np.load({str(path)!r}, allow_pickle=True).astype(np.float32))"
    trust = "convert it, only if you trust the file: "
    assert refuses("got pickled objects; pickles are not read; " + trust, path).endswith(line)
    assert refuses(trust, path, "targets").endswith(line.replace("float32", "int64"))
    path = put(tmp_path / "a.npy", pickle.dumps(values(3), protocol=4))
    assert refuses(trust, path).endswith(line)
    for name in ("a.pt", "a.pth", "a.bin"):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(3))
            archive.writestr("archive/data/0", bytes(12))
        line = f"np.save('plain.npy', torch.load({str(path)!r}, weights_only=True).float().numpy())"
        assert refuses("a pickle of PyTorch; convert it: ", path).endswith(line)
        assert refuses("", path, "targets").endswith(line.replace("float", "long"))
        put(path, pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
        assert refuses("a pickle; convert it: ", path).endswith(line)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipes(tmp_path):
    array, path = values(), tmp_path / "pipe"
    os.mkfifo(path)

    def feed(content):
        def write():
            with contextlib.suppress(BrokenPipeError):
                path.write_bytes(content)

        thread = threading.Thread(target=write)
        thread.start()
        return thread

    llama(tmp_path / "l")
    tensors = safetensors({"other": values(3), "logits": array})
    for content, message, options in (
        (npy(array), None, {}),
        (tensors, None, {}),
        (array.tobytes(), None, {"dtype": "float32", "shape": (3, 5, 7)}),
        (array.tobytes()[:-1], "ends after 419 of 420 bytes", {"dtype": "float32", "shape": (3, 5, 7)}),
        (tensors[:-1], "ends after 419 of 420 bytes", {}),
        (tensors[:60], "ends inside the header", {}),
        (array.tobytes(), "expected no -1 for a pipe", {"dtype": "float32", "shape": (-1, 5, 7)}),
        ((tmp_path / "l").read_bytes(), "a llama.cpp file cannot be read from a pipe", {}),
    ):
        thread = feed(content)
        if message:
            refuses(message, path, **options)
        else:
            with open_array(path, "logits", **options) as file:
                assert file.identity() is None
                out = np.empty(array.size - 20, np.float32)
                file.skip(20)
                file.read(out)
                assert np.array_equal(out, array.reshape(-1)[20:])
        thread.join()


def test_identity(tmp_path):
    path = put(tmp_path / "a.safetensors", safetensors({"x": values(3)}))
    state = os.stat(path)
    for name in (str(path), f"{path}:x"):
        with open_array(name, "logits") as file:
            assert file.identity() == [[name, state.st_size, state.st_mtime_ns]]
            assert file.is_file(path)
            assert file.floor is None
