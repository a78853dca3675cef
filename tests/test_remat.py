"""Gradient checkpointing keeps less and changes nothing else."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tcjax.config import MeshConfig, Run, TrainConfig
from tcjax.dry_run import dry_run
from tcjax.train.state import recompute
from tests.tiny import VLM, batch_at
from tests.tiny_boards import data_config

DEEP = dataclasses.replace(VLM, llm=dataclasses.replace(VLM.llm, layers=10))  # more than are unrolled


@pytest.mark.parametrize("config", [VLM, DEEP], ids=["unrolled", "scanned"])
def test_gradients_are_the_same(config):
    batch = batch_at(0, 4)
    gradients = []
    for remat in (False, True):
        model = config.build(nnx.Rngs(0))
        recompute(model, remat)
        graphdef, state = nnx.split(model)
        total = jax.jit(jax.value_and_grad(lambda state, g=graphdef: nnx.merge(g, state).loss_terms(batch).total))
        gradients.append(total(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), *gradients)


def test_less_is_kept(tmp_path):
    run = Run(name="deep", model=DEEP, data=data_config(), train=TrainConfig(steps=1), mesh=MeshConfig(data=1))
    kept = dry_run(run, root=tmp_path)["activations"]
    less = dry_run(run.replace(train=TrainConfig(steps=1, remat=True)), root=tmp_path)["activations"]
    assert less < kept / 3


def test_a_model_without_an_llm_is_refused():
    with pytest.raises(ValueError, match=r"train.remat is about an LLM, and Linear has none"):
        recompute(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), True)
