"""Owns the one thread that computes: commands go down to it as values, events come back from it."""
