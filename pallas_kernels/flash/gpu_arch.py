"""Which NVIDIA architecture a device kind is: kernels are chosen by it, and compilers do not check.

Compiling for a GPU on a host without one succeeds for instructions that the GPU lacks, so the
bodies ask this table before they do anything.
"""

from __future__ import annotations

import re

from pallas_kernels.dispatch import Target, Unsupported

COMPUTE_CAPABILITY: tuple[tuple[str, tuple[int, int]], ...] = (
    # longer names first: the first pattern that occurs as whole words decides
    (r"RTX PRO \d+ Blackwell", (12, 0)),
    (r"RTX PRO [456]\d{3}", (12, 0)),
    (r"(GeForce )?RTX 50\d\d", (12, 0)),
    (r"GB10", (12, 1)),
    (r"GB300|B300", (10, 3)),
    (r"GB200|B200|B100", (10, 0)),
    (r"GH200|H200|H100|H800|H20", (9, 0)),
    (r"RTX \d{4} Ada|RTX 40\d\d|L40S?|L20|L4|L2", (8, 9)),
    (r"Orin", (8, 7)),
    (r"A100|A800|A30X?", (8, 0)),
    (r"RTX A\d{4}|RTX 30\d\d|A40|A16|A10G?|A10M|A2", (8, 6)),
    (r"T4G?|RTX 20\d\d|GTX 16\d\d|TITAN RTX|Quadro RTX \d{4}", (7, 5)),
    (r"V100S?|TITAN V|GV100", (7, 0)),
    (r"P100", (6, 0)),
    (r"P40|P4|GTX 10\d\d", (6, 1)),
)
"""(pattern of the name, (major, minor)) of the GPUs that a device kind may name."""


def compute_capability(kind: str | None) -> tuple[int, int] | None:
    """Compute capability of a device kind as JAX reports it, None for one the table lacks.

    Example: >>> compute_capability("NVIDIA H100 80GB HBM3")
    (9, 0)
    """
    if kind is None:
        return None
    for pattern, version in COMPUTE_CAPABILITY:
        # a word ends where letters and digits do: "A100-SXM4" has the word A100, "A1000" has not
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", kind, re.IGNORECASE):
            return version
    return None


def require_capability(target: Target, least: tuple[int, int], kernel: str) -> tuple[int, int]:
    """Compute capability of a target that a kernel can run on.

    Args:
      target: what the kernel is lowered for; its own capability counts before the table.
      least: smallest (major, minor) that the kernel runs on.
      kernel: name of the kernel for the message.

    Raises:
      Unsupported: when the GPU is older than `least`, or its kind is unknown.
    """
    found = target.capability or compute_capability(target.kind)
    wanted = f"{least[0]}.{least[1]}"
    if found is None:
        raise Unsupported(
            f"{kernel}: the compute capability of the GPU kind {target.kind!r} is not known, and "
            f"the kernel needs {wanted} or newer; use implementation='xla', or lower for a device "
            "whose kind is known."
        )
    if found < least:
        raise Unsupported(
            f"{kernel}: needs a GPU of compute capability {wanted} or newer, but {target.kind!r} "
            f"has {found[0]}.{found[1]}; use implementation='xla'."
        )
    return found
