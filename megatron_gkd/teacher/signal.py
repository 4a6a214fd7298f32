"""What a teacher hands to the loss.

Shapes: T = rows that enter the loss, H = the teacher's hidden size.
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
