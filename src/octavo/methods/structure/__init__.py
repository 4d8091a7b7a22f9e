"""Units of a whole block cut away together: neurons, heads and their dimensions."""
