"""PaiNN: NequIP's own model tests, and the published equations."""

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nequip")

from e3nn import o3
from nequip.utils.unittests.conftest import *  # noqa: F403  upstream's fixtures
from nequip.utils.unittests.model_tests import BaseEnergyModelTests
from nequip_models import MODELS, build, energy_forces, molecule

# upstream's tests start nequip-train by name
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

pytestmark = pytest.mark.nequip

MODEL = MODELS["painn"]


# the float32 half of upstream's tests adds minutes and nothing that the compiled models do not show
@pytest.fixture(scope="session", params=["float64"])
def model_dtype(request):
    return request.param


class TestUpstream(BaseEnergyModelTests):
    """Everything that NequIP asks of an energy model."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls):
        return MODEL

    @pytest.fixture
    def strict_locality(self):
        return False

    @pytest.fixture(scope="class", params=["minimal_toy_emt.yaml"])
    @classmethod
    def conffile(cls, request):
        return request.param  # the other one downloads its data

    @pytest.fixture(scope="class", params=["package"])
    @classmethod
    def model_source(cls, request):
        return request.param  # a package is built from a checkpoint, so it shows both


def by_hand(layer, s, v, edges, filters, directions):
    """Equations 7 to 10 of arXiv 2102.03150 with loops over edges and atoms."""
    f = layer.num_features
    ds, dv = torch.zeros_like(s), torch.zeros_like(v)
    for e, (i, j) in enumerate(edges.T.tolist()):
        phi = layer.message_mlp(s[j : j + 1])[0] * filters[e]
        ds[i] += phi[:f]
        dv[i] += phi[f : 2 * f, None] * directions[e] + phi[2 * f :, None] * v[j]
    s, v = s + layer.norm_const * ds, v + layer.norm_const * dv
    u = (layer.linear_u.weight.view(f, f) / f**0.5).T
    w = (layer.linear_v.weight.view(f, f) / f**0.5).T
    out_s, out_v = [], []
    for i in range(len(s)):
        uv, vv = u @ v[i], w @ v[i]
        a = layer.update_mlp(torch.cat([s[i], (vv.square().sum(1) + 1e-8).sqrt()])[None])[0]
        out_s.append(s[i] + a[:f] + a[f : 2 * f] * (uv * vv).sum(1))
        out_v.append(v[i] + a[2 * f :, None] * uv)
    return torch.stack(out_s), torch.stack(out_v)


def test_a_layer_is_the_published_equations():
    model = build("painn")
    layer = next(m for m in model.modules() if type(m).__name__ == "PaiNNLayer" and not m.is_first_layer)
    data = molecule()
    n, f = len(data["pos"]), layer.num_features
    s, v = torch.randn(n, f, dtype=torch.float64), torch.randn(n, f, 3, dtype=torch.float64)
    edges = data["edge_index"]
    vectors = data["pos"][edges[1]] - data["pos"][edges[0]]
    directions = vectors / vectors.norm(dim=1, keepdim=True)
    embedding = torch.randn(edges.shape[1], 6, dtype=torch.float64)
    out = layer(
        data
        | {
            "node_features": torch.cat([s, v.reshape(n, -1)], 1), "edge_attrs": directions,
            "edge_embedding": embedding, "painn_isolated_scalars": s[:1],
        }
    )["node_features"]  # fmt: skip
    s_ref, v_ref = by_hand(layer, s, v, edges, layer.filter(embedding), directions)
    torch.testing.assert_close(out[:, :f], s_ref, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(out[:, f:].view(n, f, 3), v_ref, atol=1e-10, rtol=1e-10)


def test_radial_functions_are_the_published_sines_times_the_cutoff():
    """Equation 5, up to one constant, times 1 - 28 x^6 + 48 x^7 - 21 x^8 (the polynomial cutoff with p = 6)."""
    model, seen = build("painn"), []
    bessel = next(m for m in model.modules() if type(m).__name__ == "BesselEdgeLengthEncoding")
    handle = bessel.register_forward_hook(lambda _, __, out: seen.append(out))
    energy_forces(model, molecule())
    handle.remove()
    lengths, found = seen[0]["edge_lengths"].view(-1, 1), seen[0]["edge_embedding"]
    x = lengths / MODEL["r_max"]
    expected = torch.sin(torch.arange(1, 7) * torch.pi * x) / lengths * (1 - 28 * x**6 + 48 * x**7 - 21 * x**8)
    constant = (found * expected).sum() / expected.square().sum()
    torch.testing.assert_close(found, constant * expected, atol=1e-6, rtol=0)


def test_vector_features_rotate_and_flip():
    model = build("painn")
    readout = next(m for m in model.modules() if type(m).__name__ == "PaiNNReadout")
    seen = []
    handle = readout.register_forward_pre_hook(lambda _, args: seen.append(args[0]["node_features"].detach().clone()))
    rotation = -o3.rand_matrix().double()
    energy_forces(model, molecule())
    energy_forces(model, molecule(rotation))
    handle.remove()
    f = readout.num_features
    torch.testing.assert_close(seen[1][:, :f], seen[0][:, :f], atol=1e-10, rtol=0)
    vectors = [x[:, f:].view(len(x), f, 3) for x in seen]
    assert vectors[0].abs().max() > 1e-2
    torch.testing.assert_close(vectors[1], vectors[0] @ rotation.T, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected a positive whole number, got 0"),
        ({"avg_num_neighbors": {"H": 1.0}}, "avg_num_neighbors: expected one positive number for PaiNN"),
        ({"avg_num_neighbors": float("nan")}, "avg_num_neighbors: expected one positive number for PaiNN, got nan"),
        ({"r_max": -1}, "r_max: expected one positive number for PaiNN, got -1"),
        ({"num_features": True}, "num_features: expected a positive whole number, got True"),
        ({"num_bessels": "a"}, "num_bessels: expected a positive whole number, got 'a'"),
        ({"per_type_energy_scales": {"H": 1.0}}, "per_type_energy_scales: expected one number or one for each of"),
        (
            {"per_type_energy_shifts": {"H": float("nan"), "C": 0.0, "O": 0.0}},
            "per_type_energy_shifts: expected one",
        ),
        ({"polynomial_cutoff_p": 0}, "polynomial_cutoff_p: expected a positive whole number, got 0"),
        ({"type_names": []}, r"type_names: expected a list of different names, e.g. \[H, C, O\], got \[\]"),
        ({"type_names": "HCO"}, "type_names: expected a list of different names, .*, got 'HCO'"),
        ({"per_edge_type_cutoff": {"H": 99.0}}, "per_edge_type_cutoff: H: expected types of .* of at most r_max = "),
        ({"per_edge_type_cutoff": {"U": 1.0}}, "per_edge_type_cutoff: U: expected types of"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        build("painn", **changes)
