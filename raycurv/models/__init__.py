"""Networks as chains of segments, from HF checkpoints or a callable."""
