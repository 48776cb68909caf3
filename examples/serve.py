"""
`transformers serve` for T6: an OpenAI-compatible server of a folder or a repository of the Hub.

    pip install -e ".[serving]"
    python examples/serve.py examples/t6-tiny-shakespeare --continuous-batching --cb-num-blocks 64

Takes the arguments of `transformers serve`, which looks up the class that `config.json` names in Transformers itself, where
no class of remote code is, and so fails with every such model. Here that class is there. Installed, it is `t6-serve`.
"""

import command_line  # noqa: F401  (finds the checkout)
from serving.command import main


if __name__ == "__main__":
    main()
