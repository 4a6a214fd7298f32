"""Training entry point: torchrun --nproc-per-node N launch/pretrain_gkd.py --config FILE [section.key=value ...]."""

import sys

from megatron_gkd.cli.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
