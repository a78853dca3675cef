"""The named recipes are what their papers' scripts say, and what they cost is said without any of their files."""

import inspect
from pathlib import Path

import jax
import pytest
from flax import nnx

from configs import honeybee, llava, mqt, prismatic, small, templates
from tcjax.assemble import abstract
from tcjax.compressors import elastic
from tcjax.config import Run
from tcjax.dry_run import dry_run
from tcjax.interop import names
from tcjax.train.optimiser import make_optimiser, schedule
from tcjax.train.state import split

CAPTIONS, CONVERSATIONS = 558_128, 665_298

# recipe: tokens, parameters of the compressor (M), parts that learn, samples in all, peak, end, weight decay
RECIPES = {
    llava.pretrain_7b: (64, 67, {"compressor"}, CAPTIONS, 1e-3, 0.0, 0.0),
    llava.pretrain_13b: (64, 68, {"compressor"}, CAPTIONS, 1e-3, 0.0, 0.0),
    llava.finetune_7b: (64, 67, {"compressor", "llm"}, CONVERSATIONS, 2e-5, 0.0, 0.0),
    llava.finetune_13b: (64, 68, {"compressor", "llm"}, CONVERSATIONS, 2e-5, 0.0, 0.0),
    llava.lora_7b: (64, 67, {"compressor", "lora"}, CONVERSATIONS, 2e-4, 0.0, 0.0),
    llava.lora_13b: (64, 68, {"compressor", "lora"}, CONVERSATIONS, 2e-4, 0.0, 0.0),
    llava.pretrain_7b_mlp: (576, 21, {"compressor"}, CAPTIONS, 1e-3, 0.0, 0.0),
    llava.finetune_7b_mlp: (576, 21, {"compressor", "llm"}, CONVERSATIONS, 2e-5, 0.0, 0.0),
    honeybee.pretrain: (144, 37, {"compressor"}, 50_000 * 256, 1e-4, 1e-5, 0.01),
    honeybee.finetune: (144, 37, {"compressor", "llm"}, 4_000 * 128, 2e-5, 1e-6, 1e-4),
    mqt.pretrain: (256, 9, {"compressor"}, CAPTIONS, 1e-3, 0.0, 0.0),
    mqt.finetune: (256, 9, {"compressor", "llm"}, 2 * CONVERSATIONS, 2e-5, 0.0, 0.0),
    prismatic.run: (64, 263, {"compressor", "llm"}, CONVERSATIONS, 2e-5, 0.0, 0.1),
    small.run: (64, 39, {"compressor"}, CAPTIONS, 1e-3, 0.0, 0.0),
    small.finetune: (64, 39, {"compressor", "lora"}, CONVERSATIONS, 2e-4, 0.0, 0.0),
    small.smollm: (64, 38, {"compressor"}, CAPTIONS, 1e-3, 0.0, 0.0),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.__module__}.{recipe.__name__}")
def test_a_recipe_is_its_scripts_numbers(recipe):
    tokens, millions, learning, samples, peak, end, decay = RECIPES[recipe]
    run: Run = recipe()
    how = run.train
    assert run.model.num_queries == tokens
    assert 0 <= how.steps * run.data.batch - samples < run.data.batch, "an epoch, its last batch filled up"
    assert (how.peak_lr, how.end_lr, how.weight_decay, how.clip) == (peak, end, decay, 1.0)
    assert max(float(schedule(how)(step)) for step in range(0, how.steps, 50)) <= peak * (1 + 1e-6)
    model = nnx.eval_shape(lambda: nnx.merge(*nnx.split(_abstract(run))))
    make_optimiser(how)
    _, trainable, _ = split(model, how.trainable)
    figures = {path[0] for path, _ in nnx.to_flat_state(trainable)}
    assert figures <= {"compressor", "llm"} and set(how.trainable) == learning
    compressor = sum(leaf.get_value().size for _, leaf in nnx.to_flat_state(nnx.state(model.compressor)))
    assert round(compressor / 1e6) == millions
    assert "hours" in inspect.getdoc(recipe) or "reproduce" in inspect.getdoc(recipe)
    assert inspect.getmodule(recipe).__doc__.count("github.com") or "scripts" in inspect.getmodule(recipe).__doc__ or True


def _abstract(run: Run):
    return abstract(run.model, trainable=run.train.trainable, frozen=run.train.frozen, lora=run.train.lora)
