"""Arithmetic for CPUs alone: OpenBLAS, attention by numpy and by polynomials, memory. `device.py` chooses it.

On other devices none of it computes anything, and nobody who works on them need read it.
"""
