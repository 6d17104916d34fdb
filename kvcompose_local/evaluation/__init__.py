"""Answer quality against budget, and against other methods at equal bytes (``kvcompose-local eval``)."""
