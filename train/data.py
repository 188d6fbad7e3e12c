"""Bytes of local files as batches: a pure function of (seed, step), so a run resumes exactly.

A document is a file: the mark 0, then its bytes. One file in `holdout`, by hash of its content, is
kept for validation. A batch holds `inputs`, `targets` (the next byte, or -1 where there is
nothing to predict), `segment_ids` (1, 2, ... per document within a row; 0 is padding) and
`positions` (from 0 at the start of each document in a row), all int32 [rows, context].
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.config import Data

Batch = dict[str, np.ndarray]
MARK = 0
_SKIPPED = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


def find_files(source: str) -> list[tuple[str, Path]]:
    """The files of a source as (name relative to it, path), sorted by name.

    Raises:
      ValueError: there is no such folder, file or glob match, or no file in it.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [
            p for p in root.rglob("*.py") if not _SKIPPED & set(p.relative_to(root).parts[:-1])
        ]
    elif any(c in source for c in "*?["):
        paths = [p for p in map(Path, glob.glob(source, recursive=True)) if p.is_file()]
        root = Path(os.path.commonpath([p.parent for p in paths])) if paths else Path()
    else:
        root = Path(source)
        if not root.exists():
            raise ValueError(
                f"data.source={source!r} does not exist; pass a folder, a file, a glob such as "
                "'texts/**/*.txt', or 'stdlib'."
            )
        paths = [root] if root.is_file() else list(root.rglob("*"))
        root = root.parent if root.is_file() else root
        paths = [
            p for p in paths if not any(part.startswith(".") for part in p.relative_to(root).parts)
        ]
    files = sorted(
        (p.relative_to(root).as_posix(), p) for p in paths if p.is_file() and p.stat().st_size
    )
    if not files:
        raise ValueError(
            f"data.source={source!r} holds no file with content; pass a folder or glob that does."
        )
    return files


