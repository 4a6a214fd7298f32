"""A frozen, headless Megatron model as teacher, in a layout of its own on the student's ranks.

Only hidden states leave it. Its output projection is kept as shards on the student's last stage (``head_VH``), split like
the student's vocabulary; the loss multiplies the two.

Shapes: T = rows that enter the loss, H = the teacher's hidden size, V = vocabulary entries of a student rank.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from megatron_gkd.checkpoint.weights import WeightSource, load_head, load_weights
from megatron_gkd.config.hf_shapes import load_hf_shapes
from megatron_gkd.config.teacher import MegatronTeacherConfig
from megatron_gkd.data.sample import Batch, MicroBatch
from megatron_gkd.models.gpt import LocalModel, ShardedModel, build_gpt
from megatron_gkd.models.pipeline import forward_rows
from megatron_gkd.parallel.groups import Layout, ModelGroups, make_model_groups
from megatron_gkd.parallel.routing import plan_transfers, route_rows, share
from megatron_gkd.teacher.base import HiddenSignal, TeacherContext, TeacherEngine

log = logging.getLogger(__name__)


class MegatronTeacher(TeacherEngine):
    """Hidden states of the rows of a batch that enter the loss.

    Args:
        model: This rank's part of the headless model, weights loaded.
        groups: The teacher's layout and process groups.
        student_layout: Where the rows are needed.
        student_dp_rank: Copy of the student that this rank belongs to.
        micro_batch_size: Most sequences in one forward pass.
        pad_id: Token that pads shorter sequences.
        device: The device of this rank.
        head_VH: See ``TeacherEngine``.
    """

    def __init__(
        self,
        model: LocalModel,
        groups: ModelGroups,
        *,
        student_layout: Layout,
        student_dp_rank: int,
        micro_batch_size: int,
        pad_id: int,
        device: torch.device,
        head_VH: Tensor | None = None,
    ):
        # The weights keep requires_grad although no gradient is computed: torch picks the kernel of a product by it, and
        # a teacher that equals the student must compute the same numbers to the last bit.
        self._model = model.eval()
        self._groups, self._student_layout, self._student_dp_rank = groups, student_layout, student_dp_rank
        self._micro_batch_size, self._pad_id, self._device = micro_batch_size, pad_id, device
        self.head_VH = head_VH

    @override
    @classmethod
    def build(
        cls, section: MegatronTeacherConfig, context: TeacherContext, student: ShardedModel
    ) -> "MegatronTeacher":
        source, parallel, job = WeightSource.of(section), section.parallel, context.job
        groups = make_model_groups(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
        shapes = load_hf_shapes(source.hf_folder)
        model = build_gpt(
            shapes,
            groups,
            dtype=student.dtype,
            device=job.device,
            kernels=job.kernels,
            max_seq_length=context.config.teacher_seq_length,
            sequence_parallel=parallel.sequence_parallel,
            is_headless=True,
        )
        load_weights(model, source, shapes, groups, is_headless=True, device=job.device)
        # split as the student's head, whatever the layout of the teacher: both meet in one loss
        head_VH = load_head(
            source,
            shapes,
            tp_rank=student.groups.tp_rank,
            tp_size=student.groups.layout.tp_size,
            padded_vocab=student.model.vocab_size,
            dp_rank=student.groups.dp_rank,
            dtype=student.dtype,
            device=job.device,
            is_needed=student.groups.is_last_stage,
        )
        log.info("Teacher: %s, %s, headless", source.folder, groups.layout)
        return cls(
            model,
            groups,
            student_layout=student.groups.layout,
            student_dp_rank=student.groups.dp_rank,
            micro_batch_size=section.micro_batch_size,
            pad_id=context.tokenizer.pad_id,
            device=job.device,
            head_VH=head_VH,
        )

    @override
    def score(self, batch: Batch, micro_batches: list[MicroBatch]) -> list[HiddenSignal]:
        lengths = [sample.num_loss_tokens for sample in batch.samples]
        rows_TH = self._score_own_share(batch.as_read_by_teacher())
        layout, config = self._groups.layout, self._model.config
        received_TH = route_rows(
            plan_transfers(layout, self._student_layout, len(lengths)),
            rows_TH,
            first_sequence=share(len(lengths), self._groups.dp_rank, layout.dp_size)[0],
            lengths=lengths,
            hidden_size=config.hidden_size,
            dtype=config.params_dtype,
            device=self._device,
        )
        if received_TH is None:
            return []
        first = share(len(lengths), self._student_dp_rank, self._student_layout.dp_size)[0]
        return _split(received_TH, micro_batches, lengths, first)

    def _score_own_share(self, batch: Batch) -> Tensor | None:
        layout = self._groups.layout
        dp_size = layout.dp_size
        # forward only, so the size of a micro-batch is independent of the student's
        own = batch.micro_batches(
            min(len(batch.samples) // dp_size, self._micro_batch_size),
            dp_rank=self._groups.dp_rank,
            dp_size=dp_size,
            seq_length=batch.padded_length(layout.tp_size if self._model.config.sequence_parallel else 1),
            pad_id=self._pad_id,
        )
        rows = forward_rows(self._model, self._model.config, self._groups, own)
        return torch.cat(rows) if rows else None


def _split(
    rows_TH: Tensor, micro_batches: Sequence[MicroBatch], lengths: Sequence[int], first: int
) -> list[HiddenSignal]:
    # rows arrive in the order of the batch; ``indices`` of a micro-batch are its samples there
    offsets = [0]
    for length in lengths[first:]:
        offsets.append(offsets[-1] + length)
    signals = []
    for micro_batch in micro_batches:
        blocks = [rows_TH[offsets[i - first] : offsets[i - first + 1]] for i in micro_batch.indices]
        signals.append(HiddenSignal(torch.cat(blocks)))
    return signals
