"""Rate-distortion curves of sites, and plans that fit a budget."""
