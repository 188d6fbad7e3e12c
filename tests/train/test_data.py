"""Byte data: pure batches, honest packing, clean splits, clear errors."""

import numpy as np
import pytest

from train.config import Data
from train.data import MARK, ByteData, FirstFitRows


def test_batch_is_a_function_of_seed_and_step(config):
    one, two = ByteData(config.data), ByteData(config.data)
    two.batch(1, 0, 8)  # an earlier call changes nothing
    for name, x in one.batch(7, 5, 8).items():
        assert x.dtype == np.int32 and x.shape == (8, 64)
        np.testing.assert_array_equal(x, two.batch(7, 5, 8)[name])
    assert not np.array_equal(one.batch(7, 5, 8)["inputs"], one.batch(7, 6, 8)["inputs"])
    assert not np.array_equal(one.batch(7, 5, 8)["inputs"], one.batch(8, 5, 8)["inputs"])


def test_rows_of_a_step_do_not_depend_on_the_batch_size(config):
    data = ByteData(config.data)
    whole = data.batch(0, 1, 8)["inputs"]
    halves = [data.batch(0, step, 4)["inputs"] for step in (2, 3)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_positions_restart_and_no_target_crosses_documents(config, packing):
    data = ByteData(Data(source=config.data.source, context=200, batch=4, packing=packing))
    crossings = 0
    for step in range(6):
        batch = data.batch(0, step, 4)
        for row in range(4):
            tokens, targets, segments, positions = (
                batch[name][row] for name in ("inputs", "targets", "segment_ids", "positions")
            )
            for segment in set(segments.tolist()) - {0}:
                where = np.flatnonzero(segments == segment)
                np.testing.assert_array_equal(where, np.arange(where[0], where[-1] + 1))
                np.testing.assert_array_equal(positions[where], np.arange(len(where)))
                if segment > 1 and packing == "concat":
                    assert tokens[where[0]] == MARK
                # within a document the target is the next input
                np.testing.assert_array_equal(targets[where[:-1]], tokens[where[1:]])
                crossings += segment > 1
            assert (targets[segments == 0] == -1).all()
            assert MARK not in targets
    assert crossings >= 3


def test_first_fit_predicts_every_byte_once():
    documents = [bytes([65 + i]) * (17 * i + 1) for i in range(9)]
    rows = FirstFitRows(documents, 40)
    counts = np.zeros(256, int)
    for i in range(rows.count):
        row = rows.row(i, 0)
        assert row["inputs"].shape == (40,)
        targets = row["targets"][row["targets"] >= 0]
        counts += np.bincount(targets, minlength=256)
    assert {d[0]: len(d) for d in documents} == {i: n for i, n in enumerate(counts.tolist()) if n}


def test_an_epoch_visits_every_row_once(config):
    data = ByteData(config.data)
    count = data._rows.count
    starts = [data.batch(3, step, 1)["inputs"].tobytes() for step in range(count)]
    assert len(set(starts)) == count


def test_validation_predicts_every_held_out_byte_once(config):
    data = ByteData(config.data)
    seen = [x for b in data.validation(3) for x in b["targets"][b["targets"] >= 0].tolist()]
    assert bytes(seen) == b"".join(data.held_out)
    assert all(b["inputs"].shape == (3, 64) for b in data.validation(3))
    assert len(list(data.validation(3, batches=1))) == 1


def test_split_is_by_content_and_digest_by_files(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document number {i} " * 8)
    data = ByteData(Data(source=str(tmp_path), context=16))
    assert 0 < len(data.held_out) < 12 and len(data.train) + len(data.held_out) == 40
    assert not set(data.held_out) & set(data.train)
    assert ByteData(Data(source=f"{tmp_path}/*.txt", context=16)).held_out == data.held_out
    same = ByteData(Data(source=str(tmp_path), context=16))
    assert same.digest == data.digest
    (tmp_path / "0.txt").write_text("another text " * 8)
    assert ByteData(Data(source=str(tmp_path), context=16)).digest != data.digest


def test_one_file_holds_out_its_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"0123456789" * 30)
    data = ByteData(Data(source=str(path), context=16))
    assert b"".join(data.train + data.held_out) == path.read_bytes()
    assert len(data.held_out[0]) == 30


def test_stdlib_has_no_tests_in_it():
    data = ByteData(Data(source="stdlib"))
    assert len(data.train) > 300 and len(data.held_out) > 30
    assert not any(b"class MinidomTest(" in document for document in data.train)
    assert "held out" in data.describe()


@pytest.mark.parametrize("kind", ["missing", "empty", "glob", "short"])
def test_bad_sources_are_errors_with_a_sentence(tmp_path, kind):
    source = {"missing": tmp_path / "nowhere", "glob": tmp_path / "*.txt"}.get(kind, tmp_path)
    if kind == "short":
        (tmp_path / "a.txt").write_text("few bytes")
    wanted = {"missing": "does not exist", "short": "at least 129"}.get(kind, "holds no file")
    with pytest.raises(ValueError, match=wanted):
        ByteData(Data(source=str(source), context=64))
