"""When things happen: state, optimizer, compiled step, loop, checkpoints."""
