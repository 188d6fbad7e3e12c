"""One step of training and one of validation.

The loss is the cross-entropy in nats per predicted token, computed over `loss_chunk` tokens of each
row at a time so that logits [b, t, vocab] never exist together. Targets of -1 (padding, or a token
of another document) do not count.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from attnjax.models import LanguageModel
from train import mesh as meshes
from train.state import Parts, TrainState

Batch = dict[str, jax.Array]
QUARTERS = 4


def token_losses(
    model: LanguageModel, hidden: Float[Array, "b t m"], targets: Int[Array, "b t"], chunk: int
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Cross-entropy and log-normalizer of every token, in chunks of the row.

        loss_t = lse_t - logit_t[target_t],   lse_t = log sum_v exp logit_t[v]

    Args:
      model: gives `unembed(hidden)`, logits in float32.
      hidden: final hidden states.
      targets: token ids; -1 gives loss 0.
      chunk: tokens of a row whose logits exist at one time; the backward pass computes them again.
    """
    batch, length, width = hidden.shape
    chunk = min(chunk, length)
    padding = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=-1)
    pieces = (length + padding) // chunk
    hidden = jnp.moveaxis(hidden.reshape(batch, pieces, chunk, width), 1, 0)
    targets = jnp.moveaxis(targets.reshape(batch, pieces, chunk), 1, 0)

    def one(
        _: None, piece: tuple[jax.Array, jax.Array]
    ) -> tuple[None, tuple[jax.Array, jax.Array]]:
        states, wanted = piece
        logits = model.unembed(states).astype(jnp.float32)  # [b, c, vocab]
        lse = jax.nn.logsumexp(logits, axis=-1)
        # a comparison and a sum, not a gather: no scatter backward, and the vocabulary may be
        # sharded
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == wanted[..., None]
        loss = lse - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return None, (jnp.where(wanted >= 0, loss, 0.0), lse)

    _, (loss, lse) = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, (hidden, targets))
    loss, lse = (jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in (loss, lse))
    return loss, lse


