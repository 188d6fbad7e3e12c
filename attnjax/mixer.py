"""What the modules of all sequence mechanisms share: sizes, the call's contract, the output.

A mechanism's module subclasses `SequenceMixer`, makes its projections, and writes `mix`, which
turns a checked `Call` into z, the output by head. Everything that does not depend on the mechanism
happens here, once: checks and their messages, positions, padding, packed documents, caches, taps,
dropout and the output projection.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache import DenseCache, TokenCache
from attnjax.cache.base import new_positions, valid_count
from attnjax.checks import check_heads, check_segments
from attnjax.layers import Projection, add_bias, default_bias_init, default_kernel_init
from attnjax.masks import Causal, Lengths, Mask, Segments
from attnjax.masks.keys import key_set
from attnjax.positions import apply_rope, rope_frequencies
from attnjax.positions.rope import Layout
from attnjax.taps import Edits, Tap

HEAD_SITES = ("q", "k", "v", "z", "head_out", "attn_out")
"""The sites that every mixer with queries, keys, values and an output projection has."""

SCORE_SITES = (*HEAD_SITES, "scores", "weights")
"""The sites of a mixer that can also show (and let edit) its scores and weights."""


@dataclasses.dataclass
class Call:
    """One call of a mixer, checked.

    Attributes:
      x: [b, t, m]; zeros where `valid` is False.
      positions: [b, t] int32, absolute; they count on from the cache where none were given.
      placed: whether positions were given.
      start: tokens already in the cache: 0, or [b] int32. The t new tokens have the indices
        start + 0, 1, ..., which is what masks and caches count by (`positions` need not agree).
      segment_ids, mask, valid: as given, or None.
      cache: the cache; `mix` replaces it by the new one. None without decoding.
      causal: whether token t sees tokens up to t only.
      tap: edits and captures.
      dropout_key: key for dropout, or None where it is off.
      further: every name of the mixer's `further` -> what the call brought, or None.
    """

    x: jax.Array
    positions: jax.Array
    start: Any
    segment_ids: Any
    mask: Any
    valid: Any
    cache: Any
    causal: bool
    tap: Tap
    dropout_key: Any = None
    placed: bool = False
    further: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def wants_scores(self) -> bool:
        """Whether scores or weights must exist: they are shown, edited or dropped at random."""
        tap, edits = self.tap, self.tap.edits
        shown = any(site in tap.capture or tap.edits_site(site) for site in ("scores", "weights"))
        given = (edits.score_bias, edits.weight_edit, self.dropout_key)
        return shown or any(value is not None for value in given)

    @property
    def count(self) -> Int[Array, " b"]:
        """How many of the new tokens of each row are real."""
        return valid_count(self.valid, self.positions)

    def store(self, **tokens: jax.Array) -> dict[str, jax.Array]:
        """All tokens so far: with a `TokenCache` the stored ones and the new, else just the new.

        Args:
          tokens: name -> [b, t, ...], what the mechanism needs of each token again later.

        Returns:
          name -> [b, s, ...] in the dtype of the new tokens; token j of a row stands at index j,
          and `keep` tells which of them a query may see.
        """
        if self.cache is None:
            return tokens
        self.cache = self.cache.append(tokens, self.valid)
        return {name: self.cache.tokens[name].astype(array.dtype) for name, array in tokens.items()}

    def visible(
        self, length: int, layout: Any = None, *, documents: bool = True
    ) -> Mask | Bool[Array, "#b #h t s"] | None:
        """Which of `length` stored tokens each new one may see; None when it is all of them.

        Joins causality, padding, packed documents, the caller's mask, `Edits.key_mask` and the
        mechanism's own `layout`.

        Args:
          length: s.
          layout: a mask of `attnjax.masks`, or booleans of rank 4, or None.
          documents: False leaves `segment_ids` out.

        Returns:
          A mask of `attnjax.masks`; booleans where one of its parts is an array.
        """
        lengths, ids, kept = self.lengths(), self.segment_ids, self.tap.edits.key_mask
        parts = (
            Causal() if self.causal else None,
            layout,
            self.mask,
            None if kept is None else key_set(kept),
            None if lengths is None else Lengths(lengths),
            None if ids is None or not documents else Segments(ids),
        )
        programs = [part for part in parts if isinstance(part, Mask)]
        program = functools.reduce(operator.and_, programs) if programs else None
        arrays = [
            part.reshape((1,) * (4 - part.ndim) + part.shape)
            for part in parts
            if part is not None and not isinstance(part, Mask)
        ]
        if not arrays:
            return program
        if program is not None:
            arrays.append(program.dense(self.x.shape[1], length, q_offset=self.start))
        return functools.reduce(operator.and_, arrays)

    def keep(self, length: int, layout: Any = None) -> Bool[Array, "#b #h t s"] | None:
        """`visible` as booleans, for mechanisms that have scores of their own.

        Args:
          length: s.
          layout: as in `visible`.

        Returns:
          Booleans, or None when all tokens are seen.

        Memory: O(t s), and times b or h where they differ by row or head.
        """
        visible = self.visible(length, layout)
        if isinstance(visible, Mask):
            return visible.dense(self.x.shape[1], length, q_offset=self.start)
        return visible

    def lengths(self) -> Int[Array, " b"] | None:
        """[b] real tokens so far; None when all are, or causality hides the others."""
        if self.causal or (self.valid is None and self.cache is None):
            return None
        return jnp.asarray(self.start, jnp.int32) + self.count.astype(jnp.int32)


class SequenceMixer(nnx.Module):
    """Base class of the modules that mix the tokens of a sequence.

    A subclass sets the class attributes below to what it supports; anything else raises, naming
    the mechanism, the option and what is supported.

    Attributes:
      sites: places that can be captured and edited.
      directions: "causal", "bidirectional" or both.
      grouped: whether several query heads may share a key/value head.
      packed: whether `segment_ids` are supported.
      masked: whether `mask` is supported.
      rotary: whether queries and keys are rotated where `rope_base` is set.
      decodes: whether there is a cache.
      resumes: whether `segment_ids` go with a cache, which the first document of a call takes up.
      drops: whether `dropout_rate` is supported.
      spatial: whether tokens may have several axes, x [b, *spatial, m], when not causal.
      rope_layout: how rotary positions pair the channels, "half" or "interleaved".
      further: names of further inputs of a call, which `Call.further` hands to `mix`.
      block_options: options that a model sets, because a block is around the mixer.

    Args:
      num_heads: h.
      in_features: width of the input.
      qkv_features: width of all heads together; None is `in_features`.
      out_features: width of the output; None is `in_features`.
      num_kv_heads: g, divides h; None is h.
      causal: whether token t sees tokens up to t only.
      rope_base: base of rotary positions; None is no rotation.
      dropout_rate: of the weights, where the mechanism has some.
      deterministic: True turns dropout off; a call's own argument comes first.
      dtype: of the computation; None promotes inputs and parameters.
      param_dtype: of the parameters.
      precision: of the projections.
      kernel_init, bias_init: initializers of the projections.
      out_kernel_init: of the output projection; None is `kernel_init`.
      use_bias: whether projections have biases.
      rngs: stream `params`.

    Raises:
      ValueError: when sizes do not divide or an option is out of range.
      NotImplementedError: for an option that the mechanism does not have.
    """

    sites: ClassVar[tuple[str, ...]] = HEAD_SITES
    directions: ClassVar[tuple[str, ...]] = ("causal",)
    grouped: ClassVar[bool] = False
    packed: ClassVar[bool] = True
    masked: ClassVar[bool] = False
    rotary: ClassVar[bool] = False
    decodes: ClassVar[bool] = True
    resumes: ClassVar[bool] = False
    drops: ClassVar[bool] = True
    spatial: ClassVar[bool] = False
    rope_layout: ClassVar[Layout] = "half"
    further: ClassVar[tuple[str, ...]] = ()
    block_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        num_kv_heads: int | None = None,
        causal: bool = True,
        rope_base: float | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        out_kernel_init: Callable[..., Any] | None = None,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        qkv_features = in_features if qkv_features is None else qkv_features
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for label, size in (("num_heads", num_heads), ("in_features", in_features)):
            if size < 1:
                raise ValueError(f"{name}: {label} must be at least 1, got {size}.")
        if qkv_features % num_heads:
            raise ValueError(
                f"{name}: qkv_features={qkv_features} must be a multiple of num_heads={num_heads}."
            )
        if num_kv_heads != num_heads and not self.grouped:
            raise NotImplementedError(
                f"{name}: num_kv_heads={num_kv_heads} is not supported; every head has its own "
                f"key and value, num_kv_heads={num_heads}."
            )
        check_heads(name, num_heads, num_kv_heads)
        wanted = "causal" if causal else "bidirectional"
        if wanted not in self.directions:
            raise NotImplementedError(
                f"{name}: causal={causal} is not supported; it is {self.directions[0]} only, "
                f"causal={not causal}."
            )
        if rope_base is not None and not self.rotary:
            raise NotImplementedError(
                f"{name}: rope_base={rope_base} is not supported, it does not rotate queries and "
                "keys; leave rope_base=None."
            )
        if not 0.0 <= dropout_rate < 1.0:
            raise ValueError(f"{name}: dropout_rate must be in [0, 1), got {dropout_rate}.")
        if dropout_rate and not self.drops:
            raise NotImplementedError(
                f"{name}: dropout_rate={dropout_rate} is not supported, it drops no weights; "
                "leave dropout_rate=0."
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = qkv_features // num_heads
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        self.causal, self.rope_base = causal, rope_base
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.kernel_init, self.bias_init = kernel_init, bias_init
        self.out_kernel_init = out_kernel_init or kernel_init
        self.use_bias = use_bias

    # ------------------------------------------------------------------ for subclasses: building

    def projection(
        self,
        features: int | tuple[int, ...],
        axes: tuple[str | None, ...] | None = None,
        *,
        inputs: int | None = None,
        in_axis: str | None = "embed",
        use_bias: bool | None = None,
        kernel_init: Any = None,
        rngs: nnx.Rngs,
    ) -> Projection:
        """A linear map of the input (or of a vector of width `inputs`).

        Args:
          features: sizes of the new axes, for example (h, d).
          axes: their logical names; None is ("heads", "head_dim") for two, ("mlp",) for one.
          inputs: width of what is mapped; None is `in_features`.
          in_axis: logical name of that width.
          use_bias, kernel_init: None is the module's own.
          rngs: stream `params`.
        """
        sizes = (features,) if isinstance(features, int) else features
        names = axes or {1: ("mlp",), 2: ("heads", "head_dim")}[len(sizes)]
        return Projection(
            self.in_features if inputs is None else inputs,
            sizes,
            in_axes=(in_axis,),
            out_axes=names,
            use_bias=self.use_bias if use_bias is None else use_bias,
            kernel_init=kernel_init or self.kernel_init,
            bias_init=self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            rngs=rngs,
        )

    def output_projection(
        self,
        value_dim: int | None = None,
        *,
        use_bias: bool | None = None,
        bias_init: Any = None,
        rngs: nnx.Rngs,
    ) -> Projection:
        """The map of all heads [h, e] to the output; assign it to `self.out`.

        Args:
          value_dim: e; None is d.
          use_bias, bias_init: None is the module's own.
          rngs: stream `params`.
        """
        return Projection(
            (self.num_heads, self.head_dim if value_dim is None else value_dim),
            self.out_features,
            in_axes=("heads", "head_dim"),
            out_axes=("embed",),
            use_bias=self.use_bias if use_bias is None else use_bias,
            kernel_init=self.out_kernel_init,
            bias_init=bias_init or self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            rngs=rngs,
        )

    def parameter(
        self, value: Any, axes: tuple[str | None, ...], dtype: Any = None
    ) -> nnx.Param[jax.Array]:
        """A parameter with the logical names of its axes."""
        return nnx.Param(jnp.asarray(value, dtype or self.param_dtype), axes=axes)

    # ------------------------------------------------------------------- for subclasses: calling

    def mix(self, call: Call) -> jax.Array:
        """Z, the output by head [b, t, h, e], before the output projection `self.out`.

        With a cache, sets `call.cache` to the next one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mix.")

    def token_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """What a `TokenCache` keeps of each token: name -> shape; None for keys and values."""
        return None

    def token_dtypes(self, dtype: Any) -> dict[str, Any]:
        """Of what `token_shapes` names, that whose dtype is not the cache's own: name -> dtype.

        Args:
          dtype: of the cache.
        """
        del dtype
        return {}

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """An empty cache for `max_length` tokens in each of `batch` rows.

        Args:
          batch: rows.
          max_length: tokens per row, prompt and continuation together.
          dtype: of what is stored; None is the module's dtype, or that of the parameters.
        """
        self._require_decoding()
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        shapes = self.token_shapes()
        if shapes is None:
            sizes = (batch, max_length, self.num_kv_heads, self.head_dim)
            return DenseCache.create(*sizes, dtype=dtype)
        kinds = dict.fromkeys(shapes, dtype) | self.token_dtypes(dtype)
        return TokenCache.create(batch, max_length, shapes, kinds)

    def heads(
        self, call: Call, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values after the edits and captures of the sites q, k and v."""
        tap = call.tap
        if tap.edits.q_add is not None:
            query = add_bias(query, tap.edits.q_add)
        if tap.edits.k_add is not None:
            key = add_bias(key, tap.edits.k_add)
        return tap("q", query), tap("k", key), tap("v", value)

    def rotate(self, call: Call, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rotary positions on queries and keys where `rope_base` is set."""
        if self.rope_base is None:
            return query, key
        inv_freq, factor = rope_frequencies(query.shape[-1], self.rope_base, None, None)

        def turn(x: jax.Array) -> jax.Array:
            return apply_rope(
                x, call.positions, inv_freq, layout=self.rope_layout, attention_factor=factor
            )

        return turn(query), turn(key)

    def attend(
        self,
        call: Call,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        layout: Any = None,
        bias: Any = None,
        score_mod: Any = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Softmax attention of the new tokens to all tokens so far, by `attnjax.attention`.

        Honors the call's mask, padding, documents, cache (`DenseCache`), edits, captures, dropout.

        Args:
          call: the call.
          query, key, value: of the new tokens.
          layout: the mechanism's own mask beside causality, or None.
          bias: [b, h, t, s], added to the scores.
          score_mod: as in `attention`.
          options: further options of `attention`.

        Returns:
          z [b, t, h, e] and lse [b, t, h].
        """
        tap, edits = call.tap, call.tap.edits
        wanted = tuple(site for site in ("scores", "weights") if site in tap.capture)
        s = key.shape[1] if call.cache is None else call.cache.max_length
        mask = call.visible(s, layout, documents=False)
        if edits.score_bias is not None:
            bias = edits.score_bias if bias is None else bias + edits.score_bias
        edited = tap.score_mod(call.start)
        if edited is not None:
            inner = score_mod
            score_mod = (
                edited
                if inner is None
                else lambda s, b, h, q, k: edited(inner(s, b, h, q, k), b, h, q, k)
            )
        given = dict(bias=bias, score_mod=score_mod, weight_edit=tap.weight_edit())
        options |= {name: value for name, value in given.items() if value is not None}
        if call.dropout_key is not None:
            options |= dict(dropout_rate=self.dropout_rate, dropout_rng=call.dropout_key)
        if wanted:
            options["capture"] = wanted
        if call.cache is None:
            outputs = attention(
                query, key, value, mask=mask, segment_ids=call.segment_ids, return_residual=True,
                **options,
            )  # fmt: skip
        else:
            outputs, call.cache = call.cache.attend(
                query, key, value, mask=mask, valid=call.valid, **options
            )
        if wanted:
            tap.captured |= outputs[2]
        return outputs[0], outputs[1]

    def edit_scores(self, call: Call, scores: jax.Array) -> jax.Array:
        """Scores [b, h, t, s] of a mechanism's own after `score_bias` and the site "scores".

        Call it before the mask is applied.
        """
        bias = call.tap.edits.score_bias
        if bias is not None:
            scores = scores + bias.reshape((1,) * (4 - bias.ndim) + bias.shape).astype(scores.dtype)
        return call.tap("scores", scores)

    def edit_weights(self, call: Call, weights: jax.Array) -> jax.Array:
        """Weights [b, h, t, s] of a mechanism's own after edits, captures and dropout."""
        if call.tap.edits.weight_edit is not None:
            weights = call.tap.edits.weight_edit(weights)
        weights = call.tap("weights", weights)
        if call.dropout_key is None:
            return weights
        kept = jax.random.bernoulli(call.dropout_key, 1 - self.dropout_rate, weights.shape)
        return jnp.where(kept, weights / (1 - self.dropout_rate), jnp.zeros_like(weights))

    def finish(self, call: Call, z: jax.Array) -> jax.Array:
        """The output [b, t, out_features] of z, with the sites z, head_out and attn_out."""
        tap = call.tap
        z = tap.heads(z)
        y = self.out(z)  # pyright: ignore[reportAttributeAccessIssue]
        edited = tap.edits_site("head_out")
        if edited or "head_out" in tap.capture:
            kernel = self.out.kernel[...].astype(y.dtype)  # pyright: ignore
            heads = jnp.einsum("bthd,hdm->bthm", z.astype(y.dtype), kernel)
            new = tap("head_out", heads)
            if edited:
                y = y + (new - heads).sum(2)
        return tap("attn_out", y)

    # ---------------------------------------------------------------------------- the call itself

    def __call__(
        self,
        x: Float[Array, "b *t m"],
        *,
        mask: Any = None,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Any = None,
        valid: Bool[Array, "b *t"] | None = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
        edits: Edits | None = None,
        capture: Iterable[str] = (),
        **further: Any,
    ) -> Any:
        """Mixes the tokens of x.

        Args:
          x: [b, t, in_features]; [b, *spatial, in_features] where the mechanism allows it.
          mask: a mask of `attnjax.masks`, or booleans broadcastable to [b, h, t, s], True = attend.
          positions: absolute positions; None counts on from the cache's length, or from 0.
          segment_ids: documents packed in a row, which do not see each other.
          cache: from `init_cache`, or of an earlier call.
          valid: True for real tokens, which come first in each row. Padding leaves the cache alone;
            the output there is meaningless.
          deterministic: True turns dropout off; None is the module's own.
          dropout_rng: key for dropout.
          edits: interventions of this layer (`attnjax.taps.Edits`).
          capture: names of sites to return.
          **further: inputs that only some mechanisms take; their classes name them in `further`
            and describe them. None is the same as leaving one out.

        Returns:
          y shaped like x, with width out_features; `(y, cache)` with a cache; captured arrays as a
          dict last, with all tokens in one axis.
        """
        call = self.begin(
            x, mask=mask, positions=positions, segment_ids=segment_ids, cache=cache, valid=valid,
            deterministic=deterministic, dropout_rng=dropout_rng, edits=edits, capture=capture,
            **further,
        )  # fmt: skip
        y = self.finish(call, self.mix(call))
        if x.ndim > 3:
            y = y.reshape(*x.shape[:-1], -1)
        return call.tap.result(y) if cache is None else call.tap.result(y, call.cache)

    def begin(
        self,
        x: jax.Array,
        *,
        mask: Any = None,
        positions: Any = None,
        segment_ids: Any = None,
        cache: Any = None,
        valid: Any = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
        edits: Edits | None = None,
        capture: Iterable[str] = (),
        **further: Any,
    ) -> Call:
        """Checks the arguments of a call; see `__call__`."""
        name = type(self).__name__
        unknown = [word for word in further if word not in self.further]
        if unknown:
            raise TypeError(
                f"{name}: unknown argument {', '.join(unknown)}; further arguments of its call are "
                f"{', '.join(self.further) or 'none'}."
            )
        spatial = self.spatial and not self.causal
        if not (x.ndim == 3 or (x.ndim > 3 and spatial)) or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{name}: x must have shape [batch, {'*spatial' if spatial else 'length'}, "
                f"{self.in_features}], got {x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: x must be floating point, got {x.dtype}.")
        lead, x = x.shape[:-1], x.reshape(x.shape[0], -1, x.shape[-1])
        b, t = x.shape[:2]
        self._check(mask, positions, segment_ids, cache, b, t)
        if valid is not None:
            if valid.shape != lead or valid.dtype != jnp.bool_:
                raise ValueError(
                    f"{name}: valid must be boolean of shape [batch, length] = {lead}, got "
                    f"{valid.dtype} {valid.shape}."
                )
            valid = valid.reshape(b, t)
            # padding may hold anything, NaN too: 0 there keeps states and gradients clean
            x = jnp.where(valid[..., None], x, jnp.zeros_like(x))
        start = 0 if cache is None else cache.length
        placed = positions is not None
        if positions is None:
            positions = new_positions(jnp.broadcast_to(jnp.asarray(start, jnp.int32), (b,)), t)
        return Call(
            x, positions, start, segment_ids, mask, valid, cache, self.causal,
            Tap(edits, capture, sites=self.sites, name=name),
            self._dropout_key(deterministic, dropout_rng), placed,
            dict.fromkeys(self.further) | further,
        )  # fmt: skip

    def _check(
        self, mask: Any, positions: Any, segment_ids: Any, cache: Any, b: int, t: int
    ) -> None:
        name = type(self).__name__
        if mask is not None and not self.masked:
            raise NotImplementedError(
                f"{name}: mask is not supported; use valid for padding"
                f"{' and segment_ids for packed documents' if self.packed else ''}."
            )
        if positions is not None and positions.shape != (b, t):
            raise ValueError(
                f"{name}: positions must have shape [batch, length] = {(b, t)}, got "
                f"{positions.shape}."
            )
        if segment_ids is not None:
            if not self.packed:
                raise NotImplementedError(
                    f"{name}: segment_ids are not supported; give one document per row."
                )
            check_segments(name, segment_ids, b, t)
        if cache is None:
            return
        self._require_decoding()
        if segment_ids is not None and not self.resumes:
            raise NotImplementedError(
                f"{name}: segment_ids with a cache are not supported; decode one document per row."
            )
        if cache.length.shape != (b,):
            raise ValueError(
                f"{name}: the cache was made for batch {cache.length.shape}, the input has {b} "
                "rows; use init_cache(batch, max_length)."
            )

    def _require_decoding(self) -> None:
        name = type(self).__name__
        if not self.decodes:
            raise NotImplementedError(
                f"{name}: has no step-by-step form, so no cache; call it on whole sequences."
            )
        if not self.causal:
            raise ValueError(f"{name}: a cache needs causal=True, set when the module is made.")

    def _dropout_key(self, deterministic: bool | None, dropout_rng: Any) -> Any:
        if self.dropout_rate == 0.0:
            return None
        name = type(self).__name__
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic is None:
            raise ValueError(
                f"{name}: dropout_rate={self.dropout_rate} needs deterministic=True or False, in "
                "the call or when the module is made."
            )
        if deterministic:
            return None
        if dropout_rng is None:
            raise ValueError(f"{name}: dropout needs dropout_rng=key in the call.")
        return dropout_rng
