"""
Run by every Python process that a test starts. To it, packages that few tests and few users need are not installed:
Transformers imports them wherever it finds them, which takes longer than most of what such a process does.
"""

import sys


sys.modules.update(dict.fromkeys(("hqq", "torchao")))
