"""The jobs: settings, the phases of a fit and of scoring, rows, progress."""
