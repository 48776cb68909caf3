"""
Puts a T6 folder on the Hub as a repository that anyone loads with plain Transformers.

    python hub_upload.py MODEL_DIR REPO_ID --dry-run    checks the folder, shows files and model card, contacts nobody
    python hub_upload.py MODEL_DIR REPO_ID              uploads in one commit, downloads it again and compares logits

The folder is left as it is: what it lacks (code, LICENSE, model card, ...) is added to a copy. What the repository holds of
another model's weights, code, tokenizer, adapters and processors is removed in the same commit. Success means that a
process that knows nothing of this package loads the commit; a model that does not fit into memory, without its numbers.
An upload that was cut off goes on where it stopped when the command is run again: the weights that arrived are not sent
twice.
"""

import argparse
import re
import sys
from pathlib import Path

from .sizes import shard_size


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="MODEL_DIR", type=Path, help="as `save_pretrained` or a conversion wrote it")
    parser.add_argument("repo_id", metavar="REPO_ID", help="name on the Hub: someone/model")
    parser.add_argument("--private", action="store_true", help="make a new repository that only its owner sees")
    parser.add_argument("--revision", help="branch to push to, made if it is not there (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing to main")
    parser.add_argument("--commit-message", help="default: what is pushed, in one line")
    parser.add_argument("--dry-run", action="store_true", help="check, list files and show the card; contact nobody")
    parser.add_argument(
        "--code-only",
        action="store_true",
        help="push code, config.json and card only, to a repository that holds the weights of MODEL_DIR",
    )
    parser.add_argument("--max-shard-size", type=shard_size, help="split larger files of weights, e.g. 5GB")
    parser.add_argument("--token", help="default: HF_TOKEN, or that of `hf auth login`")
    parser.add_argument(
        "--license", help="of the weights, an identifier of the Hub (default: the card's, else apache-2.0)"
    )
    parser.add_argument("--base-model", help="name on the Hub of the model this one was made from")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="data sets of the Hub that it was trained on")
    parser.add_argument("--eval-results", nargs="+", type=Path, metavar="JSON", help="results written by lm-eval")
    parser.add_argument("--no-tokenizer", action="store_true", help="the model has none")
    args = parser.parse_args(argv)
    if args.create_pr and (args.revision or args.private):
        parser.error(
            "--create-pr opens a pull request against main of an existing repository: not with --revision, --private"
        )
    # The Hub would make a branch of that name, which loads in place of the commit.
    if re.fullmatch(r"[0-9a-f]{40}|refs/(?!pr/\d).*", revision := args.revision or "main"):
        parser.error(f"--revision must be a branch or refs/pr/N, got {revision}")
    if args.commit_message is not None and not args.commit_message.strip():
        parser.error("--commit-message must not be empty")
    if args.token is not None and not args.token.strip():
        parser.error("--token must not be empty")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    try:
        # Only now: torch and Transformers take seconds, and help and errors in the arguments need neither.
        from .upload import run

        return run(args)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
