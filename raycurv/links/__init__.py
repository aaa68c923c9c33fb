"""Tensors from process to process by torch.distributed, beside the calls of Ray."""
