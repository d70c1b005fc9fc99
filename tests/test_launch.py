"""How kernels are found, compiled and started: backends, threads, forks and caches."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import numba
import numpy as np
import pytest
from common import Exporter

import numbaloss as nl
from numbaloss import _backend
from numbaloss.cpu import _launch

ROWS, CLASSES = 200, 500  # beyond what runs serially


def example():
    rng = np.random.default_rng(3)
    return rng.standard_normal((ROWS, CLASSES), dtype=np.float32), rng.integers(0, CLASSES, ROWS)


def python(code, cwd=None, **environment):
    """What code prints in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | environment
    run = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


LOSS_OF_EXAMPLE = """
    import numpy as np
    import numbaloss as nl
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((200, 500), dtype=np.float32), rng.integers(0, 500, 200)
    print(nl.sparse_softmax_cross_entropy_with_logits(y, x).tobytes().hex())
"""


def test_import_is_light():
    out = python("import sys, numbaloss; print([m for m in ('numba', 'cupy', 'rich', 'scipy') if m in sys.modules])")
    assert out == "[]"


def test_eight_threads_at_once():
    x, y = example()
    want = nl.sparse_softmax_cross_entropy_with_logits(y, x)
    got = [None] * 8

    def run(k):
        for _ in range(20):
            got[k] = nl.sparse_softmax_cross_entropy_with_logits(y, x)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(np.array_equal(g, want) for g in got)


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_threads_and_layers(layer):
    """Eight threads at once on each threading layer that is there: workqueue aborts when two parallel kernels meet."""
    code = """
        import threading
        import numpy as np
        import numba
        import numbaloss as nl
        x, y = np.random.default_rng(0).standard_normal((200, 500), dtype=np.float32), np.zeros(200, np.int64)
        want = nl.cross_entropy(x, y)
        wrong = []
        def run():
            for _ in range(30):
                if nl.cross_entropy(x, y) != want:
                    wrong.append(1)
        threads = [threading.Thread(target=run) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        print(len(wrong), numba.threading_layer())
    """
    assert python(code, NUMBA_THREADING_LAYER=layer) == f"0 {layer}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_parallel_kernels():
    """A child of a process that has run parallel kernels computes, serially, the same bits."""
    code = """
        import os
        import numpy as np
        import numbaloss as nl
        x, y = np.random.default_rng(0).standard_normal((200, 500), dtype=np.float32), np.zeros(200, np.int64)
        want = nl.cross_entropy(x, y)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if nl.cross_entropy(x, y) == want else 3)
        print(os.waitpid(pid, 0)[1])
    """
    assert python(code) == "0"


def test_one_thread_gives_the_same_bits():
    assert python(LOSS_OF_EXAMPLE, NUMBA_NUM_THREADS="1") == python(LOSS_OF_EXAMPLE)


def test_cold_cache_started_by_several_processes(tmp_path):
    """Processes that start on one empty cache must not meet in it."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "1"}
    code = textwrap.dedent(LOSS_OF_EXAMPLE)
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = {run.communicate(timeout=300)[0] for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert len(outputs) == 1 and outputs != {b""}
    assert list(tmp_path.rglob("*.nbi"))


def test_processes_that_compile_for_two_types_at_once(tmp_path, monkeypatch):
    """Each finds its own code: both have seen an empty index, and the first ends its writing after the other."""
    from numbaloss._backend import keep_on_disk

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    first, second = numba.njit(cell), numba.njit(cell)
    for dispatcher in (first, second):
        keep_on_disk(dispatcher, "stamp")
    file, other = first._cache._cache_file, second._cache._cache_file
    write = file._save_data

    def write_late(name, data):
        other.save(("int64",), "code for int64")
        write(name, data)

    monkeypatch.setattr(file, "_save_data", write_late)
    with monkeypatch.context() as patch:
        patch.setattr(type(file), "_load_index", lambda self: {})
        file.save(("float64",), "code for float64")
    assert file.load(("float64",)) == "code for float64"
    assert other.load(("int64",)) in (None, "code for int64")
    other.save(("int64",), "code for int64")
    assert (file.load(("float64",)), file.load(("int64",))) == ("code for float64", "code for int64")


def cell(x):
    return x + x


def test_unwritable_cache(tmp_path):
    """Where no folder can be written, kernels compile for the process alone."""
    shutil.copytree(Path(nl.__file__).parent, tmp_path / "numbaloss", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "numbaloss" / "cpu" / "__pycache__").write_text("a file where a folder is expected")
    code = """
        import numpy as np
        import numbaloss as nl
        from numbaloss.cpu import _launch
        print(float(nl.cross_entropy(np.zeros((1, 4), np.float32), [0])), _launch.cache_folder())
    """
    nowhere = str(tmp_path / "numbaloss" / "__init__.py" / "x")
    environment = dict.fromkeys(("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME"), nowhere)
    assert python(code, tmp_path, PYTHONPATH=str(tmp_path), **environment) == "1.3862943649291992 None"


def test_serial_and_parallel_forms_do_not_share_a_cache():
    """Numba's cache goes by name: under one name, the serial form would load the parallel code."""
    from numbaloss.cpu.softmax import sparse_xent_grad

    files = [form._cache._cache_file._index_path for form in (sparse_xent_grad.serial, sparse_xent_grad.parallel)]
    assert files[0] != files[1]


