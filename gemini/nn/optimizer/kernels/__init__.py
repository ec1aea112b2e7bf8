"""One Adam step on flat buffers: its definition, a kernel for each device, and plain torch as the reference."""
