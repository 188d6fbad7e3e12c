"""Presets: functions that return a complete configuration; `python -m train run <name>`."""

from __future__ import annotations

from collections.abc import Callable

from train.config import Checkpoint, Config, Data, Eval, Log, Model, Optim, Schedule


def demo() -> Config:
    """Hybrid byte model on the standard library's sources: minutes on two CPU cores."""
    return Config(
        name="demo",
        steps=280,
        model=Model(
            mixers="lightning*2, window(256)+sink(4), softmax",
            width=128,
            num_layers=4,
            num_heads=2,
            mlp_width=384,
        ),
        # few held-out files: predicting every byte of them is part of the run's time
        data=Data(context=2048, batch=2, holdout=30),
        optim=Optim(name="muon", lr=0.02, adam_lr=0.005),
        schedule=Schedule(kind="wsd", warmup=20, decay=0.4),
        checkpoint=Checkpoint(every_minutes=0.5),
        eval=Eval(every=160, batches=4, rows=4),
        log=Log(every=20),
    )


def tiny() -> Config:
    """A run of seconds, to see that everything works."""
    return Config(
        name="tiny",
        steps=12,
        model=Model(mixers="softmax", width=32, num_layers=2, num_heads=2, mlp_width=64),
        data=Data(context=64, batch=8, max_bytes=40_000),
        optim=Optim(lr=3e-3, loss_chunk=32),
        schedule=Schedule(warmup=2),
        checkpoint=Checkpoint(every_steps=4, every_minutes=0.0),
        eval=Eval(rows=8, batches=2, sample_bytes=16),
        log=Log(every=4),
    )


def stdlib_16k() -> Config:
    """Ten million parameters at 16,384 bytes of context: for one accelerator."""
    return Config(
        name="stdlib_16k",
        steps=4000,
        model=Model(
            mixers="lightning*3, window(1024)+sink(4), softmax",
            width=384,
            num_layers=5,
            num_heads=6,
            mlp_width=1024,
            remat="dots",
            dtype="bfloat16",
        ),
        data=Data(context=16384, batch=8),
        optim=Optim(name="muon", lr=0.02, adam_lr=0.003, weight_decay=0.1, loss_chunk=2048),
        schedule=Schedule(kind="wsd", warmup=100, decay=0.4),
        checkpoint=Checkpoint(every_steps=1000, every_minutes=10.0),
        eval=Eval(every=500, batches=4, rows=8, sample_bytes=800),
        log=Log(every=20),
    )


PRESETS: dict[str, Callable[[], Config]] = {"demo": demo, "tiny": tiny, "stdlib_16k": stdlib_16k}
"""Name -> preset."""
