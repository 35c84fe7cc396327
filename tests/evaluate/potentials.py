"""Potentials that tests name as MODULE:FUNCTION."""

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT


class Springs(Calculator):
    """Bond of a diatomic molecule: harmonic about 1.1 Å and pushed apart by a constant force (eV/Å)."""

    implemented_properties = ("energy", "forces")

    def __init__(self, stiffness: float, push: float = 0.0) -> None:
        super().__init__()
        self.stiffness, self.push = stiffness, push

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        vector = atoms.positions[1] - atoms.positions[0]
        length = np.linalg.norm(vector)
        force = (self.stiffness * (length - 1.1) - self.push) * vector / length
        energy = 0.5 * self.stiffness * (length - 1.1) ** 2 - self.push * length
        self.results = {"energy": energy, "forces": np.array([force, -force])}


class Weak(EMT):
    """Forces a tenth too small."""

    def calculate(self, *args, **kwargs):
        super().calculate(*args, **kwargs)
        self.results["forces"] = 0.9 * self.results["forces"]


def bound(atoms):
    return Springs(30.0)


def unbound(atoms):
    return Springs(0.0, push=0.5)


def weak(atoms):
    return Weak()


class Broken(Springs):
    """Energy NaN away from the start."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if abs(self.results["forces"]).max() > 0.02:
            self.results["energy"] = float("nan")


def broken(atoms):
    return Broken(30.0)
