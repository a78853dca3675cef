"""Images of any shape: SigLIP2's NaFlex tower, its positions, and what a model makes of tokens without one grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image

from configs.compressors import CATALOGUE
from tcjax.batch import Batch
from tcjax.compressors import avg_pool, mlp, resampler
from tcjax.compressors.base import Context, Widths
from tcjax.config import Pixels
from tcjax.evaluate.cost import tower_flops
from tcjax.export import hosts
from tcjax.nn.positions import RESIZES
from tcjax.pipeline import geometry
from tcjax.towers import naflex
from tcjax.vlm import VlmConfig
from tests.saved_towers import NAFLEX, SIGLIP, images, loaded, saved, twin
from tests.tiny import LLM

READ_ANY = (
    *("resampler", "idefics2_resampler", "decoder_resampler", "qformer", "qformer_text", "elastic"),
    *("learned_merge", "learned_merge_text", "query_merge", "token_learner"),
)
GRIDS_B2 = np.array([[4, 6], [3, 3], [1, 5], [12, 2], [4, 4], [1, 1]], np.int32)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(the published class, its folder)."""
    model = twin(NAFLEX)
    return model, saved(model, tmp_path_factory.mktemp("naflex"))


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_every_image_of_its_own_grid_is_seen_as_by_the_published_class(published, feature_layer):
    model, folder = published
    cfg = dataclasses.replace(NAFLEX, feature_layer=feature_layer, levels=(1,))
    rows_BNP3 = images(cfg, len(GRIDS_B2))
    valid_BN = np.asarray(naflex.valid(GRIDS_B2, 24))
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(rows_BNP3.reshape(len(GRIDS_B2), 24, 48)),
            pixel_attention_mask=torch.from_numpy(valid_BN.astype(np.int64)),
            spatial_shapes=torch.from_numpy(GRIDS_B2.astype(np.int64)),
            output_hidden_states=True,
        )
    last = theirs.last_hidden_state if feature_layer == -1 else theirs.hidden_states[feature_layer]
    expected_BNE = torch.cat([last, theirs.hidden_states[1]], -1).numpy()
    found_BNE = np.asarray(jax.jit(loaded(cfg, folder))(rows_BNP3, GRIDS_B2))
    np.testing.assert_allclose(found_BNE[valid_BN], expected_BNE[valid_BN], rtol=1e-5, atol=1e-5)
    assert (found_BNE[~valid_BN] == 0).all()


def test_what_lies_behind_an_image_influences_nothing(published):
    cfg = dataclasses.replace(NAFLEX, probes=("column_means", "keys"))
    run = jax.jit(loaded(cfg, published[1]))
    rows_BNP3 = images(cfg, len(GRIDS_B2))
    valid_BN = np.asarray(naflex.valid(GRIDS_B2, 24))
    spoiled_BNP3 = np.where(valid_BN[..., None, None], rows_BNP3, np.nan).astype(np.float32)
    np.testing.assert_array_equal(run(spoiled_BNP3, GRIDS_B2), run(rows_BNP3, GRIDS_B2))


def test_a_slot_without_an_image_is_all_zeros(published):
    found_BNC = loaded(NAFLEX, published[1])(np.zeros((2, 24, 16, 3), np.float32), np.array([[0, 0], [2, 3]], np.int32))
    assert (found_BNC[0] == 0).all() and (found_BNC[1, :6] != 0).any()


@pytest.mark.parametrize("size", [(3, 5), (7, 4), (4, 4), (1, 9), (16, 2)], ids=str)
@pytest.mark.parametrize("resize", RESIZES)
def test_tables_are_resized_as_torch_does(resize, size):
    table_HWC = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    mode, antialias = resize.split()[0], resize.endswith("antialiased")
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(table_HWC).permute(2, 0, 1)[None], size=size, mode=mode, antialias=antialias
    )[0].permute(1, 2, 0)
    rows, columns = (RESIZES[resize](*sides) for sides in zip((4, 6), size, strict=True))
    np.testing.assert_allclose(np.einsum("hH,wW,HWC->hwC", rows, columns, table_HWC), theirs, atol=2e-6)


def test_positions_of_a_grid_are_those_of_the_resized_table():
    table_HWC = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    rows, columns = (RESIZES["bilinear antialiased"](*sides) for sides in ((4, 3), (6, 7)))
    expected_NC = np.einsum("hH,wW,HWC->hwC", rows, columns, table_HWC).reshape(21, 5)
    found_BNC = naflex.positions(jnp.asarray(table_HWC.reshape(24, 5)), (4, 6), jnp.array([[3, 7]]), 24)
    np.testing.assert_allclose(found_BNC[0, :21], expected_NC, atol=2e-6)
    assert (found_BNC[0, 21:] == 0).all()


