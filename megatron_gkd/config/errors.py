"""The one error that a wrong configuration raises."""

from collections.abc import Iterable
from typing import Self


class ConfigError(ValueError):
    """The configuration cannot be used; the message names every wrong key, its value and what to change."""

    @classmethod
    def listing(cls, source: str, problems: Iterable[str]) -> Self:
        """One error for all ``problems`` found in ``source``, one per line."""
        lines = [f"  {problem}" for problem in problems]
        return cls(f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in {source}:\n" + "\n".join(lines))
