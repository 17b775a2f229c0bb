"""A MemoryFormer written again in numpy float64, loop by loop from the paper; shares no code with mfdist."""

import math

import numpy as np

from mfdist.testing import oracles


def memory_layer(x, table, bias, bits, kind, temperature=1.0):
    """Equation 11 for x [N, d], table [K·2^bits, h]."""
    codes, scores = oracles.sign_hash(x, bits, kind, temperature)
    out = oracles.gather_sum(table, codes, scores, 2**bits)
    return out if bias is None else out + bias


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def rotate(vector, position, rotary_dim):
    out = vector.copy()
    half = rotary_dim // 2
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / rotary_dim)
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(qkv, num_heads, rotary_dim):
    """Causal attention of one sequence, qkv [T, 3d]."""
    length, d = qkv.shape[0], qkv.shape[1] // 3
    width = d // num_heads
    out = np.zeros((length, d))
    for head in range(num_heads):
        columns = slice(head * width, (head + 1) * width)
        query, key, value = (qkv[:, part * d : (part + 1) * d][:, columns] for part in range(3))
        query = np.stack([rotate(row, position, rotary_dim) for position, row in enumerate(query)])
        key = np.stack([rotate(row, position, rotary_dim) for position, row in enumerate(key)])
        for t in range(length):
            logits = key[: t + 1] @ query[t] / math.sqrt(width)
            weights = np.exp(logits - logits.max())
            out[t, columns] = (weights / weights.sum()) @ value[: t + 1]
    return out


def forward(parameters, tokens, *, num_layers, num_heads, bits, extra_bits, rotary_dim, kind, activation="none"):
    """Logits [T, V] of one sequence of tokens."""
    x = parameters["embedding.weight"][tokens]
    for index in range(num_layers):
        part = {name.removeprefix(f"blocks.{index}."): value for name, value in parameters.items()}

        def layer(name, value, bits, part=part):
            return memory_layer(value, part[f"{name}.table.weight"], part[f"{name}.bias"], bits, kind)

        normed = rms_norm(x, part["attention_norm.weight"])
        x = x + attention(layer("qkv", normed, bits), num_heads, rotary_dim)
        wide = layer("ffn1", rms_norm(x, part["ffn1_norm.weight"]), bits)
        if activation == "gelu":
            wide = wide * np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(wide)
        wide = layer_norm(wide, part["ffn2_norm.weight"], part["ffn2_norm.bias"])
        x = x + layer("ffn2", wide, bits + extra_bits)
    return rms_norm(x, parameters["norm.weight"]) @ parameters["head.weight"].T
