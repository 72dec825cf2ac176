"""Measures, likelihood of a split, generated samples, and pictures of patterns."""
