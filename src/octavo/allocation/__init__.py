"""Curves of sites, and the plan that fits a budget."""
