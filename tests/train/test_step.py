"""One step: the loss in chunks, accumulation, sharding, NaN, schedules, one compile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.runs import change
from train.config import Config, Optim, Schedule
from train.data import ByteData
from train.optim import make_fraction, make_optimizer, matrix_axes
from train.state import Parts, init_state, prepare
from train.step import (
    batch_losses,
    batch_shardings,
    gradients,
    make_eval_step,
    make_train_step,
    token_losses,
)

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
MORE_MESHES = [(2, 4, 1), (4, 1, 2), (1, 4, 2)]


def on_device(parts: Parts, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.device_put(batch, batch_shardings(parts))


def single(config: Config) -> Parts:
    return prepare(change(config, mesh={"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])


def test_chunked_loss_is_the_plain_loss():
    class Head:
        def __init__(self, table):
            self.table = table

        def unembed(self, hidden):
            return hidden @ self.table

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (3, 50, 16))
    table = jax.random.normal(keys[1], (16, 37))
    targets = jax.random.randint(keys[2], (3, 50), -1, 37)

    def plain(hidden, table):
        logits = hidden @ table
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return jnp.where(targets >= 0, loss, 0.0)

    def in_chunks(size):
        return lambda hidden, table: token_losses(Head(table), hidden, targets, size)[0]

    @jax.jit
    def losses_and_slopes(hidden, table):
        losses = (plain, *map(in_chunks, (7, 16, 512)))
        return [
            (f(hidden, table), jax.grad(lambda *a, f=f: f(*a).sum(), argnums=(0, 1))(hidden, table))
            for f in losses
        ]

    (wanted, slopes), *others = losses_and_slopes(hidden, table)
    for found, their_slopes in others:
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
        for a, b in zip(their_slopes, slopes, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_memory_of_the_loss_does_not_hold_all_logits():
    class Head:
        def __init__(self, table):
            self.table = table

        def unembed(self, hidden):
            return hidden @ self.table

    def temporary(chunk: int) -> int:
        def loss(hidden, table):
            return token_losses(Head(table), hidden, jnp.zeros((2, 1024), jnp.int32), chunk)[
                0
            ].sum()

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 1024, 32), (32, 4096))]
        return (
            jax.jit(jax.grad(loss, (0, 1)))
            .lower(*shapes)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporary(64) < temporary(1024) / 4


def test_accumulation_is_the_whole_batch(config):
    data = ByteData(change(config, data={"packing": "first_fit"}).data)
    batch = data.batch(0, 0, 8)
    batch["targets"][3] = -1  # slices then hold different numbers of predicted tokens
    results = []
    for slices in (1, 4):
        parts = single(change(config, optim={"accumulate": slices, "z_loss": 1e-3}))
        state = init_state(parts)
        results.append(
            jax.jit(lambda p, b, parts=parts: gradients(parts, p, b, jax.random.key(0)))(
                state["params"], on_device(parts, batch)
            )
        )
    for loss, tokens, grads in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-6)
        assert tokens == results[0][1]
        for name, g in grads.items():
            np.testing.assert_allclose(g, results[0][2][name], rtol=1e-4, atol=1e-6)


def three_steps(parts: Parts) -> list[float]:
    data = ByteData(parts.config.data)
    state, step, found = init_state(parts), make_train_step(parts), []
    for i in range(3):
        state, metrics = step(state, on_device(parts, data.batch(0, i, 8)))
        found += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return found


def check_meshes(config: Config, meshes: list[tuple[int, int, int]]) -> None:
    wanted = three_steps(single(config))
    for data, fsdp, tensor in meshes:
        mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
        found = three_steps(prepare(change(config, mesh=mesh)))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=str(mesh))


def test_sharded_is_unsharded(config):
    check_meshes(change(config, data={"packing": "first_fit"}), MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("mixers", ["lightning, softmax", "window(16)+sink(2), softmax"])
def test_sharded_is_unsharded_for_more(config, packing, mixers):
    config = change(config, model={"mixers": mixers}, data={"packing": packing})
    check_meshes(change(config, optim={"name": "muon", "lr": 0.02}), MESHES + MORE_MESHES)


def test_one_compile_over_all_steps(config):
    config = change(config, mesh={"data": 2, "fsdp": 2, "tensor": 2}, optim={"accumulate": 2})
    parts, data = prepare(config), ByteData(config.data)
    compiled: list[str] = []
    counting = True

    def listen(event: str, duration: float, **names: object) -> None:
        if counting and event.endswith("backend_compile_duration"):
            compiled.append(str(names.get("fun_name", "")))

    state, step = init_state(parts), make_train_step(parts)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for i in range(4):
            state, _ = step(state, on_device(parts, data.batch(0, i, 8)))
        jax.block_until_ready(state)
    finally:
        counting = False
    assert len([name for name in compiled if "train_step" in name]) == 1, compiled
    assert len(compiled) == 1, compiled


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(config):
    parts = single(config)
    state, step = init_state(parts), make_train_step(parts)
    batch = on_device(parts, ByteData(config.data).batch(0, 0, 8))
    poisoned = {**state, "params": {**state["params"]}}
    name = next(n for n, axes in parts.skeleton.axes.items() if "vocab" in axes)
    poisoned["params"][name] = state["params"][name].at[0, 0].set(jnp.nan)
    before = jax.tree.map(np.asarray, {k: poisoned[k] for k in ("params", "opt")})
    after, metrics = step(poisoned, batch)
    assert not metrics["finite"] and not np.isfinite(metrics["loss"])
    assert int(after["step"]) == 1
    jax.tree.map(np.testing.assert_array_equal, before, {k: after[k] for k in ("params", "opt")})


def test_documents_of_a_row_do_not_see_each_other(config):
    parts = single(change(config, data={"packing": "first_fit"}))
    params = init_state(parts)["params"]
    losses = jax.jit(lambda row: batch_losses(parts.skeleton.model(params), row, 64)[0])
    rows = ByteData(parts.config.data).batch(0, 0, 32)
    index = next(i for i in range(32) if rows["segment_ids"][i].max() >= 2)
    row = {name: jnp.asarray(x[index : index + 1]) for name, x in rows.items()}
    packed = losses(row)
    where = np.flatnonzero(np.asarray(row["segment_ids"])[0] == 2)
    alone = {name: x[:, where[0] : where[-1] + 1] for name, x in row.items()}
    alone = {**alone, "segment_ids": jnp.ones_like(alone["inputs"])}
    wanted = losses(alone)
    np.testing.assert_allclose(packed[:, where[0] : where[-1] + 1], wanted, rtol=1e-5, atol=1e-5)


def test_validation_sums_by_quarter(config):
    parts = single(config)
    params, data = init_state(parts)["params"], ByteData(config.data)
    step = make_eval_step(parts)
    losses = jax.jit(lambda p, batch: batch_losses(parts.skeleton.model(p), batch, 64)[0])
    total = 0.0
    for batch in data.validation(4):
        loss, tokens = step(params, batch)
        plain = losses(params, batch)
        counted = batch["targets"] >= 0
        for quarter in range(4):
            member = counted & (batch["positions"] // 16 == quarter)
            assert int(tokens[quarter]) == member.sum()
            np.testing.assert_allclose(
                loss[quarter], np.asarray(plain)[member].sum(), rtol=1e-5, atol=1e-5
            )
        total += float(tokens.sum())
    assert total == sum(map(len, data.held_out))


@pytest.mark.parametrize("kind", ["cosine", "wsd", "inv_sqrt", "constant"])
def test_schedules(kind):
    fraction = make_fraction(Schedule(kind=kind, warmup=10, decay=0.2, final=0.1), 100)
    values = np.asarray([fraction(jnp.asarray(i)) for i in range(101)])
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=0.05)
    assert (np.diff(values[10:]) <= 1e-6).all()
    last = {"cosine": 0.1, "wsd": 0.1, "inv_sqrt": 0.1**0.5, "constant": 1.0}[kind]
    np.testing.assert_allclose(values[100], last, rtol=1e-3)
    if kind == "wsd":
        np.testing.assert_allclose(values[10:81], 1.0)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_the_learning_rate_scales_the_whole_update(name):
    axes = {"w": ("embed", "mlp"), "table": ("vocab", "embed"), "gain": ("embed",)}
    params = {"w": jnp.ones((4, 6)), "table": jnp.ones((8, 4)), "gain": jnp.ones(4)}
    grads = jax.tree.map(lambda p: jnp.linspace(-1.0, 1.0, p.size).reshape(p.shape), params)
    base = Optim(name=name, lr=0.1, adam_lr=0.2, weight_decay=0.3)
    half = dataclasses.replace(base, lr=0.05, adam_lr=0.1)
    one, two = (make_optimizer(o, axes) for o in (base, half))
    full, _ = one.update(grads, one.init(params), params)
    scaled, _ = two.update(grads, two.init(params), params)
    for key, update in full.items():
        np.testing.assert_allclose(update * 0.5, scaled[key], rtol=1e-5)


def test_matrices_are_read_off_the_axis_names():
    assert matrix_axes(("embed",)) is None
    assert matrix_axes(("vocab", "embed")) is None
    assert matrix_axes(("layers", "heads")) is None
    assert matrix_axes(("embed", None)) is None
    assert tuple(matrix_axes(("embed", "heads", "head_dim"))) == ((0,), (1, 2))
    assert tuple(matrix_axes(("layers", "embed", None, "heads"))) == ((1,), (3,))
    assert tuple(matrix_axes(("layers", "heads", "head_dim", "embed"))) == ((1, 2), (3,))
