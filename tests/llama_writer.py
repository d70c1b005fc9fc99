"""Writes what `llama-perplexity --kl-divergence-base` of llama.cpp writes, from the published layout, row by row.

An oracle for the reader: it shares nothing with numbaloss. `encode` follows the writer's arithmetic (float32), `write`
the order of the fields (tools/perplexity/perplexity.cpp).
"""

import math
import struct


def f32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def encode(logits):
    """(bytes of the row, the log probabilities that they stand for) of one row of logits, a list of floats."""
    largest, smallest = max(logits), min(logits)
    smallest = max(smallest, f32(largest - 16))
    log_sum = f32(math.log(sum(math.exp(x - largest) for x in logits)))
    scale = f32(f32(largest - smallest) / 65535)
    least = f32(f32(smallest - largest) - log_sum)
    codes = [round((x - smallest) / scale) if scale and x > smallest else 0 for x in logits]
    padding = [0xABCD] * (len(codes) % 2)
    data = struct.pack("<2f", scale, least) + struct.pack(f"<{len(codes) + len(padding)}H", *codes, *padding)
    return data, [f32(f32(scale * code) + least) for code in codes]


def write(path, context, classes, tokens, logits):
    """Writes a file. Returns the rows of log probabilities, and the token that each of them predicts.

    tokens: one list of `context` token ids for each chunk. logits: for each chunk one row for each of `context`
    positions, of which the second half is kept; the row at t predicts the token at t + 1, so the last has no target.
    """
    rows, targets = [], []
    with open(path, "wb") as file:
        file.write(b"_logits_" + struct.pack("<3i", context, classes, len(tokens)))
        for chunk in tokens:
            file.write(struct.pack(f"<{context}i", *chunk))
        for chunk, positions in zip(tokens, logits):
            for t in range(context // 2, context - 1):
                data, row = encode(positions[t])
                file.write(data)
                rows.append(row)
                targets.append(chunk[t + 1])
    return rows, targets
