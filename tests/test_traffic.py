"""Bytes between devices: on programs written by hand, and on compiled ones whose traffic is known beforehand."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tcjax.plan.groups import groups, pairs
from tcjax.plan.hlo import parse, turns
from tcjax.plan.traffic import traffic
from tests.partitioned import partitioned

EIGHT = tuple(range(8))
FOUR_BY_TWO = ((0, 2, 4, 6), (1, 3, 5, 7))


@pytest.mark.parametrize(
    ("spelling", "found"),
    [
        ("replica_groups={{0,1},{2,3},{4,5,6,7}}, x=1", ((0, 1), (2, 3), (4, 5, 6, 7))),
        ("replica_groups={}", (EIGHT,)),
        ("channel_id=1", (EIGHT,)),
        ("replica_groups=[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", FOUR_BY_TWO),
        ("replica_groups=[1,8]<=[8]", (EIGHT,)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", FOUR_BY_TWO),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", (EIGHT,)),
        ("replica_groups=mesh[a=2,b=4] {b}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", FOUR_BY_TWO),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=({{0,2,4,6},{1,3,5,7}}) {'b'}", FOUR_BY_TWO),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_every_spelling_of_groups_is_read(spelling, found):
    assert tuple(tuple(sorted(group)) for group in groups(spelling, 8)) == found


def test_an_unknown_spelling_is_refused():
    with pytest.raises(ValueError, match="unknown spelling of replica_groups"):
        groups("replica_groups=ring(8)", 8)
    with pytest.raises(ValueError, match="names no source_target_pairs"):
        pairs("channel_id=1")


def sent(collective: str, islands=(0, 0, 0, 0, 1, 1, 1, 1), before: str = ""):
    """The traffic of a program of one collective `x` on a float32 [8,16], 512 bytes, and 8 devices."""
    return traffic(
        "HloModule one, num_partitions=8\n\n%sum (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n"
        "  %b = f32[] parameter(1)\n  ROOT %c = f32[] add(%a, %b)\n}\n\n"
        "ENTRY %main (p: f32[8,16]) -> f32[8,16] {\n  %p = f32[8,16]{1,0:T(8,128)} parameter(0)\n"
        f"{before}  ROOT %x = {collective}\n}}\n",
        islands,
    )


ALL = "channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true"
GATHER = f"f32[64,16]{{1,0}} all-gather(%p), {ALL}, dimensions={{0}}"
INSIDE = "channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true"
ACROSS = "channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true"


@pytest.mark.parametrize(
    ("collective", "ici", "dcn"),
    [  # R = 512 bytes go in, 4096 come out of a gather over 8
        (GATHER, 4096 * 3 // 4, 4096 // 8),
        (f"f32[32,16]{{1,0}} all-gather(%p), {INSIDE}, dimensions={{0}}", 2048 * 3 // 4, 0),
        (f"f32[16,16]{{1,0}} all-gather(%p), {ACROSS}, dimensions={{0}}", 0, 1024 // 2),
        (f"f32[1,16]{{1,0}} reduce-scatter(%p), {ALL}, dimensions={{0}}, to_apply=%sum", 512 * 3 // 4, 512 // 8),
        (f"f32[8,16]{{1,0}} all-reduce(%p), {ALL}, to_apply=%sum", 2 * 512 * 3 // 4, 2 * 512 // 8),
        (f"f32[8,16]{{1,0}} all-reduce(%p), {ACROSS}, to_apply=%sum", 0, 512),
        (f"f32[8,16]{{1,0}} all-to-all(%p), {ALL}, dimensions={{0}}", 512 * 3 // 8, 512 * 4 // 8),
        ("f32[8,16]{1,0} collective-permute(%p), channel_id=1, source_target_pairs={{0,1},{4,5}}", 512, 0),
        ("f32[8,16]{1,0} collective-permute(%p), channel_id=1, source_target_pairs={{0,4},{4,0}}", 0, 512),
        ("f32[8,16]{1,0} collective-permute(%p), channel_id=1, source_target_pairs={{3,3}}", 0, 0),
        ("f32[8,16]{1,0} all-reduce(%p), replica_groups={}, to_apply=%sum", 0, 0),  # among replicas: there is one
        ("f32[8,16]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0}}, to_apply=%sum", 768, 128),
    ],
)
def test_each_collective_costs_what_the_table_says(collective, ici, dcn):
    assert (sent(collective).ici_bytes, sent(collective).dcn_bytes) == (ici, dcn)


def test_on_one_island_a_ring_sends_all_but_the_own_share():
    one = sent(GATHER, (0,) * 8)
    assert (one.ici_bytes, one.dcn_bytes) == (4096 * 7 // 8, 0)
    assert one.of("all-gather") == one.of("all-gather", "f32") == 4096
    assert one.of("all-gather", "bf16") == one.of("all-reduce") == 0


def test_a_collective_tells_what_it_moves():
    (one,) = sent(GATHER + ', metadata={op_name="jit(step)/dot" stack_frame_id=1}').collectives
    assert (one.kind, one.dtype, one.shape, one.bytes, one.times) == ("all-gather", "f32", (64, 16), 4096, 1)
    assert (one.group, one.islands, one.spans_islands, one.where) == (8, 2, True, "jit(step)/dot")


def test_started_and_finished_counts_once_and_a_tuple_counts_each_array():
    started = (
        f"  %s = (f32[8,16], f32[64,16]) all-gather-start(%p), {ALL}, dimensions={{0}}\n"
        f"  %h = bf16[8,16]{{1,0}} convert(%p)\n"
        f"  %r = (f32[8,16], bf16[8,16]) all-reduce(%p, %h), {ALL}, to_apply=%sum\n"
    )
    result = sent("(f32[64,16], (f32[8,16], bf16[8,16])) tuple(%s, %r)", (0,) * 8, started)
    assert [(c.kind, c.dtype, c.bytes) for c in result.collectives] == [
        ("all-gather", "f32", 4096),
        ("all-reduce", "f32", 512),
        ("all-reduce", "bf16", 256),
    ]
    assert result.ici_bytes == 4096 * 7 // 8 + 2 * 768 * 7 // 8
    done = sent("f32[64,16]{1,0} all-gather-done(%s)", (0,) * 8, started)
    assert done.ici_bytes == 4096 * 7 // 8, "nobody reads the all-reduce"


def test_an_all_reduce_of_which_a_share_is_read_is_a_reduce_scatter():
    reduced = f"  %i = s32[] constant(0)\n  %r = f32[8,16]{{1,0}} all-reduce(%p), {ALL}, to_apply=%sum\n"
    copied = reduced + "  %k = f32[8,16]{1,0} copy(%r)\n"
    share = "f32[1,16]{1,0} dynamic-slice(%k, %i, %i), dynamic_slice_sizes={1,16}"
    assert sent(share, (0,) * 8, copied).ici_bytes == 512 * 7 // 8
    half = share.replace("f32[1,16]", "f32[4,16]").replace("{1,16}", "{4,16}")
    assert sent(half, (0,) * 8, copied).ici_bytes == 2 * 512 * 7 // 8


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="right after SPMD partitioning"):
        sent("(f32[8,16], u32[], token[]) send(%p, %p), channel_id=1")
    with pytest.raises(ValueError, match="names 4 devices, the program runs on 8"):
        sent(GATHER, (0, 0, 1, 1))
    with pytest.raises(ValueError, match="no computation is marked ENTRY"):
        traffic("module {}", (0,))


LOOP = """HloModule loop, num_partitions=4

