"""Published numbers to the digit, and formulas equal to what the real modules multiply."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import llms, towers
from tcjax.assemble import build
from tcjax.batch import Batch
from tcjax.compressors import avg_pool, mlp, resampler
from tcjax.compressors.base import Widths
from tcjax.config import LoraConfig, Pixels
from tcjax.evaluate.cost import (
    compressor_flops,
    cost,
    head_flops,
    kv_cache_bytes,
    llm_flops,
    lora_flops,
    tower_flops,
    training_flops,
)
from tcjax.evaluate.flops import matmul_flops
from tcjax.llms.decoder import LlmConfig
from tcjax.loss import cross_entropy
from tcjax.towers.vit import VitConfig
from tcjax.train.state import split
from tcjax.vlm import VlmConfig

TOWER = VitConfig(
    pixels=Pixels(size_YX=(16, 16)),
    patch=4,
    width=24,
    layers=3,
    heads=2,
    feed_forward=32,
    activation="quick_gelu",
    norm_eps=1e-5,
    class_token=True,
    patch_bias=False,
    pre_norm=True,
    post_norm=False,
    feature_layer=-2,
)
LLM = LlmConfig(
    vocab=40,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=8,
    feed_forward=28,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie=True,
)
VLM = VlmConfig(tower=TOWER, compressor=avg_pool.Config(num_queries=4), llm=LLM)


def abstract(config):
    """Shapes without weights: nothing is compiled."""
    return nnx.split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("tokens", "tera_macs"),
    [
        (576, 3.817),
        (288, 1.887),
        (192, 1.253),
        (144, 0.938),
        (128, 0.833),
        (64, 0.416),
        (32, 0.208),
        (16, 0.104),
        (1, 0.006),
    ],
)
def test_vicuna_7b_prefill_is_the_published_table(tokens, tera_macs):
    assert round(llm_flops(llms.vicuna_7b(), tokens).total / 2e12, 3) == tera_macs


def test_clip_l_336_is_the_published_190_6_giga_macs():
    whole = towers.clip_l_336(feature_layer=-1)
    embedding = 2 * 576 * 3 * 14**2 * 1024
    assert round((tower_flops(whole).total - embedding) / 2e9, 1) == 190.6
    assert tower_flops(towers.clip_l_336()).total < tower_flops(whole).total, "LLaVA reads before the last block"


@pytest.mark.parametrize(
    ("llm", "tokens", "size"),
    [
        (llms.vicuna_7b(), 576, 301_989_888),
        (llms.vicuna_7b(), 36, 18_874_368),
        (llms.qwen2_5_0_5b(), 256, 3 * 2**20),
        (llms.qwen3_0_6b(), 144, 63 * 2**18),
        (llms.smollm2_135m(), 64, 1_474_560),
    ],
)
def test_kv_bytes_count_key_value_heads(llm, tokens, size):
    assert kv_cache_bytes(tokens, llm) == size


def test_matmul_flops_equal_xlas_and_a_scan_counts_every_turn():
    x_BC, kernels_LCC = jnp.ones((5, 8)), jnp.ones((3, 8, 8))

    def scanned(x_BC, kernels_LCC):
        return jax.lax.scan(lambda x_BC, kernel_CC: (x_BC @ kernel_CC, None), x_BC, kernels_LCC)[0]

    def unrolled(x_BC, kernels_LCC):
        for kernel_CC in kernels_LCC:
            x_BC = x_BC @ kernel_CC
        return x_BC

    def of_xla(function):
        return jax.jit(function).lower(x_BC, kernels_LCC).compile().cost_analysis()["flops"]

    assert matmul_flops(unrolled, x_BC, kernels_LCC) == of_xla(unrolled) == 3 * 2 * 5 * 8 * 8
    assert matmul_flops(scanned, x_BC, kernels_LCC) == of_xla(unrolled)
    assert of_xla(scanned) < of_xla(unrolled) / 2, "XLA counts a loop's body once: that is why we count ourselves"


def test_matmul_flops_see_batches_convolutions_branches_and_refuse_open_loops():
    a, b = jnp.ones((7, 2, 3)), jnp.ones((7, 3, 5))
    assert matmul_flops(jax.jit(lambda a, b: jnp.einsum("gij,gjk->gik", a, b)), a, b) == 2 * 7 * 2 * 3 * 5
    image, kernel = jnp.ones((2, 4, 8, 8)), jnp.ones((6, 4, 3, 3))
    assert matmul_flops(lambda i, k: jax.lax.conv(i, k, (1, 1), "SAME"), image, kernel) == 2 * 2 * 6 * 8 * 8 * 4 * 9
    square = jnp.ones((4, 4))
    assert matmul_flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), square) == 2 * 4**3
    with pytest.raises(ValueError, match="while loop multiplies"):
        matmul_flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), square)


def test_the_tower_formula_is_what_the_tower_multiplies():
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    graphdef, state = abstract(TOWER)
    assert tower_flops(TOWER).total == matmul_flops(lambda state, x: nnx.merge(graphdef, state)(x), state, image)


def test_the_llm_formula_is_what_the_llm_multiplies():
    """Causal attention is cut into blocks that skip 3/8 of the pairs; the formula counts all, as papers do."""
    (graphdef, state), S, ours = abstract(LLM), 16, llm_flops(LLM, 16)

    def logits(state, seq_BSD):
        llm = nnx.merge(graphdef, state)
        return llm.logits(llm(seq_BSD))

    multiplied = matmul_flops(logits, state, jax.ShapeDtypeStruct((1, S, 16), jnp.float32))
    assert multiplied == ours.weights + ours.attention * 5 // 8 + head_flops(LLM, S)


WIDTHS = Widths(grid_HW=(4, 4), vision_C=24, llm_D=16)
N, C, D = 16, 24, 16


@pytest.mark.parametrize(
    ("config", "macs"),
    [
        (mlp.Config(), N * (C * D + D * D)),
        (avg_pool.Config(num_queries=4), 4 * (C * D + D * D)),
        (avg_pool.Config(num_queries=9), 9 * N * C + 9 * (C * D + D * D)),
        (
            resampler.Config(num_queries=4, depth=3, heads=2, head_width=8, ff_mult=2),
            3 * ((2 * 4 + 2 * (N + 4)) * C * 16 + 2 * 4 * (N + 4) * 16 + 2 * 2 * 4 * C * C) + 4 * C * D,
        ),
    ],
    ids=["mlp", "avg_pool", "avg_pool where bins overlap", "resampler"],
)
def test_compressor_flops_are_those_of_its_docstring(config, macs):
    assert compressor_flops(config, WIDTHS) == 2 * macs


def test_a_compressor_without_loops_agrees_with_xla():
    config = mlp.Config(depth=1)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: config.build(WIDTHS, nnx.Rngs(0))))
    run = jax.jit(lambda state, x_BNC: nnx.merge(graphdef, state)(x_BNC).tokens_BQD)
    of_xla = run.lower(state, jax.ShapeDtypeStruct((1, N, C), jnp.float32)).compile().cost_analysis()["flops"]
    assert of_xla == compressor_flops(config, WIDTHS) + N * D, "one addition per bias"


def test_the_bill_adds_up():
    bill = cost(VLM, text_tokens=12)
    assert (bill.visual_tokens, bill.ratio) == (4, 4.0)
    assert bill.llm_flops == llm_flops(LLM, 16).total + head_flops(LLM, 1)
    assert bill.prefill_flops == bill.tower_flops + bill.compressor_flops + bill.llm_flops
    assert bill.kv_bytes == 4 * bill.visual_kv_bytes == kv_cache_bytes(16, LLM)
    assert cost(VLM, 12, bytes_per_value=4).kv_bytes == 2 * bill.kv_bytes


def test_a_big_model_is_billed_without_building_it():
    big = VlmConfig(tower=towers.clip_l_336(), compressor=resampler.Config(num_queries=64), llm=llms.vicuna_7b())
    bill = cost(big, text_tokens=64)
    assert bill.ratio == 9
    assert bill.visual_kv_bytes == 64 * 524_288
    layer = (2 * 64 + 2 * 640) * 1024 * 512 + 2 * 64 * 640 * 512 + 2 * 4 * 64 * 1024**2
    assert bill.compressor_flops == 2 * (6 * layer + 64 * 1024 * 4096)


@pytest.mark.parametrize("trainable", [("compressor",), ("compressor", "llm"), ("llm",), ("tower", "compressor")])
def test_training_flops_are_what_the_gradient_multiplies(trainable):
    """Equal but for what the formula counts too much: skipped causal pairs, and the gradient for the input of the
    first part that learns."""
    S = 16
    skipped = llm_flops(LLM, S).attention * 3 // 8 * 3
    linear, embedding = 2 * 4 * C * D, 2 * N * 48 * C
    too_much = {"compressor": linear, "tower": embedding, "llm": 0}  # the embedding learns too
    assert (
        multiplied_by_the_gradient(trainable)
        == training_flops(VLM, S - 4, trainable) - skipped - too_much[trainable[0]]
    )


@pytest.mark.parametrize("targets", [LoraConfig().targets, ("key", "out", "down")], ids=["all", "three"])
def test_training_flops_with_lora_are_what_the_gradient_multiplies(targets):
    lora, learning, S = LoraConfig(rank=5, targets=targets), ("compressor", "lora"), 16
    skipped, linear = llm_flops(LLM, S).attention * 3 // 8 * 3, 2 * 4 * C * D
    counted = multiplied_by_the_gradient(learning, lora)
    assert counted == training_flops(VLM, S - 4, learning, lora=lora) - skipped - linear


def test_a_frozen_kernel_costs_4_and_its_update_6_per_weight_and_token():
    """Updates of 3 layers: query 16 x 32, key and value 16 x 16, out 32 x 16, gate and up 16 x 28, down 28 x 16."""
    lora = LoraConfig(rank=5)
    weights = 5 * 3 * (48 + 32 + 32 + 48 + 44 + 44 + 44)
    assert lora_flops(LLM, lora, 1) == 2 * weights
    alone = training_flops(VLM, 12)
    assert training_flops(VLM, 12, ("compressor", "lora"), lora=lora) - alone == 6 * weights * 16
    behind = training_flops(VLM, 12, ("lora",), lora=lora, cached_features=True)
    frozen = 2 * llm_flops(LLM, 16).weights + 2 * head_flops(LLM, 16) + 3 * llm_flops(LLM, 16).attention
    assert behind == compressor_flops(VLM.compressor, VLM.widths) + frozen + 6 * weights * 16
    with pytest.raises(ValueError, match=r"names \['lora'\]; the parts are \['tower', 'compressor', 'llm'\]"):
        training_flops(VLM, 12, ("compressor", "lora"))


def multiplied_by_the_gradient(trainable: tuple[str, ...], lora: LoraConfig = LoraConfig()) -> int:
    """FLOPs of a gradient step of VLM on one row of 16 positions, every one supervised."""
    model = nnx.eval_shape(lambda: build(VLM, lora=lora))
    graphdef, parts, rest = split(model, trainable)
    S = 16
    batch = Batch(
        tokens_BS=jnp.zeros((1, S), jnp.int32),
        is_image_BS=(jnp.arange(S) < 4)[None],
        supervised_BS=jnp.ones((1, S), bool),
        valid_BS=jnp.ones((1, S), bool),
        images_BYX3=jnp.zeros((1, 16, 16, 3)),
    )

    def mean_loss(parts, rest):
        model = nnx.merge(graphdef, parts, rest)
        logits = model.llm.logits(model.llm(*model.embed(batch)))
        return cross_entropy(logits[:, :-1], batch.tokens_BS[:, 1:], batch.supervised_BS[:, 1:]).total

    return matmul_flops(jax.grad(mean_loss), parts, rest)


def test_training_flops_know_frozen_parts():
    alone = training_flops(VLM, 12)
    cached = training_flops(VLM, 12, cached_features=True)
    assert alone - cached == tower_flops(TOWER).total, "the tower is forward only"
    assert training_flops(VLM, 12, ("tower", "compressor", "llm")) - alone == (
        2 * tower_flops(TOWER).total + llm_flops(LLM, 16).weights + head_flops(LLM, 16)
    )
    assert alone - training_flops(VLM, 12, supervised=5) == 2 * head_flops(LLM, 16 - 5), "forward and to the input"
    with pytest.raises(ValueError, match=r"names \['projector'\]; the parts are \['tower', 'compressor', 'llm'\]"):
        training_flops(VLM, 12, ("projector",))


def test_more_layers_cost_more():
    deeper = dataclasses.replace(LLM, layers=6)
    assert llm_flops(deeper, 16).total == 2 * llm_flops(LLM, 16).total
