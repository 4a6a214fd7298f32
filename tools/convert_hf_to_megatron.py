"""Hugging Face folder -> Megatron checkpoint; see --help."""

import sys

from megatron_gkd.cli.convert import main_hf_to_megatron

if __name__ == "__main__":
    sys.exit(main_hf_to_megatron())
