"""How a process uses the host."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading
from qi2_jax.runtime import devices

if sys.argv[1] == "keep":
    devices.keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

counts = []
thread = threading.Thread(target=lambda: counts.extend(faults() for _ in range(3)))
thread.start()
thread.join()
print(*counts)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this system's C library has no mallopt")
def test_kept_memory_is_not_mapped_again():
    def counts(mode: str) -> list[int]:
        output = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True).stdout
        return [int(word) for word in output.split()]

    first, *later = counts("keep")
    assert max(later) < first / 10
    assert min(counts("default")) > first / 2
