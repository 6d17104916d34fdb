"""Local LLM chat whose KV cache stays inside the RAM you give it (KVCompose, arXiv 2509.05165, on llama.cpp)."""

__version__ = "0.1.0"
