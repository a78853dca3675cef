"""What a tower's last block tells of its tokens: the attention of transformers' eager classes, at one block's cost."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from tcjax.batch import Batch
from tcjax.compressors import learned_merge, resampler
from tcjax.nn import attention
from tcjax.towers import blocks, naflex
from tcjax.vlm import VlmConfig
from tests.saved_towers import CLIP, DINOV2, NAFLEX, REGISTERS, SIGLIP, TOWERS, images, loaded, pixels, saved, twin
from tests.tiny import LLM

WHOLE = {name: cfg for name, cfg in TOWERS.items() if name != "naflex"}


def probes_of(cfg) -> tuple[str, ...]:
    """Every probe the tower has, in an order of their own."""
    return ("keys", "column_means") + (("class_attention",) if cfg.class_token else ())


@pytest.mark.parametrize("feature_layer", [-1, -2])
@pytest.mark.parametrize("name", WHOLE)
def test_probes_are_the_published_attention_behind_the_features(name, feature_layer, tmp_path):
    cfg = dataclasses.replace(WHOLE[name], feature_layer=feature_layer, levels=(3,), probes=probes_of(WHOLE[name]))
    model = twin(cfg, eager=True)
    block = model.encoder.layer if cfg.names == "dinov2" else model.encoder.layers
    attention_of = block[feature_layer].attention if cfg.names == "dinov2" else block[feature_layer].self_attn
    keys = []
    attention_of.k_proj.register_forward_hook(lambda module, inputs, output: keys.append(output))
    images_BYX3 = images(cfg)
    with torch.no_grad():
        theirs = model(pixels(images_BYX3), output_attentions=True)
    paid_BSM = theirs.attentions[feature_layer].mean(1)
    found_BNE = np.asarray(jax.jit(loaded(cfg, saved(model, tmp_path)))(images_BYX3))
    first, C = cfg.num_prefix, cfg.width
    assert found_BNE.shape == (2, 16, 3 * C + 1 + cfg.class_token)
    np.testing.assert_allclose(found_BNE[..., 2 * C : 3 * C], keys[0][:, first:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found_BNE[..., 3 * C], paid_BSM.mean(1)[:, first:], rtol=1e-5, atol=1e-5)
    if cfg.class_token:
        np.testing.assert_allclose(found_BNE[..., 3 * C + 1], paid_BSM[:, 0, first:], rtol=1e-5, atol=1e-5)
    bare = dataclasses.replace(cfg, probes=())
    np.testing.assert_allclose(
        found_BNE[..., : 2 * C], jax.jit(loaded(bare, tmp_path))(images_BYX3), rtol=1e-6, atol=1e-6
    )


def test_padding_neither_pays_nor_receives_attention(tmp_path):
    cfg = dataclasses.replace(NAFLEX, probes=("column_means",))
    model = twin(cfg, eager=True)
    grids_B2, rows_BNP3 = np.array([[4, 6], [2, 5]], np.int32), images(cfg, 2)
    valid_BN = np.asarray(naflex.valid(grids_B2, 24))
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(rows_BNP3.reshape(2, 24, 48)),
            pixel_attention_mask=torch.from_numpy(valid_BN.astype(np.int64)),
            spatial_shapes=torch.from_numpy(grids_B2.astype(np.int64)),
            output_attentions=True,
        )
    paid_BSM = theirs.attentions[-1].mean(1)
    found_BN = np.asarray(jax.jit(loaded(cfg, saved(model, tmp_path)))(rows_BNP3, grids_B2))[..., -1]
    np.testing.assert_allclose(found_BN[0], paid_BSM[0].mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found_BN[1, :10], paid_BSM[1, :10, :10].mean(0), rtol=1e-5, atol=1e-5)
    assert (found_BN[1, 10:] == 0).all()
    np.testing.assert_allclose(found_BN.sum(1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(("probes", "weights"), [((), 0), (("keys",), 0), (("class_attention",), 1)])
def test_only_the_probed_block_writes_its_weights_out(monkeypatch, probes, weights):
    """Three blocks attend, through the one door; explicit weights are computed for one, and for the asked row alone."""
    calls = {"attend": 0, "weights": []}

    def attend(*args, **options):
        calls["attend"] += 1
        return attention.attend(*args, **options)

    def attention_weights(query_BSKA, *args, **options):
        calls["weights"].append(query_BSKA.shape[1])
        return attention.attention_weights(query_BSKA, *args, **options)

    monkeypatch.setattr(blocks, "attend", attend)
    monkeypatch.setattr(blocks, "attention_weights", attention_weights)
    cfg = dataclasses.replace(CLIP, layers=5, feature_layer=-2, probes=probes)
    jax.make_jaxpr(cfg.build(nnx.Rngs(0)))(images(cfg))
    assert calls["attend"] == (2 if probes else 1)  # a loop's body is traced once: the blocks before, and the one asked
    assert calls["weights"] == [1] * weights


def test_the_loop_over_the_other_blocks_holds_no_explicit_weights():
    """Read off the program: with the probe there is one more softmax than without, and it stands outside of the loop."""
    cfg = dataclasses.replace(CLIP, layers=12)
    asked = dataclasses.replace(cfg, probes=("column_means",))
    counts = []
    for each in (cfg, asked):
        tower = nnx.eval_shape(lambda each=each: each.build(nnx.Rngs(0)))
        graphdef, state = nnx.split(tower)
        run = jax.make_jaxpr(lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x))(state, images(cfg))
        text = str(run)
        counts.append((text.count("scan["), text.count("reduce_max")))
    (plain_loops, plain_maxima), (loops, maxima) = counts
    assert plain_loops == 1 and plain_maxima == 1
    assert loops == 2 and maxima == 3  # loop over 11 blocks; the last by itself, its `attend` and its weights


def test_scores_reach_a_compressor_that_starts_from_them(tmp_path):
    merge = learned_merge.Config(num_queries=4, prior=True)
    tower = dataclasses.replace(CLIP, probes=("keys", "class_attention", "column_means"), levels=(1,))
    config = VlmConfig(tower=tower, compressor=merge, llm=LLM)
    model = config.build(nnx.Rngs(0))
    batch = Batch(images_BYX3=images(CLIP), index_B=np.arange(2))
    given = {}

    class Spy:
        def __call__(self, tokens_BNC, context):
            given.update(tokens=tokens_BNC, context=context)

    compressed = model.compress(batch)
    assert compressed.tokens_BQD.shape == (2, 4, LLM.width)
    seen_BNE = model.see(batch)
    object.__setattr__(model, "compressor", Spy())
    model.compress(batch)
    np.testing.assert_array_equal(given["tokens"], seen_BNE[..., :24])
    np.testing.assert_array_equal(given["context"].levels_BNE, seen_BNE[..., 24:48])
    np.testing.assert_array_equal(
        given["context"].prior_BN, seen_BNE[..., 72]
    )  # the first score named; keys lie before
    with pytest.raises(
        ValueError, match=r"learned_merge starts from scores .*probes=\(\); name one of \('class_attention'"
    ):
        VlmConfig(tower=CLIP, compressor=merge, llm=LLM).build(nnx.Rngs(0))
    plain = VlmConfig(tower=tower, compressor=resampler.Config(num_queries=2, depth=1, heads=2, head_width=8), llm=LLM)
    assert plain.num_queries == 2


@pytest.mark.parametrize("cfg", [SIGLIP, NAFLEX], ids=["siglip", "naflex"])
def test_a_tower_without_class_token_names_the_probe_that_stands_in(cfg):
    with pytest.raises(ValueError, match=r'"class_attention", but this tower has no class token.*"column_means"'):
        dataclasses.replace(cfg, probes=("class_attention",))


@pytest.mark.parametrize("cfg", [DINOV2, REGISTERS], ids=["dinov2", "registers"])
@pytest.mark.parametrize("probes", [("values",), ("keys", "keys")])
def test_unknown_probes_are_refused(cfg, probes):
    with pytest.raises(ValueError, match=r"must name some of \('class_attention', 'column_means', 'keys'\), each once"):
        dataclasses.replace(cfg, probes=probes)
