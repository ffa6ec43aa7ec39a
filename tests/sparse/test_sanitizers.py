"""Native kernels under the compiler's sanitizers: of addresses, undefined behaviour and threads.

Of the instruction sets the best that this processor has; PRIORITYPROP_SANITIZE=1 has all of them,
AVX-512 put together from smaller instructions where there is none, and the kernels within Python.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest

ALL = os.environ.get("PRIORITYPROP_SANITIZE") == "1"
HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "priorityprop_jax" / "sparse" / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
MEMORY, THREADS = "address,undefined", "thread"
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are asked for on Linux only"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
]


def flags_by_set():
    """What makes kernels for each instruction set that this processor can be asked to run."""
    calls = re.findall(r"add_kernels\((\w+)(.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.S)
    flags = {name: more.split() for name, more in calls if name != "name"}
    known = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    needs = {name: {f[2:] for f in flags[name] if "=" not in f} for name in flags}
    runs = {name: flags[name] for name in flags if needs[name] <= known}
    if not ALL:
        return dict([*runs.items()][-1:])
    if "avx512" not in runs and "avx2" in runs:
        header = os.fspath(HERE / "emulate_avx512.h")
        runs["avx512, emulated"] = [*runs["avx2"], "-include", header, "-Wno-psabi"]
    return runs


def sanitized(kinds):
    return [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-std=c++17", "-pthread", "-g"]


def skip_without(kinds, folder):
    (folder / "empty.cc").write_text("int main() { return 0; }\n")
    command = [COMPILER, *sanitized(kinds), os.fspath(folder / "empty.cc"), "-o", "/dev/null"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{COMPILER} has no sanitizers of {kinds}")


@pytest.mark.parametrize("kinds", [MEMORY, THREADS])
@pytest.mark.parametrize("driver", ["linear", "conv", "recurrent"])
def test_kernels_are_clean(driver, kinds, tmp_path):
    skip_without(kinds, tmp_path)
    # Few of the variants that differ only in how often a loop is unrolled, for a quick build.
    source = ["-DPRIORITYPROP_VECTORS=3", f"-I{SOURCES}", os.fspath(HERE / f"sanitize_{driver}.cc")]
    for name, flags in flags_by_set().items():
        binary = os.fspath(tmp_path / "run")
        command = [COMPILER, *sanitized(kinds), *flags, *source, "-o", binary]
        subprocess.run(command, check=True)
        run = subprocess.run([binary], capture_output=True, text=True)
        assert run.returncode == 0, f"{name}:\n{run.stdout}{run.stderr}"


@pytest.mark.skipif(not ALL, reason="PRIORITYPROP_SANITIZE=1 asks for it")
def test_the_path_from_python_is_clean(tmp_path):
    """The tests of the kernels in Python, with libraries that are made with the sanitizers."""
    skip_without(MEMORY, tmp_path)
    for folder in ("priorityprop_jax", "tests"):
        left_out = shutil.ignore_patterns("_priorityprop_*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = ["-shared", "-fPIC", "-O1", "-isystem", jax.ffi.include_dir(), SOURCES / "ffi.cc"]
    for name, flags in flags_by_set().items():
        if "emulated" not in name:
            to = tmp_path / "priorityprop_jax" / "sparse" / f"_priorityprop_{name}.so"
            command = [COMPILER, *sanitized(MEMORY), *flags, *source, "-o", to]
            subprocess.run(list(map(os.fspath, command)), check=True)
    libraries = [
        subprocess.check_output([COMPILER, f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    tests = [f"tests/sparse/test_native{more}.py" for more in ("", "_conv")]
    tests += [
        "tests/rnn/test_native.py",
        "-k",
        "not no_memory",
    ]  # which ends a sanitizer itself; the drivers above have it
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests],
        env={
            **os.environ,
            "PYTHONPATH": os.fspath(tmp_path),
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        },
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    print(run.stdout[-300:])
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]
