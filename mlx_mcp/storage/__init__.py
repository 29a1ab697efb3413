"""Blocks and sessions on disk, whole after kills, power cuts, damage and full disks. Knows bytes, no tensors."""
