"""A plan as forms that use the budget exactly."""