def batch_losses(
    model: LanguageModel, batch: Batch, chunk: int, **options: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`token_losses` of a batch {inputs, targets, segment_ids, positions}, and the auxiliary loss.

    The third result is what the mixers add to the mean loss of the batch (a router's load balance,
    for example), summed over the layers; 0 where none does.
    """
    options["capture"] = ("aux_loss",) if model.has_aux_loss else ()
    hidden = model.hidden(
        batch["inputs"], positions=batch["positions"], segment_ids=batch["segment_ids"], **options
    )
    extra = jnp.zeros(())
    if model.has_aux_loss:
        hidden, captured = hidden
        by_layer = captured["aux_loss"].astype(jnp.float32)  # NaN in layers that have none
        extra = jnp.where(jnp.isnan(by_layer), 0.0, by_layer).sum()
    return *token_losses(model, hidden, batch["targets"], chunk), extra


def gradients(
    parts: Parts, params: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Mean loss over the predicted tokens of the whole batch, their number, and the gradient.

    With accumulation the sums over slices are added and divided once by the number of tokens, so
    slices with fewer predicted tokens weigh less and the result is that of the whole batch.
    """
    optim, dropout = parts.config.optim, parts.config.model.dropout_rate > 0

    def total(params: Any, piece: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = parts.skeleton.model(params)
        options = {"deterministic": not dropout, "dropout_rng": key if dropout else None}
        loss, lse, auxiliary = batch_losses(model, piece, optim.loss_chunk, **options)
        counted = piece["targets"] >= 0
        extra = optim.z_loss * jnp.sum(jnp.where(counted, lse * lse, 0.0)) if optim.z_loss else 0.0
        extra += auxiliary * counted.sum().astype(jnp.float32)  # sums are divided by it in the end
        return jnp.sum(loss) + extra, jnp.sum(loss)

    tokens = jnp.sum(batch["targets"] >= 0).astype(jnp.float32)
    differentiate = jax.value_and_grad(total, has_aux=True)
    if optim.accumulate == 1:
        (_, loss), grads = differentiate(params, batch, key)
    else:
        slices = jax.tree.map(lambda x: _slices(x, optim.accumulate, parts.mesh), batch)

        def one(carry: Any, piece: Any) -> tuple[Any, None]:
            index, rows = piece
            (_, loss), grads = differentiate(params, rows, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, (loss, grads)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), _ = jax.lax.scan(one, zeros, (jnp.arange(optim.accumulate), slices))
    share = 1.0 / jnp.maximum(tokens, 1.0)
    return loss * share, tokens, jax.tree.map(lambda g: g * share.astype(g.dtype), grads)


def make_train_step(parts: Parts) -> Any:
    """The jitted step: (state, batch) -> (state, metrics); the state is donated.

    Metrics: loss (nats per token), tokens, grad_norm (before clipping), lr, finite. When the loss,
    the gradient or the update is not finite, weights and optimizer keep their old values and only
    the step is counted.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state["rng"], state["step"])
        loss, tokens, grads = gradients(parts, state["params"], batch, key)
        grad_norm = optax.tree.norm(grads)
        fraction = parts.fraction(state["step"])
        updates, opt = parts.optimizer.update(grads, state["opt"], state["params"])
        updates = jax.tree.map(lambda u: u * fraction.astype(u.dtype), updates)
        finite = (
            jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        )
        new = {"params": optax.apply_updates(state["params"], updates), "opt": opt}
        old = {"params": state["params"], "opt": state["opt"]}
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {
            "loss": loss,
            "tokens": tokens,
            "grad_norm": grad_norm,
            "lr": parts.config.optim.lr * fraction,
            "finite": finite,
        }
        return {**kept, "step": state["step"] + 1, "rng": state["rng"]}, metrics

    rows, whole = batch_shardings(parts), meshes.replicated(parts.mesh)
    return jax.jit(
        train_step,
        in_shardings=(parts.shardings, rows),
        out_shardings=(parts.shardings, whole),
        donate_argnums=0,
    )


def make_eval_step(parts: Parts) -> Any:
    """The jitted validation step: (params, batch) -> (loss sums, token counts), each [4].

    Quarter i holds the tokens whose position, that is the number of tokens of the same document and
    row before them, lies in [i, i + 1) * context / 4. The sums are in nats.
    """
    length = parts.config.data.context

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = parts.skeleton.model(params)
        loss, *_ = batch_losses(model, batch, parts.config.optim.loss_chunk, deterministic=True)
        quarter = jnp.minimum(batch["positions"] * QUARTERS // length, QUARTERS - 1)
        member = jax.nn.one_hot(quarter, QUARTERS) * (batch["targets"] >= 0)[..., None].astype(
            jnp.float32
        )
        return jnp.einsum("btq,bt->q", member, loss), jnp.sum(member, axis=(0, 1))

    rows, whole = (
        meshes.sharding_for(("batch", "length"), parts.mesh),
        meshes.replicated(parts.mesh),
    )
    shardings = {name: rows for name in ("inputs", "targets", "segment_ids", "positions")}
    return jax.jit(
        eval_step, in_shardings=(parts.shardings["params"], shardings), out_shardings=(whole, whole)
    )


def batch_shardings(parts: Parts) -> dict[str, jax.sharding.NamedSharding]:
    """Where the arrays of a training batch go."""
    rows = meshes.batch_sharding(parts.mesh, parts.config.data.batch, parts.config.optim.accumulate)
    return {name: rows for name in ("inputs", "targets", "segment_ids", "positions")}


def _slices(x: jax.Array, count: int, mesh: jax.sharding.Mesh) -> jax.Array:
    # [rows, t] -> [count, rows / count, t]; slice i takes every count-th row, so each device keeps
    # its own rows
    x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, x.shape[1]), 0, 1)
    return meshes.constrain(x, None, "batch", "length", mesh=mesh)
