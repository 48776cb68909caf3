"""Sizes of files as words of a command line."""

import argparse
import re


def shard_size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MB; a type for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB or 500MB, got {text!r}")
    return max(1, int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")))
