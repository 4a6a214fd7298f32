"""Build Megatron-Core's GPTModel from config.json and read hidden states instead of logits.

The model is Megatron's own class; nothing of it is subclassed. Three things are changed per instance, each with its
reason beside it: the norm of the plain torch layers, the rotary frequencies and the forward of the output layer.
Checked with megatron-core 0.16.1; docs/versions.md lists what to check when it is upgraded.

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
from megatron_gkd.models.transformer import rotary_frequencies, transformer_config
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.platform.kernels import Kernels


class ModelChunks(torch.nn.ModuleList):
    """A rank's virtual pipeline stages in order, with those attributes of GPTModel in use.

    Parameter names start with the index of the chunk, as in ``reshard.layout``.
    """

    @property
    def config(self) -> Any:
        """The ``TransformerConfig`` that all chunks share."""
        return chunks_of(self)[0].config

    @property
    def vocab_size(self) -> int:
        """Vocabulary rows after padding, over all tensor-parallel ranks."""
        return chunks_of(self)[0].vocab_size

    def sharded_state_dict(self, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """The state of all chunks for dist_checkpointing, as ``GPTModel.sharded_state_dict``."""
        # the prefix keeps the dictionary's keys apart; in the checkpoint, layers go by their global numbers
        return {
            f"{i}.{name}": value
            for i, chunk in enumerate(chunks_of(self))
            for name, value in chunk.sharded_state_dict(metadata=metadata).items()
        }


LocalModel = GPTModel | ModelChunks
"""This rank's part of a model: a GPTModel, or its virtual pipeline stages."""


def chunks_of(model: LocalModel) -> list[GPTModel]:
    """The rank's GPTModels in pipeline order; a single one without virtual stages."""
    chunks: Any = list(model) if isinstance(model, ModelChunks) else [model]
    return chunks


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for Megatron's layer spec that supports sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        weight: Any = self.weight
        # WrappedTorchNorm asserts against sequence parallelism (megatron-core 0.16.1, transformer/torch_norm.py:32).
        # With this attribute finalize_model_grads sums the weight's gradient over the tensor-parallel group, since
        # each rank has normalized only its part of the sequence.
        weight.sequence_parallel = config.sequence_parallel


class HiddenOnly(torch.nn.Module):
    """Output layer of a headless model: an identity, so the model returns hidden states."""

    def forward(self, input_: Tensor, weight=None, runtime_gather_output=None) -> tuple[Tensor, None]:
        """Return ``input_`` in the (output, bias) form of Megatron's linear layers."""
        return input_, None


class HiddenTap:
    """Bypass the output layer of the last stage, so that ``model(...)`` returns hidden states.

    The result is [B, S, H], or this rank's [B, S / tp, H] with sequence parallelism. Inside ``with tap:`` the output
    layer runs and the model returns logits, as generation needs.
    """

    # Only the layer's forward is replaced, not the layer: it keeps its parameter, so the state dict, DDP and the
    # all-reduce of a tied embedding's gradient between the first and the last stage stay as Megatron wrote them.

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
    is_uninitialized: bool = False,
) -> LocalModel:
    """Build this rank's part of the model with zero weights; ``ModelChunks`` for virtual stages.

    Args:
        shapes: Sizes from config.json.
        groups: The model's layout and process groups.
        dtype: Parameter dtype.
        device: Parameter device.
        kernels: Optional kernel libraries.
        max_seq_length: Longest sequence in positions.
        vocab_divisible_by: The vocabulary is padded to a multiple of this times the tensor-parallel size.
        sequence_parallel: Split activations outside the tensor-parallel regions along the sequence.
        recompute: Activations recomputed in the backward pass.
        is_headless: Omit the output layer; the model returns hidden states after the final norm.
        is_uninitialized: Skip zeroing the weights, so that their pages take no memory until they are written.
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
            is_uninitialized=is_uninitialized,
            kernels=kernels,
        ).to(device=device, dtype=dtype)  # torch.nn.RMSNorm allocates its weight in fp32
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
    is_uninitialized: bool,
    kernels: Kernels,
) -> GPTModel:
    """Build one chunk; the model's first holds the embedding, its last the output layer."""
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
        parallel_output=True,  # logits stay split over the vocabulary
        share_embeddings_and_output_weights=shapes.tied and not is_headless,
        position_embedding_type="rope",
        pg_collection=groups.pg,
        vp_stage=vp_stage,
    )
    # RotaryEmbedding(rope_scaling=True) takes only `factor` and hard-codes the other three numbers of Llama 3.1
    # (megatron-core 0.16.1, rotary_pos_embedding.py:92)
    model.rotary_pos_emb.inv_freq = rotary_frequencies(shapes)
    if is_headless and has_head:
        model.add_module("output_layer", HiddenOnly())
    _mark_split_weights(model)
    for parameter in () if is_uninitialized else model.parameters():
        parameter.data.zero_()  # vocabulary padding is never loaded and must not hold NaN
    return model


