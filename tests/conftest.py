"""Eight fake CPU devices, exact matmuls, quiet threads: set before anything imports JAX, for tests and subprocesses."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Eight devices share a few cores: threads inside one operation only get in the way.
        "--xla_cpu_multi_thread_eigen=false",
    ]
).strip()
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, the oracle
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is not a test
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"
os.environ["COLUMNS"] = "120"  # tables and --help look the same in every terminal

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    if jax.device_count() != 8:
        raise pytest.UsageError(
            f"tests need 8 fake CPU devices, JAX shows {jax.devices()}; was it imported before tests/conftest.py?"
        )
