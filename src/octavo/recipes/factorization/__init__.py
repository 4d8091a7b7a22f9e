"""Studies of systems that compress by factors: low rank, tensor trains, separable filters."""
