"""Where cases come from: sources, their storage and the input pipeline."""
