"""Weights trained elsewhere: reading, naming, merging."""
