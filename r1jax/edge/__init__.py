"""What runs an exported model on a device: NumPy and ai-edge-litert or iree-base-runtime, nothing of r1jax.

`r1jax export` packs this package into one file, `r1jax_edge.pyz`, which is why its imports are relative. What it does
in small (reading cases, filling a report) tests hold to the original, byte for byte.
"""
