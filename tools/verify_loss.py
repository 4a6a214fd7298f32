"""Certify the loss against float64 on this machine; see --help."""

import sys

from megatron_gkd.cli.verify_loss import main

if __name__ == "__main__":
    sys.exit(main())