def test_a_model_passes_on_which_tokens_are_real():
    """A padded patch changes no visual token, and a compressor that reads any number of them is content."""
    config = VlmConfig(
        tower=NAFLEX, compressor=resampler.Config(num_queries=3, depth=1, heads=2, head_width=8), llm=LLM
    )
    assert config.widths.ragged and config.widths.num_tokens == 24
    model = config.build(nnx.Rngs(0))
    rows_BNP3 = images(NAFLEX, 2)
    batch = Batch(images_BYX3=rows_BNP3, grids_B2=np.array([[4, 6], [2, 5]], np.int32), index_B=np.arange(2))
    first = model.compress(batch).tokens_BQD
    rows_BNP3[1, 10:] = 7.0
    np.testing.assert_array_equal(model.compress(batch._replace(images_BYX3=rows_BNP3)).tokens_BQD, first)
    seen_BNC = model.see(batch)
    cached = model.compress(batch._replace(images_BYX3=None, features_BNC=seen_BNC)).tokens_BQD
    np.testing.assert_array_equal(cached, first)
    with pytest.raises(ValueError, match=r"needs Batch\.grids_B2, int32 \[2, 2\].*and got none"):
        model.compress(batch._replace(grids_B2=None))


@pytest.mark.parametrize("compressor", [avg_pool.Config(num_queries=4), mlp.Config()], ids=["avg_pool", "mlp"])
def test_a_compressor_of_a_grid_refuses_a_tower_without_one(compressor):
    with pytest.raises(
        ValueError, match=r"images of any shape, up to N=24.*a compressor that reads any number of tokens"
    ):
        VlmConfig(tower=NAFLEX, compressor=compressor, llm=LLM).build(nnx.Rngs(0))


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_compressor_reads_them_or_says_that_it_reads_a_grid(name):
    """Those that read any number of tokens know the padding; the others refuse at the latest when they see tokens."""
    config = CATALOGUE[name](4)
    widths = config.asked(Widths(grid_HW=(1, 24), vision_C=64, llm_D=128, text_D=128, ragged=True))
    context = Context(
        valid_BN=jnp.ones((2, 24), bool),
        text_BTD=jnp.ones((2, 3, 128)),
        levels_BNE=jnp.ones((2, 24, widths.levels * 64)),
        prior_BN=jnp.ones((2, 24)),
    )

    def compress(tokens_BNC):
        config.outputs(widths)
        return config.build(widths, nnx.Rngs(0))(tokens_BNC, context)

    if name in READ_ANY:
        made = jax.eval_shape(compress, jnp.ones((2, 24, 64)))
        assert made.tokens_BQD.shape[::2] == (2, 128) and made.valid_BQ is not None
    else:
        with pytest.raises(ValueError, match=r"any shape|shrunk|1x24 grid"):
            jax.eval_shape(compress, jnp.ones((2, 24, 64)))


def test_an_image_of_any_shape_costs_as_much_as_the_most_patches():
    fixed = dataclasses.replace(SIGLIP, pixels=Pixels(size_YX=(16, 24)))
    assert tower_flops(NAFLEX) == tower_flops(fixed)
    assert "any shape" in hosts.why_no_tower(NAFLEX, after_norm=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_token": True}, "is SigLIP2's: class_token=False.*got True"),
        ({"table_HW": None}, r"table_HW must be given.*\(16, 16\)"),
        ({"patch": 8}, "pixels.patch=4 cuts other patches than the tower's patch=8"),
        ({"shrunk_HW": (1, 2)}, r"shrunk_HW=None; got .*\(1, 2\)"),
        ({"resize": "nearest"}, "resize='nearest' is unknown; possible: .*bicubic antialiased"),
    ],
)
def test_impossible_naflex_towers_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NAFLEX, **change)


@pytest.mark.parametrize("grids", [np.ones((2, 2), np.float32), np.ones((3, 2), np.int32)], ids=["float", "three"])
def test_grids_that_fit_no_batch_say_why(grids):
    with pytest.raises(ValueError, match=r"int32 \[2, 2\]: rows and columns of every image's patches, and got"):
        NAFLEX.build(nnx.Rngs(0))(images(NAFLEX, 2), grids)


def test_images_are_seen_as_the_published_processor_and_class_see_them(published):
    """From images of two shapes through our own host side: up to 24 patches of 4 x 4 pixels."""
    model, folder = published
    rng = np.random.default_rng(0)
    shown = [Image.fromarray(rng.integers(0, 256, (*shape, 3)).astype(np.uint8)) for shape in ((32, 50), (61, 47))]
    processor = transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=24)
    theirs = processor(shown, return_tensors="pt")
    with torch.no_grad():
        expected_BNC = model(**theirs).last_hidden_state.numpy()
    wanted = dataclasses.replace(NAFLEX.pixels, resample="bilinear")
    rows, grids = zip(*(geometry.patch_rows(geometry.fit(image, wanted), wanted) for image in shown), strict=True)
    np.testing.assert_array_equal(np.stack(grids), theirs["spatial_shapes"])
    tower = loaded(dataclasses.replace(NAFLEX, pixels=wanted), folder)
    found_BNC = np.asarray(jax.jit(tower)(np.stack(rows), np.stack(grids)))
    valid_BN = np.asarray(theirs["pixel_attention_mask"]).astype(bool)
    assert len({tuple(grid) for grid in grids}) == 2
    np.testing.assert_allclose(found_BNC[valid_BN], expected_BNC[valid_BN], rtol=1e-5, atol=1e-5)
