"""What nearly every rank of the pool imports; imported once, by the server that ranks are forked from.

No import here may start a thread: a fork would not take it along.
"""

import importlib

from megatron_gkd.platform.cpu import install

install()  # before megatron is imported
for name in ("megatron_gkd.checkpoint.hf", "megatron_gkd.train.setup", "tests.support.on_ranks"):
    importlib.import_module(name)
