"""What a run says about itself: log, metrics, samples, progress, timers, status."""

from megatron_gkd.observability.log import configure_logging
from megatron_gkd.observability.metrics import Metric, Metrics, MetricsWriter, SampleWriter
from megatron_gkd.observability.progress import Progress, progress_line
from megatron_gkd.observability.status import Status, StatusFile
from megatron_gkd.observability.stop_file import StopFile
from megatron_gkd.observability.timers import Timers

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
    "progress_line",
]
