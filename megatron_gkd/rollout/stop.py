"""Stop strings: where a completion ends because its text contains one of them."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_gkd.serving.completion import Completion


def cut_at_stop(
    completion: Completion, stop: Sequence[str], decode: Callable[[list[int]], str]
) -> Completion:
    """The completion through the first token after which its text contains a stop string; itself if none does.

    Cut here and not by the server, which would need a tokenizer of its own and may have another. A stop string may begin
    and end inside tokens, so the text of the last token can go beyond it.

    Args:
        completion: As generated.
        stop: Non-empty texts.
        decode: Text of token ids. More tokens must only add text, as every detokenizer does up to unfinished characters.
    """
    ids = list(completion.ids)

    def has_stop(num_tokens: int) -> bool:
        text = decode(ids[:num_tokens])
        return any(string in text for string in stop)

    if not stop or not has_stop(len(ids)):
        return completion
    num_kept = bisect.bisect_left(range(len(ids) + 1), True, key=has_stop)
    return replace(completion, ids=completion.ids[:num_kept], finish_reason="stop")
