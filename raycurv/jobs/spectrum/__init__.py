"""Traces, extreme eigenpairs and densities of curvature, and the loss along a direction."""
