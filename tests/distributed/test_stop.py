"""All ranks stop together, for the reason that one of them noticed. The whole way of a stop: tests/e2e/test_training.py."""

from pathlib import Path


def check_agreement(rank: int, world_size: int, folder: Path) -> None:
    import torch

    from megatron_gkd.train.lifecycle import StopRequest

    own = folder / f"as_seen_by_rank_{rank}"
    own.mkdir()
    stop, device = StopRequest(own), torch.device("cpu")
    assert not stop.is_agreed(device)
    assert stop.reason == ""
    if rank == 1:
        (own / "stop").write_text("time is up")
    assert stop.is_agreed(device)
    assert stop.reason == f"stopped by {folder}/as_seen_by_rank_1/stop: time is up"


def test_a_stop_file_that_one_rank_sees_stops_all_of_them_for_its_reason(run_on_ranks, tmp_path):
    run_on_ranks(2, check_agreement, tmp_path)
