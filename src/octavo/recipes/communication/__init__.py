"""Studies of what workers and clients send: gradients, updates, fine-tunes, features."""
