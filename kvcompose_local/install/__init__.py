"""What lies on the disk: model files, and files that are written whole or not at all."""
