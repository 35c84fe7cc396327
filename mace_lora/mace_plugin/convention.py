"""Which e3nn sign convention a model's weights belong to.

e3nn 0.4 and 0.6 differ in the sign of nine Wigner 3j blocks, all with odd l1 + l2 + l3. MACE models
of natural parity have no such path, so their weights cross exactly; others must not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["check_convention", "sign_dependent_paths", "wigner_3j_sign"]

SIGN_CHANGED = {
    (1, 2, 2), (1, 3, 3), (1, 4, 4), (2, 1, 2), (2, 2, 1), (3, 1, 3), (3, 3, 1), (4, 1, 4), (4, 4, 1),
}  # fmt: skip


def wigner_3j_sign() -> int:
    """Sign of the first non-zero entry of the Wigner 3j block (1, 2, 2) in the installed e3nn."""
    from e3nn import o3

    block = o3.wigner_3j(1, 2, 2).reshape(-1)
    return 1 if float(block[block.abs() > 1e-6][0]) > 0 else -1


def sign_dependent_paths(model: nn.Module) -> list[str]:
    """Tensor-product paths of a model whose value depends on the convention.

    Coupling matrices of MACE's symmetric contraction are stored with the weights and cross as they
    are.
    """
    found = []
    for name, module in model.named_modules():
        if not (hasattr(module, "instructions") and hasattr(module, "irreps_in1")):
            continue
        tensor_product: Any = module
        for ins in tensor_product.instructions:
            degrees = (
                tensor_product.irreps_in1[ins.i_in1].ir.l,
                tensor_product.irreps_in2[ins.i_in2].ir.l,
                tensor_product.irreps_out[ins.i_out].ir.l,
            )
            if degrees in SIGN_CHANGED:
                found.append(f"{name}: {degrees[0]} x {degrees[1]} -> {degrees[2]}")
    return found


def check_convention(stored: Mapping[str, Any], what: str) -> None:
    """Refuse weights whose meaning the installed e3nn would change.

    Args:
        stored: the ``e3nn`` entry of a base's JSON.
        what: name for the message.

    Raises:
        ValueError: the convention differs and the model depends on it.
    """
    paths = stored.get("sign_dependent_paths")
    if paths and stored["wigner_3j_sign"] != wigner_3j_sign():
        raise ValueError(
            f"{what}: written under the other e3nn sign convention, and {len(paths)} tensor-product paths depend on it "
            f"(first: {paths[0]}); load it with the e3nn version it was written with"
        )
