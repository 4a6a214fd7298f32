"""A user's own dataset class, found by the name that the configuration gives."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from megatron_gkd.data.tokenizer import DataError


def load_dataset_class(name: str) -> Any:
    """The object that ``data.dataset_class`` names.

    Args:
        name: ``package.module:Name`` or ``path/file.py:Name``.

    Raises:
        DataError: There is no such module, file or name, or it cannot be called. Errors that the module itself raises
            are handed on.
    """
    source, _, attribute = name.rpartition(":")
    module = _load_file(Path(source), name) if source.endswith(".py") else _load_module(source, name)
    try:
        made = getattr(module, attribute)
    except AttributeError:
        known = ", ".join(key for key in vars(module) if not key.startswith("_"))
        raise DataError(f"data.dataset_class={name!r}: {source} has no {attribute}, only {known}") from None
    if not callable(made):
        raise DataError(
            f"data.dataset_class={name!r} is a {type(made).__name__}; give a class that takes a path"
        )
    return made


def _load_file(file: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise DataError(f"data.dataset_class={name!r}: there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_module(source: str, name: str) -> Any:
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another one
        raise DataError(
            f"data.dataset_class={name!r}: no module {error.name!r} on the Python path; give file.py:Name, or extend "
            "PYTHONPATH"
        ) from error
