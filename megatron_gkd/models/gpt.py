"""From the sizes in config.json to Megatron-Core's GPTModel, with hidden states where logits would come out.

Shapes: B = sequences of a micro-batch, S = positions, H = hidden, V = vocabulary entries of this rank.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_gkd.config import RecomputeConfig
from megatron_gkd.config.hf_shapes import HfShapes
from megatron_gkd.models.chunks import LocalModel, ModelChunks, chunks_of
from megatron_gkd.models.rotary import rotary_frequencies
from megatron_gkd.models.transformer import transformer_config
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.platform.kernels import Kernels


class RMSNorm(torch.nn.RMSNorm):
    """Norm for Megatron's layer spec that also works with sequence parallelism.

    Megatron's own wrapper of torch's norm refuses it. The attribute makes ``finalize_model_grads`` sum the weight's
    gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class HiddenOnly(torch.nn.Module):
    """Output layer of a headless model: hands the hidden states on."""

    def forward(self, input_: Tensor, weight=None, runtime_gather_output=None) -> tuple[Tensor, None]:
        """Return ``input_`` unchanged, in the form of Megatron's linear layers (output, bias)."""
        return input_, None


class HiddenTap:
    """Switch on a GPTModel's output layer: while on, ``model(...)`` returns hidden states [B, S, H] on the last stage.

    With sequence parallelism it returns this rank's [B, S / tp, H]. The output layer keeps its parameter, so the state
    dict, DDP and the all-reduce of a tied embedding's gradient are unchanged. While off, logits come out as usual.
    """

    def __init__(self, model: LocalModel):
        self.is_on = True
        output_layer = chunks_of(model)[-1].output_layer
        real_forward = output_layer.forward
        tap = self

        def forward(self, input_, weight=None, runtime_gather_output=None):
            if tap.is_on:
                return input_, None
            return real_forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)

        output_layer.forward = types.MethodType(forward, output_layer)

    def __enter__(self):
        """Let logits through for the length of a ``with`` block."""
        self.is_on = False

    def __exit__(self, *_):
        self.is_on = True


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tp_size: int) -> int:
    """Vocabulary rows after padding: the next multiple of ``divisible_by * tp_size``."""
    multiple = divisible_by * tp_size
    return -(-vocab_size // multiple) * multiple


def build_gpt(
    shapes: HfShapes,
    groups: ModelGroups,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    max_seq_length: int,
    vocab_divisible_by: int = 1,
    sequence_parallel: bool = False,
    recompute: RecomputeConfig = RecomputeConfig(),  # noqa: B008  (frozen)
    is_headless: bool = False,
    is_blank: bool = False,
) -> LocalModel:
    """This rank's part of the model on ``device``, every weight zero; in chunks if the layout has virtual stages.

    Args:
        shapes: Sizes from config.json.
        groups: The model's layout and process groups.
        dtype: Type of the parameters.
        device: Where they live.
        kernels: Optional kernel libraries.
        max_seq_length: Longest sequence in positions.
        vocab_divisible_by: The vocabulary is padded to a multiple of this times the tensor-parallel size.
        sequence_parallel: Split activations between the tensor-parallel regions along the sequence.
        recompute: Activations that the backward pass computes again.
        is_headless: Leave the output layer out; the model returns hidden states (after the final norm).
        is_blank: Leave the weights as they are allocated, so that they take no memory until they are written.
    """
    on_cpu = device.type == "cpu"
    config = transformer_config(
        shapes,
        groups,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        kernels=kernels,
        on_cpu=on_cpu,
    )
    vocab_size = padded_vocab_size(
        shapes.vocab_size, divisible_by=vocab_divisible_by, tp_size=groups.layout.tp_size
    )
    chunks = [
        _build_chunk(
            config,
            shapes,
            groups,
            i,
            vocab_size=vocab_size,
            max_seq_length=max_seq_length,
            is_headless=is_headless,
            is_blank=is_blank,
            kernels=kernels,
        ).to(device=device, dtype=dtype)  # norms are made in fp32
        for i in range(groups.layout.vpp_size)
    ]
    return ModelChunks(chunks) if len(chunks) > 1 else chunks[0]


def _build_chunk(
    config: TransformerConfig,
    shapes: HfShapes,
    groups: ModelGroups,
    index: int,
    *,
    vocab_size: int,
    max_seq_length: int,
    is_headless: bool,
    is_blank: bool,
    kernels: Kernels,
) -> GPTModel:
    """One of this rank's chunks; the first of the first stage has the embedding, the last of the last the head."""
    num_chunks = groups.layout.vpp_size
    has_head = groups.is_last_stage and index == num_chunks - 1
    vp_stage = index if num_chunks > 1 else None
    model = GPTModel(
        config,
        block_spec(config, vp_stage, groups.pp_rank, qk_layernorm=shapes.qk_norm, kernels=kernels),
        vocab_size,
        max_seq_length,
        pre_process=groups.is_first_stage and index == 0,
        post_process=has_head,
        parallel_output=True,
        share_embeddings_and_output_weights=shapes.tied and not is_headless,
        position_embedding_type="rope",
        pg_collection=groups.pg,
        vp_stage=vp_stage,
    )
    model.rotary_pos_emb.inv_freq = rotary_frequencies(shapes)
    if is_headless and has_head:
        model.add_module("output_layer", HiddenOnly())
    _mark_split_weights(model)
    for parameter in () if is_blank else model.parameters():
        parameter.data.zero_()  # padding rows stay zero; nothing is left as uninitialised memory
    return model


def keep_graph_in_recompute(model: LocalModel) -> None:
    """Let layers behind a frozen embedding learn with full recomputation too.

    It hands on a tensor without a graph where no input needs a gradient, and the first stage would not be trained.
    """

    def require_gradient(_module, _args, output: Tensor) -> Tensor:
        is_recomputed = model.config.recompute_granularity == "full" and torch.is_grad_enabled()
        return output.requires_grad_() if is_recomputed and not output.requires_grad else output

    first = chunks_of(model)[0]
    if first.pre_process:
        first.embedding.register_forward_hook(require_gradient)


def _mark_split_weights(model: GPTModel) -> None:
    """Mark the weights that tensor parallelism splits, as Megatron does where it draws them.

    Without the mark they count as copies, and the gradient norm takes those of the first tensor-parallel rank only.
    """
    split_dims = {
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in model.modules():
        dim, weight = split_dims.get(type(module)), getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)


def block_spec(
    config: TransformerConfig, vp_stage: int | None, pp_rank: int, *, qk_layernorm: bool, kernels: Kernels
) -> Any:
    """Transformer Engine's layers where there are any, plain torch ones elsewhere (``TransformerBlockSubmodules``)."""
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    if kernels.transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        from megatron.core.extensions.transformer_engine import TENorm

        te_norm: Any = TENorm
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=te_norm)
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
    parts: Any = layer.submodules
    norm: Any = RMSNorm
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if qk_layernorm:
        parts.self_attention.submodules.q_layernorm = parts.self_attention.submodules.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def head_weight(model: LocalModel) -> Tensor:
    """[V, H] shard of the output projection on the last stage; the embedding's copy if tied."""
    last = chunks_of(model)[-1]
    # shared_embedding_or_output_weight() answers with the embedding on a first stage even if nothing is shared
    is_in_embedding = last.share_embeddings_and_output_weights and last.pre_process
    layer: Any = last.embedding.word_embeddings if is_in_embedding else last.output_layer
    return layer.weight


