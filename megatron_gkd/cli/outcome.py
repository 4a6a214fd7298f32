"""What all commands share: the way errors reach the person who typed the command."""

import logging
import sys
from collections.abc import Callable

REFUSED = 2
FAILED = 1


def run_tool(work: Callable[[], None]) -> int:
    """Run a command; 0 if it is done, 2 if its input was refused (one clear message), 1 with a traceback for the rest."""
    from megatron_gkd.observability.log import configure_logging

    configure_logging("info", rank=0)
    try:
        work()
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    except Exception:
        logging.getLogger(__name__).exception("failed")
        return FAILED
    return 0
