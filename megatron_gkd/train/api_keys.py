"""Keys of servers, from the environment: never in a file that a run writes."""

import os

from megatron_gkd.config import ConfigError


def read_api_key(setting: str, variable: str | None) -> str | None:
    """The key that a server demands; ``None`` if none is configured.

    Args:
        setting: Dotted key of the configuration, for the message.
        variable: Its value, the name of an environment variable.

    Raises:
        ConfigError: The variable is not set.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(
            f"{setting}={variable!r}: this environment variable is not set; export it before the start, or set the key to "
            "null for servers without a key"
        )
    return os.environ[variable]
