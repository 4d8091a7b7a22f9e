"""What runs forms."""
