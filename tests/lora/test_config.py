import pytest

from mace_lora import LoraConfig, parse_rank_pattern


def test_defaults():
    config = LoraConfig()
    assert (config.rank, config.alpha, config.preset, config.init) == (16, 16.0, "degree_parity", "scaled")
    assert config.scaling_of(16) == 1.0
    assert LoraConfig(rank=16, alpha=16, use_rslora=True).scaling_of(16) == 4.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank: expected an integer >= 1, got 0"),
        ({"rank": 2.5}, r"rank: expected an integer >= 1, got 2.5"),
        ({"alpha": -1}, r"alpha: expected a positive number, got -1"),
        ({"alpha": float("nan")}, r"alpha: expected a positive number"),
        ({"preset": "best"}, r"preset: expected one of degree_parity, upstream, got 'best'"),
        ({"init": "pissa"}, r"init: expected one of scaled, elora, got 'pissa'"),
        ({"rank_pattern": {"1x": 2}}, r"rank_pattern: expected irreps such as '0e' or '1o', got '1x'"),
        ({"rank_pattern": {"1o": -2}}, r"rank_pattern\['1o'\]: expected an integer >= 0, got -2"),
        ({"targets": "readouts"}, r"targets: expected a sequence of regular expressions, got the string"),
        ({"targets": ["("]}, r"targets: '\(' is not a regular expression"),
        ({"module_rank_pattern": {"(": 1}}, r"module_rank_pattern: '\(' is not a regular expression"),
        ({"module_rank_pattern": {"a": True}}, r"module_rank_pattern\['a'\]: expected an integer >= 0, got True"),
    ],
)
def test_bad_values_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"use_dora: equivariant LoRA layers cannot honour use_dora=True"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: equivariant LoRA layers cannot honour 'pissa'"),
        ({"lora_dropout": 0.1}, r"lora_dropout: equivariant LoRA layers cannot honour lora_dropout=0.1"),
        ({"rnak": 3}, r"LoraConfig: unknown key 'rnak'; expected one of alpha"),
    ],
)
def test_options_that_cannot_be_honoured_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig.from_dict(options)


def test_dictionary_round_trip():
    config = LoraConfig(rank=3, rank_pattern={"1o": 2}, targets=("a", "b"), dense=(), init="elora")
    assert LoraConfig.from_dict(config.to_dict()) == config


def test_rank_pattern():
    assert parse_rank_pattern("0e:16, 1o:8") == {"0e": 16, "1o": 8}
    assert parse_rank_pattern("") == {}


@pytest.mark.parametrize("text", ["0e", "0e=3", "0e:x", "e0:3", "0e:-1"])
def test_bad_rank_pattern(text):
    with pytest.raises(ValueError, match=r"rank_pattern: expected 'irrep:rank' pairs such as '0e:16,1o:8', got"):
        parse_rank_pattern(text)


def test_irrep_given_twice():
    with pytest.raises(ValueError, match=r"rank_pattern: irrep '0e' is given twice"):
        parse_rank_pattern("0e:1,0e:2")
