"""Eight fake CPU devices, exact matmuls, quiet threads: set before anything imports JAX, for tests and subprocesses."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Eight devices share a few cores: threads inside one operation only get in the way.
        "--xla_cpu_multi_thread_eigen=false",
        # Most of a test's time is XLA compiling something tiny: unoptimised, that takes a quarter.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # An unknown flag ends the process: jaxlib 0.11.2 has lost this one.
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith(("0.10.", "0.11.0")) else []),
    ]
).strip()
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, the oracle
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is not a test
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"
# Tests compile the same small programs many times: each is compiled once per worker, subprocesses included.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    Path(__file__).parents[1] / ".pytest_cache" / "xla" / os.environ.get("PYTEST_XDIST_WORKER", "main")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["COLUMNS"] = "120"  # tables and --help look the same in every terminal

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forgotten_programs():
    """A process that holds some thousands of compiled programs runs out of memory maps, and XLA then crashes."""
    yield
    jax.clear_caches()


def pytest_configure(config: pytest.Config) -> None:
    if jax.device_count() != 8:
        raise pytest.UsageError(
            f"tests need 8 fake CPU devices, JAX shows {jax.devices()}; was it imported before tests/conftest.py?"
        )
