"""What this machine has for a fit."""
