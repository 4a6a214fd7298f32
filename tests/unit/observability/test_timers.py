"""Stage timers with a clock of our own; waiting for a real device is covered by tests/gpu."""

import pytest

from megatron_gkd.observability.metrics import Metric, Metrics
from megatron_gkd.observability.timers import Timers


class Clock:
    """Time that passes only when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_seconds_of_a_stage_add_up_until_they_are_recorded():
    clock, metrics = Clock(), Metrics()
    timers = Timers(clock=clock)
    for seconds in (1.0, 2.5):
        with timers("teacher"):
            clock.now += seconds
        clock.now += 100  # outside
    assert timers.seconds == {"teacher": 3.5}
    timers.record(metrics)
    assert metrics.take() == [Metric("time/teacher_s", 3.5, "s", "max")]
    assert timers.seconds == {}
    timers.record(metrics)
    assert metrics.take() == []


def test_nested_stages_count_their_whole_time_each():
    clock, metrics = Clock(), Metrics()
    timers = Timers(clock=clock)
    with timers("iteration"):
        clock.now += 1
        with timers("teacher"):
            clock.now += 2
    timers.record(metrics)
    assert {m.name: m.value for m in metrics.take()} == {"time/iteration_s": 3.0, "time/teacher_s": 2.0}


def test_stage_pays_for_the_work_that_it_started_and_not_for_earlier_work():
    clock, metrics = Clock(), Metrics()
    pending = [5.0]  # seconds of device work not yet waited for

    def synchronize():
        clock.now += sum(pending)
        pending.clear()

    timers = Timers(synchronize, clock=clock)
    with timers("teacher"):
        pending.append(2.0)
    timers.record(metrics)
    assert metrics.take()[0].value == 2.0


def test_time_counts_when_the_stage_fails_and_the_timer_can_be_used_again():
    clock, metrics = Clock(), Metrics()
    timers = Timers(clock=clock)

    def fail_after_a_second():
        with timers("teacher"):
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_a_second()
    with timers("teacher"):
        clock.now += 1
    timers.record(metrics)
    assert metrics.take()[0].value == 2.0


def test_running_timer_cannot_start_again():
    timers = Timers()
    with (
        timers("teacher"),
        pytest.raises(RuntimeError, match="'teacher' is already running"),
        timers("teacher"),
    ):
        pass
