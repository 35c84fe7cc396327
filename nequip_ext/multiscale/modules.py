"""What MultiScaleNequIP adds to NequIP's modules: two ranges of edges, two sets of features, one energy."""

from __future__ import annotations

from typing import Any

import torch
from nequip.data import AtomicDataDict
from nequip.nn import GraphModuleMixin

from nequip_ext.upstream.nn import register_fields

__all__ = [
    "ATOMS_LONG", "ENERGY_LONG", "ENERGY_SHORT", "LONG_ENERGY", "LONG_FEATURES", "AddedEnergy", "AllEdges",
    "EnergyShares", "FusedReadout", "ShortEdges", "ShortShare",
]  # fmt: skip

LONG_FEATURES = "multiscale_long_features"
LONG_ENERGY = "multiscale_long_energy"  # of atoms, before scales and shifts
ENERGY_SHORT, ENERGY_LONG = "energy_short", "energy_long"  # of frames, eV
ATOMS_LONG = "multiscale_atomic_energy_long"
register_fields(graph_fields=[ENERGY_SHORT, ENERGY_LONG])
_INDEX, _VECTORS, _LENGTHS = "multiscale_edge_index", "multiscale_edge_vectors", "multiscale_edge_lengths"
_NORMED = "multiscale_normed_lengths"


class ShortEdges(GraphModuleMixin, torch.nn.Module):
    """End of the long path: keep its features, and go on with the edges shorter than ``r_short``.

    The short edges are an index subset, so that what follows costs what a graph of that cutoff costs.

    Args:
        r_short: Å.
        irreps_in: fields of the previous module.
    """

    _init_irreps: Any
    irreps_in: Any

    def __init__(self, r_short: float, irreps_in: dict[str, Any]) -> None:
        super().__init__()
        self.r_short = float(r_short)
        features = irreps_in[AtomicDataDict.NODE_FEATURES_KEY]
        self._init_irreps(irreps_in=irreps_in, irreps_out={LONG_FEATURES: features})

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Replace index (2, edges), vectors (edges, 3) and lengths (edges,) by those of the short edges."""
        data[LONG_FEATURES] = data[AtomicDataDict.NODE_FEATURES_KEY]
        index, vectors = data[AtomicDataDict.EDGE_INDEX_KEY], data[AtomicDataDict.EDGE_VECTORS_KEY]
        lengths = data[AtomicDataDict.EDGE_LENGTH_KEY]
        data[_INDEX], data[_VECTORS], data[_LENGTHS] = index, vectors, lengths
        data[_NORMED] = data[AtomicDataDict.NORM_LENGTH_KEY]
        _drop_edge_values(data)
        inner = torch.nonzero(lengths.view(-1) < self.r_short).view(-1)
        data[AtomicDataDict.EDGE_INDEX_KEY] = torch.index_select(index, 1, inner)
        data[AtomicDataDict.EDGE_VECTORS_KEY] = torch.index_select(vectors, 0, inner)
        data[AtomicDataDict.EDGE_LENGTH_KEY] = torch.index_select(lengths, 0, inner)
        return data


class AllEdges(GraphModuleMixin, torch.nn.Module):
    """End of the short path: the neighbour list is whole again, for what follows (pair potentials, derivatives)."""

    _init_irreps: Any

    def __init__(self, irreps_in: dict[str, Any]) -> None:
        super().__init__()
        self._init_irreps(irreps_in=irreps_in, irreps_out={})

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Put the edges back; values per short edge are dropped."""
        data[AtomicDataDict.EDGE_INDEX_KEY] = data.pop(_INDEX)
        data[AtomicDataDict.EDGE_VECTORS_KEY] = data.pop(_VECTORS)
        data[AtomicDataDict.EDGE_LENGTH_KEY] = data.pop(_LENGTHS)
        data[AtomicDataDict.NORM_LENGTH_KEY] = data.pop(_NORMED)
        _drop_edge_values(data)
        return data


def _drop_edge_values(data: AtomicDataDict.Type) -> None:
    """What belongs to the edges of the path that ends; 1/sqrt(avg_num_neighbors) too, which NequIP would take again."""
    for key in (
        AtomicDataDict.EDGE_ATTRS_KEY, AtomicDataDict.EDGE_EMBEDDING_KEY, AtomicDataDict.EDGE_CUTOFF_KEY,
        AtomicDataDict.EDGE_FEATURES_KEY, AtomicDataDict.EDGE_ENERGY_KEY, AtomicDataDict.EDGE_TYPE_KEY,
        AtomicDataDict.FEATURE_NORM_FACTOR_KEY,
    ):  # fmt: skip
        if key in data:
            data.pop(key)


