"""From a gradient to the update of its chunk."""
