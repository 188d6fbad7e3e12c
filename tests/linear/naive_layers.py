"""NumPy pieces from which tests write down whole layers of the linear family, token by token."""

import jax
import numpy as np
from flax import nnx


def parameters(module):
    """The module's parameters as float64 arrays: "query.kernel" -> array."""
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(v.get_value(), np.float64) for path, v in state}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, epsilon=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def project(x, kernel):
    """[b, t, m] times [m, ...]."""
    return np.tensordot(x, kernel, axes=1)


def convolve(x, kernel, bias=0.0):
    """Every channel by itself; the last tap is the current token's."""
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for i, tap in enumerate(kernel):
            source = t - (len(kernel) - 1) + i
            if source >= 0:
                y[:, t] += tap * x[:, source]
    return y + bias


def recurrence(q, k, v, decay, beta=None):
    """S = decay S + k v^T, or the delta rule's write with beta; reads S^T q.

    Args:
      q, k, v: [b, t, h, .].
      decay: factors, broadcastable to [b, t, h, k].
      beta: [b, t, h], or None.
    """
    decay = np.broadcast_to(decay, q.shape)
    state = np.zeros((q.shape[0], *q.shape[2:], v.shape[-1]))
    out = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - np.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * new[:, :, None]
        out.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return np.stack(out, 1)


def output(z, kernel):
    return np.einsum("bthd,hdm->btm", z, kernel)


def run(make, shape):
    """`make()` built and applied in float64: the module's parameters, its input and its output.

    Args:
      make: makes the module with float64 parameters.
      shape: of the input.
    """
    with jax.enable_x64(True):
        module = make()
        x = np.random.default_rng(7).standard_normal(shape)
        y = jax.jit(module.__call__)(jax.numpy.asarray(x))
        return parameters(module), x, np.asarray(y)


def both(f, inputs, ct):
    """Output of f, and what ct pulls back to its inputs: one compiled program.

    Args:
      f: a function of the inputs.
      inputs: arrays.
      ct: shaped like the output.
    """

    def program(inputs, ct):
        out, pull = jax.vjp(f, *inputs)
        return out, pull(ct)

    return jax.jit(program)(inputs, ct)
