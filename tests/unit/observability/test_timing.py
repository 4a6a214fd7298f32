"""Stage timers, durations, and the estimate of the time left."""

import pytest

from megatron_gkd.observability.metrics import Metric, Metrics
from megatron_gkd.observability.timing import Progress, Timers, format_duration, progress_line


class Clock:
    """A clock that the test advances."""

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


def test_line_shows_iteration_loss_lag_speed_and_time_left():
    expected = "iteration 12/40 | loss 1.234 | lag 0 | 213 tok/s | 3 min 10 s left"
    assert progress_line(12, 40, loss=1.2341, lag=0, tokens_per_s=212.7, seconds_left=190.2) == expected


def test_line_without_estimate_or_with_broken_loss_says_so():
    assert progress_line(1, 40, loss=float("nan"), lag=1, tokens_per_s=0.0, seconds_left=None).endswith(
        "loss nan | lag 1 | 0 tok/s | time left unknown"
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s"), (-3, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (190, "3 min 10 s"), (3599.6, "1 h 0 min"),
     (7500, "2 h 5 min"), (97200, "1 d 3 h")],
)  # fmt: skip
def test_duration_shows_its_two_largest_units(seconds, expected):
    assert format_duration(seconds) == expected


def test_estimate_is_the_median_iteration_times_what_is_left():
    clock = Clock()
    progress = Progress(10, clock=clock)
    assert progress.seconds_left(0) is None
    for iteration, seconds in enumerate([60, 2, 3, 2, 50], start=1):  # a slow start, a save
        clock.now += seconds
        line = progress.finish(iteration, loss=1.0, lag=0, num_tokens=100)
    assert progress.seconds_left(5) == 3 * 5
    assert line == "iteration 5/10 | loss 1.000 | lag 0 | 2 tok/s | 15 s left"
    assert progress.seconds_left(11) == 0


def test_only_the_last_iterations_count():
    clock = Clock()
    progress = Progress(10, window=2, clock=clock)
    for iteration, seconds in enumerate([9, 9, 9, 1, 1], start=1):
        clock.now += seconds
        progress.finish(iteration, loss=1.0, lag=0, num_tokens=1)
    assert progress.seconds_left(5) == 5


def test_clock_that_stands_still_does_not_divide_by_zero():
    assert "0 tok/s" in Progress(2, clock=Clock()).finish(1, loss=1.0, lag=0, num_tokens=5)
