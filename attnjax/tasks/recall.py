"""Tasks of recall: values by their keys, and chains of links."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from attnjax.tasks.base import Task, check_positive, unasked


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall: k_1 v_1 ... k_n v_n, then each key once more at some place.

    The gaps between the pairs and the queries follow the power law p(g) ~ a g^(a-1), so that most
    queries come early. All other places hold token 0.

    Arora et al., "Zoology", 2023, arXiv:2312.04927: vocabulary 8192, 64 to 512 tokens, 4 to 64
    pairs, a = 0.01.

    Attributes:
      num_pairs: n.
      text: t, tokens of an example, at least 4n.
      symbols: size of the vocabulary; keys are its lower half (but 0), values the upper half.
      power: a.
    """

    num_pairs: int = 4
    text: int = 64
    symbols: int = 64
    power: float = 0.01

    def __post_init__(self) -> None:
        check_positive(self, "num_pairs")
        if self.text < 4 * self.num_pairs:
            raise ValueError(
                f"MQAR: text={self.text} must hold {self.num_pairs} pairs and their queries, at "
                f"least {4 * self.num_pairs} tokens."
            )
        if self.symbols // 2 - 1 < self.num_pairs:
            raise ValueError(
                f"MQAR: symbols={self.symbols} gives {self.symbols // 2 - 1} keys, fewer than "
                f"num_pairs={self.num_pairs}; use at least {2 * self.num_pairs + 2}."
            )

    @property
    def length(self) -> int:
        """The tokens of the text."""
        return self.text

    @property
    def vocab_size(self) -> int:
        """The symbols."""
        return self.symbols

    @property
    def chance(self) -> float:
        """1 / number of values."""
        return 1 / (self.symbols - self.symbols // 2)

    def longer(self, factor: int) -> Self:
        """`factor` times as much text, with as many pairs."""
        return dataclasses.replace(self, text=self.text * factor)

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [t]; the value is asked where the key stands again."""
        n, half = self.num_pairs, self.symbols // 2
        for_keys, for_values, for_gaps = jax.random.split(key, 3)
        keys = 1 + jax.random.permutation(for_keys, half - 1)[:n].astype(jnp.int32)
        # drawn without replacement, like the keys
        values = half + jax.random.permutation(for_values, self.symbols - half)[:n].astype(
            jnp.int32
        )
        space = (self.text - 2 * n) // 2
        odds = (self.power - 1) * jnp.log(jnp.arange(1, space + 1, dtype=jnp.float32))
        _, gaps = jax.lax.top_k(odds + jax.random.gumbel(for_gaps, (space,)), n)
        pairs = jnp.stack([keys, values], axis=1).reshape(-1)
        places = 2 * n + 2 * gaps
        inputs = jnp.zeros((self.text,), jnp.int32).at[: 2 * n].set(pairs).at[places].set(keys)
        return inputs, unasked(self.text).at[places].set(values)


@dataclasses.dataclass(frozen=True)
class RetrievalChain(Task):
    """Shuffled links (a b)(b c)..., then a start: say where each further step of the chain leads.

    The links form one chain of D steps. After the start token, the text goes on with the tokens
    reached, so every depth 1 .. D is asked (`curriculum`), or a question token stands in their
    place and only the end is asked.

    "Mechanism and Emergence of Stacked Attention Heads in Multi-Layer Transformers", 2024,
    arXiv:2411.12118; sizes and token layout are choices of this library.

    Attributes:
      depth: D, links of the chain.
      symbols: different nodes, at least D + 1.
      curriculum: ask all depths instead of the last alone.
    """

    depth: int = 4
    symbols: int = 32
    curriculum: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "depth")
        if self.symbols < self.depth + 1:
            raise ValueError(
                f"RetrievalChain: symbols={self.symbols} must be at least depth + 1 = "
                f"{self.depth + 1}."
            )

    @property
    def length(self) -> int:
        """2D for the links and D for the walk."""
        return 3 * self.depth

    @property
    def vocab_size(self) -> int:
        """Nodes and the question token."""
        return self.symbols + 1

    @property
    def chance(self) -> float:
        """1 / D: a node of the links."""
        return 1 / self.depth

    def longer(self, factor: int) -> Self:
        """A chain `factor` times as long, as far as there are nodes."""
        return dataclasses.replace(self, depth=min(self.depth * factor, self.symbols - 1))

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [3D]."""
        d = self.depth
        for_nodes, for_order = jax.random.split(key)
        nodes = jax.random.permutation(for_nodes, self.symbols)[: d + 1].astype(jnp.int32)
        links = jnp.stack([nodes[:-1], nodes[1:]], axis=1)
        links = links[jax.random.permutation(for_order, d)].reshape(-1)
        if self.curriculum:
            return jnp.concatenate([links, nodes[:-1]]), jnp.concatenate(
                [unasked(2 * d), nodes[1:]]
            )
        walk = jnp.full((d,), self.symbols, jnp.int32).at[0].set(nodes[0])
        return jnp.concatenate([links, walk]), unasked(3 * d).at[-1].set(nodes[-1])
