"""TPU slices and GPU nodes: what a topology means, under every name it has."""

import pytest

from launch import slices
from launch.job import LaunchError

# accelerator: chips, hosts, devices of a mesh, machine type, accelerator type of queued resources
FACTS = {
    "v4:2x2x2": (8, 2, 8, "ct4p-hightpu-4t", "v4-16"),
    "v4:4x4x4": (64, 16, 64, "ct4p-hightpu-4t", "v4-128"),
    "v5e:1x1": (1, 1, 1, "ct5lp-hightpu-1t", "v5litepod-1"),
    "v5e:4x4": (16, 4, 16, "ct5lp-hightpu-4t", "v5litepod-16"),
    "v5e:16x16": (256, 64, 256, "ct5lp-hightpu-4t", "v5litepod-256"),
    "v5p:2x2x1": (4, 1, 4, "ct5p-hightpu-4t", "v5p-8"),
    "v5p:16x20x28": (8960, 2240, 8960, "ct5p-hightpu-4t", "v5p-17920"),
    "v6e:8x16": (128, 32, 128, "ct6e-standard-4t", "v6e-128"),
}


@pytest.mark.parametrize("text", FACTS)
def test_a_slice_counts_chips_hosts_and_devices(text):
    got = slices.parse(text)
    assert (got.chips, got.hosts, got.devices, got.machine, got.accelerator_type) == FACTS[text]


def test_ironwood_has_two_devices_a_chip_and_is_had_on_gke_alone():
    got = slices.parse("tpu7x:2x2x2")
    assert (got.chips, got.hosts, got.devices, got.machine) == (8, 2, 16, "tpu7x-standard-4t")
    with pytest.raises(LaunchError, match="on GKE alone"):
        assert got.accelerator_type


def test_gpus_are_hosts_times_gpus():
    assert slices.parse("h100:8") == slices.Gpus("h100", 1, 8)
    assert slices.parse("h200:2x8").devices == 16


def test_an_accelerator_type_says_the_shape_nearest_to_a_cube_and_nothing_else():
    assert all(slices.parse(text).usual for text in ("v4:2x2x4", "v5p:4x8x8", "v4:8x8x8", "v5p:8x8x12", "v6e:4x8"))
    assert not any(slices.parse(text).usual for text in ("v4:4x4x16", "v5p:4x4x32", "v4:8x4x4"))


REFUSED = {
    "v5e": "not known: write GENERATION:TOPOLOGY.*v4, v5e, v5p, v6e, tpu7x.*a100.*h100",
    "v5e-16": "not known",
    "v7:4x4": "not known",
    "v5e:3x3": "no slice of v5e; it has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "v5e:4x4x4": "no slice of v5e",
    "v6e:16x32": "no slice of v6e",
    "v5p:4x4": "no slice of v5p.*multiples of 4, in rising order, up to 8960 chips",
    "v5p:8x4x4": "no slice of v5p",
    "v5p:4x4x6": "no slice of v5p",
    "v5p:24x24x24": "no slice of v5p",
    "v4:16x16x20": "up to 4096 chips",
    "tpu7x:-4x4x4": "no slice of tpu7x",
    "h100:": "write h100:HOSTSxGPUS",
    "h100:2x8x1": "write h100:HOSTSxGPUS",
    "h100:0x8": "write h100:HOSTSxGPUS",
    "h100:16": "at most 8 GPUs of that kind; write h100:HOSTSx8",
}


@pytest.mark.parametrize("text", REFUSED)
def test_an_unknown_accelerator_is_refused_with_what_is_known(text):
    with pytest.raises(LaunchError, match=REFUSED[text]):
        slices.parse(text)
