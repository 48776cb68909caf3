"""
Run by every Python process that a test starts. To it, packages are not installed that it has no use for: Transformers
imports them wherever it finds them, which takes longer than most of what such a process does.
"""

import sys


sys.modules.update(dict.fromkeys(("bitsandbytes", "hqq", "peft", "scipy", "sklearn", "torchao")))
