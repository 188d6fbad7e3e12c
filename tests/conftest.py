"""Strict settings for every test: no implicit promotion, warnings are errors, 8 CPU devices."""

import os

# Compilers for other devices may be installed; they must not look for their hardware here.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

# XLA's emitters of fused loops take half of the time to compile a small program. JAX 0.11 has no
# other ones, and an XLA that does not know a flag ends the process.
_FLAGS = os.environ.get("XLA_FLAGS")
if jax.__version_info__ < (0, 11) and not os.environ.get("ATTNJAX_OPTIMIZED"):
    os.environ["XLA_FLAGS"] = f"{_FLAGS or ''} --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile thousands of small programs and run each once or twice: compile them quickly.
# Runs in child processes (the trainer's) are compiled as a user's are.
jax.config.update("jax_disable_most_optimizations", not os.environ.get("ATTNJAX_OPTIMIZED"))
jax.devices()  # reads the flags, which child processes must not inherit
if _FLAGS is None:
    os.environ.pop("XLA_FLAGS", None)
else:
    os.environ["XLA_FLAGS"] = _FLAGS

if os.environ.get("ATTNJAX_TYPECHECK"):  # shapes and types of annotations, checked at every call
    from jaxtyping import install_import_hook

    install_import_hook(["attnjax"], "beartype.beartype")


@pytest.fixture
def key():
    """A random key, the same in every run."""
    return jax.random.key(20240917)


_TESTS_BETWEEN_LOOKS, _MANY_MAPPINGS = 25, 30_000
_ran = 0


@pytest.fixture(autouse=True)
def _few_programs_at_a_time():
    """Frees compiled programs before the kernel's limit on memory mappings (65,530) is reached.

    Every program of the CPU compiler has mappings of its own, and beyond the limit LLVM crashes.
    """
    global _ran
    yield
    _ran += 1
    if _ran % _TESTS_BETWEEN_LOOKS == 0 and os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps", "rb") as file:
            if sum(1 for _ in file) > _MANY_MAPPINGS:
                jax.clear_caches()
