"""Weight layouts as slices of Hugging Face tensors, and their transfer to and from safetensors files."""
