"""What a fit and a scoring would take."""
