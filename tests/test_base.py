"""The embedded base is what it says: small, whole, hashed, and the same numbers in transformers under published names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from configs import boards, boards_base
from tcjax.assemble import assemble
from tcjax.interop.tensors import content_hash
from tcjax.record import to_dict

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs/boards_base"
TOWER, LLM = boards_base.tower_config(), boards_base.llm_config()


def test_the_base_takes_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in BASE.glob("*.safetensors")) <= 8 * 10**6


def test_every_weight_file_has_the_hash_written_beside_it():
    written = {
        name: facts
        for path in BASE.glob("*.json")
        if path.stem in ("tower", "llm")
        for name, facts in json.loads(path.read_text()).items()
    }
    assert set(written) == {path.name for path in BASE.glob("*.safetensors")}
    for name, facts in written.items():
        assert content_hash(BASE / name) == facts["content_hash"], name


def test_the_llm_stands_on_the_tower_that_is_shipped():
    facts = json.loads((BASE / "llm.json").read_text())
    assert facts["llm.safetensors"]["stands_on"]["tower.weights"] == content_hash(BASE / "tower.safetensors")


def test_the_tower_is_a_siglip_vision_model():
    config = SiglipVisionConfig(
        hidden_size=TOWER.width,
        intermediate_size=TOWER.feed_forward,
        num_hidden_layers=TOWER.layers,
        num_attention_heads=TOWER.heads,
        image_size=64,
        patch_size=TOWER.patch,
        hidden_act=TOWER.activation,
        layer_norm_eps=TOWER.norm_eps,
        vision_use_head=False,
    )
    twin = SiglipVisionModel(config).eval()
    weights = {
        name.removeprefix("vision_model."): tensor for name, tensor in load_file(BASE / "tower.safetensors").items()
    }
    twin.load_state_dict({key: weights[key.removeprefix("vision_model.")] for key in twin.state_dict()}, strict=True)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = twin(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    model, _ = assemble(boards.reference().model, root=ROOT)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(model.tower(images)) / scale, expected / scale, atol=1e-5)


def test_the_llm_is_a_llama():
    config = LlamaConfig(
        vocab_size=LLM.vocab,
        hidden_size=LLM.width,
        intermediate_size=LLM.feed_forward,
        num_hidden_layers=LLM.layers,
        num_attention_heads=LLM.heads,
        num_key_value_heads=LLM.kv_heads,
        head_dim=LLM.head_width,
        rms_norm_eps=LLM.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": LLM.rope_theta},
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    twin = LlamaForCausalLM(config).eval()
    left = twin.load_state_dict(load_file(BASE / "llm.safetensors"), strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys
    tokens = np.random.default_rng(0).integers(0, LLM.vocab, (2, 20))
    with torch.no_grad():
        expected = twin(torch.tensor(tokens)).logits.numpy()
    model, _ = assemble(boards.reference().model, root=ROOT)
    logits = model.llm.logits(model.llm(model.llm.embed(tokens)))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_the_reference_starts_from_the_projector_the_llm_was_trained_with():
    run = boards.reference()
    model, identity = assemble(run.model, root=ROOT, start=run.train.weights)
    shipped = load_file(BASE / "projector.safetensors")
    ours = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model.compressor))}
    assert set(ours) == set(shipped)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, shipped[name].numpy())
    assert len(identity["tower.weights"]) == len(identity["llm.weights"]) == 64


@pytest.mark.parametrize(
    "run", [boards.run(), boards.pooled(), boards.reference(), boards_base.tower(), boards_base.llm()]
)
def test_every_named_run_is_plain_data(run):
    assert json.loads(json.dumps(to_dict(run)))["name"] == run.name
