"""How much memory is free."""

import math
import os


def available_memory() -> float:
    """Bytes that are free; all that there are where the system does not say (macOS), without end where it says neither."""
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # Windows has no sysconf
            continue
    return math.inf
