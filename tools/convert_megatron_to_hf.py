"""Megatron checkpoint -> Hugging Face folder; see --help."""

import sys

from megatron_gkd.cli.convert import main_megatron_to_hf

if __name__ == "__main__":
    sys.exit(main_megatron_to_hf())
