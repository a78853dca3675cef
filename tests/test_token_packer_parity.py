"""TokenPacker against the original class, whose answers with random weights are in tests/golden, and cell by cell.

token_packer.safetensors: CircleRadon/TokenPacker, commit 771a16e, llava/model/multimodal_projector/builder.py,
TokenPacker(raw_grid=12, scale_factor=2, 3, 4, 6), one set of weights. Run with torch 2.13 in float32; the widths 4096
and 1024, which the source states as numbers, were replaced by 2 * 8 and 8, the LLM's by 12.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from tcjax.compressors import token_packer
from tcjax.compressors.base import Widths
from tcjax.export.torch import token_packer as room
from tcjax.interop import tensors
from tcjax.nn.cells import cells, from_cells
from tcjax.nn.positions import bilinear_matrix
from tests.planted import leaves, noise, planted
from tests.torch_layers import attention, compress, line, loaded, normed, ragged, section, twin, two, values

GOLDEN = Path(__file__).parent / "golden/token_packer.safetensors"
C, D, EPS = 8, 12, 1e-6
WIDTHS = Widths(grid_HW=(12, 12), vision_C=C, llm_D=D, levels=2)
CLOSE = {"rtol": 0, "atol": 4e-6}  # outputs are of size 1 ... 4
GRIDS = [((12, 12), (4, 4)), ((8, 6), (4, 3)), ((9, 15), (3, 5)), ((8, 10), (2, 5)), ((27, 27), (9, 9))]


def packer(num_queries: int, *, head_width: int = 4, **choices) -> token_packer.Config:
    return token_packer.Config(num_queries=num_queries, head_width=head_width, levels=(1, 2), **choices)


@pytest.mark.parametrize("scale", [2, 3, 4, 6])
def test_token_packer_equals_the_original_at_every_scale_with_one_set_of_weights(scale):
    golden = tensors.load(GOLDEN)
    weights, given = section(golden, "weights."), section(golden, f"{scale}.")
    config = packer((12 // scale) ** 2)
    ours = compress(loaded(config, WIDTHS, weights), given["tokens"], levels_BNE=given["levels"])
    np.testing.assert_allclose(ours.tokens_BQD, given["out"], **CLOSE)
    theirs = twin(room, config, WIDTHS, weights)(
        torch.from_numpy(given["tokens"]), levels=torch.from_numpy(given["levels"])
    )
    np.testing.assert_allclose(theirs.numpy(force=True), given["out"], **CLOSE)


@pytest.mark.parametrize(("grid_HW", "shape"), GRIDS)
def test_token_packer_with_padding_one_cell_at_a_time(grid_HW, shape):
    """x0: torch's bilinear of the tokens and of the mask, divided; where that reads nothing, the cell's valid mean."""
    (H, W), (h, w) = grid_HW, shape
    widths = Widths(grid_HW=grid_HW, vision_C=C, llm_D=D, levels=2)
    module = planted(packer(h * w, shape=shape), widths)
    value = values(module)
    x_BNC, l_BNE, valid_BN = noise(4, H * W, C) + 1, noise(4, H * W, 2 * C, seed=1), ragged(grid_HW)
    hidden_BN1 = np.where(valid_BN, 1, np.nan)[..., None].astype("f4")
    ours = compress(module, x_BNC * hidden_BN1, levels_BNE=l_BNE * hidden_BN1, valid_BN=valid_BN)
    heads = attention(value, 2)
    for b in range(4):
        x, keep = (torch.from_numpy(a[b].astype("f4")).reshape(H, W, -1) for a in (x_BNC, valid_BN[..., None]))
        level = torch.from_numpy(l_BNE[b]).reshape(H, W, -1)

        def bilinear(grid):
            return functional.interpolate(grid.permute(2, 0, 1)[None], size=shape, mode="bilinear")[0]

        sums, mass = bilinear(x * keep), bilinear(keep)
        for i in range(h):
            for j in range(w):
                rows, columns = slice(i * H // h, (i + 1) * H // h), slice(j * W // w, (j + 1) * W // w)
                inside = keep[rows, columns, 0] > 0
                found = np.asarray(ours.tokens_BQD[b, i * w + j])
                assert bool(ours.valid_BQ[b, i * w + j]) == bool(inside.any())
                if not inside.any():
                    np.testing.assert_array_equal(found, 0)
                    continue
                few = level[rows, columns][inside]
                x0 = sums[:, i, j] / mass[0, i, j] if mass[0, i, j] > 0 else x[rows, columns][inside].mean(0)
                query = normed(value, "norm_query", line(value, "query", x0), EPS)
                key = normed(value, "norm_key", two(value, "key", few), EPS)
                read, share = heads(
                    query[None, None], key[None], normed(value, "norm_value", two(value, "value", few), EPS)[None]
                )
                np.testing.assert_allclose(found, two(value, "mlp", read[0, 0]).numpy(force=True), atol=2e-6)
                row_HW = np.asarray(ours.assign_BQN[b, i * w + j]).reshape(H, W)
                np.testing.assert_allclose(row_HW[rows, columns][inside], share[0, 0].numpy(force=True), atol=1e-6)


@pytest.mark.parametrize(
    ("num_in", "num_out"), [(24, 12), (24, 8), (24, 6), (24, 10), (27, 9), (7, 7), (5, 12), (1, 3)]
)
def test_bilinear_is_torchs_without_antialiasing(num_in, num_out):
    x = noise(num_in, 6)
    theirs = functional.interpolate(torch.from_numpy(x.T[None].copy()), size=num_out, mode="linear")[0].T
    # torch rounds the source positions to float32
    np.testing.assert_allclose(bilinear_matrix(num_in, num_out) @ x, theirs, atol=4e-6)


def test_bilinear_reads_two_one_and_two():
    np.testing.assert_array_equal(bilinear_matrix(24, 12)[0, :2], [0.5, 0.5])
    np.testing.assert_array_equal(bilinear_matrix(24, 8)[0, :3], [0, 1, 0])
    np.testing.assert_array_equal(bilinear_matrix(24, 6)[0, :4], [0, 0.5, 0.5, 0])
    antialiased = jax.image.resize(noise(24, 3), (6, 3), "linear")
    assert np.abs(bilinear_matrix(24, 6) @ noise(24, 3) - antialiased).max() > 0.1


def test_cells_run_row_by_row_inside_and_outside():
    index_BQM = cells(jnp.arange(24)[None], (4, 6), (2, 2))
    assert np.asarray(index_BQM[0, 1]).tolist() == [3, 4, 5, 9, 10, 11]
    weights_BQM = jnp.asarray(noise(2, 4, 6))
    whole_BQN = from_cells(weights_BQM, (4, 6), (2, 2))
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(whole_BQN), np.asarray(index_BQM), 2), weights_BQM)
    assert (np.asarray(whole_BQN) != 0).sum() == weights_BQM.size


def test_no_residual_so_the_features_only_steer():
    """With equal levels inside a cell, whatever the features are, the answer is the same."""
    module = planted(packer(9), WIDTHS)
    levels_BNE = np.broadcast_to(noise(2, 1, 2 * C), (2, 144, 2 * C))
    one, other = (compress(module, noise(2, 144, C, seed=seed), levels_BNE=levels_BNE).tokens_BQD for seed in (1, 2))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_cells_nearest_to_squares_are_taken_and_any_are_possible():
    for num_queries, grid_HW, expected in (
        (144, (24, 24), (12, 12)),
        (64, (24, 24), (8, 8)),
        (36, (24, 24), (6, 6)),
        (81, (27, 27), (9, 9)),
        (48, (24, 32), (6, 8)),
    ):
        widths = Widths(grid_HW=grid_HW, vision_C=C, llm_D=D, levels=2)
        assert packer(num_queries).out_grid(widths) == expected
    assert packer(6, shape=(1, 6)).out_grid(Widths(grid_HW=(4, 6), vision_C=C, llm_D=D, levels=2)) == (1, 6)
    with pytest.raises(ValueError, match=r"num_queries=144 .* 27x27 grid; possible: \[1, 3, 9, 27, 81, 243, 729\]"):
        packer(144).outputs(Widths(grid_HW=(27, 27), vision_C=C, llm_D=D, levels=2))


def test_the_defaults_are_the_published_sizes():
    """36.7 M parameters: W_q, two projections of the levels, three norms, the attention, the MLP; 8 heads of 128."""
    widths = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096, levels=4)
    config = token_packer.Config()
    module = nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))
    C, D = 1024, 4096
    expected = C**2 + 2 * (4 * C * C + C**2 + 2 * C) + 3 * 2 * C + 4 * (C**2 + C) + (C + D) * D + 2 * D
    assert sum(leaf.get_value().size for leaf in leaves(module).values()) == expected == 36_722_688
    assert config.of_tower() == {"levels": (12, 16, 22, 23)}
    assert (config.outputs(widths), module.attention.heads) == (144, 8)


def test_it_starts_as_published():
    """Linear layers N(0, 0.02), cut nowhere; in_proj Xavier-uniform over the packed matrix; biases 0."""
    widths = Widths(grid_HW=(4, 4), vision_C=64, llm_D=64, levels=2)
    value = values(packer(4, head_width=16).build(widths, nnx.Rngs(0)))
    drawn = [path for path in value if path.endswith("kernel") and "in_proj" not in path]
    assert len(drawn) == 8
    for path in drawn:
        np.testing.assert_allclose(value[path].std(), 0.02, rtol=0.05, err_msg=path)
        assert np.abs(value[path]).max() > 2.5 * 0.02, path  # not truncated at two deviations
    np.testing.assert_allclose(np.abs(value["attention/in_proj/kernel"]).max(), (6 / (64 + 192)) ** 0.5, rtol=0.01)
    assert all((array == 0).all() for path, array in value.items() if path.endswith("bias"))
