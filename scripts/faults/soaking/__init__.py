"""The parts of ``soak``: what happens, to whom, what the system says of it, and a picture."""
