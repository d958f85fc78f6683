"""The random vector from which one backward pass learns what a change does to the answer; the same in every framework.

To second order a change of the logits by `d` costs `KL = 1/2 d^T F d`, where `F = diag(p) - p p^T` is the Fisher
information of the next-token distribution `p`. A random vector `xi` with `E[xi xi^T] = F` turns that into one number:
`KL = 1/2 E[(xi . d)^2]`. With `g` the gradient of `xi . logits` by a head's dense outputs, a change of these outputs
costs `1/2 (sum over rows of g . change)^2` (to first order in the network), an unbiased estimate from one backward pass
however sure the model is: gradients of `log p(y)` of its own answer vanish where it is sure, and rank far worse.
"""

from __future__ import annotations

import zlib

import numpy as np

# Of so many of the likeliest next tokens the randomness is reduced; the cube of it is spent.
_ROTATED = 32


def fisher_vector(logits: np.ndarray, seed: int) -> np.ndarray:
    """A vector per row whose covariance over seeds is `diag(p) - p p^T`, `p` being the softmax: `[B, V]` float32.

    With `A = (I - p 1^T) diag(sqrt(p))` that covariance is `A A^T`, so `A Q s` will do for random signs `s` and any
    rotation `Q`. The likeliest tokens are rotated to the eigenvectors of `A^T A`: where few tokens share all of `p`
    hardly anything is left to chance, and where two do, nothing.

    The signs are those of normal numbers, `s = sign(Q^T z)`, which are as fair and as independent. So neither the order
    nor the signs of the eigenvectors matter, which differ between frameworks: logits that are nearly equal give vectors
    that are.

    Args:
        logits: `[B, V]`.
        seed: see `prompt_seed`.

    Raises:
        ValueError: a logit is not a number, or infinitely high.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if not (logits < np.inf).all():
        raise ValueError("the logits of the next token must be numbers. Got NaN or inf. Measure in higher precision.")
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    z = np.random.default_rng(seed).standard_normal(p.shape)
    n_rotated = min(_ROTATED, p.shape[-1])
    index = np.argpartition(p, -n_rotated, axis=-1)[:, -n_rotated:]  # [B, k]
    top = np.take_along_axis(p, index, axis=-1)
    gram = np.sqrt(top[:, :, None] * top[:, None]) * (
        np.square(p).sum(axis=-1)[:, None, None] - top[:, :, None] - top[:, None]
    )
    gram += top[:, :, None] * np.eye(n_rotated)
    rotation = np.linalg.eigh(gram).eigenvectors  # [B, k, k]
    some = np.take_along_axis(z, index, axis=-1)[..., None]
    turned = rotation @ np.sign(rotation.swapaxes(1, 2) @ some)
    signs = np.sign(z)
    np.put_along_axis(signs, index, turned[..., 0], axis=-1)
    scaled = np.sqrt(p) * signs
    vector: np.ndarray = (scaled - p * scaled.sum(axis=-1, keepdims=True)).astype(np.float32)
    return vector


def magnified(vector: np.ndarray) -> tuple[np.ndarray, float]:
    """A vector whose largest entry is in [32, 64), and what it must be multiplied by to be the given one again.

    A sure model's vector is so small that its gradients would be 0 in float16. The factor is a power of two, so that
    wider types compute the same bits.
    """
    _, exponent = np.frexp(np.abs(vector).max())
    unit = 2.0 ** (int(exponent) - 6) if vector.any() else 1.0
    return (vector / unit).astype(np.float32), unit


def prompt_seed(input_ids: np.ndarray) -> int:
    """The seed of a prompt's vector: by its tokens, whatever their integer type."""
    return zlib.crc32(np.ascontiguousarray(input_ids, dtype="<i8").tobytes())
