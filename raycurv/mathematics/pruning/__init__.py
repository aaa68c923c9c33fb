"""Which weights go, and how the others move to make up for them."""
