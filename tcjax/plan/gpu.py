"""A GPU described to XLA's compiler in its own terms, a text of stream_executor's GpuTargetConfigProto.

Facts: NVIDIA's CUDA C++ programming guide, "Technical specifications per compute capability" (9.0: threads, registers,
shared memory; 228 KB per multiprocessor, of which a block can opt in to 227), the Hopper white paper (132 multiprocessors of
128 lanes on the SXM module, 50 MB of second-level cache, 1.98 GHz at most) and the data sheets (memory, its rate).
Without a GPU nothing is tuned by trying: kernels may be others than in a real run.
"""

from __future__ import annotations

from tcjax.plan.chips import CHIPS, GPU_SHARE, Chip

_KB = 1024
_HOPPER = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
    "shared_memory_per_block": 48 * _KB,
    "shared_memory_per_block_optin": 227 * _KB,
    "shared_memory_per_core": 228 * _KB,
    "core_count": 132,
    "fpus_per_core": 128,
    "l2_cache_size": 50 * _KB * _KB,
    "clock_rate_ghz": 1.98,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
}


def target(chip: Chip) -> str:
    """The text."""
    memory = int(CHIPS[chip.name].hbm_bytes / GPU_SHARE)  # all of it, whatever JAX takes
    facts = _HOPPER | {"memory_bandwidth": int(chip.hbm_rate), "device_memory_size": memory}
    lines = [f"  {name}: {value}" for name, value in facts.items()]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "  cuda_compute_capability { major: 9 minor: 0 }",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 12 }",
            f'device_description_str: "{chip.device_kind}"',
        ]
    )
