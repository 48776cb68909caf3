"""Checkpoints in: `python -m conversion --help`."""
