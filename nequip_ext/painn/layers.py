"""PaiNN's modules on NequIP's data dictionaries.

Node features are F scalars s and F vectors v, stored flat as ``Fx0e + Fx1o``. Equation numbers are
those of arXiv 2102.03150. Every layer also carries the scalars that a single atom of each type
would have, so that the energy of an isolated atom is exactly its shift, as NequIP models promise;
the reference is removed from the data by the readout.
"""

from __future__ import annotations

from typing import Any

import torch
from e3nn.o3._irreps import Irreps
from e3nn.o3._linear import Linear
from nequip.data import AtomicDataDict
from nequip.nn import GraphModuleMixin, ScalarMLPFunction, scatter
from nequip.nn.embedding import NodeTypeEmbed

from nequip_ext.upstream.nn import NoOpGhostExchangeModule

__all__ = ["PaiNNLayer", "PaiNNReadout", "PaiNNTypeEmbed"]

_ISOLATED = "painn_isolated_scalars"
# Added to |Vv|^2: the square root has no derivative at zero, where isolated atoms are.
_EPSILON = 1e-8
_START = 0.3


class PaiNNTypeEmbed(NodeTypeEmbed):
    """NequIP's type embedding, which also hands on the table of all types."""

    embed_module: Any

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Set node attributes and features (n, F), and the isolated atoms' scalars (types, F)."""
        data = super().forward(data)
        data[_ISOLATED] = self.embed_module.weight
        return data


