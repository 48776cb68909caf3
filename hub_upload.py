"""
Puts a T6 folder on the Hub as a repository that anyone loads with plain Transformers: the command of the package `hub`.

    python hub_upload.py MODEL_DIR REPO_ID --dry-run    checks the folder, shows files and model card, contacts nobody
    python hub_upload.py MODEL_DIR REPO_ID              uploads in one commit, downloads it again and compares logits
"""

import sys

from hub.command import main


__all__ = ["main"]


if __name__ == "__main__":
    sys.exit(main())
