"""Errors of inference engines, and their transport between ranks.

Imports nothing, because rollout, teacher and train raise and catch these errors too.
"""


class EngineError(RuntimeError):
    """Base class; the train loop saves a checkpoint and stops on any of them."""


class EngineDied(EngineError):
    """The server process ended; the message includes the last lines of its log."""


class EngineTimeout(EngineError):
    """No reply within the timeout."""


class EngineReplyInvalid(EngineError):
    """The server rejected the request, or its reply violates the contract."""


class EngineRequestInvalid(EngineError, ValueError):
    """Invalid arguments; the request was not sent."""


class StaleWeights(EngineError):
    """The reply was produced by other weights than the last pushed version."""


# An explicit list instead of a look-up by name: the names arrive over the network.
_BY_NAME = {
    kind.__name__: kind
    for kind in (
        EngineError,
        EngineDied,
        EngineTimeout,
        EngineReplyInvalid,
        EngineRequestInvalid,
        StaleWeights,
    )
}


def error_to_json(error: Exception) -> dict[str, str]:
    """Serialize an error for other ranks; foreign types become ``EngineError``."""
    name = type(error).__name__
    if isinstance(error, EngineError) and name in _BY_NAME:
        return {"kind": name, "message": str(error)}
    return {"kind": EngineError.__name__, "message": f"{name}: {error}"}


def error_from_json(value: dict[str, str]) -> EngineError:
    """Inverse of ``error_to_json``."""
    return _BY_NAME[value["kind"]](value["message"])
