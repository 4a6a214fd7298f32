"""Loading of user-defined dataset classes and chat templates by name."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from megatron_gkd.data.tokenizer import DataError


def load_dataset_class(name: str) -> Any:
    """Import the class that ``data.dataset_class`` refers to.

    Args:
        name: ``package.module:Name`` or ``path/file.py:Name``.

    Raises:
        DataError: The module, file or name does not exist, or is not callable. Exceptions raised by the module itself
            propagate.
    """
    loaded = _load("data.dataset_class", name)
    if not callable(loaded):
        raise DataError(
            f"data.dataset_class={name!r} is a {type(loaded).__name__}; give a class that takes a path"
        )
    return loaded


def load_chat_template(name: str) -> str:
    """Return the Jinja source that ``data.chat_template`` refers to.

    Args:
        name: Path of a file, or ``package.module:NAME`` or ``path/file.py:NAME`` of a string.

    Raises:
        DataError: The file, module or name does not exist, or is not a string.
    """
    if ":" in name:
        template = _load("data.chat_template", name)
        if not isinstance(template, str):
            raise DataError(
                f"data.chat_template={name!r} is a {type(template).__name__}; give a string with a Jinja template"
            )
        return template
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template={name!r} cannot be read: {error}") from error


def _load(key: str, name: str) -> Any:
    source, _, attribute = name.rpartition(":")
    module = (
        _load_file(key, Path(source), name) if source.endswith(".py") else _load_module(key, source, name)
    )
    try:
        return getattr(module, attribute)
    except AttributeError:
        known = ", ".join(name for name in vars(module) if not name.startswith("_"))
        raise DataError(f"{key}={name!r}: {source} has no {attribute}, only {known}") from None


def _load_file(key: str, file: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise DataError(f"{key}={name!r}: there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_module(key: str, source: str, name: str) -> Any:
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise  # the module exists; one of its own imports is missing
        raise DataError(
            f"{key}={name!r}: no module {error.name!r} on the Python path; give file.py:Name, or extend PYTHONPATH"
        ) from error
