"""Corpora as memory-mapped tokens, and the rows that each optimizer step sees."""
