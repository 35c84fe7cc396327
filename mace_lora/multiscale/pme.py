"""Electrostatics beyond the long cutoff: learned charges and an Ewald sum on a mesh (torch-pme)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from mace_lora.mace_plugin.model_parts import ScaleShiftMACE

from .model import MultiScaleMACE

__all__ = ["Charges", "MultiScaleMACEPME"]


class Charges(nn.Module):
    """Charges that neighbours exchange, so that every fragment is neutral and a lone atom has none.

    chi_i is a value of the element plus a linear function of the atom's long-path scalars; with u(r) that goes smoothly
    to zero at r_max, q_i = sum_j u(r_ij) (chi_j - chi_i) / avg_num_neighbors. What one atom gets another loses, and a
    charge depends on what is within reach of the long path only, so that far fragments do not change it.

    Args:
        features: number of scalars.
        elements: number of elements.
        avg_num_neighbors: within r_max.
        scale: standard deviation of the first values of chi, e. Not zero: the energy is quadratic in the charges, so
            that all-zero charges would have no gradient.
    """

    neighbors: torch.Tensor

    def __init__(self, features: int, elements: int, avg_num_neighbors: float = 1.0, scale: float = 0.1) -> None:
        super().__init__()
        self.element = nn.Parameter(scale * torch.randn(elements))
        self.weight = nn.Parameter(scale * torch.randn(features) / features**0.5)
        self.register_buffer("neighbors", torch.tensor(float(avg_num_neighbors)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "neighbors" not in state["_buffers"]:
            raise ValueError(
                "long_range pme: expected a model whose charges are exchanged between neighbours, got one of an "
                "earlier version, whose charges have another meaning; train it anew"
            )
        super().__setstate__(state)

    def forward(
        self, node_attrs: torch.Tensor, features: torch.Tensor, edges: torch.Tensor, envelope: torch.Tensor
    ) -> torch.Tensor:
        """Charges (atoms,) in e.

        Args:
            node_attrs: (atoms, elements), one-hot.
            features: (atoms, features).
            edges: (2, edges), each pair in both directions.
            envelope: u(r) of every edge (edges,).
        """
        chi = node_attrs @ self.element + features[:, : len(self.weight)] @ self.weight
        other, atom = edges
        exchanged = envelope * (chi[other] - chi[atom])
        charges: torch.Tensor = torch.zeros_like(chi).index_add(0, atom, exchanged) / self.neighbors
        return charges


class MultiScaleMACEPME(MultiScaleMACE):
    """MultiScaleMACE with the Coulomb energy of learned charges beyond ``r_max``.

    Coulomb's law is switched off smoothly (twice differentiable) within ``r_max``, which the two message-passing paths
    describe, so nothing is counted twice. Frames must be periodic. Not scriptable and not for LAMMPS, whose ML-IAP
    interface gives no mesh.

    Args:
        short, long, coupling: as for :class:`MultiScaleMACE`.
        smearing: width of the Gaussians of the Ewald sum, Å; default r_max / 6.
        scale: standard deviation of the first charges, e.

    Raises:
        ValueError: torch-pme is not installed, or the smearing does not fit the cutoff.
    """

    _last: tuple[torch.Tensor, ...] = ()  # charges and Coulomb energies of the forward pass under way

    def __init__(
        self, short: ScaleShiftMACE, long: ScaleShiftMACE, coupling: str = "sum", smearing: float | None = None,
        scale: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(short, long, coupling)
        features = int(long.products[-1].linear.irreps_out.count("0e"))
        reference = next(short.parameters())
        neighbors = float(long.interactions[0].avg_num_neighbors)
        self.charges = Charges(features, len(short.atomic_numbers), neighbors, scale).to(reference)
        self.smearing = float(long.r_max) / 6 if smearing is None else float(smearing)
        self.coulomb = pme_calculator(float(long.r_max), self.smearing).to(reference)

    def __getstate__(self) -> dict[str, Any]:
        """Without the mesh of the last evaluation, which can neither be copied nor saved."""
        kept = {k: v for k, v in self._modules.items() if k != "coulomb"}
        return {**self.__dict__, "_modules": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.coulomb = pme_calculator(float(self.r_max), self.smearing).to(self.charges.weight)  # type: ignore[arg-type]

    def forward(
        self,
        data: dict[str, torch.Tensor],
        training: bool = False,
        compute_force: bool = True,
        compute_virials: bool = False,
        compute_stress: bool = False,
        compute_displacement: bool = False,
        compute_hessian: bool = False,
        compute_edge_forces: bool = False,
        compute_atomic_stresses: bool = False,
        lammps_mliap: bool = False,
    ) -> dict[str, torch.Tensor | None]:
        """As MACE's, without what is a sum over edges.

        Raises:
            ValueError: forces of edges, or virials or stresses of atoms, are asked for; or a frame is not periodic.

        Also ``charges`` (atoms,) in e, and ``energy_coulomb`` (graphs,) in eV, which is part of ``energy_long``.
        """
        if compute_edge_forces or compute_atomic_stresses:
            raise ValueError(
                "long_range pme: expected compute_edge_forces and compute_atomic_stresses to be off, got one of them; "
                "edges do not have the forces of the mesh; use forces and the stress of the whole frame"
            )
        out = super().forward(
            data, training=training, compute_force=compute_force, compute_virials=compute_virials,
            compute_stress=compute_stress, compute_displacement=compute_displacement, compute_hessian=compute_hessian,
            lammps_mliap=lammps_mliap,
        )  # fmt: skip
        out["charges"], out["energy_coulomb"] = self._last
        self._last = ()
        return out

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
        cutoff = self.long.radial_embedding.cutoff_fn  # near neighbours exchange charge, whatever the path leaves out
        envelope = cutoff.calculate_envelope(lengths, cutoff.r_max, cutoff.p.to(torch.int)).squeeze(-1)
        charges = self.charges(data["node_attrs"], features, edges, envelope)
        cells = data["cell"].view(-1, 3, 3)
        if displacement is not None:
            strain = 0.5 * (displacement + displacement.transpose(-1, -2))
            cells = cells + torch.matmul(cells, strain)
        owner = batch[edges[0]]
        # torch cannot differentiate a float32 determinant while float64 is the default
        dtype = torch.promote_types(charges.dtype, torch.get_default_dtype())
        positions, apart = data["positions"].to(dtype), lengths.reshape(-1).to(dtype)
        out = []
        for graph, cell in enumerate(cells):
            mine, pairs = batch == graph, owner == graph
            first = int(torch.nonzero(mine)[0])
            q = charges[mine].to(dtype)
            potential = self.coulomb(
                q[:, None], cell.to(dtype), positions[mine], (edges[:, pairs] - first).T, apart[pairs]
            )
            out.append(q * potential[:, 0])
        self._last = (charges.detach(), torch.stack([e.detach().sum() for e in out]).to(charges.dtype))
        return torch.cat(out).to(charges.dtype)


def pme_calculator(r_max: float, smearing: float) -> Any:
    """torch-pme's calculator of the Coulomb energy beyond r_max.

    Args:
        r_max: Å; the energy of two charges is switched on from nothing at 0 to all of it at r_max.
        smearing: Å.

    Raises:
        ValueError: torch-pme is not installed, or the smearing does not fit the cutoff.
    """
    try:
        from torchpme import P3MCalculator
        from torchpme.prefactors import eV_A
    except ImportError as err:
        raise ValueError("long_range pme: it needs torch-pme: pip install torch-pme") from err
    if not 0 < smearing <= r_max / 4:
        raise ValueError(
            f"pme_smearing: expected a length above 0 and at most {r_max / 4:g} Å, a quarter of r_max, got {smearing:g}"
        )
    potential = _potential_class()(smearing=smearing, exclusion_radius=r_max, prefactor=eV_A)
    # P3M's B-splines are smooth where an atom comes nearer to another mesh point; PME's polynomials of 5 nodes jump
    calculator = P3MCalculator(potential, mesh_spacing=smearing / 2, interpolation_nodes=5, full_neighbor_list=True)
    one, points = torch.eye(3), torch.ones(3, dtype=torch.int64)  # until the first frame
    calculator.kspace_filter = _filter_class()(
        one, points, 5, potential, fft_norm="backward", ifft_norm="forward", mode=0
    )
    return calculator


@functools.cache
def _filter_class() -> Any:
    """P3M's influence function for cells of any shape."""
    from torchpme.lib.kspace_filter import P3MKSpaceFilter

    class AnyCell(P3MKSpaceFilter):  # type: ignore[misc, unused-ignore]
        """torch-pme takes the Cartesian components of k for those along the cell's vectors: right for boxes only."""

        def _compute_influence(self, kvectors: torch.Tensor) -> torch.Tensor:
            """1 / U(k)² of the charge assignment (nx, ny, nz/2+1), with k·a_i / n_i along vector i."""
            along = torch.matmul(kvectors, self.cell.T) / self.ns_mesh
            assigned = self._charge_assignment(along)
            inverse: torch.Tensor = torch.where(assigned == 0, 0.0, 1 / torch.where(assigned == 0, 1.0, assigned))
            return inverse

    return AnyCell


@functools.cache
def _potential_class() -> Any:
    """A function of its own, since torch-pme is optional."""
    from torchpme.potentials import CoulombPotential

    class SmoothCoulomb(CoulombPotential):  # type: ignore[misc, unused-ignore]
        """Coulomb potential with an exclusion that is smooth to the second derivative at its radius."""

        def f_cutoff(self, dist: torch.Tensor, pair_mask: torch.Tensor | None = None) -> torch.Tensor:
            """What is taken away (1 at 0, 0 at the radius); torch-pme's cosine has a kink in the slope there."""
            x = (dist / self.exclusion_radius).clamp(max=1.0)
            taken: torch.Tensor = 1 - x**3 * (10 - 15 * x + 6 * x**2)
            return taken if pair_mask is None else taken * pair_mask

    return SmoothCoulomb
