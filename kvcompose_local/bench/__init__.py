"""How fast: decode, prefill and compaction against the uncompressed cache (``kvcompose-local bench``)."""
