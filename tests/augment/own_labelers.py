"""Labelers that tests name as MODULE:FUNCTION."""

import os
import time

import numpy as np
from ase.calculators.emt import EMT


class Slow(EMT):
    """EMT with 10 ms on top."""

    def calculate(self, *args, **kwargs):
        time.sleep(0.01)
        super().calculate(*args, **kwargs)


class Faulty(EMT):
    """EMT that fails as the frame's info['fault'] says."""

    fault = ""

    def calculate(self, *args, **kwargs):
        if self.fault == "throws":
            raise RuntimeError("no convergence")
        if self.fault == "hangs":
            time.sleep(60)
        if self.fault == "dies":
            os._exit(3)
        super().calculate(*args, **kwargs)
        if self.fault == "nan":
            self.results["forces"] = np.full_like(self.results["forces"], np.nan)


def slow(atoms):
    return Slow()


def faulty(atoms):
    calculator = Faulty()
    calculator.fault = atoms.info.get("fault", "")
    return calculator


NOT_A_FUNCTION = 3