%body (s: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %s = (s32[], f32[8]{0}, /*index=2*/s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %two = s32[] constant(2)
  %place = s32[] multiply(%i, %two)
  %cut = f32[2]{0} dynamic-slice(%x, %place), dynamic_slice_sizes={2}
  %g = f32[8]{0} all-gather(%cut), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, dimensions={0}
  ROOT %t = (s32[], f32[8]{0}, s32[]) tuple(%next, %g, %n)
}

%compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=DIRECTION
}

%condition (s: (s32[], f32[8], s32[])) -> pred[] {
  %s = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=2
  %limit = s32[] constant(LIMIT)
  ROOT %c = pred[] TEST
}

ENTRY %main (p: f32[8], q: s32[]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = s32[] parameter(1)
  %first = s32[] constant(FIRST)
  %m = s32[] COUNT
  %start = (s32[], f32[8]{0}, s32[]) tuple(%first, %p, %m)
  %w = (s32[], f32[8]{0}, s32[]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def loop(test="compare(%i, %limit), direction=LT", first=0, step=1, limit=5, direction="LT", count="constant(9)"):
    """A loop around an all-gather of 32 bytes on 4 devices, 24 of which each device sends."""
    text = LOOP.replace("TEST", test).replace("STEP", str(step)).replace("LIMIT", str(limit))
    return text.replace("FIRST", str(first)).replace("DIRECTION", direction).replace("COUNT", count)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (loop(), 5),
        (loop(first=1, step=2, limit=6), 3),
        (loop("compare(%i, %limit), direction=LE"), 6),
        (loop("compare(%i, %limit), direction=NE", first=5, step=-1, limit=0), 5),
        (loop("compare(%i, %limit), direction=GT", first=8, step=-3, limit=0), 3),
        (loop("compare(%limit, %i), direction=GT"), 5),
        (loop("compare(%i, %n), direction=LT"), 9),
        (loop("fusion(%i, %limit), kind=kLoop, calls=%compare"), 5),
        (loop(first=7), 0),
        (loop().replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'), 11),
    ],
)
def test_a_loop_counts_once_per_turn(text, count):
    counted = traffic(text, (0,) * 4)
    assert counted.ici_bytes == count * 24
    assert [c.times for c in counted.collectives] == [count]
    assert not counted.unknown_loops


@pytest.mark.parametrize(
    "text",
    [
        loop("compare(%i, %n), direction=LT", count="copy(%q)"),
        loop("compare(%limit, %i), direction=LT"),  # counts away from its limit
        loop("compare(%i, %n), direction=LT").replace("tuple(%next, %g, %n)", "tuple(%next, %g, %next)"),
    ],
    ids=["length is data", "never ends", "limit moves"],
)
def test_a_loop_of_unknown_length_walks_its_array_once_and_is_told(text):
    counted = traffic(text, (0,) * 4)
    assert counted.ici_bytes == 4 * 24, "8 values, 2 at a time"
    assert [loop.turns for loop in counted.unknown_loops] == [4]


def loop_turns(text: str):
    module = parse(text)
    main = module.computations["main"]
    return turns(module, main, main.instructions["w"])


def test_an_unknown_loop_that_sends_nothing_is_not_told():
    text = loop("compare(%i, %n), direction=LT", count="copy(%q)")
    silent = re.sub(r"%g = .*", "%g = f32[8]{0} copy(%x)", text)
    assert traffic(silent, (0,) * 4).unknown_loops == ()
    assert loop_turns(silent) == (4, False)
    assert loop_turns(re.sub(r"%cut = .*", "%cut = f32[8]{0} copy(%x)", silent)) == (1, False), "nothing is sliced"


def test_of_a_choice_the_heaviest_branch_counts():
    branch = "%{0} (p: f32[8,16]) -> f32[8,16] {{\n  %p = f32[8,16] parameter(0)\n  ROOT %r = f32[8,16] {1}\n}}\n\n"
    both = branch.format("light", "copy(%p)") + branch.format("heavy", f"all-reduce(%p), {ALL}, to_apply=%sum")
    text = (
        f"HloModule choice, num_partitions=8\n\n{both}ENTRY %main (i: s32[], p: f32[8,16]) -> f32[8,16] {{\n"
        "  %i = s32[] parameter(0)\n  %p = f32[8,16] parameter(1)\n"
        "  ROOT %x = f32[8,16] conditional(%i, %p, %p), branch_computations={%light, %heavy}\n}\n"
    )
    named = text.replace("branch_computations={%light, %heavy}", "true_computation=%heavy, false_computation=%light")
    called = text.replace("conditional(%i, %p, %p), branch_computations={%light, %heavy}", "call(%p), to_apply=%heavy")
    for program in (text, named, called):
        assert traffic(program, (0,) * 8).ici_bytes == 2 * 512 * 7 // 8


def a_mesh(data: int, fsdp: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def a_stack(mesh, dtype, layers=5, width=16):
    """(function, weights, activations): a scanned stack of matrices sharded over fsdp, gathered one by one."""

    def lies(*names):
        return NamedSharding(mesh, PartitionSpec(*names))

    def run(weights, x):
        def layer(x, weight):
            weight = jax.lax.with_sharding_constraint(weight, lies())
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), lies(("data", "fsdp"))), None

        return jax.lax.scan(layer, x, weights)[0]

    weights = jax.ShapeDtypeStruct((layers, width, width), dtype, sharding=lies(None, "fsdp"))
    return run, weights, jax.ShapeDtypeStruct((8, width), dtype, sharding=lies(("data", "fsdp")))


