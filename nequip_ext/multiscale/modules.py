"""What MultiScaleNequIP adds to NequIP's modules: two ranges of edges, two sets of features, one energy."""

from __future__ import annotations

from typing import Any

import torch
from e3nn.o3._irreps import Irreps
from nequip.data import AtomicDataDict
from nequip.nn import GraphModuleMixin

__all__ = ["LONG_ENERGY", "LONG_FEATURES", "AddLongEnergy", "AllEdges", "JoinFeatures", "ShortEdges"]

LONG_FEATURES = "multiscale_long_features"
LONG_ENERGY = "multiscale_long_energy"
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
        _drop_norm_factor(data)
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
        for key in (AtomicDataDict.EDGE_ATTRS_KEY, AtomicDataDict.EDGE_EMBEDDING_KEY, AtomicDataDict.EDGE_CUTOFF_KEY):
            if key in data:
                data.pop(key)
        _drop_norm_factor(data)
        return data


def _drop_norm_factor(data: AtomicDataDict.Type) -> None:
    """NequIP keeps 1/sqrt(avg_num_neighbors) in the data and takes it again; each path has its own."""
    if AtomicDataDict.FEATURE_NORM_FACTOR_KEY in data:
        data.pop(AtomicDataDict.FEATURE_NORM_FACTOR_KEY)


class JoinFeatures(GraphModuleMixin, torch.nn.Module):
    """Scalars of both paths side by side, for a readout that sees both (coupling "fused")."""

    _init_irreps: Any

    def __init__(self, irreps_in: dict[str, Any]) -> None:
        super().__init__()
        sizes = [Irreps(irreps_in[k]).dim for k in (AtomicDataDict.NODE_FEATURES_KEY, LONG_FEATURES)]
        self._init_irreps(
            irreps_in=irreps_in, irreps_out={AtomicDataDict.NODE_FEATURES_KEY: Irreps(f"{sum(sizes)}x0e")}
        )

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Set node features (n, short + long)."""
        joined = torch.cat((data[AtomicDataDict.NODE_FEATURES_KEY], data.pop(LONG_FEATURES)), 1)
        data[AtomicDataDict.NODE_FEATURES_KEY] = joined
        return data


class AddLongEnergy(GraphModuleMixin, torch.nn.Module):
    """Atomic energies: those of the short path plus those of the long one (coupling "sum")."""

    _init_irreps: Any

    def __init__(self, irreps_in: dict[str, Any]) -> None:
        super().__init__()
        self._init_irreps(irreps_in=irreps_in, irreps_out={AtomicDataDict.PER_ATOM_ENERGY_KEY: "1x0e"})

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Add (n, 1) to (n, 1)."""
        data.pop(LONG_FEATURES)
        data[AtomicDataDict.PER_ATOM_ENERGY_KEY] = data[AtomicDataDict.PER_ATOM_ENERGY_KEY] + data.pop(LONG_ENERGY)
        return data
