"""Numba's cache of the run is its own, keyed by the package's sources and by what is installed, so a repeated run is
quick and none is stale."""

import getpass
import hashlib
import importlib.util
import os
import pathlib
import sys
import sysconfig
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, configuration, settings

ROOT = pathlib.Path(__file__).resolve().parent.parent


def package_folder():
    if importlib.util.find_spec("numbaloss") is None:  # finds, does not import
        sys.path.insert(0, str(ROOT))
    return pathlib.Path(importlib.util.find_spec("numbaloss").origin).parent


def cache_folder():
    installed = sysconfig.get_path("platlib")  # a compiler among them
    digest = hashlib.sha256(f"{installed}\0{os.stat(installed).st_mtime_ns}\0".encode())
    for path in sorted(package_folder().rglob("*.py")):
        digest.update(f"{path}\0{path.stat().st_mtime_ns}\0".encode() + path.read_bytes())
    return os.path.join(tempfile.gettempdir(), f"numbaloss-tests-{getpass.getuser()}-{digest.hexdigest()[:16]}")


os.environ["NUMBA_CACHE_DIR"] = cache_folder()
os.environ.setdefault("NUMBA_NUM_THREADS", str(max(4, os.cpu_count() or 1)))  # several splits even on one core

configuration.set_hypothesis_home_dir(os.path.join(os.environ["NUMBA_CACHE_DIR"], "hypothesis"))  # not the checkout
settings.register_profile(
    "numbaloss", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("numbaloss")
np.set_printoptions(threshold=50)


@pytest.fixture
def one_thread():
    """Only the serial form of each kernel is compiled. That threads do not change a bit is tested in test_bits.py."""
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


def half(item):
    """Of two processes, each gets a half of the tests: by dtype, so that few kernels are compiled in both."""
    return 2 if "bfloat16" in item.name or "float64" in item.name else 0 if "float" in item.name else 1


def pytest_collection_modifyitems(config, items):
    items.sort(key=half)
    for marker in ("mutants", "architectures"):
        if marker not in config.getoption("-m"):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"slow, asked for with -m {marker}"))
