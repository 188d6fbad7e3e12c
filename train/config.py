"""Configuration of a run: frozen dataclasses, checked when they are made.

A preset (`train.presets`) is a function that returns a complete `Config`; command-line flags
overlay it. There is no other source of settings.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal

AXES = ("data", "fsdp", "tensor", "context")
"""Names of the mesh axes, in the order of device placement."""


def _require(fine: bool, sentence: str) -> None:
    if not fine:
        raise ValueError(sentence)


@dataclasses.dataclass(frozen=True)
class Model:
    """The language model; fields as in `attnjax.models.LanguageModelConfig`."""

    mixers: str = "softmax"
    """Pattern of sequence mixers over the layers: see `attnjax.models.pattern`."""
    width: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; None: as many as query heads."""
    mlp: Literal["swiglu", "sglu"] = "swiglu"
    mlp_width: int | None = None
    """Hidden width of the MLP; None: the model's default."""
    norm: Literal["rmsnorm", "srmsnorm"] = "rmsnorm"
    qk_norm: bool = False
    """Normalize queries and keys per head."""
    tie_embeddings: bool = True
    """Use the embedding table as the output head."""
    rope_base: float = 10000.0
    scan_layers: bool = True
    """Run repeated layers under one scan: faster to compile, identical in value."""
    remat: Literal["none", "full", "dots", "names"] = "none"
    """What the backward pass recomputes."""
    dtype: str = "float32"
    """Type of the computation; parameters, softmax and loss stay float32."""
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        _require(
            min(self.width, self.num_layers, self.num_heads) >= 1,
            f"model.width, model.num_layers and model.num_heads must be at least 1; got "
            f"{self.width}, "
            f"{self.num_layers} and {self.num_heads}.",
        )
        _require(
            self.width % self.num_heads == 0,
            f"model.width must be a multiple of model.num_heads; got width={self.width}, "
            f"num_heads={self.num_heads}.",
        )
        _require(
            self.num_kv_heads is None or self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads must divide model.num_heads; got "
            f"num_kv_heads={self.num_kv_heads}, "
            f"num_heads={self.num_heads}.",
        )
        _require(
            0.0 <= self.dropout_rate < 1.0,
            f"model.dropout_rate must be in [0, 1); got {self.dropout_rate}.",
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """Bytes of local files, cut into rows of `context` tokens."""

    source: str = "stdlib"
    """"stdlib": the sources of the Python standard library; or a folder, a file, a glob."""
    context: int = 2048
    """Tokens (bytes) per row."""
    batch: int = 8
    """Rows per optimizer step, over all devices and accumulation steps."""
    packing: Literal["concat", "first_fit"] = "concat"
    """"concat": one stream, cut every `context` tokens; "first_fit": pieces fitted into rows."""
    holdout: int = 10
    """One file in `holdout`, by hash of its content, is kept for validation."""
    max_bytes: int | None = None
    """Read files, in the order of their names, up to this many bytes; None: all."""

    def __post_init__(self) -> None:
        _require(self.context >= 2, f"data.context must be at least 2 tokens; got {self.context}.")
        _require(self.batch >= 1, f"data.batch must be at least 1 row; got {self.batch}.")
        _require(
            self.holdout >= 2,
            f"data.holdout={self.holdout} would leave nothing to train on; pass 2 or more (10 "
            "keeps 1 in 10).",
        )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Number of devices along each mesh axis; one may be -1 and takes what is left."""

    data: int = -1
    """Copies of the model, each with its own rows."""
    fsdp: int = 1
    """Rows and parameters are both split over this axis."""
    tensor: int = 1
    """Heads, MLP width and vocabulary are split over this axis."""
    context: int = 1
    """Tokens of one row; only 1 is supported."""

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        _require(
            all(n == -1 or n >= 1 for n in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be positive, and at most one -1; got "
            f"{dict(zip(AXES, sizes, strict=True))}.",
        )
        _require(
            self.context == 1,
            f"mesh.context={self.context}: no mechanism splits the tokens of a row over devices "
            "yet; pass "
            "mesh.context=1 and use data, fsdp or tensor.",
        )


@dataclasses.dataclass(frozen=True)
class Optim:
    """Optimizer, and what surrounds it in a step."""

    name: Literal["adamw", "lion", "muon"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate; for muon that of the orthogonalized matrices."""
    adam_lr: float = 3e-3
    """Muon only: peak learning rate of embeddings, norms and biases (by AdamW)."""
    beta1: float = 0.9
    """Decay of the first moment (muon: its momentum is 0.95, this is AdamW's part)."""
    beta2: float = 0.95
    weight_decay: float = 0.0
    """On matrices only, multiplied by the learning rate."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    accumulate: int = 1
    """Slices of the batch computed one after the other, weighted by their token counts."""
    loss_chunk: int = 512
    """Tokens of a row whose logits exist at one time."""
    z_loss: float = 0.0
    """Weight of the mean squared log-normalizer; 1e-4 is usual for large vocabularies."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What a loss or update that is not finite does; it never reaches the weights."""

    def __post_init__(self) -> None:
        _require(
            self.lr > 0 and self.adam_lr > 0,
            f"optim.lr must be positive; got {self.lr}, {self.adam_lr}.",
        )
        _require(
            self.accumulate >= 1, f"optim.accumulate must be at least 1; got {self.accumulate}."
        )
        _require(
            self.loss_chunk >= 1,
            f"optim.loss_chunk must be at least 1 token; got {self.loss_chunk}.",
        )
        _require(self.clip >= 0, f"optim.clip must be 0 (off) or positive; got {self.clip}.")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate over the steps, as a fraction of its peak."""

    kind: Literal["cosine", "wsd", "inv_sqrt", "constant"] = "cosine"
    """"wsd": warm up, stay, then fall in a straight line during the last `decay` of the run."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.2
    """Fraction of all steps in the falling tail of "wsd"."""
    final: float = 0.0
    """Fraction of the peak reached at the end of "cosine" and "wsd"."""

    def __post_init__(self) -> None:
        _require(self.warmup >= 0, f"schedule.warmup must be 0 or more steps; got {self.warmup}.")
        _require(
            0 <= self.decay <= 1,
            f"schedule.decay is a fraction of the run in [0, 1]; got {self.decay}.",
        )
        _require(
            0 <= self.final <= 1,
            f"schedule.final is a fraction of the peak in [0, 1]; got {self.final}.",
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When the state is saved; the last step and a stop signal always save."""

    every_steps: int = 0
    """Save every so many steps; 0: not by step."""
    every_minutes: float = 10.0
    """Save when so many minutes have passed since the last save; 0: not by time."""
    keep: int = 2
    """Checkpoints that stay on disk."""
    resume: bool = True
    """Go on from the newest whole checkpoint in the folder; False: there must be none."""
    export: bool = True
    """Write the weights alone to `weights.npz` at the end."""

    def __post_init__(self) -> None:
        _require(self.keep >= 1, f"checkpoint.keep must be at least 1; got {self.keep}.")


@dataclasses.dataclass(frozen=True)
class Log:
    """What is shown; every step is always written to `metrics.jsonl`."""

    console: Literal["auto", "live", "plain", "quiet"] = "auto"
    """"auto": a live progress bar on a terminal, plain lines elsewhere."""
    every: int = 20
    """Steps between plain lines."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"log.every must be at least 1 step; got {self.every}.")


@dataclasses.dataclass(frozen=True)
class Eval:
    """Validation on the held-out files."""

    every: int = 0
    """Steps between validations during training; 0: only at the end."""
    batches: int = 4
    """Batches of a validation during training; the one at the end reads every held-out byte."""
    rows: int = 8
    """Rows per validation batch."""
    prompt: str = "def "
    """Beginning of the sample shown at the end."""
    sample_bytes: int = 400
    """Length of the sample; 0: none."""
    temperature: float = 0.8
    top_k: int | None = 40

    def __post_init__(self) -> None:
        _require(
            min(self.every, self.sample_bytes) >= 0 and min(self.batches, self.rows) >= 1,
            f"eval.every and eval.sample_bytes must be 0 or more, eval.batches and eval.rows 1 or "
            f"more; got {self}.",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A complete run."""

    name: str = "run"
    """Name of the run, and of its folder below `runs/`."""
    out: str | None = None
    """Folder of checkpoints, metrics and curve; None: runs/<name>."""
    steps: int = 1000
    """Optimizer steps in total, over all resumed pieces of the run."""
    seed: int = 0
    model: Model = Model()
    data: Data = Data()
    mesh: Mesh = Mesh()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    eval: Eval = Eval()

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps must be at least 1; got {self.steps}.")
        _require(
            self.data.batch % self.optim.accumulate == 0,
            f"data.batch must be a multiple of optim.accumulate; got {self.data.batch} rows and "
            f"{self.optim.accumulate} slices.",
        )

    @property
    def folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.out or f"runs/{self.name}").resolve()

    def identity(self) -> dict[str, Any]:
        """The fields that decide the numbers of a run; a checkpoint resumes only under equal ones.

        Left out: names and folders, `steps` (a run may be extended), the mesh (any mesh may
        resume), and what only shows, saves, validates, or trades memory for time.
        """
        free = {"name", "out", "steps", "mesh", "checkpoint", "log", "eval"}
        free |= {"model.scan_layers", "model.remat", "optim.loss_chunk", "optim.on_nan"}
        return {
            k: v for k, v in flatten(self).items() if k not in free and k.split(".")[0] not in free
        }


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dataclasses as one level: `{"optim.lr": 0.001, ...}`."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        flat.update(
            flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
        )
    return flat


def to_json(config: Config) -> str:
    """The configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def show(config: Config) -> str:
    """The configuration in a few lines, one per section, for people."""
    sections: dict[str, list[str]] = {}
    for name, value in flatten(config).items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section or "run", []).append(f"{field}={value!r}")
    return "\n".join(f"{section:<11} {' '.join(items)}" for section, items in sections.items())


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """Builds a dataclass from nested dictionaries, as read from JSON; checks run again.

    Raises:
      ValueError: a key that the dataclass does not have (a file of another version).
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(hints))}."
        )
    nested = {
        k: from_dict(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v
        for k, v in values.items()
    }
    return kind(**nested)
