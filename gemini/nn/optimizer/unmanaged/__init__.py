"""The Adam step of parameters that are in no chunk, all or nothing: checked, made ready, then done."""
