"""Command line of the benchmarks: `python -m benchmarks NAME [options]`; `--help` lists them."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys

OTHERS = {
    "portability": ("benchmarks.portability", "compiles every kernel for every TPU and GPU"),
    "tpu-static": ("benchmarks.tpu_static", "bundles of the TPU kernels beside splash attention"),
    "gpu": ("benchmarks.gpu", "times beside cuDNN, PyTorch and fla on an NVIDIA GPU"),
    "tune": ("benchmarks.tuning", "measures tile sizes on the device at hand"),
    "zoo": (
        "benchmarks.zoo",
        "every causal mechanism under one harness",
    ),
}
"""Benchmarks with options of their own: name -> (module with `add_arguments` and `run`, help)."""


def main() -> None:
    """Parses the command line, takes `--threads` cores and runs one benchmark."""
    if len(sys.argv) > 1 and sys.argv[1] in OTHERS:
        _other(sys.argv[1])
        return
    args = _parser().parse_args()
    # Before jax starts: its thread pools take the cores that the process may use.
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        os.sched_setaffinity(0, cores)
    args.out.mkdir(parents=True, exist_ok=True)

    if args.benchmark == "attention":
        from benchmarks import attention

        attention.run(
            lengths=args.lengths,
            cases=args.cases,
            heads=args.heads,
            head_dim=args.head_dim,
            repeats=args.repeats,
            threads=args.threads,
            out=args.out,
        )
    elif args.benchmark == "memory":
        from benchmarks import memory

        memory.run(lengths=args.lengths, heads=args.heads, head_dim=args.head_dim, out=args.out)
    else:
        from benchmarks import lightning

        lightning.run(lengths=args.lengths, out=args.out)


def _other(name: str) -> None:
    """Runs one of `OTHERS`; a result that is not 0 is the exit code."""
    module = importlib.import_module(OTHERS[name][0])
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=module.__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    found = module.run(**vars(parser.parse_args(sys.argv[2:])))
    sys.exit(found if isinstance(found, int) else 0)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--threads", type=int, default=2, help="cores for every candidate (2)")
    shared.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("build/benchmarks"),
        help="folder for the JSON file and the picture (build/benchmarks)",
    )
    shape = argparse.ArgumentParser(add_help=False)
    shape.add_argument("--heads", type=int, default=8, help="query and key/value heads (8)")
    shape.add_argument("--head-dim", type=int, default=64, help="width of a head (64)")

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)

    attention = commands.add_parser(
        "attention",
        parents=[shared, shape],
        help="times beside jax.nn and, when installed, PyTorch SDPA and FlexAttention",
    )
    attention.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    names = ["causal", "full", "window256", "window_sink", "documents"]
    attention.add_argument("--cases", nargs="+", choices=names, default=names)
    attention.add_argument("--repeats", type=int, default=5, help="timed rounds of all candidates")

    memory = commands.add_parser(
        "memory", parents=[shared, shape], help="compiled temporary memory beside dense attention"
    )
    memory.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])

    lightning = commands.add_parser(
        "lightning",
        parents=[shared],
        help="tokens per second over length at constant batch x length",
    )
    powers = [1024 * 2**i for i in range(7)]
    lightning.add_argument("--lengths", type=int, nargs="+", default=powers)

    for name, (_, text) in OTHERS.items():  # their options are in their own modules
        commands.add_parser(name, help=text, add_help=False)
    return parser


if __name__ == "__main__":
    main()
