"""What a boosted model tells of itself."""
