"""Units of a model, the hooks around them, and uses of parameters outside of them."""
