"""What the Hub shares with the conversions: the one place where this package takes something from `conversion`."""

try:
    from ..conversion.__main__ import shard_size
    from ..conversion.checkpoint import INDEX, Checkpoint, ShardWriter, read_json
    from ..conversion.errors import ConversionError
    from ..conversion.verify import available_memory
except ImportError:  # in a checkout the two packages stand side by side, and in no third
    from conversion.__main__ import shard_size
    from conversion.checkpoint import INDEX, Checkpoint, ShardWriter, read_json
    from conversion.errors import ConversionError
    from conversion.verify import available_memory


__all__ = [
    "INDEX",
    "Checkpoint",
    "ConversionError",
    "ShardWriter",
    "available_memory",
    "read_json",
    "shard_size",
]
