"""What a router's view of its engines is worth: prefixes in flight, and first tokens that nobody reports."""
