"""Which cells stay: arrays in, arrays out, and no llama.cpp."""
