"""Methods that remove units of a whole block: neurons, heads and head dimensions."""
