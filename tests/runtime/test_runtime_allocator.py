"""Memory that a step frees stays with the process, unless the user has said otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from partita.runtime.allocator import is_left_to_user

FAULTS = """
import resource, sys, threading
from partita.runtime.allocator import keep_freed_memory
import torch
print(keep_freed_memory())

def work():
    torch.set_num_threads(1)
    for _ in range(30):
        torch.ones(8 * 2**20)                     # 32 MiB: 8,192 pages
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(8 * 2**20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def run(**environment: str) -> list[str]:
    path = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env={**path, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux counts them")
def test_tensors_that_are_made_again_take_no_page_faults_in_any_thread() -> None:
    kept, main, worker = run()
    assert kept == "True"
    assert int(main) < 1000 and int(worker) < 1000  # of 81,920 pages


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux counts them")
def test_a_user_who_tunes_malloc_is_left_alone() -> None:
    kept, *_ = run(MALLOC_TRIM_THRESHOLD_="65536")
    assert kept == "False"


@pytest.mark.parametrize(
    ("environment", "left"),
    [
        ({}, False),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, True),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, False),
    ],
)
def test_the_environment_decides(environment: dict[str, str], left: bool) -> None:
    assert is_left_to_user(environment) is left
