"""Every stretched kind of rotary position has the frequencies and the magnitude that transformers computes for it."""

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configs import llms
from tcjax.llms import published
from tcjax.llms.rope import LinearScaling, Llama3Scaling, Scaling, YarnScaling, frequencies

LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
CASES: dict[str, tuple[int, float, dict, Scaling]] = {  # head width, theta, config.json's words, ours
    "linear": (128, 1e4, LINEAR, LinearScaling(factor=2.5)),
    "llama 3.2": (64, 5e5, LLAMA3, Llama3Scaling(factor=32.0)),
    "qwen2.5 long": (128, 1e6, YARN, YarnScaling(factor=4.0, original=32_768)),
    "yarn, small head": (64, 1e4, YARN, YarnScaling(factor=4.0, original=32_768)),
    "yarn, its own betas": (
        128,
        1e4,
        YARN | {"beta_fast": 20, "beta_slow": 2, "truncate": False},
        YarnScaling(factor=4.0, original=32_768, fast=20.0, slow=2.0, truncate=False),
    ),
    "yarn, told magnitude": (
        64,
        1e4,
        YARN | {"attention_factor": 1.5},
        YarnScaling(factor=4.0, original=32_768, attention=1.5),
    ),
    "yarn, two scales": (
        64,
        1e4,
        YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707},
        YarnScaling(factor=40.0, original=32_768, attention=(0.1 * np.log(40) + 1) / (0.0707 * np.log(40) + 1)),
    ),
    "yarn, one scale counts for nothing": (
        64,
        1e4,
        YARN | {"mscale": 0.5},
        YarnScaling(factor=4.0, original=32_768),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_magnitude_are_those_of_transformers(case):
    width, theta, words, scaling = CASES[case]
    config = transformers.LlamaConfig(head_dim=width, rope_parameters=words | {"rope_theta": theta})
    expected, magnitude = ROPE_INIT_FUNCTIONS[words["rope_type"]](config, "cpu")
    np.testing.assert_allclose(frequencies(width, theta, scaling), expected.numpy(), rtol=2e-6)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
    assert np.abs(frequencies(width, theta) - expected.numpy()).max() > 1e-5


@pytest.mark.parametrize("case", CASES)
def test_config_json_says_the_same_in_either_spelling(case):
    width, theta, words, scaling = CASES[case]
    shape = {"model_type": "llama", "head_dim": width}
    for said in (
        {"rope_theta": theta, "rope_scaling": words},
        {"rope_theta": theta, "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in words.items()}},
        {"rope_parameters": words | {"rope_theta": theta}},
    ):
        cfg = published.of_json(shape | said)
        assert (cfg.rope_theta, type(cfg.rope_scaling)) == (theta, type(scaling))
        np.testing.assert_array_equal(frequencies(width, theta, cfg.rope_scaling), frequencies(width, theta, scaling))
        assert cfg.rope_scaling is not None and cfg.rope_scaling.magnitude == pytest.approx(scaling.magnitude)


def test_positions_of_the_first_training_are_max_position_embeddings_unless_said():
    words = {"rope_type": "yarn", "factor": 4.0}
    cfg = published.of_json({"model_type": "qwen2", "max_position_embeddings": 4096, "rope_scaling": words})
    assert cfg.rope_scaling == YarnScaling(factor=4.0, original=4096)


def test_the_published_llama_3_2_is_stretched_as_its_config_says():
    cfg = llms.llama_3_2_1b()
    assert (cfg.head_width, cfg.rope_theta, cfg.rope_scaling) == (64, 5e5, CASES["llama 3.2"][3])