class FusedReadout(GraphModuleMixin, torch.nn.Module):
    """One readout of the scalars of both paths (coupling "fused").

    What it makes of the short path's alone counts as the short share, the rest as the long one.

    Args:
        readout: from node features (n, short + long) to atomic energies (n, 1).
        irreps_in: fields of the previous module.
    """

    _init_irreps: Any

    def __init__(self, readout: torch.nn.Module, irreps_in: dict[str, Any]) -> None:
        super().__init__()
        self.per_atom_energy_readout = readout
        self._init_irreps(
            irreps_in=irreps_in, irreps_out={AtomicDataDict.PER_ATOM_ENERGY_KEY: "1x0e", LONG_ENERGY: "1x0e"}
        )

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Set the two shares (n, 1)."""
        near, far = data[AtomicDataDict.NODE_FEATURES_KEY], data.pop(LONG_FEATURES)
        shares = []
        for features in (far, torch.zeros_like(far)):
            data[AtomicDataDict.NODE_FEATURES_KEY] = torch.cat((near, features), 1)
            data = self.per_atom_energy_readout(data)
            shares.append(data[AtomicDataDict.PER_ATOM_ENERGY_KEY])
        data[AtomicDataDict.NODE_FEATURES_KEY] = near
        data[LONG_ENERGY] = shares[0] - shares[1]
        return data


class EnergyShares(GraphModuleMixin, torch.nn.Module):
    """Atomic energies of both paths, in eV; the isolated atoms' belong to the short one.

    Args:
        scale_shift: NequIP's per-type scales and shifts.
        irreps_in: fields of the previous module.
    """

    _init_irreps: Any

    def __init__(self, scale_shift: torch.nn.Module, irreps_in: dict[str, Any]) -> None:
        super().__init__()
        self.per_type_energy_scale_shift = scale_shift
        self._init_irreps(
            irreps_in=irreps_in, irreps_out={AtomicDataDict.PER_ATOM_ENERGY_KEY: "1x0e", ATOMS_LONG: "1x0e"}
        )

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Set the atomic energies and their long shares (n, 1)."""
        key, far = AtomicDataDict.PER_ATOM_ENERGY_KEY, data.pop(LONG_ENERGY)
        if LONG_FEATURES in data:
            data.pop(LONG_FEATURES)
        near = data[key]
        data = self.per_type_energy_scale_shift(data)
        without = data[key]
        data[key] = near + far
        data = self.per_type_energy_scale_shift(data)
        data[ATOMS_LONG] = data[key] - without
        return data


class ShortShare(GraphModuleMixin, torch.nn.Module):
    """The short path's energy of every frame (frames, 1) in eV: what is not the long one's; pair potentials too."""

    _init_irreps: Any

    def __init__(self, irreps_in: dict[str, Any]) -> None:
        super().__init__()
        self._init_irreps(irreps_in=irreps_in, irreps_out={ENERGY_SHORT: "1x0e"})

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Set energy_short, which with energy_long is the total energy."""
        data.pop(ATOMS_LONG)
        data[ENERGY_SHORT] = data[AtomicDataDict.TOTAL_ENERGY_KEY] - data[ENERGY_LONG]
        return data


class AddedEnergy(GraphModuleMixin, torch.nn.Module):
    """A long path's energy on top of a model's own: atomic and total energies, and the shares of the frames.

    Args:
        total: sum of the atoms' long energies over every frame.
        scales: energy scale of every type (types, 1) in eV.
        irreps_in: fields of the previous module.
    """

    _init_irreps: Any
    scales: torch.Tensor

    def __init__(self, total: torch.nn.Module, scales: torch.Tensor, irreps_in: dict[str, Any]) -> None:
        super().__init__()
        self.total = total
        self.register_buffer("scales", scales)
        self._init_irreps(
            irreps_in=irreps_in, irreps_out={ATOMS_LONG: "1x0e", ENERGY_LONG: "1x0e", ENERGY_SHORT: "1x0e"}
        )

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Set atomic (n, 1), total, short and long energies (frames, 1)."""
        atoms, frames = AtomicDataDict.PER_ATOM_ENERGY_KEY, AtomicDataDict.TOTAL_ENERGY_KEY
        far = data.pop(LONG_ENERGY)
        data.pop(LONG_FEATURES)
        types = data[AtomicDataDict.ATOM_TYPE_KEY].view(-1)[: far.size(0)]  # ML-IAP: local atoms only
        scales = torch.nn.functional.embedding(types, self.scales)
        data[ATOMS_LONG] = scales * far.to(scales.dtype)
        data = self.total(data)
        added, own = data.pop(ATOMS_LONG), data[atoms]
        if AtomicDataDict.LMP_MLIAP_DATA_KEY in data:  # Allegro has rows for ghost atoms too
            added = torch.cat((added, torch.zeros_like(own[added.size(0) :])), 0)
        data[atoms] = own + added
        data[ENERGY_SHORT] = data[frames]
        data[frames] = data[frames] + data[ENERGY_LONG]
        return data
