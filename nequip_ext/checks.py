"""Checks of a builder's arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "is_number", "require_energies", "require_flags", "require_pair_cutoffs", "require_sizes", "require_types",
]  # fmt: skip


def is_number(value: Any) -> bool:
    """A finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_sizes(sizes: Mapping[str, Any], least: int = 1) -> None:
    """Refuse sizes that are no whole numbers of at least ``least``.

    Raises:
        ValueError: the first of them.
    """
    what = "positive whole number" if least == 1 else f"whole number of at least {least}"
    for name, value in sizes.items():
        if not (is_number(value) and int(value) == value and value >= least):
            raise ValueError(f"{name}: expected a {what}, got {value!r}")


def require_flags(flags: Mapping[str, Any]) -> None:
    """Refuse what is neither true nor false, such as a quoted ``"no"``.

    Raises:
        ValueError: the first of them.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")


def require_types(types: Any) -> list[str]:
    """Names of the atom types, as a list.

    Raises:
        ValueError: none, a string, or one twice.
    """
    names = [] if isinstance(types, str) else list(types)
    if not names or len({*names}) < len(names) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"type_names: expected a list of different names, e.g. [H, C, O], got {types!r}")
    return names


def require_energies(energies: Mapping[str, Any], types: list[str]) -> None:
    """Refuse energies of the types that are no numbers, or of other types.

    Raises:
        ValueError: the first of them.
    """
    for name, value in energies.items():
        per_type = isinstance(value, Mapping) and {*value} == {*types} and all(map(is_number, value.values()))
        if not (value is None or is_number(value) or per_type):
            raise ValueError(f"{name}: expected one number or one for each of {types}, got {value!r}")


def require_pair_cutoffs(cutoffs: Any, r_max: float, types: list[str]) -> None:
    """Refuse cutoffs of pairs of types beyond ``r_max``.

    Raises:
        ValueError: the first of them, or of an unknown type.
    """
    if not isinstance(cutoffs, Mapping | None):
        raise ValueError(f"per_edge_type_cutoff: expected a mapping of types to cutoffs in Å, got {cutoffs!r}")
    for source, row in (cutoffs or {}).items():
        pairs = dict(row) if isinstance(row, Mapping) else {source: row}
        for target, value in pairs.items():
            known = source in types and target in types
            if not (known and is_number(value) and 0 < value <= r_max):
                raise ValueError(
                    f"per_edge_type_cutoff: {source}: expected types of {types} and cutoffs of at most r_max = "
                    f"{r_max:g} Å, got {row!r}"
                )
