"""What a budget counts."""
