"""Megatron's optimizer and learning-rate schedule, built from plain values."""
