"""What we rely on in MACE, checked: a changed upstream gives a clear message, not a wrong result."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

__all__ = ["EXPECTED", "ContractError", "check", "require"]

TESTED = "0.3.16"

# module -> name -> leading parameters that we pass or read
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "mace.data.utils": {"estimate_e0s_from_foundation": ("foundation_model",)},
    "mace.tools.arg_parser": {"build_default_arg_parser": (), "str2bool": ("value",)},
    "mace.tools.arg_parser_tools": {"check_args": ("args",)},
    "mace.tools.checkpoint": {
        "CheckpointBuilder": (),
        "CheckpointIO": ("directory", "tag", "keep", "swa_start"),
        "CheckpointHandler": ("args", "kwargs"),
        "CheckpointBuilder.load_checkpoint": ("state", "checkpoint", "strict"),
        "CheckpointBuilder.create_checkpoint": ("state",),
        "CheckpointIO.save": ("self", "checkpoint", "epochs", "keep_last"),
        "CheckpointIO._get_checkpoint_filename": ("self", "epochs", "swa_start"),
        "CheckpointHandler.save": ("self", "state", "epochs", "keep_last"),
    },
    "mace.tools.multihead_tools": {"dict_head_to_dataclass": ("head",)},
    "mace.modules.models": {
        "ScaleShiftMACE": ("atomic_inter_scale", "atomic_inter_shift", "kwargs"),
        "ScaleShiftMACE.forward": (
            "self",
            "data",
            "training",
            "compute_force",
            "compute_virials",
            "compute_stress",
            "compute_displacement",
            "compute_hessian",
            "compute_edge_forces",
            "compute_atomic_stresses",
            "lammps_mliap",
        ),
    },
    "mace.modules.blocks": {
        "LinearReadoutBlock": ("irreps_in", "irrep_out"),
        "NonLinearReadoutBlock": ("irreps_in", "MLP_irreps", "gate", "irrep_out", "num_heads"),
    },
    "mace.modules.utils": {
        "get_outputs": ("energy", "positions", "cell", "displacement", "vectors"),
        "prepare_graph": ("data", "compute_virials", "compute_stress", "compute_displacement", "lammps_mliap"),
        "get_atomic_virials_stresses": ("edge_forces", "edge_index", "vectors", "num_atoms", "batch", "cell"),
    },
    "mace.tools.train": {
        "train": ("model", "loss_fn", "train_loader"),
        "valid_err_log": ("valid_loss",),
        "evaluate": ("model", "loss_fn", "data_loader"),
        "train_one_epoch": ("model", "loss_fn", "data_loader", "optimizer", "epoch"),
    },
    "mace.tools.scripts_utils": {"get_params_options": ("args", "model"), "extract_config_mace_model": ("model",)},
    "mace.tools.model_script_utils": {
        "configure_model": ("args", "train_loader", "atomic_energies", "model_foundation", "heads", "z_table"),
    },
    "mace.tools.distributed_tools": {"init_distributed": ("args",)},
    "mace.tools.finetuning_utils": {"load_foundations_elements": ("model", "model_foundations", "table")},
    "mace.cli.run_train": {"LBFGS": ("params",)},
    "mace.modules.lora": {"inject_LoRAs": ("model", "rank", "alpha"), "merge_lora_weights": ("model",)},
}


class ContractError(RuntimeError):
    """MACE changed something that the plugin relies on."""


def require(module: ModuleType, name: str) -> inspect.Signature:
    """Signature of ``module.name`` after checking that it is as expected.

    Raises:
        ContractError: missing, or with other leading parameters.
    """
    item: object = module
    for part in name.split("."):
        item = getattr(item, part, None)
    expected = EXPECTED[module.__name__][name]
    if item is None or not callable(item):
        raise ContractError(_message(module.__name__, name, expected, "nothing callable"))
    signature = inspect.signature(item)
    got = tuple(signature.parameters)
    if got[: len(expected)] != expected:
        raise ContractError(_message(module.__name__, name, expected, f"({', '.join(got)})"))
    return signature


def _message(module: str, name: str, expected: tuple[str, ...], got: str) -> str:
    return (
        f"equitune relies on {module}.{name}({', '.join(expected)}…), got {got}. It was tested with mace-torch "
        f"{TESTED}: install that version, or set EQUITUNE_DISABLE=1 to run MACE without equitune."
    )


def check() -> list[tuple[str, str | None]]:
    """Check the whole contract.

    Returns:
        (what, problem) pairs; problem is None where all is well.
    """
    results: list[tuple[str, str | None]] = []
    for module_name, names in EXPECTED.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as err:
            results.append((module_name, str(err)))
            continue
        for name in names:
            try:
                require(module, name)
            except ContractError as err:
                results.append((f"{module_name}.{name}", str(err)))
            else:
                results.append((f"{module_name}.{name}", None))
    return results
