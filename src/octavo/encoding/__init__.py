"""Turning a plan into forms that use the budget exactly."""
