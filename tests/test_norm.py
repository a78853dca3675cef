"""Norms and their written-out derivatives against torch's, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from tcjax.nn.norm import LayerNorm, RMSNorm
from tests.planted import noise, plant

THEIRS = {
    LayerNorm: lambda x, scale, bias: functional.layer_norm(x, (12,), scale, bias, eps=1e-5),
    RMSNorm: lambda x, scale, _: functional.rms_norm(x, (12,), scale, eps=1e-5),
}


@pytest.mark.parametrize("norm", THEIRS)
@pytest.mark.parametrize("mean", [0.0, 30.0])  # far from 0, E[x^2] - E[x]^2 would be off
def test_value_and_gradients_are_torchs(norm, mean):
    module = plant(norm("C", 12, eps=1e-5))
    x_BNC, weights_BNC = noise(2, 5, 12) + np.float32(mean), noise(2, 5, 12, seed=1)
    given = [torch.from_numpy(x_BNC).requires_grad_(), torch.from_numpy(np.array(module.scale[...])).requires_grad_()]
    bias = torch.from_numpy(np.array(module.bias[...])) if norm is LayerNorm else None
    out = THEIRS[norm](given[0], given[1], bias)
    (out * torch.from_numpy(weights_BNC)).sum().backward()

    graphdef, state = nnx.split(module)

    def loss(x_BNC, state):
        return (nnx.merge(graphdef, state)(x_BNC) * weights_BNC).sum()

    np.testing.assert_allclose(module(x_BNC), out.detach(), atol=1e-6 if mean == 0 else 3e-5)
    grad_BNC, grads = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x_BNC), state)
    np.testing.assert_allclose(grad_BNC, given[0].grad, atol=1e-6 if mean == 0 else 3e-5)
    np.testing.assert_allclose(grads["scale"][...], given[1].grad, atol=1e-5 if mean == 0 else 1e-4)


@pytest.mark.parametrize("norm", THEIRS)
def test_bfloat16_in_and_out_float32_between(norm):
    module, x_BNC = plant(norm("C", 12, eps=1e-5)), jnp.asarray(noise(2, 5, 12), jnp.bfloat16)
    out_BNC = module(x_BNC)
    grad_BNC = jax.grad(lambda x: module(x).astype(jnp.float32).sum())(x_BNC)
    assert out_BNC.dtype == grad_BNC.dtype == jnp.bfloat16
    exact_BNC = module(x_BNC.astype(jnp.float32))
    np.testing.assert_allclose(out_BNC.astype(jnp.float32), exact_BNC, atol=0.03)
