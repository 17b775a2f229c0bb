"""What the kernels must compute, written a second time: loops over numpy float64 that share no code with any kernel.

Slow on purpose. Gradients are written out by hand from the formulas; tests hold them against finite differences too.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def norm(x: Floats, is_centred: bool, eps: float, weight: Floats | None, shift: Floats | None) -> Floats:
    """Return LayerNorm of activations [N, d], or RMSNorm where they are not centred."""
    centred = x - x.mean(axis=1, keepdims=True) if is_centred else x
    z: Floats = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    z = z if weight is None else z * weight
    return z if shift is None else z + shift


def sign_hash(x: Floats, bits: int, score: str, temperature: float = 1.0) -> tuple[Ints, Floats]:
    """Return codes and scores, [N, K] each, of activations [N, d]."""
    num_tokens, dim = x.shape
    codes = np.zeros((num_tokens, dim // bits), np.int64)
    scores = np.zeros((num_tokens, dim // bits))
    for n in range(num_tokens):
        for k in range(dim // bits):
            chunk = [float(value) for value in x[n, k * bits : (k + 1) * bits]]
            code = "".join("1" if value >= 0 else "0" for value in chunk)
            codes[n, k] = int(code, 2)
            scores[n, k] = _score(chunk, score, temperature)
    return codes, scores


def sign_hash_gradient(x: Floats, grad_scores: Floats, bits: int, score: str, temperature: float = 1.0) -> Floats:
    """Return the gradient of x [N, d] from that of the scores [N, K]."""
    grad_x = np.zeros(x.shape)
    for n in range(x.shape[0]):
        for i in range(x.shape[1]):
            chunk = [float(value) for value in x[n, i // bits * bits : (i // bits + 1) * bits]]
            z = float(x[n, i])
            p = _score(chunk, "paper", temperature)
            slope = p * (2 / temperature) * (1 - 1 / (1 + math.exp(-2 * abs(z) / temperature)))
            if score == "released":
                slope = p + sum(abs(value) for value in chunk) * slope
            grad_x[n, i] = grad_scores[n, i // bits] * slope * ((z > 0) - (z < 0))
    return grad_x


def gather_sum(table: Floats, row_ids: Ints, scores: Floats, code_stride: int = 0) -> Floats:
    """Return [N, D], the score-weighted sum of each token's rows."""
    out = np.zeros((row_ids.shape[0], table.shape[1]))
    for n in range(row_ids.shape[0]):
        for k in range(row_ids.shape[1]):
            out[n] += scores[n, k] * table[k * code_stride + row_ids[n, k]]
    return out


def row_gradient(
    table: Floats, row_ids: Ints, scores: Floats, grad_output: Floats, code_stride: int = 0
) -> tuple[Floats, Floats]:
    """Return the gradients of the table [R, D] and of the scores [N, K]."""
    grad_table = np.zeros(table.shape)
    grad_scores = np.zeros(scores.shape)
    for n in range(row_ids.shape[0]):
        for k in range(row_ids.shape[1]):
            row = k * code_stride + row_ids[n, k]
            grad_table[row] += scores[n, k] * grad_output[n]
            grad_scores[n, k] = np.dot(table[row], grad_output[n])
    return grad_table, grad_scores


def row_update(
    rows: Floats,
    states: list[Floats],
    grads: Floats,
    kind: str,
    lr: float,
    step: int,
    *,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[Floats, list[Floats]]:
    """Return rows [U, D] and their states after one update, the `step`-th, by their gradients."""
    rows, states = rows.copy(), [state.copy() for state in states]
    for u in range(rows.shape[0]):
        g, kept = grads[u], rows[u] - lr * weight_decay * rows[u]
        if kind == "sgd":
            rows[u] = kept - lr * g
        elif kind == "rowwise_adagrad":
            square = sum(float(value) ** 2 for value in g) / len(g)
            kept_part, gain = (betas[1], 1 - betas[1]) if betas[1] < 1 else (1.0, 1.0)
            states[0][u] = kept_part * states[0][u] + gain * square if states[0][u] > 0 else square
            rows[u] = kept - lr / (math.sqrt(states[0][u]) + eps) * g
        else:
            m, v = (moment[u] for moment in states)
            m[:] = betas[0] * m + (1 - betas[0]) * g
            v[:] = betas[1] * v + (1 - betas[1]) * g * g
            for c in range(len(g)):
                root = math.sqrt(v[c] / (1 - betas[1] ** step))
                rows[u, c] = kept[c] - lr * m[c] / (1 - betas[0] ** step) / (root + eps)
    return rows, states


def _score(chunk: list[float], score: str, temperature: float) -> float:
    certainty = 1.0
    for value in chunk:
        certainty /= 1 + math.exp(-2 * abs(value) / temperature)
    return certainty * sum(abs(value) for value in chunk) if score == "released" else certainty
