"""What a process frees is there for the next step."""

import ctypes
import subprocess
import sys

from priorityprop_jax.exact import keep_memory, memory

# Pages that the system had to give for an array that is made and freed ten times.
PROGRAM = """
import resource, sys
from priorityprop_jax.exact import keep_memory

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

print(int(keep_memory()) if sys.argv[1] == "kept" else 0)
for size in (1 << 20, 1 << 27):
    once = b"x" * size
    del once
    before = pages()
    for _ in range(10):
        array = b"x" * size
        del array
    print(pages() - before)
"""


def test_what_is_freed_is_not_fetched_again():
    def run(how):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return [int(line) for line in done.stdout.split()]

    kept, _, plain = 1, 0, run("plain")[2]
    assert plain > 10 * (1 << 27) // 4096 / 2
    kept, small, large = run("kept")
    assert kept == 1 and small < 100 and large < 100


def test_another_c_library_is_left_alone(monkeypatch):
    calls = []

    class Musl:
        def mallopt(self, *setting):  # takes it, and does nothing
            calls.append(setting)
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Musl())
    assert keep_memory() is False and not calls

    def windows(name):
        raise TypeError("a name is needed")

    monkeypatch.setattr(ctypes, "CDLL", windows)
    assert keep_memory() is False


def test_a_setting_that_is_refused_is_told(monkeypatch):
    class Glibc:
        gnu_get_libc_version = None

        def mallopt(self, name, value):
            return int(name == -8)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Glibc())
    for settings, expected in (({"a": (-8, 1)}, True), ({"a": (-8, 1), "b": (-4, 0)}, False)):
        monkeypatch.setattr(memory, "_SETTINGS", settings)
        assert keep_memory() is expected
