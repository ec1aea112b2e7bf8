"""From parameters to a placed set of chunks."""