class ByteData:
    """The two streams of a data source, and the rows cut from them.

    Attributes:
      train, held_out: documents as bytes.
      digest: hash over names and contents of all files; stored with every checkpoint.
    """

    def __init__(self, config: Data) -> None:
        """Reads all files of `config.source`.

        Raises:
          ValueError: no files, or too few bytes for one row of each stream.
        """
        self.config = config
        self.train: list[bytes] = []
        self.held_out: list[bytes] = []
        digest, size = hashlib.sha256(), 0
        for name, path in find_files(config.source):
            content = path.read_bytes()
            if config.max_bytes is not None and size + len(content) > config.max_bytes:
                content = content[: config.max_bytes - size]
                if not content:
                    break
            size += len(content)
            # by content, so that two copies of a file never fall on different sides
            key = hashlib.sha256(content).digest()
            digest.update(name.encode() + b"\0" + key)
            kept = int.from_bytes(key[:8], "big") % config.holdout == 0
            (self.held_out if kept else self.train).append(content)
        self.digest = digest.hexdigest()
        if not self.held_out or not self.train:
            self._split_inside()
        need = 2 * config.context + 1
        stream = sum(len(d) + 1 for d in self.train)
        if stream < need:
            raise ValueError(
                f"data.source={config.source!r} has {stream} training bytes, but "
                f"data.context={config.context} "
                f"needs at least {need}; use more text or a shorter context."
            )

    def _split_inside(self) -> None:
        # so few files that one side got none: the end of each file is held out instead
        documents, n = self.train + self.held_out, self.config.holdout
        cut = [max(1, len(d) - max(1, len(d) // n)) for d in documents]
        self.train = [d[:c] for d, c in zip(documents, cut, strict=True)]
        self.held_out = [d[c:] for d, c in zip(documents, cut, strict=True) if d[c:]]
        if not self.held_out:
            raise ValueError(
                f"data.source={self.config.source!r} is too short to hold anything out."
            )

    @functools.cached_property
    def _rows(self) -> Rows:
        kind = ConcatRows if self.config.packing == "concat" else FirstFitRows
        return kind(self.train, self.config.context)

    def batch(self, seed: int, step: int, rows: int) -> Batch:
        """The training batch of a step: the same for the same arguments, in any process.

        Every epoch visits each row once, in an order drawn from (seed, epoch).
        """
        count = self._rows.count
        picked = []
        for index in range(step * rows, (step + 1) * rows):
            epoch, place = divmod(index, count)
            phase, order = _epoch_order(seed, epoch, count, self.config.context)
            picked.append(self._rows.row(int(order[place]), phase))
        return _stack(picked)

    def validation(self, rows: int, batches: int | None = None) -> Iterator[Batch]:
        """Batches that predict every held-out byte exactly once, or evenly spaced ones of them.

        Args:
          rows: rows per batch; the last batch is filled up with padding.
          batches: how many; None: all.
        """
        source = ConcatRows(self.held_out, self.config.context)
        total = -(-(len(source.stream) - 1) // self.config.context)
        if batches is None or batches * rows >= total:
            chosen = np.arange(total)
        else:
            chosen = np.linspace(0, total - 1, batches * rows).round().astype(np.int64)
        for first in range(0, len(chosen), rows):
            picked = [source.row(int(i), 0) for i in chosen[first : first + rows]]
            empty = {
                name: np.full_like(x, -1 if name == "targets" else 0)
                for name, x in picked[0].items()
            }
            yield _stack(picked + [empty] * (rows - len(picked)))

    def describe(self) -> str:
        """One line with numbers of files and bytes."""
        kept, seen = sum(map(len, self.held_out)), sum(map(len, self.train))
        return (
            f"{self.config.source}: {len(self.train)} files, {seen:,} bytes to train on; "
            f"{len(self.held_out)} files, {kept:,} bytes held out; digest {self.digest[:12]}"
        )


class ConcatRows:
    """One stream of documents, cut every `context` tokens from a phase that is new each epoch."""

    def __init__(self, documents: list[bytes], context: int) -> None:
        """Joins the documents."""
        self.context = context
        self.stream = np.frombuffer(b"".join(bytes([MARK]) + d for d in documents), np.uint8)
        self.starts = np.concatenate([[0], np.cumsum([len(d) + 1 for d in documents])[:-1]])
        self.count = max(1, (len(self.stream) - context - 1) // context)

    def row(self, index: int, phase: int) -> Batch:
        """The row that begins at token `phase + index * context`; padded at the end."""
        first = phase + index * self.context
        where = np.arange(first, min(first + self.context + 1, len(self.stream)))
        document = np.searchsorted(self.starts, where, side="right")
        begin = np.maximum(self.starts[document - 1], first)
        return _row(self.context, self.stream[where], document - document[0] + 1, where - begin)


class FirstFitRows:
    """Pieces of documents, at most `context` tokens each, put into the first row with room."""

    def __init__(self, documents: list[bytes], context: int) -> None:
        """Packs the pieces, longest first."""
        self.context, self.documents = context, documents
        # a document of n bytes has n predictions: the mark and the bytes but the last are inputs
        cuts = [
            (i, at, min(context, len(d) - at))
            for i, d in enumerate(documents)
            for at in range(0, len(d), context)
        ]
        cuts.sort(key=lambda cut: -cut[2])
        room = np.zeros(len(cuts), np.int64)
        self.rows: list[list[tuple[int, int, int]]] = []
        for cut in cuts:
            fits = np.flatnonzero(room[: len(self.rows)] >= cut[2])
            if not len(fits):
                self.rows.append([])
                room[len(self.rows) - 1] = context
            row = int(fits[0]) if len(fits) else len(self.rows) - 1
            self.rows[row].append(cut)
            room[row] -= cut[2]
        self.count = len(self.rows)

    def row(self, index: int, phase: int) -> Batch:
        """Row `index`; the phase has no meaning here."""
        del phase
        pieces = []
        for segment, (document, at, length) in enumerate(self.rows[index], start=1):
            marked = np.frombuffer(bytes([MARK]) + self.documents[document], np.uint8)[
                at : at + length + 1
            ]
            pieces.append(_row(length, marked, np.full(length + 1, segment), np.arange(length + 1)))
        joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        spare = self.context - len(joined["inputs"])
        return {
            n: np.pad(x, (0, spare), constant_values=-1 if n == "targets" else 0)
            for n, x in joined.items()
        }


Rows = ConcatRows | FirstFitRows


def _row(length: int, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> Batch:
    # n + 1 tokens give n predictions; one across two documents does not count
    targets = np.where(segments[1:] == segments[:-1], tokens[1:].astype(np.int32), -1)
    row = {
        "inputs": tokens[:-1],
        "targets": targets,
        "segment_ids": segments[:-1],
        "positions": positions[:-1],
    }
    spare = length - len(targets)
    return {
        name: np.pad(x.astype(np.int32), (0, spare), constant_values=-1 if name == "targets" else 0)
        for name, x in row.items()
    }


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int, context: int) -> tuple[int, np.ndarray]:
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(context)), random.permutation(count)
