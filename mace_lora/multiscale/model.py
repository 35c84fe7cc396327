"""MultiScaleMACE: MACE on short edges beside a light MACE on long ones (arXiv 2312.09490, DESIGN section 5)."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple  # noqa: UP035  TorchScript reads these

import torch
from e3nn import o3
from e3nn.util.jit import compile_mode

from mace_lora.mace_plugin.model_parts import (
    LinearReadoutBlock,
    NonLinearReadoutBlock,
    ScaleShiftMACE,
    get_atomic_virials_stresses,
    get_outputs,
    prepare_graph,
    scatter_sum,
)

__all__ = ["COUPLINGS", "MultiScaleMACE"]

COUPLINGS = ("sum", "fused")


@compile_mode("script")
class MultiScaleMACE(ScaleShiftMACE):
    """Two message-passing paths over one neighbour list of r_max.

    The short path is a MACE of many channels, high l and a product basis; it gets the edges shorter than ``r_short``
    as an index subset, so that it costs what a MACE of that cutoff costs. The long path is a MACE of few channels, low
    l and a linear update; it gets all edges. E_i = sum_t readout_t(short) + readout_t(long) for ``coupling="sum"``;
    with "fused" one readout per layer sees both feature sets.

    Beyond MACE's outputs there are ``energy_short`` and ``energy_long`` (graphs,) in eV: the shares of the two paths
    in the interaction energy (fused: what the energy is without the long features, and the rest).

    Args:
        short: stock model with the short cutoff, whose modules are taken over (not copied).
        long: stock model with the long cutoff; its E0s, scale and shift are not used.
        coupling: "sum" or "fused".

    Raises:
        ValueError: the cutoffs, layers, heads or elements of the two do not fit.
    """

    def __init__(self, short: ScaleShiftMACE, long: ScaleShiftMACE, coupling: str = "sum") -> None:
        check_paths(short, long, coupling)
        adopt(self, short)
        self.register_buffer("r_short", short.r_max.clone())
        self.register_buffer("r_max", long.r_max.clone())
        self.long = long
        self.coupling = coupling
        self.fused = coupling == "fused"
        if self.fused:
            self.readouts = fused_readouts(short, long)
            long.readouts.requires_grad_(False)  # unused

    def forward(
        self,
        data: Dict[str, torch.Tensor],  # noqa: UP006
        training: bool = False,
        compute_force: bool = True,
        compute_virials: bool = False,
        compute_stress: bool = False,
        compute_displacement: bool = False,
        compute_hessian: bool = False,
        compute_edge_forces: bool = False,
        compute_atomic_stresses: bool = False,
        lammps_mliap: bool = False,
    ) -> Dict[str, Optional[torch.Tensor]]:  # noqa: UP006, UP045
        """As MACE's; the neighbour list in ``data`` must be that of ``r_max``, the long cutoff."""
        graph = prepare_graph(
            data, compute_virials=compute_virials, compute_stress=compute_stress,
            compute_displacement=compute_displacement, lammps_mliap=lammps_mliap,
        )  # fmt: skip
        atoms = graph.num_atoms_arange.to(torch.int64)
        heads = graph.node_heads.to(torch.int64)
        vectors, lengths, edges = graph.vectors, graph.lengths, data["edge_index"]
        node_e0 = self.atomic_energies_fn(data["node_attrs"])[atoms, heads]
        e0 = scatter_sum(src=node_e0, index=data["batch"], dim=0, dim_size=graph.num_graphs).to(vectors.dtype)

        inner = torch.nonzero(lengths.squeeze(-1) < self.r_short).squeeze(-1)
        near, near_vectors, near_lengths = edges[:, inner], vectors[inner], lengths[inner]
        natoms = graph.interaction_kwargs.lammps_natoms
        local = natoms[0] if graph.is_lammps else -1

        lammps = graph.interaction_kwargs.lammps_class
        short_feats = self.short_features(data["node_attrs"], near, near_vectors, near_lengths, lammps, natoms)
        long_feats = self.long_features(data["node_attrs"], edges, vectors, lengths, lammps, natoms)
        short_es, long_es = self.energies(short_feats, long_feats, heads)
        short_e, long_e = short_es[atoms, heads], long_es[atoms, heads]
        if hasattr(self, "pair_repulsion"):
            pair = self.pair_repulsion_fn(near_lengths, data["node_attrs"], near, self.atomic_numbers)
            short_e = short_e + (pair if local < 0 else pair[:local])
        # scale and shift: the shift belongs to the short path
        node_short = self.scale_shift(short_e, heads)
        far = self.far_energies(data, graph.displacement, long_feats[-1], lengths)
        node_inter = self.scale_shift(short_e + long_e, heads) + far
        inter_e = scatter_sum(node_inter, data["batch"], dim=-1, dim_size=graph.num_graphs)
        energy_short = scatter_sum(node_short, data["batch"], dim=-1, dim_size=graph.num_graphs)

        forces, virials, stress, hessian, edge_forces = get_outputs(
            energy=inter_e, positions=graph.positions, displacement=graph.displacement, vectors=vectors,
            cell=graph.cell, training=training, compute_force=compute_force, compute_virials=compute_virials,
            compute_stress=compute_stress, compute_hessian=compute_hessian,
            compute_edge_forces=compute_edge_forces or compute_atomic_stresses,
        )  # fmt: skip
        atomic_virials: Optional[torch.Tensor] = None  # noqa: UP045
        atomic_stresses: Optional[torch.Tensor] = None  # noqa: UP045
        if compute_atomic_stresses and edge_forces is not None:
            atomic_virials, atomic_stresses = get_atomic_virials_stresses(
                edge_forces=edge_forces, edge_index=edges, vectors=vectors, num_atoms=graph.positions.shape[0],
                batch=data["batch"], cell=graph.cell,
            )  # fmt: skip
        return {
            "energy": e0 + inter_e,
            "node_energy": node_e0.clone().double() + node_inter.clone().double(),
            "interaction_energy": inter_e,
            "energy_short": energy_short,
            "energy_long": inter_e - energy_short,
            "forces": forces,
            "edge_forces": edge_forces,
            "virials": virials,
            "stress": stress,
            "atomic_virials": atomic_virials,
            "atomic_stresses": atomic_stresses,
            "hessian": hessian,
            "displacement": graph.displacement,
            "node_feats": torch.cat(short_feats, dim=-1),
            "node_feats_long": torch.cat(long_feats, dim=-1),
        }

    def short_features(
        self,
        node_attrs: torch.Tensor,
        edges: torch.Tensor,
        vectors: torch.Tensor,
        lengths: torch.Tensor,
        lammps: Optional[torch.Tensor],  # noqa: UP045
        natoms: Tuple[int, int],  # noqa: UP006
    ) -> List[torch.Tensor]:  # noqa: UP006
        """Node features (atoms, features) after every layer of the short path; edges, Å, within r_short."""
        feats: List[torch.Tensor] = []  # noqa: UP006
        node_feats = self.node_embedding(node_attrs)
        edge_attrs = self.spherical_harmonics(vectors)
        edge_feats, cutoff = self.radial_embedding(lengths, node_attrs, edges, self.atomic_numbers)
        local = natoms[0] if lammps is not None else len(node_attrs)
        for i, (interaction, product) in enumerate(zip(self.interactions, self.products)):  # noqa: B905
            node_feats, sc = interaction(
                node_attrs=node_attrs if i == 0 else node_attrs[:local], node_feats=node_feats, edge_attrs=edge_attrs,
                edge_feats=edge_feats, edge_index=edges, cutoff=cutoff, first_layer=(i == 0), lammps_class=lammps,
                lammps_natoms=natoms,
            )  # fmt: skip
            node_feats = product(node_feats=node_feats, sc=sc, node_attrs=node_attrs[:local])
            feats.append(node_feats)
        return feats

    def long_features(
        self,
        node_attrs: torch.Tensor,
        edges: torch.Tensor,
        vectors: torch.Tensor,
        lengths: torch.Tensor,
        lammps: Optional[torch.Tensor],  # noqa: UP045
        natoms: Tuple[int, int],  # noqa: UP006
    ) -> List[torch.Tensor]:  # noqa: UP006
        """The same for the long path (TorchScript cannot be given the modules of a path)."""
        feats: List[torch.Tensor] = []  # noqa: UP006
        node_feats = self.long.node_embedding(node_attrs)
        edge_attrs = self.long.spherical_harmonics(vectors)
        edge_feats, cutoff = self.long.radial_embedding(lengths, node_attrs, edges, self.atomic_numbers)
        local = natoms[0] if lammps is not None else len(node_attrs)
        for i, (interaction, product) in enumerate(zip(self.long.interactions, self.long.products)):  # noqa: B905
            node_feats, sc = interaction(
                node_attrs=node_attrs if i == 0 else node_attrs[:local], node_feats=node_feats, edge_attrs=edge_attrs,
                edge_feats=edge_feats, edge_index=edges, cutoff=cutoff, first_layer=(i == 0), lammps_class=lammps,
                lammps_natoms=natoms,
            )  # fmt: skip
            node_feats = product(node_feats=node_feats, sc=sc, node_attrs=node_attrs[:local])
            feats.append(node_feats)
        return feats

    def far_energies(
        self,
        data: Dict[str, torch.Tensor],  # noqa: UP006
        displacement: Optional[torch.Tensor],  # noqa: UP045
        features: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """Atomic energies from beyond the long cutoff (atoms,) in eV; none here, see ``pme``."""
        return torch.zeros_like(features[:, 0])

    def energies(
        self,
        short_feats: List[torch.Tensor],  # noqa: UP006
        long_feats: List[torch.Tensor],  # noqa: UP006
        heads: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:  # noqa: UP006
        """Atomic energies of the two paths before scale and shift, each (atoms, heads)."""
        short_es: List[torch.Tensor] = []  # noqa: UP006
        long_es: List[torch.Tensor] = []  # noqa: UP006
        for i, readout in enumerate(self.readouts):
            at = -1 if len(self.readouts) == 1 else i
            if self.fused:
                near, far = short_feats[at], long_feats[at]
                alone = readout(torch.cat([near, torch.zeros_like(far)], dim=-1), heads)
                short_es.append(alone)
                long_es.append(readout(torch.cat([near, far], dim=-1), heads) - alone)
            else:
                short_es.append(readout(short_feats[at], heads))
        if not self.fused:
            for i, far_readout in enumerate(self.long.readouts):
                at = -1 if len(self.long.readouts) == 1 else i
                long_es.append(far_readout(long_feats[at], heads))
        return torch.stack(short_es, dim=0).sum(dim=0), torch.stack(long_es, dim=0).sum(dim=0)

    @torch.jit.unused
    def short_model(self) -> ScaleShiftMACE:
        """The short path as a stock model of cutoff ``r_short``, with the same (not copied) modules.

        Raises:
            ValueError: the readouts are fused and need the long features.
        """
        if self.fused:
            raise ValueError("short_model: the readouts are fused with the long path; there is no short model in them")
        stock = ScaleShiftMACE.__new__(ScaleShiftMACE)
        adopt(stock, self)
        del stock.long, stock.__dict__["coupling"], stock.__dict__["fused"]
        stock.r_max = self.r_short.clone()
        del stock._buffers["r_short"]
        for name in ("charges", "coulomb"):  # of the electrostatic variant
            stock._modules.pop(name, None)
        return stock


def check_paths(short: ScaleShiftMACE, long: ScaleShiftMACE, coupling: str) -> None:
    """What the two paths must have in common.

    Raises:
        ValueError: which of it they have not.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling: expected one of {', '.join(COUPLINGS)}, got {coupling!r}")
    if float(short.r_max) > float(long.r_max) or float(short.r_max) <= 0:
        raise ValueError(
            f"r_short: expected 0 < r_short <= r_max (the long cutoff), got {float(short.r_max):g} and "
            f"{float(long.r_max):g} Å"
        )
    for what, a, b in (
        ("interaction layers", len(short.interactions), len(long.interactions)),
        ("heads", list(short.heads), list(long.heads)),
        ("elements", short.atomic_numbers.tolist(), long.atomic_numbers.tolist()),
        ("readouts", len(short.readouts), len(long.readouts)),
    ):
        if a != b:
            raise ValueError(f"{what}: expected the same in both paths, got {a} (short) and {b} (long)")
    if coupling == "fused" and not all(
        isinstance(r, LinearReadoutBlock | NonLinearReadoutBlock) for r in short.readouts
    ):
        raise ValueError("coupling: this model's readouts cannot be fused; expected sum, got 'fused'")
    if hasattr(short, "joint_embedding"):
        raise ValueError("embedding_specs: MultiScaleMACE has no extra embeddings; leave --embedding_specs out")


def fused_readouts(short: ScaleShiftMACE, long: ScaleShiftMACE) -> torch.nn.ModuleList:
    """Readouts over the features of both paths, with the short path's weights and zeros for the long features."""
    pairs = zip(short.readouts, long.readouts, strict=True)
    # slots stay apart: short first
    return torch.nn.ModuleList(
        readout_like(near, first_linear(near).irreps_in + first_linear(far).irreps_in) for near, far in pairs
    )


def first_linear(readout: torch.nn.Module) -> o3.Linear:
    """The layer of a readout that sees the features."""
    layer: o3.Linear = readout.linear if isinstance(readout, LinearReadoutBlock) else readout.linear_1
    return layer


def last_linear(readout: torch.nn.Module) -> o3.Linear:
    """The layer of a readout that gives the energies."""
    layer: o3.Linear = readout.linear if isinstance(readout, LinearReadoutBlock) else readout.linear_2
    return layer


def readout_like(readout: Any, irreps_in: o3.Irreps) -> torch.nn.Module:
    """The same readout for other features: the weights of common input slots, zero for new ones.

    Args:
        readout: linear or non-linear readout of MACE.
        irreps_in: more or fewer slots than the readout's own, the first ones the same.
    """
    heads = o3.Irreps(last_linear(readout).irreps_out)
    if isinstance(readout, LinearReadoutBlock):
        block = LinearReadoutBlock(irreps_in, heads)
    else:
        gate = readout.non_linearity.acts[0].f
        block = NonLinearReadoutBlock(irreps_in, o3.Irreps(readout.hidden_irreps), gate, heads, readout.num_heads)
        block.linear_2.load_state_dict(readout.linear_2.state_dict())
    copy_common(first_linear(block), first_linear(readout))
    return block.to(next(readout.parameters()))


@torch.no_grad()
def copy_common(target: o3.Linear, source: o3.Linear) -> None:
    """Copy the weights of common slots, rescaled as e3nn divides by the number of inputs; the others become zero."""
    values = {(i.i_in, i.i_out): w * i.path_weight for _, i, w in source.weight_views(yield_instruction=True)}
    for _, instruction, view in target.weight_views(yield_instruction=True):
        known = values.get((instruction.i_in, instruction.i_out))
        view.zero_() if known is None else view.copy_(known / instruction.path_weight)


def adopt(target: torch.nn.Module, source: torch.nn.Module) -> None:
    """Give a model everything that another one's constructor has set; modules are shared, not copied."""
    torch.nn.Module.__init__(target)
    for name, value in vars(source).items():
        target.__dict__[name] = value.copy() if isinstance(value, dict) else value
