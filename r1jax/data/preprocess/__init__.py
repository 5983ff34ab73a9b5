"""Preprocessors that come with r1jax; each class here can be named in `data.preprocess`."""
