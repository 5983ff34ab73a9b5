"""What fp32 means: 24 bits, also on a GPU, where products of fp32 are otherwise formed in TF32 with 11."""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def exact_products(dtype: DTypeLike) -> AbstractContextManager:
    """Has programs that are traced within it multiply fp32 exactly.

    Args:
      dtype: Of the computation; products of other types are left as they are.

    Returns:
      A context.
    """
    return jax.default_matmul_precision("highest") if jnp.dtype(dtype) == jnp.float32 else nullcontext()
