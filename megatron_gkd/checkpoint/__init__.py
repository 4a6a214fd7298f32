"""Model folders: training checkpoints, Hugging Face checkpoints in both directions, and pruned students."""
