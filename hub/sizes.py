"""The size of a shard, as conversions read it: without torch, for the command line."""

try:
    from ..conversion.files.sizes import shard_size
except ImportError:  # in a checkout, as in `shared`
    from conversion.files.sizes import shard_size


__all__ = ["shard_size"]
