"""Megatron's DDP, optimizer, optimizer state and learning-rate schedule."""
