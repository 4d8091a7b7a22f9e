"""Products of smaller matrices."""
