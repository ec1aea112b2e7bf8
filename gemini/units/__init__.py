"""What of a model runs when: its units, what brackets them, and uses outside of them."""
