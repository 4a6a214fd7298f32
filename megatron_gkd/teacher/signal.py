"""What a teacher hands to the loss.

Shapes: T = rows that enter the loss, H = the teacher's hidden size, K = entries of a row.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's whole distribution, as its last hidden state after the final norm; exact for any divergence.

    Attributes:
        rows_TH: [T, H] one row per loss token, in the order of ``models.gpt.select_rows``.
    """

    rows_TH: Tensor


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's most probable entries of each row.

    Attributes:
        ids_TK: [T, K] int64 token ids, none of them twice in a row; -1 is no entry, so that rows may have different
            numbers of them. Rows as those of ``HiddenSignal``.
        log_probs_TK: [T, K] their log-probabilities over the whole vocabulary, float32; anything where the id is -1.
        token_log_prob_T: [T] log-probability of the token that follows in the sequence; ``None`` if it was not asked for.
    """

    ids_TK: Tensor
    log_probs_TK: Tensor
    token_log_prob_T: Tensor | None = None

    @property
    def tail_mass_T(self) -> Tensor:
        """[T] what the teacher gives to all other entries, float64; not below 0."""
        probs_TK = self.log_probs_TK.double().exp().masked_fill(self.ids_TK < 0, 0.0)
        return (1 - probs_TK.sum(-1)).clamp_min(0.0)


Signal = HiddenSignal | TopKSignal
