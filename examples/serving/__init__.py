"""Serves T6 as `transformers serve` serves models of Transformers; `examples/serve.py` is the command."""
