"""Pruned checkpoints."""