@pytest.mark.parametrize(("data", "fsdp"), [(1, 2), (1, 4), (1, 8), (2, 4)])
def test_a_scan_gathers_each_layer_once(data, fsdp):
    run, weights, x = a_stack(a_mesh(data, fsdp), jnp.bfloat16)
    counted = traffic(partitioned(jax.jit(run).lower(weights, x)), [i // fsdp for i in range(data * fsdp)])
    whole = 5 * 16 * 16 * 2
    assert (counted.of("all-gather"), counted.ici_bytes) == (whole, whole * (fsdp - 1) // fsdp)
    assert (counted.dcn_bytes, counted.unknown_loops) == (0, ())


def test_optimised_text_agrees_with_partitioned_text():
    """In float32: the CPU's compiler gathers bfloat16 as float32."""
    run, weights, x = a_stack(a_mesh(2, 4), jnp.float32)
    islands = [0, 0, 0, 0, 1, 1, 1, 1]
    first = traffic(partitioned(jax.jit(run).lower(weights, x)), islands)
    last = traffic(jax.jit(run).lower(weights, x).compile().as_text(), islands)
    assert first.ici_bytes == last.ici_bytes == 5 * 16 * 16 * 4 * 3 // 4


def test_the_gradient_of_a_replicated_weight_crosses_islands_once():
    mesh = a_mesh(2, 4)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows)
    weight = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    gradient = jax.jit(jax.grad(lambda weight, x: jnp.tanh(x @ weight).sum()))
    counted = traffic(partitioned(gradient.lower(weight, x)), [0, 0, 0, 0, 1, 1, 1, 1])
    assert [(c.kind, c.shape, c.islands) for c in counted.collectives] == [("all-reduce", (16, 16), 2)]
    assert (counted.ici_bytes, counted.dcn_bytes) == (2 * 1024 * 3 // 4, 2 * 1024 // 8)
