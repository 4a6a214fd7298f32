"""Logging set-up of one rank; several processes writing at once are covered by tests/e2e."""

import logging

import pytest

from megatron_gkd.observability.log import configure_logging


@pytest.fixture(autouse=True)
def _restore_logging():
    root, package = logging.getLogger(), logging.getLogger("megatron_gkd")
    before = (list(root.handlers), root.level, package.level)
    yield
    for handler in [handler for handler in root.handlers if handler not in before[0]]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[1])
    package.setLevel(before[2])


def speak():
    log = logging.getLogger("megatron_gkd.some.module")
    log.info("a fact")
    log.warning("a warning")
    logging.getLogger("another_library").info("chatter")


@pytest.mark.parametrize(
    ("level", "rank", "is_shown"), [("info", 0, True), ("info", 3, False), ("warning", 0, False)]
)
def test_rank_0_speaks_at_the_level_and_the_others_only_warn(capsys, level, rank, is_shown):
    configure_logging(level, rank)
    speak()
    text = capsys.readouterr().err
    assert ("a fact" in text) == is_shown
    assert f"rank {rank} WARNING megatron_gkd.some.module: a warning" in text
    assert "chatter" not in text


def test_second_call_replaces_the_first(capsys):
    configure_logging("info", 0)
    configure_logging("info", 0)
    speak()
    assert capsys.readouterr().err.count("a fact") == 1


def test_log_file_of_any_rank_gets_everything_from_the_level_on(tmp_path, capsys):
    path = tmp_path / "logs" / "rank_3.log"
    configure_logging("info", 3, path)
    speak()
    assert "rank 3 INFO megatron_gkd.some.module: a fact" in path.read_text()
    assert "a fact" not in capsys.readouterr().err


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match=r"logging\.level is 'loud'; choose one of debug, info, warning"):
        configure_logging("loud", 0)
