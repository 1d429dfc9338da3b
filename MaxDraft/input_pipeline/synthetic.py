"""Batches without a tokenizer: random tokens, in one document a row or in packed conversations."""

from __future__ import annotations

import numpy as np

from MaxDraft.input_pipeline.packing import pack_rows

# Mean tokens of a request and of a reply in ShareGPT (Kwon et al. 2023, figure 11); turns as in a
# sample with about 3.5 exchanges.
REQUEST, REPLY, EXCHANGES = 161, 338, 3.5


def whole_rows(A: int, B: int, T: int, vocab_size: int) -> dict[str, np.ndarray]:
    """One document in every row, the assistant's from its first token."""
    ones = np.ones((A, B, T), np.int32)
    return {
        "tokens": np.random.default_rng(0).integers(0, vocab_size, ones.shape).astype(np.int32),
        "segment_ids": ones,
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), ones.shape).copy(),
        "turn_ids": ones,
    }


def conversations(A: int, B: int, T: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Packed conversations, cut at T: requests and replies of exponential lengths, in turn."""
    rng = np.random.default_rng(0)
    turns, rows = [], []
    while len(rows) < A * B:
        for _ in range(2000):
            exchanges = rng.geometric(1 / EXCHANGES)
            lengths = 1 + rng.exponential(np.tile([REQUEST - 1, REPLY - 1], exchanges)).astype(int)
            numbers = np.stack([np.zeros(exchanges), 1 + np.arange(exchanges)], 1).ravel()
            turns.append(np.repeat(numbers, lengths)[:T].astype(np.int32))
        rows = pack_rows(np.array([len(turn) for turn in turns]), T, seed=0)
    batch = {
        name: np.zeros((A * B, T), np.int32) for name in ("segment_ids", "positions", "turn_ids")
    }
    for row in range(A * B):
        start = 0
        for number, document in enumerate(rows[row], 1):
            turn = turns[document]
            end = start + len(turn)
            batch["segment_ids"][row, start:end] = number
            batch["turn_ids"][row, start:end] = turn
            batch["positions"][row, start:end] = np.arange(len(turn))
            start = end
    batch["tokens"] = rng.integers(0, vocab_size, (A * B, T)).astype(np.int32)
    return {name: x.reshape(A, B, T) for name, x in batch.items()}


def document_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Tokens of every document, float64; segment_ids [..., T], 0 at pads."""
    rows = segment_ids.reshape(-1, segment_ids.shape[-1])
    counts = [np.unique(row[row > 0], return_counts=True)[1] for row in rows]
    return np.concatenate(counts).astype(np.float64)
