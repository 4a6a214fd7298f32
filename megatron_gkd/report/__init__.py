"""Evaluation of a finished run: KL on held-out completions."""

from megatron_gkd.report.held_out import HeldOutKL, held_out_kl, load_completions, write_completions

__all__ = ["HeldOutKL", "held_out_kl", "load_completions", "write_completions"]
