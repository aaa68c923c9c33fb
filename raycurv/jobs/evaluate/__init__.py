"""Loss, perplexity and accuracy of a model."""
