"""Methods that use fewer bits per weight."""
