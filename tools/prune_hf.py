"""Hugging Face folder -> smaller Hugging Face folder; see --help."""

import sys

from megatron_gkd.cli.prune import main

if __name__ == "__main__":
    sys.exit(main())
