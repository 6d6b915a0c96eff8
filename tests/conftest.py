"""What every test relies on: eight virtual CPU devices, and the folder of published weights where there is one."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import tempfile
from pathlib import Path

# Both are read when JAX starts its backend, so they must stand before any test imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# XLA's thread pool on a CPU has as many threads as there are cores or devices, whichever is more. A device that waits
# for others in two collectives at once (of two towers, say) blocks two of them, and with none left all wait for ever.
os.environ.setdefault("NPROC", "64")

# A program that several tests, or several workers, compile is compiled once a run. Workers inherit the folder from the
# process that starts them, which removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vla_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import pytest
from jaxtyping import install_import_hook
from xdist.scheduler import LoadScopeScheduling

# Modules whose signatures say shapes; every call that a test makes into them is checked. It must precede their import.
install_import_hook(
    [
        "vla_jax.adapters.adapter_fusion",
        "vla_jax.adapters.affine",
        "vla_jax.adapters.bottleneck",
        "vla_jax.adapters.clip_adapter",
        "vla_jax.adapters.cocoop",
        "vla_jax.adapters.cross_modal",
        "vla_jax.adapters.features",
        "vla_jax.adapters.fusion",
        "vla_jax.adapters.hyperformer",
        "vla_jax.adapters.ladder",
        "vla_jax.adapters.learned_tokens",
        "vla_jax.adapters.lora",
        "vla_jax.adapters.maple",
        "vla_jax.adapters.mma",
        "vla_jax.adapters.phm",
        "vla_jax.adapters.prefix",
        "vla_jax.adapters.prompt",
        "vla_jax.adapters.router",
        "vla_jax.adapters.router_training",
        "vla_jax.adapters.tip_adapter",
        "vla_jax.algebra.low_rank",
        "vla_jax.algebra.sparsify",
        "vla_jax.algebra.sums",
        "vla_jax.algebra.updates",
        "vla_jax.backbones.clip",
        "vla_jax.backbones.clip_towers",
        "vla_jax.backbones.transformer",
        "vla_jax.tasks",
    ],
    "signature_checks.check",
)


MAPS = Path("/proc/self/maps")
_tests = 0


class _ByFileOrSetting(LoadScopeScheduling):
    """Tests of one file go to one worker, for what they share; the list of properties is dealt out by setting."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        return f"{file} {test.partition('[')[2]}" if file.endswith("test_properties.py") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _ByFileOrSetting:
    """How tests are dealt out to workers (pytest-xdist)."""
    return _ByFileOrSetting(config, log)


@pytest.fixture(scope="session")
def weights_folder() -> Path:
    """The folder of published weights, or the one ``VLA_JAX_TEST_WEIGHTS`` names; the test is skipped without it."""
    given = os.environ.get("VLA_JAX_TEST_WEIGHTS")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "weights"
    if not folder.is_dir():
        pytest.skip(f"no published weights in {folder}; set VLA_JAX_TEST_WEIGHTS to a folder that holds them")
    return folder


@pytest.fixture(autouse=True)
def _few_mapped_programs():
    """Forgets compiled programs before they use up the memory maps that Linux gives a process, 65,530 by default.

    Each program takes several; XLA dies while it compiles when there are none left.
    """
    yield
    global _tests
    _tests += 1
    if _tests % 10 == 0 and MAPS.is_file() and MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@contextlib.contextmanager
def _quickly_compiled():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules that compile many small programs whose results do not depend on how well they are compiled."""
    with _quickly_compiled():
        yield


@pytest.fixture
def quick_compilation_of_a_test():
    """The same for single tests of modules in which others look at what the compiler makes."""
    with _quickly_compiled():
        yield
