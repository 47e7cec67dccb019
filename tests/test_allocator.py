"""What training asks of the allocator is asked where it can be, and harms nothing where it can not."""

import platform
import subprocess
import sys

import pytest

from triglot import allocator

REPORT = """
import resource, torch
from triglot.allocator import keep_freed_memory
assert {keep} is False or keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(5):
    faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_pages_that_were_freed_are_not_mapped_again():
    assert faults(keep=True) < faults(keep=False) / 4


def faults(*, keep: bool) -> int:
    """Pages mapped for large tensors that come and go."""
    command = [sys.executable, "-c", REPORT.format(keep=keep)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
