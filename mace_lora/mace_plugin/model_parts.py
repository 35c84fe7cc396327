"""Parts of MACE's models that MultiScaleMACE is built from; the contract lists them."""

from __future__ import annotations

from mace.modules.blocks import LinearReadoutBlock, NonLinearReadoutBlock
from mace.modules.models import ScaleShiftMACE
from mace.modules.radial import PolynomialCutoff
from mace.modules.utils import get_atomic_virials_stresses, get_outputs, prepare_graph
from mace.tools.scatter import scatter_sum

__all__ = [
    "LinearReadoutBlock",
    "NonLinearReadoutBlock",
    "PolynomialCutoff",
    "ScaleShiftMACE",
    "get_atomic_virials_stresses",
    "get_outputs",
    "prepare_graph",
    "scatter_sum",
]
