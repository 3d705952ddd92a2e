"""Large results in memory that is warm: how much of it is kept for the next update, and how to change that."""

from functional_adam.tensors.recycling import cached_bytes, empty_cache, set_cache_limit

__all__ = ["cached_bytes", "empty_cache", "set_cache_limit"]
