"""One door to attention: the kernels of TPUs and GPUs see what the plain products see, and the target decides who computes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from tcjax.batch import Batch
from tcjax.config import MeshConfig, TrainConfig
from tcjax.evaluate.flops import matmul_flops
from tcjax.nn import attention, cudnn, splash
from tcjax.nn.attention import attend, attend_causally, padding_mask
from tcjax.sharding import MESH_AXES, make_mesh, on, shardings
from tcjax.train.optimiser import make_optimiser
from tcjax.train.state import init, recompute, split
from tcjax.train.step import jit_step, make_step
from tests import tiny

S = 200  # no multiple of 128
SEEN = {  # of the positions of a row
    "all": np.ones(S, bool),
    "left": np.arange(S) >= 130,
    "right": np.arange(S) < 70,
    "middle": (np.arange(S) < 40) | (np.arange(S) > 150),
}
SEGMENTS = np.searchsorted([60, 140, 190], np.arange(S), "right") + 1


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def heads(B, S, M, K, J, A):
    return noise(B, S, K, A), noise(B, M, J, A, seed=1), noise(B, M, J, A, seed=2)


@pytest.fixture
def on_tpu(monkeypatch):
    """As if compiled for a TPU, in tiles of 128, and interpreted."""
    monkeypatch.setattr(attention, "_target", lambda: "tpu")
    monkeypatch.setattr(splash, "_BLOCKS", (128,))
    monkeypatch.setattr(splash, "pays", lambda S, M: True)
    monkeypatch.setattr(splash, "attend", partial(splash.attend, interpret=True))


@pytest.fixture
def on_gpu(monkeypatch):
    """As if compiled for a GPU, by what cuDNN is called through, in plain JAX and float32."""
    monkeypatch.setattr(attention, "_target", lambda: "gpu")
    monkeypatch.setattr(cudnn, "can_attend", lambda *heads: True)
    monkeypatch.setattr(cudnn, "attend", partial(cudnn.attend, implementation="xla"))


def results(function, arguments, mesh):
    """What comes out, and the gradients by all arguments of its sum with random weights; traced anew."""

    def loss(*arguments):
        with on(mesh):
            out = function(*arguments)
        return (out * noise(*out.shape, seed=3)).sum(), out

    arguments = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec()))
    gradients, out = jax.jit(jax.grad(loss, tuple(range(len(arguments))), has_aux=True))(*arguments)
    return out, *gradients


def assert_equal_to_plain(function, arguments, mesh, monkeypatch):
    fused = results(function, arguments, mesh)
    monkeypatch.setattr(attention, "_target", lambda: "")
    for ours, plain in zip(fused, results(function, arguments, mesh), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)


def mesh_of(data=1, fsdp=1, tensor=1):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def causally(valid_BS, **options):
    """Causal attention whose padding gives 0: what it gives is nobody's."""
    valid_BS = jnp.asarray(valid_BS)
    return lambda *heads: attend_causally(*heads, valid_BS=valid_BS, **options) * valid_BS[..., None, None]


# Splash, interpreted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "packed", "K", "J", "A"),
    [
        ("all", False, 2, 2, 128),
        ("left", False, 4, 2, 64),
        ("right", False, 2, 1, 72),
        ("middle", False, 1, 1, 64),
        ("right", True, 2, 1, 64),
    ],
)
def test_splash_sees_what_plain_products_see(seen, packed, K, J, A, on_tpu, monkeypatch):
    valid_BS = np.stack([SEEN[seen], SEEN["all"]])
    segments = {"segment_BS": jnp.asarray(SEGMENTS)[None].repeat(2, 0), "shared": False} if packed else {}
    function = causally(valid_BS, **segments)
    assert_equal_to_plain(function, heads(2, S, S, K, J, A), mesh_of(), monkeypatch)


@pytest.mark.parametrize("blocks", [(128,), (384,)], ids=["many blocks", "one block"])
def test_splash_looks_at_everything_valid(blocks, on_tpu, monkeypatch):
    monkeypatch.setattr(splash, "_BLOCKS", blocks)
    valid_BM = jnp.asarray(np.arange(300) < 170)[None]
    function = partial(attend, mask_BSM=padding_mask(valid_BM), scale=0.3)
    assert_equal_to_plain(function, heads(2, S, 300, 2, 2, 72), mesh_of(), monkeypatch)


