"""numbaloss score and compare of files against `dd` of the same files: from disk, and from the page cache; peak memory.

python perf/files.py [--write] [FOLDER]

The files (two of 2 GB, float16, 32000 classes) are written to a temporary folder in FOLDER. dd and a pass are each a
process of their own; of the pass counts what it says itself, without imports and compiling.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench import write

ROWS, CLASSES, BLOCK = 32768, 32000, 512
PASS = """
import json, re, sys
from numbaloss.files import compare, score
result = (score if sys.argv[1] == "score" else compare)(*sys.argv[2:], shift=1)
peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
print(json.dumps([result.seconds, int(peak) / 1000]))
"""


def save(folder):
    rng = np.random.default_rng(0)
    base = rng.standard_normal((BLOCK, CLASSES), dtype=np.float32)
    for name, noise in ("base", 0), ("candidate", 0.1):
        block = (base + np.float32(noise) * rng.standard_normal(base.shape, dtype=np.float32)).astype(np.float16)
        with open(folder / f"{name}.npy", "wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (ROWS // 2048, 2048, CLASSES)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(ROWS // BLOCK):
                file.write(block)
            os.fsync(file.fileno())
    np.save(folder / "targets.npy", rng.integers(0, CLASSES, (ROWS // 2048, 2048)))


def forget(paths):
    """Drop the files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dd(paths):
    start = time.perf_counter()
    for path in paths:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M", "status=none"], check=True)
    return time.perf_counter() - start


def run(what, paths):
    """(seconds, MB of memory at most)."""
    done = subprocess.run(
        [sys.executable, "-c", PASS, what, *map(str, paths)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def main():
    table = []
    where = [a for a in sys.argv[1:] if a != "--write"]
    with tempfile.TemporaryDirectory(dir=where[0] if where else None) as folder:
        save(folder := Path(folder))
        base, candidate, targets = (folder / f"{name}.npy" for name in ("base", "candidate", "targets"))
        for what, logits in ("score", [base]), ("compare", [base, candidate]):
            run(what, [*logits, targets])  # compiles
            for cold in (True, False):
                read, ours, peak = [], [], 0
                for _ in range(3):
                    for timed, call in (read, lambda x: (dd(x), 0)), (ours, lambda x, w=what: run(w, [*x, targets])):
                        if cold:
                            forget(logits)
                        seconds, megabytes = call(logits)
                        timed.append(seconds)
                        peak = max(peak, megabytes)
                read, ours = statistics.median(read), statistics.median(ours)
                size = sum(os.path.getsize(path) for path in logits)
                line = {
                    "case": f"{what}, from {'disk' if cold else 'the page cache'}",
                    "GB/s": round(size / ours / 1e9, 2),
                }
                line |= {"dd GB/s": round(size / read / 1e9, 2), "time of dd / ours": round(read / ours, 2)}
                line["peak MB"] = round(peak)
                table.append(line)
                print(line, flush=True)
    if "--write" in sys.argv:
        write("files", table)


if __name__ == "__main__":
    main()
