"""status.json; that the job writes the right state is covered by tests/e2e."""

import json
import threading

import pytest

from megatron_gkd.observability.status import Status, StatusFile


def test_written_status_is_read_back_and_has_the_documented_keys(tmp_path):
    file = StatusFile(tmp_path / "run")
    assert file.read() is None
    file.write("running", 3)
    file.write("failed", 4, "rollout: the server died")
    assert file.read() == Status("failed", 4, "rollout: the server died")
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {
        "state": "failed", "iteration": 4, "reason": "rollout: the server died",
    }  # fmt: skip


def test_unknown_state_is_refused_and_leaves_the_file(tmp_path):
    file = StatusFile(tmp_path)
    file.write("done", 9)
    with pytest.raises(ValueError, match="'finished' is not one of"):
        file.write("finished", 10)
    assert file.read() == Status("done", 9, "")


def test_failed_write_leaves_the_old_status(tmp_path, monkeypatch):
    file = StatusFile(tmp_path)
    file.write("running", 1)

    def disk_full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        file.write("running", 2)
    assert file.read() == Status("running", 1, "")


def test_reader_never_sees_half_a_file(tmp_path):
    file = StatusFile(tmp_path)
    file.write("running", 0)
    has_ended = threading.Event()

    def write():
        for iteration in range(100):
            file.write("running", iteration, "x" * 20_000)
        has_ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not has_ended.is_set():
        assert file.read() is not None  # raises on a part of a file
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"state": "done"}', '{"state": "?", "iteration": 1, "reason": ""}']
)
def test_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ValueError, match="is not a status file"):
        StatusFile(tmp_path).read()
