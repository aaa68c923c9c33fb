"""Functions of tensors: what is captured, summed, decomposed, inverted and scored. torch alone."""
