"""Energies of many molecules without what depends on their composition alone (the offsets of T-PaiNN, 2603.24752)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator

from mace_lora.atomic import atomic_path
from mace_lora.mace_plugin.labels import label_of
from mace_lora.mace_plugin.protocol import SettingsError

from .levels import Source

__all__ = ["by_composition", "write_without"]


def by_composition(sources: Sequence[Source], key: str, say: Callable[[str], None] = print) -> dict[str, float]:
    """Mean energy of every composition.

    A force field's energies of different molecules have no common zero, and no energies of the elements can give them
    one: C2H6O is ethanol or an ether. What is left after the means are taken off is what its forces belong to.

    Args:
        sources: labelled frames.
        key: of the energies, eV.
        say: gets a line with the spread of the energies before and after.

    Returns:
        eV by chemical formula (Hill).

    Raises:
        SettingsError: most compositions have a single frame, whose energy would be lost.
    """
    found = defaultdict(list)
    for source in sources:
        for atoms in source.frames:
            energy = label_of(atoms, "energy", key)
            if energy is not None:
                found[_formula(atoms)].append((float(energy), len(atoms)))
    lone = sum(len(v) == 1 for v in found.values())
    if 2 * lone > sum(map(len, found.values())):
        raise SettingsError(
            f"{sources[0].setting}: {lone} of its {sum(map(len, found.values()))} labelled frames are the only ones of "
            "their composition, so that offsets of compositions would leave nothing of their energies; give several "
            "frames of each, or offsets of elements"
        )
    means = {formula: float(np.mean([e for e, _ in values])) for formula, values in found.items()}
    every = [(e, e - means[f], n) for f, values in found.items() for e, n in values]
    before, after = (1e3 * float(np.std([row[k] / row[2] for row in every])) for k in (0, 1))
    say(f"energy offsets of {len(means)} composition(s) taken off {sources[0].path}: standard deviation "
        f"{before:.1f} -> {after:.1f} meV/atom")  # fmt: skip
    return means


def write_without(source: Source, offsets: Mapping[str, float], key: str, path: Path) -> Path:
    """Write the frames with their energies less the offsets; everything else as it was.

    Args:
        source: frames; those without a label stay as they are.
        offsets: of :func:`by_composition`.
        key: of the energies, eV.
        path: the new file, in extended XYZ.
    """
    out = []
    for atoms in source.frames:
        new, energy = atoms.copy(), label_of(atoms, "energy", key)
        results = dict(atoms.calc.results) if atoms.calc is not None else {}
        if energy is not None:
            left = float(energy) - offsets[_formula(atoms)]
            for name in ("energy", "free_energy") if key in new.info else ():
                results.pop(name, None)  # NequIP would take it before that of info
            (new.info if key in new.info else results)[key] = left
        if results:
            new.calc = SinglePointCalculator(new, **results)
        out.append(new)
    with atomic_path(path) as temporary:
        ase.io.write(temporary, out, format="extxyz")
    return path


def _formula(atoms: ase.Atoms) -> str:
    return str(atoms.get_chemical_formula())
