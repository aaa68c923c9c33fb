"""The pruning job: weights removed with a fit's curvature, and a checkpoint of what remains."""
