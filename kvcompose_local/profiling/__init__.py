"""Measures scorers: texts are read, questions asked, their attention is observed, and a scorer is fitted to it."""
