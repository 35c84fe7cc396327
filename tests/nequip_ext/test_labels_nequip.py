"""Labels that a NequIP training must not begin with."""

from types import SimpleNamespace

import pytest

pytest.importorskip("nequip")
import torch
from nequip.data.modifier import BaseModifier, PerAtomModifier

from nequip_ext.labels import require_finite, require_units

pytestmark = pytest.mark.nequip


def loss(ignore_nan: bool = False):
    """As much of NequIP's MetricsManager as is looked at."""
    fields = {"f": BaseModifier("forces"), "e": PerAtomModifier("total_energy"), "other": None}
    return SimpleNamespace(entries={k: SimpleNamespace(field=f, ignore_nan=ignore_nan) for k, f in fields.items()})


def batch():
    """Two frames of twenty atoms."""
    torch.manual_seed(0)
    return {
        "forces": torch.randn(40, 3), "total_energy": torch.randn(2, 1), "stress": torch.full((2, 3, 3), torch.nan),
        "batch": torch.arange(2).repeat_interleave(20),
    }  # fmt: skip


def test_labels_that_are_no_numbers():
    good = batch()
    require_finite(good, loss(), "here")  # the loss has no stress
    require_finite({}, loss(), "here")
    for key, place in (("forces", (25, 1)), ("total_energy", (1, 0))):
        bad = {k: v.clone() for k, v in good.items()}
        bad[key][place] = torch.inf
        with pytest.raises(ValueError, match=rf"data: here: label '{key}' is NaN or infinite in frames \[1\] of this"):
            require_finite(bad, loss(), "here")
        require_finite(bad, loss(ignore_nan=True), "here")


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (-1.0, r"they have the wrong sign \(gradients\?\): slope -0.9"),
        (1 / 51.42, "they are in other units than the base's: slope 0.019"),
        (23.06, "they are in other units than the base's: slope 2"),
    ],
)
def test_forces_of_another_unit_or_sign(factor, message):
    good = batch()
    base = {"forces": good["forces"] + 0.1 * torch.randn(40, 3)}
    require_units(good, base)
    with pytest.raises(ValueError, match=message + r".*; expected a slope near 1: .*check_units: false"):
        require_units({"forces": factor * good["forces"]}, base)


def test_what_tells_nothing():
    """A base that knows nothing of the system, few atoms, no forces."""
    good = batch()
    require_units({"forces": -good["forces"]}, {"forces": torch.randn(40, 3)})
    require_units({"forces": -good["forces"][:9]}, {"forces": good["forces"][:9]})
    require_units({"forces": -good["forces"]}, {"forces": torch.zeros(40, 3)})
    require_units({"total_energy": good["total_energy"]}, {"forces": good["forces"]})
