"""Tasks of copying: a text, its marked tokens, or what followed a marker."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from attnjax.tasks.base import Task, check_positive, unasked


@dataclasses.dataclass(frozen=True)
class Copy(Task):
    """x_1 ... x_n SEP x_1 ... x_n: say the text again, after the separator.

    Attributes:
      num_tokens: n, tokens to copy.
      symbols: different tokens; they are drawn uniformly.
    """

    num_tokens: int = 16
    symbols: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "num_tokens", "symbols")

    @property
    def length(self) -> int:
        """2n."""
        return 2 * self.num_tokens

    @property
    def vocab_size(self) -> int:
        """The symbols and the separator, which is the last token."""
        return self.symbols + 1

    @property
    def chance(self) -> float:
        """1 / symbols."""
        return 1 / self.symbols

    def longer(self, factor: int) -> Self:
        """`factor` times as many tokens to copy."""
        return dataclasses.replace(self, num_tokens=self.num_tokens * factor)

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [2n]; the n targets stand from the separator on."""
        n = self.num_tokens
        text = jax.random.randint(key, (n,), 0, self.symbols, jnp.int32)
        inputs = jnp.concatenate([text, jnp.full((1,), self.symbols, jnp.int32), text[:-1]])
        return inputs, jnp.concatenate([unasked(n), text])


@dataclasses.dataclass(frozen=True)
class SelectiveCopy(Task):
    """Data tokens scattered among blanks, then a separator: say the data in order, blanks left out.

    Gu and Dao, "Mamba", 2023, arXiv:2312.00752; Golovneva et al., "Contextual Position Encoding",
    2024, arXiv:2405.18719, with 128 data tokens and 128 blanks, tested with 64 and 256 blanks.

    Attributes:
      num_tokens: n, data tokens.
      blanks: m, blanks between them.
      symbols: different data tokens.
    """

    num_tokens: int = 8
    blanks: int = 16
    symbols: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "num_tokens", "blanks", "symbols")

    @property
    def length(self) -> int:
        """2n + m."""
        return 2 * self.num_tokens + self.blanks

    @property
    def vocab_size(self) -> int:
        """Symbols, then the blank, then the separator."""
        return self.symbols + 2

    @property
    def chance(self) -> float:
        """1 / symbols."""
        return 1 / self.symbols

    def longer(self, factor: int) -> Self:
        """`factor` times as many blanks: the paper's split."""
        return dataclasses.replace(self, blanks=self.blanks * factor)

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [2n + m]."""
        n, blank, separator = self.num_tokens, self.symbols, self.symbols + 1
        where, what = jax.random.split(key)
        body = n + self.blanks
        data = jax.random.randint(what, (n,), 0, self.symbols, jnp.int32)
        places = jnp.sort(jax.random.permutation(where, body)[:n])
        text = jnp.full((body,), blank, jnp.int32).at[places].set(data)
        inputs = jnp.concatenate([text, jnp.full((1,), separator, jnp.int32), data[:-1]])
        return inputs, jnp.concatenate([unasked(body), data])


@dataclasses.dataclass(frozen=True)
class Induction(Task):
    """... MARK v ... MARK: say the token that followed the marker the first time.

    Fu et al., "Hungry Hungry Hippos", 2022, arXiv:2212.14052 (induction head task).

    Attributes:
      text: t, tokens of an example.
      symbols: different tokens besides the marker.
    """

    text: int = 32
    symbols: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "symbols")
        if self.text < 3:
            raise ValueError(f"Induction: text must be at least 3 tokens, got {self.text}.")

    @property
    def length(self) -> int:
        """The tokens of the text."""
        return self.text

    @property
    def vocab_size(self) -> int:
        """Symbols and the marker."""
        return self.symbols + 1

    @property
    def chance(self) -> float:
        """1 / symbols."""
        return 1 / self.symbols

    def longer(self, factor: int) -> Self:
        """`factor` times as much text."""
        return dataclasses.replace(self, text=self.text * factor)

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [t]; the last place is scored."""
        what, where = jax.random.split(key)
        tokens = jax.random.randint(what, (self.text,), 0, self.symbols, jnp.int32)
        place = jax.random.randint(where, (), 0, self.text - 2, jnp.int32)
        tokens = tokens.at[place].set(self.symbols).at[-1].set(self.symbols)
        return tokens, unasked(self.text).at[-1].set(tokens[place + 1])
