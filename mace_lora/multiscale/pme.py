"""Electrostatics beyond the long cutoff: learned charges and a particle-mesh Ewald sum (torch-pme)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mace_lora.mace_plugin.model_parts import ScaleShiftMACE

from .model import MultiScaleMACE

__all__ = ["Charges", "MultiScaleMACEPME"]


class Charges(nn.Module):
    """Charge of every atom: a value of its element plus a linear function of its long-path scalars, made neutral.

    Args:
        features: number of scalars.
        elements: number of elements.
        scale: standard deviation of the first values, e. Not zero: the energy is quadratic in the charges, so that
            all-zero charges would have no gradient.
    """

    def __init__(self, features: int, elements: int, scale: float = 0.1) -> None:
        super().__init__()
        self.element = nn.Parameter(scale * torch.randn(elements))
        self.weight = nn.Parameter(scale * torch.randn(features) / features**0.5)

    def forward(self, node_attrs: torch.Tensor, features: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Charges (atoms,) in e, summing to zero in every graph.

        Args:
            node_attrs: (atoms, elements), one-hot.
            features: (atoms, features).
            batch: (atoms,) graph of every atom.
        """
        raw = node_attrs @ self.element + features[:, : len(self.weight)] @ self.weight
        graphs = int(batch.max()) + 1
        total = torch.zeros(graphs, dtype=raw.dtype, device=raw.device).index_add(0, batch, raw)
        count = torch.zeros_like(total).index_add(0, batch, torch.ones_like(raw))
        neutral: torch.Tensor = raw - (total / count)[batch]
        return neutral


class MultiScaleMACEPME(MultiScaleMACE):
    """MultiScaleMACE with the Coulomb energy of learned charges beyond ``r_max``.

    torch-pme's kernel is switched off smoothly within ``r_max``, which the two message-passing paths describe, so
    nothing is counted twice. Frames must be periodic. Not scriptable and not for LAMMPS, whose ML-IAP interface gives
    no mesh.

    Args:
        short, long, coupling: as for :class:`MultiScaleMACE`.
        smearing: width of the Gaussians of the Ewald sum, Å; default r_max / 6.
        scale: standard deviation of the first charges, e.

    Raises:
        ValueError: torch-pme is not installed, or the smearing does not fit the cutoff.
    """

    def __init__(
        self, short: ScaleShiftMACE, long: ScaleShiftMACE, coupling: str = "sum", smearing: float | None = None,
        scale: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(short, long, coupling)
        features = int(long.products[-1].linear.irreps_out.count("0e"))
        reference = next(short.parameters())
        self.charges = Charges(features, len(short.atomic_numbers), scale).to(reference)
        self.smearing = float(long.r_max) / 6 if smearing is None else float(smearing)
        self.coulomb = pme_calculator(float(long.r_max), self.smearing).to(reference)

    def __getstate__(self) -> dict[str, Any]:
        """Without the mesh of the last evaluation, which can neither be copied nor saved."""
        kept = {k: v for k, v in self._modules.items() if k != "coulomb"}
        return {**self.__dict__, "_modules": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.coulomb = pme_calculator(float(self.r_max), self.smearing).to(self.charges.weight)  # type: ignore[arg-type]

    def far_energies(
        self, data: dict[str, torch.Tensor], displacement: torch.Tensor | None, features: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Half of every atom's interaction with all others beyond r_max (atoms,) in eV."""
        if "positions" not in data or "lammps_class" in data:
            raise ValueError("long_range pme: LAMMPS ML-IAP gives no cell and mesh; run the model with ASE")
        if "pbc" in data and not bool(data["pbc"].all()):
            raise ValueError("long_range pme: expected frames that are periodic in all directions, got one that is not")
        batch, edges = data["batch"], data["edge_index"]
        charges = self.charges(data["node_attrs"], features, batch)
        cells = data["cell"].view(-1, 3, 3)
        if displacement is not None:
            strain = 0.5 * (displacement + displacement.transpose(-1, -2))
            cells = cells + torch.matmul(cells, strain)
        owner = batch[edges[0]]
        out = []
        for graph, cell in enumerate(cells):
            mine, pairs = batch == graph, owner == graph
            first = int(torch.nonzero(mine)[0])
            q = charges[mine]
            potential = self.coulomb(
                q[:, None], cell, data["positions"][mine], (edges[:, pairs] - first).T, lengths[pairs].reshape(-1)
            )
            out.append(q * potential[:, 0])
        return torch.cat(out)


def pme_calculator(r_max: float, smearing: float) -> Any:
    try:
        from torchpme import PMECalculator
        from torchpme.potentials import CoulombPotential
        from torchpme.prefactors import eV_A
    except ImportError as err:
        raise ValueError("long_range pme: it needs torch-pme: pip install torch-pme") from err
    if not 0 < smearing <= r_max / 4:
        raise ValueError(
            f"pme_smearing: expected a length above 0 and at most {r_max / 4:g} Å, a quarter of r_max, got {smearing:g}"
        )
    potential = CoulombPotential(smearing=smearing, exclusion_radius=r_max, prefactor=eV_A)
    return PMECalculator(potential, mesh_spacing=smearing / 2, interpolation_nodes=5, full_neighbor_list=True)
