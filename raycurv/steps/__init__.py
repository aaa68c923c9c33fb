"""The steps of a fit, one file each."""