def test_cache_that_fills_up(monkeypatch):
    """An OSError while a kernel is saved costs the cache, not the result."""
    from numbaloss.cpu.totals import _negate

    kernel = _launch.Kernel(_negate)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(kernel.serial._cache), "save_overload", full)
    values = np.array([1.0, 2.0], np.float32)
    kernel(2, 2, values)
    assert values.tolist() == [-1.0, -2.0]


def test_cache_stamp_covers_the_whole_package():
    """An edit of any source file makes cached kernels stale: Numba alone looks only at the kernel's own file."""
    names = {name for name, _, _ in _launch._STAMP}
    assert {"_scalar.py", "_chunks.py", "_columns.py", "_memory.py", "softmax.py"} <= names
    from numbaloss.cpu.totals import scale

    if scale.serial._cache.cache_path is not None:
        assert scale.serial._cache._cache_file._source_stamp == _launch._STAMP


class FakeCupyArray:
    """Stands in for cupy.ndarray where CuPy is not installed."""

    def __init__(self, array, device_id=0):
        self.data = types.SimpleNamespace(device_id=device_id)
        self.dtype, self.shape, self.ndim, self.size = array.dtype, array.shape, array.ndim, array.size


@pytest.fixture
def cupy(monkeypatch):
    module = types.ModuleType("cupy")
    module.ndarray = FakeCupyArray
    module.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDevice=lambda: 0))
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_numpy_and_cupy_mixed(cupy):
    x, y = example()
    with pytest.raises(TypeError, match=r"targets: expected a CuPy array as logits is, got a NumPy array"):
        nl.cross_entropy(FakeCupyArray(x), y)
    with pytest.raises(TypeError, match=r"labels"):
        nl.sigmoid_cross_entropy_with_logits(FakeCupyArray(x), x)


def test_arrays_on_two_devices(cupy):
    x, y = example()
    with pytest.raises(ValueError, match=r"targets: expected an array on device 0 as logits is, got one on device 1"):
        nl.cross_entropy(FakeCupyArray(x), FakeCupyArray(y, 1))


def test_cupy_without_the_cuda_backend(cupy, monkeypatch):
    _backend._module.cache_clear()
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    for name in [name for name in sys.modules if name.startswith("numbaloss.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    x, y = example()
    with pytest.raises(ImportError, match=r"numba-cuda.*numbaloss\[cuda13\].*numbaloss\[cuda12\]"):
        nl.cross_entropy(FakeCupyArray(x), FakeCupyArray(y))


def test_numpy_while_cupy_is_imported(cupy):
    x, y = example()
    assert np.isfinite(nl.cross_entropy(x, y))


def test_dlpack():
    x, y = example()
    want = nl.cross_entropy(x, y)
    assert nl.cross_entropy(Exporter(x), Exporter(y)) == want
    assert isinstance(nl.sparse_softmax_cross_entropy_with_logits(Exporter(y), Exporter(x)), np.ndarray)


@pytest.mark.parametrize("logits", [[[0.0, 1.0]], 1.0, "text", None])
def test_logits_must_be_an_array(logits):
    with pytest.raises(TypeError, match="logits: expected a NumPy or CuPy array"):
        nl.cross_entropy(logits, [0])


def test_leave_a_core():
    """A thread less inside, as many as before afterwards, also after an error."""
    before = numba.get_num_threads()
    with pytest.raises(RuntimeError), _launch.leave_a_core():
        assert numba.get_num_threads() == max(1, before - 1)
        raise RuntimeError
    assert numba.get_num_threads() == before
