"""Serve a model with SGLang: ``python launch/serve.py --model DIR``."""

import sys

from megatron_gkd.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