def keep_graph_in_recompute(model: LocalModel) -> None:
    """Make full recomputation train the layers after a frozen embedding."""

    # Megatron's CheckpointFunction, like torch's reentrant checkpoint, returns a tensor without a graph if no *tensor*
    # input requires a gradient. With a frozen embedding that is so for the first block, and without this hook the
    # first stage would silently not be trained (megatron-core 0.16.1).
    def require_gradient(_module, _args, output: Tensor) -> Tensor:
        is_recomputed = model.config.recompute_granularity == "full" and torch.is_grad_enabled()
        return output.requires_grad_() if is_recomputed and not output.requires_grad else output

    first = chunks_of(model)[0]
    if first.pre_process:
        first.embedding.register_forward_hook(require_gradient)


def _mark_split_weights(model: GPTModel) -> None:
    """Set Megatron's tensor-parallel attributes on the weights that are split."""
    # Megatron 0.16.1 sets them in its initialization of weights, which perform_initialization=False skips. Without them
    # a weight counts as replicated, and the gradient norm includes the shard of tensor-parallel rank 0 only.
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
    """Layer spec with Transformer Engine modules if available, else with plain torch ones."""
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    if kernels.transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        from megatron.core.extensions.transformer_engine import TENorm

        te_norm: Any = TENorm
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=te_norm)
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
    parts: Any = layer.submodules
    norm: Any = RMSNorm
    # get_gpt_layer_local_spec has no argument for the norm class
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if qk_layernorm:
        parts.self_attention.submodules.q_layernorm = parts.self_attention.submodules.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def head_weight(model: LocalModel) -> Tensor:
    """[V, H] shard of the LM head on the last stage, also if tied."""
    last = chunks_of(model)[-1]
    # with PP = 1, shared_embedding_or_output_weight() returns the embedding even for an untied model (0.16.1)
    is_in_embedding = last.share_embeddings_and_output_weights and last.pre_process
    layer: Any = last.embedding.word_embeddings if is_in_embedding else last.output_layer
    return layer.weight


def select_rows(
    hidden_BSH: Tensor, mask_BS: Tensor, *, sequence_parallel: bool, group: dist.ProcessGroup
) -> Tensor:
    """Select the [T, H] rows under the mask, sequence by sequence, on all tensor-parallel ranks.

    The backward pass sums the ranks' partial gradients over the tensor-parallel group.

    Args:
        hidden_BSH: Hidden states of the last stage; [B, S / tp, H] with sequence parallelism.
        mask_BS: True for the rows to select.
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
    # the gather yields [S, B, H]; the rows come in [B, S] order, as the mask and the targets are stored
    num_sequences = mask_BS.shape[0]
    sequence_T, position_T = mask_BS.nonzero(as_tuple=True)
    return hidden_SBH.flatten(0, 1)[position_T * num_sequences + sequence_T]


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of a model with its layout and sizes.

    Attributes:
        model: This rank's part.
        groups: Layout and process groups.
        tap: Bypass of the output layer on the last stage; ``None`` on other stages.
        shapes: Sizes from config.json.
        dtype: Parameter dtype.
    """

    model: LocalModel
    groups: ModelGroups
    tap: HiddenTap | None
    shapes: HfShapes
    dtype: torch.dtype
