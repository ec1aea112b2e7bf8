"""What to move when, and where homes live: pure decisions over frozen values."""
