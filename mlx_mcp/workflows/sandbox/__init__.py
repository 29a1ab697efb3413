"""A sandbox: Python that a caller sends, and the functions that it may call."""
