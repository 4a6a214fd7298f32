"""Weight layouts as slices of Hugging Face tensors, and transfer of slices to files."""
