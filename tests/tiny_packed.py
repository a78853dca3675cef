"""A tiny VLM of every kind of compressor on batches of tests/memory.py: terms, gradients and losses, compiled per shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.batch import Batch
from tcjax.compressors import avg_pool, resampler
from tcjax.pipeline.input import make_input
from tests.memory import PIXELS
from tests.test_instructions import Hearing
from tests.tiny import LLM, VLM

Q = 4
COMPRESSORS = {
    "resampler": resampler.Config(num_queries=Q, depth=1, heads=2, head_width=8),
    "pooled": avg_pool.Config(num_queries=Q),
    "told": Hearing(),
}


@dataclasses.dataclass
class Built:
    """A tiny VLM; terms and gradients of its compressor, compiled per shape of batch."""

    kind: str

    def __post_init__(self):
        config = dataclasses.replace(VLM, compressor=COMPRESSORS[self.kind], llm=dataclasses.replace(LLM, vocab=64))
        self.model = config.build(nnx.Rngs(1))
        graphdef, self.state = nnx.split(self.model)

        def total(state, batch):
            terms = nnx.merge(graphdef, state).loss_terms(batch, jax.random.key(0), jnp.float32(0.5))
            return terms.total, terms

        def losses(state, batch):
            model = nnx.merge(graphdef, state)
            seq_BSD, valid_BS = model.embed(batch)
            logits_BSV = model.llm.logits(model.llm(seq_BSD, valid_BS, batch.segment_BS))
            logp_BSV = jax.nn.log_softmax(logits_BSV[:, :-1])
            picked_BS = jnp.take_along_axis(logp_BSV, batch.tokens_BS[:, 1:, None], axis=-1)[..., 0]
            return jnp.where(batch.supervised_BS[:, 1:], -picked_BS, 0)

        self._gradient = jax.jit(jax.grad(total, has_aux=True, allow_int=True))
        self._losses = jax.jit(losses)

    def __call__(self, batch: Batch):
        grads, terms = self._gradient(self.state, batch)
        return terms, jax.tree.leaves(grads["compressor"])

    def losses(self, batch: Batch) -> np.ndarray:
        """[rows, S - 1]: of every supervised token."""
        return np.asarray(self._losses(self.state, batch))


def difference(grads, expected) -> float:
    """Norm of the difference of two gradients, as a share of the expected one's norm."""
    ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in (grads, expected))
    assert np.linalg.norm(theirs) > 0
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def make(config, root, **options):
    return make_input(config, PIXELS, Q, root=root, instructed=True, **options)
