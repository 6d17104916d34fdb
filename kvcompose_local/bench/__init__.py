"""The speed of decode, prefill and compaction against the uncompressed cache (``kvcompose-local bench``)."""
