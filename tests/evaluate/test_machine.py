"""What reports say of the machine."""

import os

from mace_lora.evaluate.machine import machine


def test_cores_and_processor():
    cores, _, name = machine().partition(" cores of ")
    assert int(cores) == len(os.sched_getaffinity(0))
    assert name.strip()
