"""On-policy knowledge distillation: Megatron-Core trains, SGLang generates, no logits leave the loss."""

__version__ = "0.1.0"
