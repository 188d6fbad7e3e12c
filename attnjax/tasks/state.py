"""Tasks of keeping a state: a bit, counters, a parity, an element of a group."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.tasks.base import Task, check_positive, unasked


@dataclasses.dataclass(frozen=True)
class FlipFlop(Task):
    """Pairs of an instruction and a bit: w 1 i 0 i 1 r 1 ...: a read gives the bit written last.

    Bits after "ignore" are noise. The text starts with a write and ends with a read; every bit
    after a read is scored.

    Liu et al., "Exposing Attention Glitches with Flip-Flop Language Modeling", 2023,
    arXiv:2306.00946: 512 tokens, ignore = 0.8; test sets with ignore = 0.98 (sparse) and 0.1.

    Attributes:
      pairs: instructions; the text has 2 pairs - 1 tokens of input and the last bit is asked.
      ignore: probability of "ignore"; the rest is shared by "write" and "read".
    """

    pairs: int = 32
    ignore: float = 0.8

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise ValueError(f"FlipFlop: pairs must be at least 2, got {self.pairs}.")
        if not 0 <= self.ignore <= 1:
            raise ValueError(f"FlipFlop: ignore must be in [0, 1], got {self.ignore}.")

    @property
    def length(self) -> int:
        """2 pairs - 1: the last bit is only asked."""
        return 2 * self.pairs - 1

    @property
    def vocab_size(self) -> int:
        """0, 1, write (2), ignore (3), read (4)."""
        return 5

    @property
    def chance(self) -> float:
        """Two bits."""
        return 0.5

    def longer(self, factor: int) -> Self:
        """`factor` times as many instructions."""
        return dataclasses.replace(self, pairs=self.pairs * factor)

    def sparse(self) -> Self:
        """The paper's test set with few writes and reads: ignore = 0.98."""
        return dataclasses.replace(self, ignore=0.98)

    def dense(self) -> Self:
        """The paper's test set with many writes and reads: ignore = 0.1."""
        return dataclasses.replace(self, ignore=0.1)

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [2 pairs - 1]."""
        for_kinds, for_which, for_bits = jax.random.split(key, 3)
        n = self.pairs
        ignored = jax.random.bernoulli(for_kinds, self.ignore, (n,))
        write = jax.random.bernoulli(for_which, 0.5, (n,)).at[0].set(True)
        kinds = jnp.where(ignored, 3, jnp.where(write, 2, 4)).at[0].set(2).at[-1].set(4)
        bits = jax.random.bernoulli(for_bits, 0.5, (n,)).astype(jnp.int32)
        at = jnp.where(kinds == 2, jnp.arange(n), -1)
        stored = bits[jax.lax.cummax(at)]  # of the last write up to here
        bits = jnp.where(kinds == 4, stored, bits)
        text = jnp.stack([kinds.astype(jnp.int32), bits], axis=1).reshape(-1)
        asked = jnp.stack([jnp.where(kinds == 4, bits, -1), jnp.full((n,), -1)], axis=1).reshape(-1)
        return text[:-1], asked[:-1].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Counting(Task):
    """Variables are set to 0, increased, left alone; then one is printed: say its value.

    Each step is one token: "x = 0", "x += 1" for one of the variables, or "pass"; the last is
    "print x".

    Golovneva et al., "Contextual Position Encoding", 2024, arXiv:2405.18719: 1, 3 or 5 variables,
    up to 512 tokens. One token per step is a choice of this library.

    Attributes:
      steps: tokens before the print; the first ones set every variable.
      variables: how many.
      most: largest value; a step that would go beyond it is a pass.
      passes: probability of "pass"; of the rest, one in ten sets a variable to 0.
    """

    steps: int = 31
    variables: int = 1
    most: int = 9
    passes: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self, "variables", "most")
        if self.steps < self.variables:
            raise ValueError(
                f"Counting: steps={self.steps} must be at least variables={self.variables}."
            )

    @property
    def length(self) -> int:
        """The steps and the print."""
        return self.steps + 1

    @property
    def vocab_size(self) -> int:
        """Values 0 .. most, pass, then set, increase and print of each variable."""
        return self.most + 2 + 3 * self.variables

    @property
    def chance(self) -> float:
        """1 / number of values: values are not equally likely, so a guess can be better."""
        return 1 / (self.most + 1)

    def longer(self, factor: int) -> Self:
        """`factor` times as many steps."""
        return dataclasses.replace(self, steps=self.steps * factor)

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [steps + 1]; the print is scored."""
        v, n = self.variables, self.steps
        for_pass, for_set, for_which, for_print = jax.random.split(key, 4)
        idle = jax.random.bernoulli(for_pass, self.passes, (n,))
        reset = jax.random.bernoulli(for_set, 0.1, (n,))
        which = jax.random.randint(for_which, (n,), 0, v, jnp.int32)
        first = jnp.arange(n) < v
        idle, reset = idle & ~first, reset | first
        which = jnp.where(first, jnp.arange(n, dtype=jnp.int32), which)

        def step(values: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
            idle, reset, x = at
            one = jax.nn.one_hot(x, v, dtype=jnp.int32)
            full = (values * one).sum() >= self.most
            idle = idle | (full & ~reset)
            new = jnp.where(reset, values * (1 - one), values + one)
            token = jnp.where(reset, self.most + 2 + x, self.most + 2 + v + x)
            return jnp.where(idle, values, new), jnp.where(idle, self.most + 1, token)

        values, tokens = jax.lax.scan(step, jnp.zeros((v,), jnp.int32), (idle, reset, which))
        asked = jax.random.randint(for_print, (1,), 0, v, jnp.int32)
        inputs = jnp.concatenate([tokens.astype(jnp.int32), self.most + 2 + 2 * v + asked])
        return inputs, unasked(n + 1).at[-1].set(values[asked[0]])


PARITY_KINDS = ("plain", "scratchpad", "interleaved", "mnemonic")


@dataclasses.dataclass(frozen=True)
class Parity(Task):
    """Parity of n bits, alone or with a scratchpad; with mnemonics it can be found at any length.

        plain        b_1 ... b_n =                     asks the parity
        scratchpad   b_1 ... b_n = p_1 ... p_n         asks every running parity
        interleaved  b_1 p_1 b_2 p_2 ...               the same, each beside its bit
        mnemonic     m_1 b_1 ... m_n b_n = m_1 p_1 ... asks every running parity; the m are random
                                                       anchors, different within an example

    Ebrahimi et al., "Your Context Is Not an Array", 2024, arXiv:2408.05506.

    Attributes:
      bits: n.
      kind: one of the above.
      anchors: different mnemonics, at least n for "mnemonic".
    """

    bits: int = 8
    kind: str = "mnemonic"
    anchors: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "bits")
        if self.kind not in PARITY_KINDS:
            raise ValueError(f"Parity: kind={self.kind!r} is none of {', '.join(PARITY_KINDS)}.")
        if self.kind == "mnemonic" and self.anchors < self.bits:
            raise ValueError(
                f"Parity: anchors={self.anchors} must be at least bits={self.bits}; every bit of "
                "an example has its own."
            )

    @property
    def length(self) -> int:
        """Tokens, by kind."""
        n = self.bits
        return {"plain": n + 1, "scratchpad": 2 * n, "interleaved": 2 * n, "mnemonic": 4 * n}[
            self.kind
        ]

    @property
    def vocab_size(self) -> int:
        """0, 1, "=", and the mnemonics."""
        return 3 + (self.anchors if self.kind == "mnemonic" else 0)

    @property
    def chance(self) -> float:
        """Two answers."""
        return 0.5

    def longer(self, factor: int) -> Self:
        """`factor` times as many bits; mnemonics are drawn from the same set."""
        n = self.bits * factor
        return dataclasses.replace(
            self, bits=min(n, self.anchors) if self.kind == "mnemonic" else n
        )

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [length]."""
        n = self.bits
        for_bits, for_anchors = jax.random.split(key)
        bits = jax.random.bernoulli(for_bits, 0.5, (n,)).astype(jnp.int32)
        parity = jnp.cumsum(bits, dtype=jnp.int32) % 2
        equals = jnp.full((1,), 2, jnp.int32)
        if self.kind == "plain":
            return jnp.concatenate([bits, equals]), unasked(n + 1).at[-1].set(parity[-1])
        if self.kind == "scratchpad":
            inputs = jnp.concatenate([bits, equals, parity[:-1]])
            return inputs, jnp.concatenate([unasked(n), parity])
        if self.kind == "interleaved":
            inputs = jnp.stack([bits, parity], axis=1).reshape(-1)
            return inputs, jnp.stack([parity, unasked(n)], axis=1).reshape(-1)
        names = 3 + jax.random.permutation(for_anchors, self.anchors)[:n].astype(jnp.int32)
        front = jnp.stack([names, bits], axis=1).reshape(-1)
        back = jnp.stack([names, parity], axis=1).reshape(-1)
        inputs = jnp.concatenate([front, equals, back[:-1]])
        asked = jnp.stack([parity, unasked(n)], axis=1).reshape(-1)
        return inputs, jnp.concatenate([unasked(2 * n + 1), asked[:-1]])


@dataclasses.dataclass(frozen=True)
class StateTracking(Task):
    """Words over a group: after every element, say the product of all elements so far.

    Products in the permutation groups S_3 and up cannot be found by a fixed number of layers of
    attention at all lengths (S_5), but by one recurrence. Merrill et al., "The Illusion of State in
    State-Space Models", 2024, arXiv:2404.08819.

    Attributes:
      text: t, elements.
      group: "z2", "z3", ... for counting modulo n, or "s3", "s4", "s5" for permutations.
    """

    text: int = 16
    group: str = "s3"

    def __post_init__(self) -> None:
        check_positive(self, "text")
        kind, order = self.group[:1], self.group[1:]
        if kind not in ("z", "s") or not order.isdigit() or int(order) < 2:
            raise ValueError(f"StateTracking: group={self.group!r} is not like 'z2' or 's3'.")
        if kind == "s" and int(order) > 5:
            raise ValueError(f"StateTracking: group={self.group!r} is too large; up to 's5'.")

    @property
    def length(self) -> int:
        """The elements of the word."""
        return self.text

    @property
    def vocab_size(self) -> int:
        """Order of the group: element i is token i, 0 is the identity."""
        return len(self.table())

    @property
    def chance(self) -> float:
        """1 / order of the group."""
        return 1 / self.vocab_size

    def longer(self, factor: int) -> Self:
        """Words `factor` times as long."""
        return dataclasses.replace(self, text=self.text * factor)

    def table(self) -> np.ndarray:
        """Products [n, n]: element i, then element j."""
        order = int(self.group[1:])
        if self.group[0] == "z":
            return np.add.outer(np.arange(order), np.arange(order)) % order
        elements = list(itertools.permutations(range(order)))
        index = {p: i for i, p in enumerate(elements)}
        return np.array(
            [[index[tuple(b[i] for i in a)] for b in elements] for a in elements], np.int32
        )

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [t]; every place is scored."""
        table = jnp.asarray(self.table(), jnp.int32)
        word = jax.random.randint(key, (self.text,), 0, len(table), jnp.int32)

        def step(state: jax.Array, element: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = table[state, element]
            return state, state

        return word, jax.lax.scan(step, jnp.zeros((), jnp.int32), word)[1]
