"""The disk: models, llama.cpp's build, and files that are written whole or not at all. Standard library only."""
