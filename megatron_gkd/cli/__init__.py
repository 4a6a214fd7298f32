"""Commands: argument parsing and exit codes. torch and Megatron are imported lazily."""

import logging
import sys
from collections.abc import Callable

REFUSED = 2
FAILED = 1


def run_tool(work: Callable[[], None]) -> int:
    """Run a command; return 0, 2 for refused input, or 1 after an error."""
    from megatron_gkd.observability.log import configure_logging

    configure_logging("info", rank=0)
    try:
        work()
    # ConfigError and DataError are ValueErrors: their message says what to change, a traceback would hide it
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    except Exception:
        logging.getLogger(__name__).exception("failed")
        return FAILED
    return 0
