"""Loading artifacts, proving and measuring them."""
