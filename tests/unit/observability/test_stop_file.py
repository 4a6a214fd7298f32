"""The file that asks a run to stop. Who acts on it: tests/distributed/test_stop.py."""

from megatron_gkd.observability import StopFile
from megatron_gkd.observability.stop_file import MAX_REASON_CHARACTERS


def test_the_text_of_the_file_is_the_reason(tmp_path):
    file = StopFile(tmp_path)
    assert file.read() is None
    file.path.touch()
    assert file.read() == f"stopped by {tmp_path}/stop"
    file.path.write_bytes(b"disk\n is full \xff" + b"x" * 10_000)
    assert file.read().startswith(f"stopped by {tmp_path}/stop: disk is full ")
    assert len(file.read()) < len(str(file.path)) + MAX_REASON_CHARACTERS + 20


def test_an_old_file_is_removed_and_a_missing_one_is_fine(tmp_path):
    file = StopFile(tmp_path)
    file.path.touch()
    file.clear()
    file.clear()
    assert file.read() is None
