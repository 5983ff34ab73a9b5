"""r1jax: DeepSeek-R1's design as a multimodal reasoning stack in JAX."""

__version__ = "0.1.0"
