"""How many bytes there are, what takes them, and what to say when they are not enough."""
