"""What can go wrong with a generation engine. All are ``EngineError``, so that a caller can stop on any of them."""


class EngineError(RuntimeError):
    """The engine cannot do what was asked."""


class EngineDied(EngineError):
    """The server's process ended; the message carries the last lines of its log."""


class EngineTimeout(EngineError):
    """No answer within the allowed time."""


class EngineReplyInvalid(EngineError):
    """The server refused the request or its answer breaks the contract."""


class EngineRequestInvalid(EngineError, ValueError):
    """The request was not sent: it would kill the server or spoil the result."""


class StaleWeights(EngineError):
    """The answer was made by other weights than the trainer's newest."""


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
    """``error`` as plain values, for another rank. An error of another kind becomes an ``EngineError`` naming it."""
    name = type(error).__name__
    if isinstance(error, EngineError) and name in _BY_NAME:
        return {"kind": name, "message": str(error)}
    return {"kind": EngineError.__name__, "message": f"{name}: {error}"}


def error_from_json(value: dict[str, str]) -> EngineError:
    """Inverse of ``error_to_json``."""
    return _BY_NAME[value["kind"]](value["message"])