class PaiNNLayer(GraphModuleMixin, torch.nn.Module):
    """One interaction: message block (eqs. 7 and 8), then update block (eqs. 9 and 10).

    Args:
        num_features: F, number of scalar and of vector features.
        is_first_layer: the vectors are still zero and the features scalars only.
        avg_num_neighbors: sums over neighbours are divided by its square root.
        irreps_in: fields of the previous module.
    """

    irreps_in: Any
    irreps_out: Any
    _init_irreps: Any

    def __init__(
        self, num_features: int, is_first_layer: bool, avg_num_neighbors: float, irreps_in: dict[str, Any]
    ) -> None:
        super().__init__()
        f = num_features
        scalars, vectors = f"{f}x0e", f"{f}x1o"
        self.num_features, self.is_first_layer = f, is_first_layer
        features_in = Irreps(scalars) if is_first_layer else Irreps(f"{scalars} + {vectors}")
        self._init_irreps(
            irreps_in=irreps_in,
            my_irreps_in={AtomicDataDict.NODE_FEATURES_KEY: features_in, AtomicDataDict.EDGE_ATTRS_KEY: "1x1o"},
            required_irreps_in=[AtomicDataDict.EDGE_EMBEDDING_KEY],
            irreps_out={AtomicDataDict.NODE_FEATURES_KEY: Irreps(f"{scalars} + {vectors}")},
        )
        mlp = {"output_dim": 3 * f, "nonlinearity": "silu", "forward_weight_init": True}
        hidden = {"hidden_layers_depth": 1, "hidden_layers_width": f, "bias": True}
        self.message_mlp = ScalarMLPFunction(input_dim=f, **hidden, **mlp)
        # no bias: the filters vanish smoothly at the cutoff with the edge embedding
        edge_dim = self.irreps_in[AtomicDataDict.EDGE_EMBEDDING_KEY].num_irreps
        self.filter = ScalarMLPFunction(input_dim=edge_dim, **mlp)
        self.linear_u = Linear(vectors, vectors)
        self.linear_v = Linear(vectors, vectors)
        self.update_mlp = ScalarMLPFunction(input_dim=2 * f, **hidden, **mlp)
        for last in (self.message_mlp.mlp[-1], self.update_mlp.mlp[-1]):
            with torch.no_grad():  # products of features grow with depth: start with small changes
                last.weight.mul_(_START)
        self.ghost_exchange = NoOpGhostExchangeModule(
            field=AtomicDataDict.NODE_FEATURES_KEY,
            irreps_in={AtomicDataDict.NODE_FEATURES_KEY: self.irreps_out[AtomicDataDict.NODE_FEATURES_KEY]},
        )
        self.register_buffer("norm_const", torch.tensor(avg_num_neighbors**-0.5), persistent=False)

    @torch.jit.unused
    def _num_local(self, data: AtomicDataDict.Type) -> int:
        return data[AtomicDataDict.LMP_MLIAP_DATA_KEY].nlocal

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Update the features of the local nodes; ghosts (LAMMPS) are exchanged before the messages."""
        if AtomicDataDict.LMP_MLIAP_DATA_KEY in data:
            local = self._num_local(data)
        else:
            local = AtomicDataDict.num_nodes(data)
        if not self.is_first_layer:
            data[AtomicDataDict.NODE_FEATURES_KEY] = data[AtomicDataDict.NODE_FEATURES_KEY][:local]
            data = self.ghost_exchange(data, ghost_included=False)
        s, v = self._message(data)
        s, v = self._update(s[:local], v[:local])
        data[AtomicDataDict.NODE_FEATURES_KEY] = torch.cat((s, v), 1)
        isolated = data[_ISOLATED]
        nothing = torch.zeros((isolated.shape[0], 3 * self.num_features), dtype=isolated.dtype, device=isolated.device)
        data[_ISOLATED] = self._update(isolated, nothing)[0]
        return data

    def _message(self, data: AtomicDataDict.Type) -> tuple[torch.Tensor, torch.Tensor]:
        """Scalars (n, F) and vectors (n, 3F) with the neighbours' messages added."""
        f, x = self.num_features, data[AtomicDataDict.NODE_FEATURES_KEY]
        s = x[:, :f]
        centre, neighbour = data[AtomicDataDict.EDGE_INDEX_KEY][0], data[AtomicDataDict.EDGE_INDEX_KEY][1]
        direction = data[AtomicDataDict.EDGE_ATTRS_KEY]  # (edges, 3), unit vectors
        weights = self.message_mlp(s)[neighbour] * self.filter(data[AtomicDataDict.EDGE_EMBEDDING_KEY])
        to_s, along, to_v = weights.split(f, 1)
        vectors = along.unsqueeze(-1) * direction.unsqueeze(1)  # (edges, F, 3)
        if not self.is_first_layer:
            vectors = vectors + to_v.unsqueeze(-1) * x[:, f:].view(-1, f, 3)[neighbour]
        messages = torch.cat((to_s, vectors.reshape(-1, 3 * f)), 1)
        summed = self.norm_const * scatter(messages, centre, dim=0, dim_size=x.shape[0])
        s, v = s + summed[:, :f], summed[:, f:]
        return s, v if self.is_first_layer else v + x[:, f:]

    def _update(self, s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix scalars (n, F) and vectors (n, 3F) of each atom."""
        f = self.num_features
        u_v, v_v = self.linear_u(v).view(-1, f, 3), self.linear_v(v).view(-1, f, 3)
        norm = (v_v.square().sum(-1) + _EPSILON).sqrt()
        a_ss, a_sv, a_vv = self.update_mlp(torch.cat((s, norm), 1)).split(f, 1)
        s = s + a_ss + a_sv * (u_v * v_v).sum(-1)
        return s, v + (a_vv.unsqueeze(-1) * u_v).reshape(-1, 3 * f)


class PaiNNReadout(GraphModuleMixin, torch.nn.Module):
    """Energy of each atom from its scalars, relative to an isolated atom of its type.

    Args:
        num_features: F.
        irreps_in: fields of the previous module.
    """

    _init_irreps: Any

    def __init__(self, num_features: int, irreps_in: dict[str, Any]) -> None:
        super().__init__()
        self.num_features = num_features
        self._init_irreps(
            irreps_in=irreps_in,
            required_irreps_in=[AtomicDataDict.NODE_FEATURES_KEY],
            irreps_out={AtomicDataDict.PER_ATOM_ENERGY_KEY: "1x0e"},
        )
        self.mlp = ScalarMLPFunction(
            input_dim=num_features, output_dim=1, hidden_layers_depth=1,
            hidden_layers_width=max(1, num_features // 2), nonlinearity="silu", bias=True,
        )  # fmt: skip

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Set the atomic energies (n, 1)."""
        s = data[AtomicDataDict.NODE_FEATURES_KEY][:, : self.num_features]
        types = data[AtomicDataDict.ATOM_TYPE_KEY][: s.shape[0]]
        isolated = self.mlp(data.pop(_ISOLATED))
        data[AtomicDataDict.PER_ATOM_ENERGY_KEY] = self.mlp(s) - isolated[types]
        return data
