"""Labelers that tests name as MODULE:FUNCTION."""

import os
import signal
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
        if self.fault == "hangs compiled":  # deaf to signals, as a Fortran loop would be
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            time.sleep(60)
        if self.fault == "dies":
            os._exit(3)
        super().calculate(*args, **kwargs)
        if self.fault == "one force":
            self.results["forces"] = self.results["forces"][:1]
        if self.fault == "nan":
            self.results["forces"] = np.full_like(self.results["forces"], np.nan)


class Tiring(EMT):
    """EMT that gives up above 1 eV of potential energy beyond the first frame's."""

    first = None

    def calculate(self, *args, **kwargs):
        super().calculate(*args, **kwargs)
        type(self).first = self.results["energy"] if self.first is None else self.first
        if self.results["energy"] - self.first > 1.0:
            raise RuntimeError("no convergence")


def tiring(atoms):
    return Tiring()


def hopeless(atoms):
    calculator = Faulty()
    calculator.fault = "throws"
    return calculator


def slow(atoms):
    return Slow()


def faulty(atoms):
    calculator = Faulty()
    calculator.fault = atoms.info.get("fault", "")
    return calculator


NOT_A_FUNCTION = 3