@pytest.mark.parametrize(("K", "J"), [(4, 2), (4, 1), (3, 3)], ids=["divided", "repeated", "whole"])
def test_splash_is_the_same_on_eight_devices(K, J, on_tpu, monkeypatch):
    function = causally(np.stack([SEEN[name] for name in ("all", "left", "right", "middle")]))
    assert_equal_to_plain(function, heads(4, S, S, K, J, 8), mesh_of(data=2, fsdp=2, tensor=2), monkeypatch)


def test_padding_gives_something_finite(on_tpu):
    empty = partial(attend_causally, valid_BS=jnp.zeros((1, S), bool))
    nobody = partial(attend, mask_BSM=jnp.zeros((1, 1, S), bool))
    for function in (empty, nobody):
        for value in results(function, heads(1, S, S, 1, 1, 8), mesh_of()):
            assert np.isfinite(value).all()


def test_blocks_fill_up_little():
    assert [splash.block(size) for size in (256, 576, 704, 1600, 2048)] == [256, 640, 768, 896, 1024]
    assert splash.pays(576, 576) and splash.pays(704, 704) and splash.pays(256, 4096)
    assert not splash.pays(255, 255) and not splash.pays(64, 576) and not splash.pays(257, 257)


# cuDNN, by its plain twin --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"segment_BS": 1}, {"window": 9}], ids=["causal", "segments", "window"])
@pytest.mark.parametrize("length", [24, 25], ids=["even", "odd"])
def test_cudnn_is_told_what_plain_products_see(options, length, on_gpu, monkeypatch):
    valid_BS = np.stack([np.arange(length) > 3, np.arange(length) % 7 > 1])
    if "segment_BS" in options:
        options = {"segment_BS": jnp.asarray(np.arange(length) // 8)[None].repeat(2, 0)}
    positions_BS = jnp.asarray(valid_BS).cumsum(1) - 1
    function = causally(valid_BS, positions_BS=positions_BS, **options)
    assert_equal_to_plain(function, heads(2, length, length, 4, 2, 8), mesh_of(data=2, tensor=2), monkeypatch)


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_looks_at_everything_valid(masked, on_gpu, monkeypatch):
    mask_BSM = padding_mask(jnp.asarray([np.arange(33) < 20])) if masked else None
    function = partial(attend, mask_BSM=mask_BSM, scale=0.3)
    assert_equal_to_plain(function, heads(2, 16, 33, 2, 2, 8), mesh_of(), monkeypatch)


def test_what_cudnn_cannot_do_is_left_to_plain_products(monkeypatch):
    monkeypatch.setattr(cudnn, "_fault", lambda *heads: "")

    def can(dtype, A):
        return cudnn.can_attend(*(x.astype(dtype) for x in heads(1, 8, 8, 2, 1, A)))

    assert can(jnp.bfloat16, 64) and can(jnp.float16, 72) and can(jnp.bfloat16, 128)
    assert not can(jnp.float32, 64) and not can(jnp.bfloat16, 12) and not can(jnp.bfloat16, 136)


def test_without_a_working_cudnn_attention_is_plain_and_says_so(monkeypatch):
    def missing(*arguments, **options):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    monkeypatch.setattr(attention, "_target", lambda: "gpu")
    cudnn._fault.cache_clear()
    arguments = [x.astype(jnp.bfloat16) for x in heads(1, 8, 8, 2, 2, 8)]
    with pytest.warns(UserWarning, match="attention is computed plainly.*cuDNN is not detected"):
        out = attend(*arguments)
    cudnn._fault.cache_clear()
    monkeypatch.setattr(attention, "_target", lambda: "")
    np.testing.assert_array_equal(out, attend(*arguments))


# The door ------------------------------------------------------------------------------------------------------------


def lowered(function, *shapes, platform="tpu", dtype=jnp.bfloat16):
    """The program for a machine that nobody here has."""
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform=platform)
    mesh = AbstractMesh((2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)

    def step(*arguments):
        with jax.sharding.use_abstract_mesh(mesh):
            return function(*arguments)

    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(step).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


LONG, SHORT = ((4, 576, 4, 64), (4, 576, 2, 64), (4, 576, 2, 64)), ((4, 192, 4, 64),) * 3
VALID_BS, ZERO_BS = jnp.ones((4, 576), bool), jnp.zeros((4, 576), jnp.int32)


@pytest.mark.parametrize(
    ("function", "shapes", "platform", "splashes"),
    [
        (partial(attend_causally, valid_BS=VALID_BS), LONG, "tpu", True),
        (partial(attend_causally, valid_BS=VALID_BS, segment_BS=ZERO_BS, shared=False), LONG, "tpu", True),
        (partial(attend_causally, valid_BS=VALID_BS, segment_BS=ZERO_BS), LONG, "tpu", False),
        (partial(attend_causally, valid_BS=VALID_BS, positions_BS=ZERO_BS, window=576), LONG, "tpu", True),
        (partial(attend_causally, valid_BS=VALID_BS, positions_BS=ZERO_BS, window=575), LONG, "tpu", False),
        (partial(attend_causally, valid_BS=VALID_BS[:, :192]), SHORT, "tpu", False),
        (partial(attend_causally, valid_BS=VALID_BS), LONG, "cpu", False),
        (attend, LONG, "tpu", True),
        (partial(attend, mask_BSM=VALID_BS[:, None]), LONG, "tpu", True),
        (partial(attend, mask_BSM=jnp.ones((1, 576, 576), bool)), LONG, "tpu", False),
        (attend, SHORT, "tpu", False),
    ],
    ids="causal packed turns wide-window window short cpu full padded mask short-full".split(),
)
def test_the_target_and_the_mask_decide(function, shapes, platform, splashes):
    assert ("tpu_custom_call" in lowered(function, *shapes, platform=platform)) is splashes


def test_outside_a_mesh_attention_is_plain_and_its_products_are_counted():
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in LONG]
    B, positions, K, A = LONG[0]
    assert matmul_flops(attend, *arguments) == 4 * B * K * A * positions**2


# A whole step, for chips that nobody here has ------------------------------------------------------------------------


def compiled_for_tpu(monkeypatch, positions: int, rows: int):
    """The training step of a tiny VLM, compiled for four chips."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), chips)
    llm = dataclasses.replace(tiny.LLM, width=64, heads=4, kv_heads=2, head_width=64, layers=9)
    model = nnx.eval_shape(lambda: dataclasses.replace(tiny.VLM, llm=llm).build(nnx.Rngs(0)))
    recompute(model, "full")
    graphdef, trainable, frozen = split(model, ("compressor",))
    optimiser = make_optimiser(TrainConfig(steps=5))
    state = jax.eval_shape(lambda trainable: init(trainable, optimiser), trainable)

    def there(tree):
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings(tree, mesh)
        )

    def field(dtype, *shape):
        return jax.ShapeDtypeStruct(
            (rows, *shape), dtype, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        )

    flags = {name: field(bool, positions) for name in ("is_image_BS", "supervised_BS", "valid_BS")}
    batch = Batch(tokens_BS=field(jnp.int32, positions), images_BYX3=field(jnp.float32, 16, 16, 3), **flags)
    step = jit_step(make_step(graphdef, optimiser, dtype=jnp.bfloat16), state, mesh)
    with jax.default_matmul_precision("default"):  # the kernel has no exact products of bfloat16
        return step.lower(there(state), there(frozen), batch, jax.ShapeDtypeStruct((), jnp.int32)).compile()


@pytest.fixture
def uncached():
    """Programs for chips that nobody has cannot be read back from the cache of compiled programs."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_a_step_for_tpus_attends_by_splash_and_needs_less_memory(uncached, monkeypatch):
    splashed = compiled_for_tpu(monkeypatch, positions=1024, rows=16)
    for kernel in ("splash_mha_fwd", "splash_mha_dkv"):
        assert kernel in splashed.as_text()
    monkeypatch.setattr(attention, "_target", lambda: "")
    plain = compiled_for_tpu(monkeypatch, positions=1024, rows=16)
    assert "splash_mha" not in plain.as_text()
    peaks = (program.memory_analysis().peak_memory_in_bytes for program in (splashed, plain))
    assert next(peaks) < 0.7 * next(peaks)
