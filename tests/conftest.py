"""Every test process sees eight CPU devices, so that meshes can be tested on any machine."""

import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """What has been compiled is kept in pytest's cache: most of a first run is compiling."""
    if not hasattr(config, "cache"):  # pytest -p no:cacheprovider
        return
    kept = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in kept.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for processes that tests start


@pytest.fixture(scope="module")
def quickly_compiled():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="session")
def memory_given_back():
    """The examples of `keep_memory` are run here, where hundreds of models come and go."""
    from priorityprop_jax.exact import memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_SETTINGS", {})
        yield


_since = {"clearing": 0}  # tests


def pytest_runtest_teardown(item, nextitem):
    """JAX forgets what it has traced once in a while, between files.

    Where 8,192 calls of jitted functions are kept, JAX 0.10 keeps no new ones: `_cache_size` is 0
    from then on, and every call is slow.
    """
    _since["clearing"] += 1
    if _since["clearing"] >= 300 and nextitem is not None and nextitem.path != item.path:
        _since["clearing"] = 0
        jax.clear_caches()
