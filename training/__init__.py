"""Trains the embedded model from data it makes itself: `python -m training --help`."""
