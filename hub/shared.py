"""What the Hub shares with the conversions: the one place, beside `sizes`, where this package takes something from `conversion`."""

try:
    from ..conversion.files.bars import hide_bars_of_transformers
    from ..conversion.files.checkpoints import INDEX, Checkpoint, ShardWriter
    from ..conversion.files.errors import ConversionError, is_error, one_line
    from ..conversion.files.folders import read_json, temporary_folder
    from ..conversion.files.links import leads_out
    from ..conversion.files.memory import available_memory
    from ..conversion.files.names import listed, matches
    from ..conversion.files.signals import Stopped, stoppable
except ImportError:  # in a checkout the two packages stand side by side, and in no third
    from conversion.files.bars import hide_bars_of_transformers
    from conversion.files.checkpoints import INDEX, Checkpoint, ShardWriter
    from conversion.files.errors import ConversionError, is_error, one_line
    from conversion.files.folders import read_json, temporary_folder
    from conversion.files.links import leads_out
    from conversion.files.memory import available_memory
    from conversion.files.names import listed, matches
    from conversion.files.signals import Stopped, stoppable


__all__ = [
    "INDEX",
    "Checkpoint",
    "ConversionError",
    "ShardWriter",
    "Stopped",
    "available_memory",
    "hide_bars_of_transformers",
    "is_error",
    "leads_out",
    "listed",
    "matches",
    "one_line",
    "read_json",
    "stoppable",
    "temporary_folder",
]
