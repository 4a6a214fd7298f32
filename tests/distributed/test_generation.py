"""The embedded engine writes what transformers would, in every layout, and a seed always means the same completion.

Not here: the distribution of the draws and the sets that top-k and top-p keep (tests/unit/models/test_generation).
"""

import json
from pathlib import Path

import pytest
import torch

from tests.support.on_ranks import DP, PP2, TP2, TP2_PP2, Split, load_model, student_groups
from tests.support.tiny_models import EOS_ID, write_tiny_model

PROMPT_LENGTHS = (
    7,
    1,
    12,
    3,
    3,
    20,
    5,
)  # an odd number, so that data-parallel copies have shares of different size
MAX_NEW_TOKENS = 12
MODELS = {
    "llama_tied_261": {"family": "llama", "tied": True},
    "qwen3_untied_1003": {"family": "qwen3", "tied": False, "vocab_size": 1003},
    "qwen2_tied_261": {"family": "qwen2", "tied": True},
}
LAYOUTS = [(2, TP2), (2, PP2), (2, DP), (4, TP2_PP2), (4, TP2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Model folders, each with transformers' greedy completions and the stop tokens that some of them reach."""
    from tests.support.hf_reference import greedy, load_hf_model

    folders = []
    for seed, (name, options) in enumerate(MODELS.items(), 5):
        folder = write_tiny_model(tmp_path_factory.mktemp("generation") / name, seed=seed, **options)
        model = load_hf_model(folder)
        open_ended = [greedy(model, prompt, MAX_NEW_TOKENS, ())[0] for prompt in _prompts()]
        stop_ids = [EOS_ID, open_ended[1][0], open_ended[2][4], open_ended[5][-1]]
        completions, margins = zip(
            *(greedy(model, p, MAX_NEW_TOKENS, stop_ids) for p in _prompts()), strict=True
        )
        assert min(margins) > 1e-4, "two tokens are equally likely; choose another seed"
        assert len({len(ids) for ids in completions}) >= 3
        (folder / "greedy.json").write_text(json.dumps([completions, stop_ids]))
        folders.append(folder)
    return folders


@pytest.mark.parametrize(("num_ranks", "split"), LAYOUTS, ids=str)
def test_greedy_completions_are_those_of_transformers(run_on_ranks, models, num_ranks: int, split: Split):
    run_on_ranks(num_ranks, _generate_greedily, models, split)


@pytest.fixture(scope="module")
def sampled(run_on_ranks, models, tmp_path_factory) -> list[list[list[int]]]:
    """Sampled completions of every model, as the two copies of DP 2 write them."""
    file = tmp_path_factory.mktemp("sampled") / "DP.json"
    run_on_ranks(2, _sample, models, DP, file)
    return json.loads(file.read_text())


@pytest.mark.parametrize(("num_ranks", "split"), [layout for layout in LAYOUTS if layout != (2, DP)], ids=str)
def test_a_seed_gives_the_same_completion_in_every_layout(
    run_on_ranks, models, sampled, tmp_path, num_ranks: int, split: Split
):
    run_on_ranks(num_ranks, _sample, models, split, tmp_path / "ids.json")
    assert json.loads((tmp_path / "ids.json").read_text()) == sampled


def test_different_seeds_give_different_completions(sampled):
    for completions in sampled:
        assert len({tuple(ids) for ids in completions}) == len(completions)
        # the last two prompts are equal, their seeds are not
        assert completions[-1] != completions[-2]


@pytest.mark.parametrize(("num_ranks", "split"), LAYOUTS, ids=str)
def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(
    run_on_ranks, models, num_ranks: int, split: Split
):
    run_on_ranks(num_ranks, _regroup, models[:1], split)


def test_padding_of_the_vocabulary_is_never_drawn(run_on_ranks, models):
    run_on_ranks(2, _draw_from_padded, models[0])


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_every_rank_holds_all_completions_of_an_odd_number_of_prompts(run_on_ranks, models, num_prompts: int):
    run_on_ranks(4, _compare_ranks, models[0], num_prompts)


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(250, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def _rule(stop_ids=(EOS_ID,), **changes):
    from megatron_gkd.models.generation import SamplingRule

    rule = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": MAX_NEW_TOKENS}
    return SamplingRule(**{**rule, **changes}, stop_token_ids=tuple(stop_ids))


def _load(folder: Path, groups, split: Split, **options):
    from megatron_gkd.models.gpt import HiddenTap

    model = load_model(folder, groups, split, **options)
    return model, HiddenTap(model) if groups.is_last_stage else None


def _sharded(folder: Path, model, groups, tap):
    from megatron_gkd.config import load_hf_shapes
    from megatron_gkd.models.gpt import ShardedModel

    return ShardedModel(model, groups, tap, load_hf_shapes(folder), torch.float32)


def _vocab_size(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def _generate_greedily(rank: int, world_size: int, folders: list[Path], split: Split) -> None:
    from megatron_gkd.models.generation import generate

    with student_groups(split) as groups:
        for folder in folders:
            model, tap = _load(folder, groups, split)
            model.train()
            expected, stop_ids = json.loads((folder / "greedy.json").read_text())
            prompts = _prompts()
            for rule in (
                _rule(stop_ids, top_k=1),
                _rule(stop_ids, temperature=1e-6),
                _rule(stop_ids, top_p=1e-9),
            ):
                got = generate(
                    model,
                    groups,
                    tap,
                    prompts,
                    seeds=range(len(prompts)),
                    rule=rule,
                    vocab_size=_vocab_size(folder),
                )
                assert got == expected, folder.name
            assert model.training
            assert tap is None or tap.is_on


def _sample(rank: int, world_size: int, folders: list[Path], split: Split, file: Path) -> None:
    from megatron_gkd.rollout.megatron import MegatronRollout
    from megatron_gkd.serving.protocol import Sampling

    prompts = [*_prompts(), [1, 2, 3], [1, 2, 3]]
    seeds = [2**62 - 1, 0, *range(100, 107)]
    results = []
    with student_groups(split) as groups:
        for folder in folders:
            model, tap = _load(folder, groups, split)
            sampling = Sampling(
                temperature=1.3, top_p=0.95, top_k=40, max_new_tokens=16, stop_token_ids=(EOS_ID,)
            )
            engine = MegatronRollout(sampling, decode=str)
            engine.connect(_sharded(folder, model, groups, tap))
            assert engine.push_weights(4, prompts) is None
            completions = engine.generate(prompts, seeds)
            for completion in completions:
                assert completion.weight_version == 4
                ended = completion.ids[-1] == EOS_ID
                assert completion.finish_reason == ("stop" if ended else "length")
                assert ended or len(completion.ids) == 16
            results.append([list(completion.ids) for completion in completions])
    if rank == 0:
        file.write_text(json.dumps(results))


def _regroup(rank: int, world_size: int, folders: list[Path], split: Split) -> None:
    from megatron_gkd.models.generation import generate

    prompts, seeds = _prompts(), range(20, 20 + len(PROMPT_LENGTHS))
    with student_groups(split) as groups:
        for folder in folders:
            model, tap = _load(folder, groups, split)

            vocab_size = _vocab_size(folder)

            def ids_of(*which: int, model=model, tap=tap, vocab_size=vocab_size):
                chosen = [prompts[i] for i in which], [seeds[i] for i in which]
                completions = generate(model, groups, tap, *chosen, _rule(), vocab_size=vocab_size)
                return dict(zip(which, completions, strict=True))

            together = ids_of(*range(len(prompts)))
            assert ids_of(2) | ids_of(5, 0, 1) | ids_of(6, 3, 4) == together


def _draw_from_padded(rank: int, world_size: int, folder: Path) -> None:
    from megatron_gkd.models.generation import generate

    with student_groups(TP2) as groups:
        model, tap = _load(folder, groups, TP2, vocab_divisible_by=512)
        assert model.vocab_size == 1024
        rule = _rule(temperature=1e4, stop_ids=())  # close to uniform: three of four draws would be padding
        ids = generate(model, groups, tap, _prompts(), seeds=range(7), rule=rule, vocab_size=261)
        assert max(map(max, ids)) < 261
        assert len({i for row in ids for i in row}) > 50


def _compare_ranks(rank: int, world_size: int, folder: Path, num_prompts: int) -> None:
    from megatron_gkd.parallel.collectives import gather_json
    from megatron_gkd.rollout.megatron import MegatronRollout
    from megatron_gkd.serving.protocol import Sampling

    for split in (DP, TP2, PP2):
        with student_groups(split) as groups:
            model, tap = _load(folder, groups, split)
            sampling = Sampling(max_new_tokens=5, stop_token_ids=(EOS_ID,))
            engine = MegatronRollout(sampling, stop=("7",), decode=str)
            engine.connect(_sharded(folder, model, groups, tap))
            completions = engine.generate(_prompts()[:num_prompts], range(num_prompts))
            assert len(completions) == num_prompts
            mine = [completion.to_json() for completion in completions]
            assert all(other == mine for other in gather_json(mine, device=torch.device("cpu")))
