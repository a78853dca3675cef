"""The named recipes are what their papers' scripts say, and what they cost is said without any of their files."""

import inspect

import pytest
from flax import nnx

from configs import honeybee, llava, mqt, prismatic, small, templates
from tcjax.assemble import abstract
from tcjax.config import MeshConfig, Run
from tcjax.dry_run import dry_run
from tcjax.interop import names
from tcjax.train.optimiser import make_optimiser, schedule
from tcjax.train.state import num_parameters, part_of, split

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
    assert float(schedule(how)(round(how.warmup * how.steps))) == pytest.approx(peak)
    make_optimiser(how)  # refuses rates of parts that do not learn
    model = abstract(run.model, trainable=how.trainable, frozen=how.frozen, lora=how.lora)
    _, trainable, frozen = split(model, how.trainable)
    assert {part_of(path) for path, _ in nnx.to_flat_state(trainable)} == learning == set(how.trainable)
    assert {leaf.get_value().dtype.name for _, leaf in nnx.to_flat_state(frozen)} == {"bfloat16"}
    assert {leaf.get_value().dtype.name for _, leaf in nnx.to_flat_state(trainable)} == {"float32"}
    assert round(num_parameters(nnx.state(model.compressor)) / 1e6) == millions
    assert "hours" in inspect.getdoc(recipe), "a recipe says what is known of its hours"


def test_stage_two_goes_on_from_what_stage_one_exports():
    pairs = [(llava.pretrain_7b, llava.finetune_7b), (llava.pretrain_13b, llava.lora_13b), (mqt.pretrain, mqt.finetune)]
    for first, second in [*pairs, (honeybee.pretrain, honeybee.finetune), (small.run, small.finetune)]:
        before, after = first(), second()
        assert after.train.weights == {"compressor": f"runs/{before.name}/artifact"}
        facts = [run.model.compressor.describe(run.model.widths) for run in (before, after)]
        assert facts[0] == facts[1]
        published = [_published(run) for run in (before, after)]
        assert published[0] == published[1]


def test_mixtures_and_templates_are_the_published_ones():
    weights = [source.weight for source in honeybee.finetune().data.sources]
    assert len(weights) == 13 and sum(weights) == pytest.approx(1.0, abs=0.01)
    assert mqt.finetune().model.compressor.drawn_from == tuple(range(2, 257, 2))
    assert llava.finetune_7b().model.tower.pixels.geometry == "pad"
    assert llava.pretrain_7b().model.tower.pixels.geometry == "crop"
    assert llava.lora_7b().train.lr_of == {"compressor": 2e-5}
    assert llava.finetune_7b().data.template == templates.VICUNA_V1
    widths = prismatic.run().model.widths
    assert (widths.grid_HW, widths.vision_C) == ((27, 27), 1024 + 1152)
    for recipe in (llava.finetune_7b, llava.finetune_7b_mlp, prismatic.run):
        run = recipe()
        assert run.model.num_queries + run.data.text_length == 2048


@pytest.mark.parametrize("recipe", [llava.pretrain_7b, small.finetune, prismatic.run])
def test_a_dry_run_needs_no_file_and_says_what_is_missing(recipe, tmp_path):
    run = recipe().replace(mesh=MeshConfig(data=1, fsdp=8))
    figures = dry_run(run, root=tmp_path)
    assert figures["steps"] == run.train.steps and figures["flops"] > 1e12
    assert "tokenizer" in figures["missing"]
    held = figures["weights"] + figures["training"] + figures["activations"]
    assert held < 80 * 2**30, "eight cards of 80 GB hold it"


def test_the_small_one_fits_a_card_of_24_gb(tmp_path):
    for recipe in (small.run, small.finetune, small.smollm):
        figures = dry_run(recipe().replace(mesh=MeshConfig(data=1)), root=tmp_path)
        assert figures["weights"] + figures["training"] + figures["activations"] < 12 * 2**30


def _published(run: Run) -> names.Shapes:
    config, widths = run.model.compressor, run.model.widths
    return names.published_shapes(
        config.names(widths), names.shapes(nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0))))
    )