def select_rows(
    hidden_BSH: Tensor, mask_BS: Tensor, *, sequence_parallel: bool, group: dist.ProcessGroup
) -> Tensor:
    """[T, H] rows under the mask, sequence by sequence, equal on all tensor-parallel ranks.

    Each rank may hand back a partial gradient: it is summed over the tensor-parallel group on the way into the model.

    Args:
        hidden_BSH: Hidden states of the last stage; [B, S / tp, H] with sequence parallelism.
        mask_BS: True where a row is wanted.
        sequence_parallel: Whether ``hidden_BSH`` is split along the sequence.
        group: The model's tensor-parallel group.
    """
    hidden_SBH = hidden_BSH.transpose(0, 1).contiguous()
    if sequence_parallel:
        hidden_SBH = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_SBH, tensor_parallel_output_grad=True, group=group
        )
    else:
        hidden_SBH = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH, group=group)
    num_sequences = mask_BS.shape[0]
    sequence_T, position_T = mask_BS.nonzero(as_tuple=True)
    return hidden_SBH.flatten(0, 1)[position_T * num_sequences + sequence_T]


@dataclass(frozen=True)
class ShardedModel:
    """A model as one rank holds it.

    Attributes:
        model: This rank's part.
        groups: Layout and process groups.
        tap: Switch on the output layer of the last stage; ``None`` on other stages.
        shapes: Sizes from config.json.
        dtype: Number format of the parameters.
    """

    model: LocalModel
    groups: ModelGroups
    tap: HiddenTap | None
    shapes: HfShapes
    dtype: torch.dtype
