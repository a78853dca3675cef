"""Gradient checkpointing keeps less, each policy what it says, and changes nothing else."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tcjax.config import MeshConfig, Run, TrainConfig
from tcjax.dry_run import dry_run
from tcjax.nn.layers import REMATS
from tcjax.train.state import recompute
from tests.tiny import VLM, batch_at
from tests.tiny_boards import data_config

DEEP = dataclasses.replace(VLM, llm=dataclasses.replace(VLM.llm, layers=10))  # more than are unrolled


@pytest.mark.parametrize("config", [VLM, DEEP], ids=["unrolled", "scanned"])
def test_gradients_are_the_same(config):
    batch = batch_at(0, 4)
    gradients = []
    for remat in REMATS:
        model = config.build(nnx.Rngs(0))
        recompute(model, remat)
        graphdef, state = nnx.split(model)
        total = jax.jit(jax.value_and_grad(lambda state, g=graphdef: nnx.merge(g, state).loss_terms(batch).total))
        gradients.append(total(state))
    for other in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), gradients[0], other)


def test_less_is_kept(tmp_path):
    run = Run(name="deep", model=DEEP, data=data_config(), train=TrainConfig(steps=1), mesh=MeshConfig(data=1))
    none, full, attention = (
        dry_run(run.replace(train=TrainConfig(steps=1, remat=remat)), root=tmp_path)["activations"]
        for remat in ("none", "full", "save-attention")
    )
    assert full < none / 3
    rows, positions = run.data.batch, run.data.text_length + VLM.num_queries
    heads = DEEP.llm.layers * rows * positions * DEEP.llm.heads * DEEP.llm.head_width * 4
    assert attention == full + heads


def test_what_is_offloaded_lies_in_the_hosts_memory():
    model, batch = DEEP.build(nnx.Rngs(0)), batch_at(0, 4)
    recompute(model, "offload")
    graphdef, state = nnx.split(model)
    step = jax.jit(jax.grad(lambda state: nnx.merge(graphdef, state).loss_terms(batch).total))
    assert "pinned_host" in step.trace(state).lower(lowering_platforms=("tpu",)).as_text()


def test_a_model_without_an_llm_is_refused():
    with pytest.raises(ValueError, match=r"train.remat='full' is about an LLM, and Linear has none"):
        recompute(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "full")
    with pytest.raises(ValueError, match=r"'half' is not one of \['none', 'full', 'save-attention', 'offload'\]"):
        recompute(VLM.build(nnx.Rngs(0)), "half")
