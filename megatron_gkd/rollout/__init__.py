"""Completions sampled from the student: the engines, the on-policy mixture, and the weight push."""

from megatron_gkd.config.rollout import MegatronRolloutConfig, SglangRolloutConfig
from megatron_gkd.rollout.base import RolloutEngine
from megatron_gkd.rollout.megatron import MegatronRollout
from megatron_gkd.rollout.sglang import SglangRollout

ROLLOUTS: dict[type, type[RolloutEngine]] = {
    MegatronRolloutConfig: MegatronRollout,
    SglangRolloutConfig: SglangRollout,
}
"""The engine of each rollout section. A new kind is a section, a file with its engine, and a line here."""
