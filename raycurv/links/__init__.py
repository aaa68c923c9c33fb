"""Tensors from process to process beside the calls of Ray."""
