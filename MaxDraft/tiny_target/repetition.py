"""How far a text is from one loop repeated: the share of its n-grams that are distinct.

A head is easy to train for a target that repeats itself, and its accept length then says little.
"""

from __future__ import annotations

from collections.abc import Sequence


def distinct_ngram_share(token_lists: Sequence[Sequence[int]], n: int = 4) -> float:
    """Distinct n-grams of each reply over all its n-grams, both summed over the replies.

    1.0: no reply says the same n tokens twice. A loop of period p, long enough, tends to 0. n-grams
    that two replies share count in both, since a common phrase is no loop. 0.0 without any n-gram.
    """
    distinct = total = 0
    for tokens in token_lists:
        ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        distinct, total = distinct + len(set(ngrams)), total + len(ngrams)
    return distinct / total if total else 0.0
