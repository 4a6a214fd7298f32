"""The sequences of a probe. Pushes and their failures: tests/distributed/test_weight_push.py."""

from megatron_gkd.rollout.weight_sync import MAX_PROBE_SEQUENCES, MAX_PROBE_TOKENS, probe_sequences


def test_probes_are_few_short_and_long_enough_to_be_scored():
    long = list(range(1000))
    assert probe_sequences([[1], long, [], [3, 4], [5, 6]]) == [long[-MAX_PROBE_TOKENS:], [3, 4]]
    assert MAX_PROBE_SEQUENCES == 2
    assert probe_sequences([(7, 8)]) == [[7, 8]]
    assert probe_sequences([(7,), (8,)]) == [[7, 7], [8, 8]], "one token has nothing to predict"
