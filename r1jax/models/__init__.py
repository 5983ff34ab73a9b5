"""What is computed: Flax Linen modules without mesh, I/O or optimizer."""
