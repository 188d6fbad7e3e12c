"""Strict settings for every test: no implicit promotion, warnings are errors, 8 CPU devices."""

import os

# Compilers for other devices may be installed; they must not look for their hardware here.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile thousands of small programs and run each once or twice: compile them quickly.
# Runs in child processes (the trainer's) are compiled as a user's are.
jax.config.update("jax_disable_most_optimizations", not os.environ.get("ATTNJAX_OPTIMIZED"))

if os.environ.get("ATTNJAX_TYPECHECK"):  # shapes and types of annotations, checked at every call
    from jaxtyping import install_import_hook

    install_import_hook(["attnjax"], "beartype.beartype")


@pytest.fixture
def key():
    """A random key, the same in every run."""
    return jax.random.key(20240917)
