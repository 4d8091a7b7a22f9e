"""Studies of systems that compress by codes, and of the tables of recommenders."""
