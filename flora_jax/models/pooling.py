"""What becomes of the last block's tokens: one feature an image, for the classifier or as it is."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora_jax.models.attention import attend, merge_heads
from flora_jax.models.functional import Undecayed
from flora_jax.models.layers import LayerNorm, Linear
from flora_jax.models.mlp import Mlp
from flora_jax.models.vit_spec import ViTSpec


class AttentionPool(nnx.Module):
    """Tokens [B, N, D] -> [B, D]: a learned query attends to all of them, then an MLP (SigLIP).

    It is no searchable layer: for one query it costs little, and its kernels stay dense.
    """

    def __init__(self, spec: ViTSpec, *, rngs: nnx.Rngs):
        width, self.num_heads = spec.embed_dim, spec.num_heads
        init = nnx.initializers.normal(width**-0.5)
        self.latent = Undecayed(init(rngs.params(), (1, width)))
        self.q = Linear(width, width, rngs=rngs)
        self.kv = Linear(width, 2 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)
        self.norm = LayerNorm(width, spec.layer_norm_eps)
        hidden = spec.mlp_dim
        fc1, fc2 = Linear(width, hidden, rngs=rngs), Linear(hidden, width, rngs=rngs)
        self.mlp = Mlp(fc1, fc2, spec.activation)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        batch, num_tokens, width = tokens.shape
        query = self.q(self.latent[...]).reshape(1, self.num_heads, 1, -1)
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        key_value = self.kv(tokens.reshape(-1, width))
        key, value = key_value.reshape(batch, num_tokens, 2, self.num_heads, -1).transpose(
            2, 0, 3, 1, 4
        )
        x = self.proj(merge_heads(attend(query, key, value, np.zeros((1, 1, 1, 1), np.float32))))
        return x + self.mlp(self.norm(x))
