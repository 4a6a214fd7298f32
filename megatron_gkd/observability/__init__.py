"""Log, metrics, samples, timers and progress of a run, and the files of its folder."""

from megatron_gkd.observability.log import configure_logging
from megatron_gkd.observability.metrics import Metric, Metrics, MetricsWriter, SampleWriter
from megatron_gkd.observability.run_folder import Status, StatusFile, StopFile
from megatron_gkd.observability.timing import Progress, Timers

__all__ = [
    "Metric",
    "Metrics",
    "MetricsWriter",
    "Progress",
    "SampleWriter",
    "Status",
    "StatusFile",
    "StopFile",
    "Timers",
    "configure_logging",
]
