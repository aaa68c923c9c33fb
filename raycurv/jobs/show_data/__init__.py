"""What examples become before a model sees them."""
