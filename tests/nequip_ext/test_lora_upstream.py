"""NequIP's own model tests on LoRA-wrapped NequIP and Allegro models.

EQUITUNE_FULL=1 adds upstream's training, packaging and compilation tests (about ten minutes).
"""

import copy
import os
import pkgutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("nequip")

from nequip.utils.unittests.conftest import *  # noqa: F403  upstream's fixtures
from nequip_models import MODELS, Upstream, randomise

from mace_lora.lora.inject import adapter_layers

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
pytestmark = pytest.mark.nequip


@pytest.fixture(scope="session", params=["float64"])
def model_dtype(request):
    return request.param


class LoraTests(Upstream):
    """The tests with an adapter that is not zero."""

    name = ""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls):
        return {"_target_": "nequip_ext.LoRA", "rank": 2, "model": copy.deepcopy(MODELS[cls.name])}

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, config, device, model_dtype):
        model = cls.make_model(config | {"model_dtype": model_dtype}, device)
        # the tests look up types and cutoffs at the top of the config
        return model, {**MODELS[cls.name], **config, "model_dtype": model_dtype}, model.irreps_out.keys()

    @staticmethod
    def make_model(model_config, device):
        config = {k: copy.deepcopy(model_config[k]) for k in ("rank", "model", "model_dtype")}
        model = pkgutil.resolve_name(model_config["_target_"])(**config)
        assert adapter_layers(model)
        randomise(model, 0.02)
        for layer in adapter_layers(model).values():  # the tests compare with the shifts of the base
            if "shifts" in layer.lora_dense["default"]:
                layer.lora_dense["default"]["shifts"].data.zero_()
        return model.to(device)

    def model_parameter_updates(self, model_config):
        return {f"model.{k}": v for k, v in super().model_parameter_updates(model_config["model"]).items()}

    @pytest.fixture(scope="class", params=["minimal_toy_emt.yaml"])
    @classmethod
    def conffile(cls, request):
        return request.param  # the other one downloads its data


class TestNequIP(LoraTests):
    name = "nequip"

    @pytest.fixture
    def strict_locality(self):
        return False


class TestAllegro(LoraTests):
    name = "allegro"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def installed(cls):
        pytest.importorskip("allegro")

    @pytest.fixture
    def strict_locality(self):
        return True
