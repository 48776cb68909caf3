"""`transformers serve`, with the class of T6 where that command looks for the classes of models."""

import sys


def main() -> None:
    """Runs `transformers serve` with this process's arguments."""
    import transformers
    from transformers.cli.transformers import main as transformers_command

    import modeling_t6

    transformers.T6ForCausalLM = modeling_t6.T6ForCausalLM
    sys.argv.insert(1, "serve")
    transformers_command()
