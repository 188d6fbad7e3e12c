"""Checkpoints: other configuration, torn files, other meshes, NaN, and weights alone."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.runs import change, losses
from train.checkpoint import Checkpoints, TornCheckpointWarning, load_weights, saved_config
from train.data import ByteData
from train.loop import NonFiniteLossError, run
from train.state import abstract_state, init_state, prepare

ONE = {"data": 1, "fsdp": 8}


@pytest.fixture
def short(config):
    return change(
        config,
        steps=8,
        mesh=ONE,
        schedule={"kind": "constant"},  # does not depend on the number of steps
        checkpoint={"every_steps": 2},
        eval={"sample_bytes": 0},
    )


def test_another_configuration_is_refused_by_field(short):
    assert run(change(short, steps=2)) == 0
    with pytest.raises(ValueError, match=r"step 2 .* optim.lr is 0.003 there and 0.5 here"):
        run(change(short, optim={"lr": 0.5}))
    with pytest.raises(ValueError, match="resume is off"):
        run(change(short, checkpoint={"resume": False}))
    assert saved_config(short.folder) == change(short, steps=2)
    digest = ByteData(short.data).digest
    checkpoints = Checkpoints(short, "0" * 64)
    with pytest.raises(ValueError, match=f"data files differ .digest {digest[:12]} there"):
        checkpoints.restore(abstract_state(prepare(short)))
    checkpoints.close()


def test_torn_checkpoints_are_skipped_with_a_warning(short, tmp_path, capsys):
    whole = change(short, out=str(tmp_path / "whole"))
    run(whole)
    run(change(short, steps=6))
    folder = short.folder / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["4", "6"]
    for path in (folder / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(TornCheckpointWarning, match="step 6 cannot be read"):
        run(short)
    assert "resumed from step 4 of 8" in capsys.readouterr().out
    assert losses(short) == losses(whole)
    assert len(list(short.folder.glob("torn-6-*"))) == 1
    for step in (6, 8):
        shutil.rmtree(folder / str(step) / "meta")
    with pytest.warns(TornCheckpointWarning) as caught:
        run(short)
    assert sorted(str(w.message).split("step ")[1][0] for w in caught) == ["6", "8"]
    assert losses(short) == losses(whole)


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8, "fsdp": 1}])
def test_resume_on_another_mesh(short, tmp_path, mesh):
    whole = change(short, out=str(tmp_path / "whole"))
    run(whole)
    run(change(short, steps=4))
    run(change(short, mesh=mesh))
    wanted = losses(whole)
    for step, loss in losses(short).items():
        np.testing.assert_allclose(loss, wanted[step], rtol=1e-5)


def test_restored_state_is_the_saved_one(short):
    parts = prepare(short)
    state = init_state(parts)
    checkpoints = Checkpoints(short, "digest")
    assert checkpoints.restore(abstract_state(parts)) is None
    checkpoints.save(3, state)
    step, restored = checkpoints.restore(abstract_state(parts)) or (0, {})
    checkpoints.close()
    assert step == 3

    def same(a, b):
        assert a.sharding == b.sharding and a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(same, state, restored)


def test_saving_by_minutes(short, monkeypatch):
    short = change(short, checkpoint={"every_steps": 0, "every_minutes": 2.0})
    now = [100.0]
    monkeypatch.setattr("train.checkpoint.time.monotonic", lambda: now[0])
    checkpoints = Checkpoints(short, "digest")
    assert not checkpoints.due(1)
    now[0] += 121.0
    assert checkpoints.due(2)
    checkpoints.save(2, init_state(prepare(short)))
    assert not checkpoints.due(3)
    checkpoints.close()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_nan_stops_or_is_left_out_and_is_never_saved(short, policy, monkeypatch, capsys):
    import jax.numpy as jnp

    from train import step as steps

    plain = steps.gradients

    def poisoned(parts, params, batch, key):
        # the loss of the fifth step is NaN
        loss, tokens, grads = plain(parts, params, batch, key)
        fifth = jnp.all(key == jax.random.fold_in(jax.random.key(short.seed), 4))
        bad = jnp.where(fifth, jnp.nan, 1.0)
        return loss * bad, tokens, jax.tree.map(lambda g: g * bad, grads)

    monkeypatch.setattr(steps, "gradients", poisoned)
    short = change(short, optim={"on_nan": policy})
    if policy == "stop":
        with pytest.raises(
            NonFiniteLossError, match=r"step 5: loss nan.*last checkpoint is of step 4"
        ):
            run(short)
        assert sorted(p.name for p in (short.folder / "checkpoints").iterdir()) == ["2", "4"]
        return
    assert run(short) == 0
    assert "step 5: loss or update not finite" in capsys.readouterr().out
    found = losses(short)
    assert found[5] is None and all(found[i] is not None for i in found if i != 5)
    weights, _ = load_weights(short.folder / "weights.npz")
    assert all(np.isfinite(x).all() for x in weights.values())


def test_exported_weights_are_the_parameters(short):
    run(change(short, steps=1))
    weights, config = load_weights(short.folder / "weights.npz")
    assert config.identity() == short.identity()
    parts = prepare(short)
    assert {n: x.shape for n, x in weights.items()} == parts.skeleton.shapes
    assert (short.folder / "loss.png").stat().st_size > 1000
