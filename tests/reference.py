"""A slow EAGLE-3 rollout in NumPy float64: loops over rows, steps and keys, document by document.

It shares no code and no tricks with MaxDraft: rows are never packed (each document is cut out of
its row and stands alone), attention is a list of keys under one softmax, the teacher's logits are
dense, alignment scans tokens and metrics are counted. What has no definition (a row whose token
lies outside its document) is NaN, so that a loss that touched it would be NaN as well.

    state(0, i) = fc aux[i];  state(k + 1, i) = layer(embed x[i+1+k], state(k, i))
    loss_k(i)   = -sum_v p_v(i+1+k) log q_v(k, i),   p = softmax over the D draft tokens
    total       = sum_k 0.8^k sum_i loss_k(i) / N_k

A head is a dict of arrays under the names of a published checkpoint. `torch_total` writes the same
equations a second time, dense over a whole row with one mask, for autograd to differentiate.
Dimensions: B rows, T tokens, H width, V target and D draft vocabulary, K steps, d head size.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Head:
    """What the arrays of a head do not say: its attention heads, rotary base, norm epsilon."""

    heads: int
    kv_heads: int
    head_dim: int
    theta: float = 10000.0
    eps: float = 1e-6
    fc_norm: bool = False  # EAGLE-3.1: an RMSNorm of its own for each feature before fc
    norm_output: bool = False  # EAGLE-3.1: the normed state is what the next step reads


@dataclasses.dataclass
class Batch:
    """B rows of T tokens; segments: 0 is padding, a document is a run of one positive number."""

    tokens: np.ndarray  # [B, T]
    turns: np.ndarray  # [B, T] 0 where the assistant did not write, else its turn in the document
    segments: np.ndarray  # [B, T]
    positions: np.ndarray  # [B, T] inside the document
    aux: np.ndarray  # [B, T, 3H]
    final: np.ndarray  # [B, T, H] the target's normed last state


@dataclasses.dataclass
class Teacher:
    """The frozen target as a head sees it."""

    embedding: np.ndarray  # [V, H]
    lm_head: np.ndarray  # [V, H]


@dataclasses.dataclass
class Problem:
    """A head, a teacher and a batch."""

    head: Head
    params: dict[str, np.ndarray]
    teacher: Teacher
    d2t: np.ndarray  # [D] OFFSETS: target id = draft id + d2t[draft id]
    batch: Batch


def read_layout(layout):
    """Rows as text -> (turns, segments, positions), each [B, T].

    A letter is one token: p a prompt's, a digit the assistant's in that turn, "." a pad. "|" stands
    between two documents and is no token.
    """
    turns, segments, positions = [], [], []
    for row in layout:
        row_turns, row_segments, row_positions = [], [], []
        number, start = 1, 0
        for mark in row:
            if mark == "|":
                number, start = number + 1, len(row_turns)
                continue
            row_turns.append(int(mark) if mark.isdigit() else 0)
            row_positions.append(0 if mark == "." else len(row_turns) - 1 - start)
            row_segments.append(0 if mark == "." else number)
        turns.append(row_turns)
        segments.append(row_segments)
        positions.append(row_positions)
    return np.array(turns), np.array(segments), np.array(positions)


def make_problem(
    layout, seed=0, *, vocabulary=11, draft_vocabulary=6, width=8, inner=12, head=Head(4, 2, 6)
):
    """A random problem. What stands at pads is large garbage, which nothing may notice."""
    rng = np.random.default_rng(seed)
    turns, segments, positions = read_layout(layout)
    H, q_size, kv_size = width, head.heads * head.head_dim, head.kv_heads * head.head_dim
    shapes = {
        "fc.weight": (H, 3 * H),
        "midlayer.input_layernorm.weight": (H,),
        "midlayer.hidden_norm.weight": (H,),
        "midlayer.self_attn.q_proj.weight": (q_size, 2 * H),
        "midlayer.self_attn.k_proj.weight": (kv_size, 2 * H),
        "midlayer.self_attn.v_proj.weight": (kv_size, 2 * H),
        "midlayer.self_attn.o_proj.weight": (H, q_size),
        "midlayer.post_attention_layernorm.weight": (H,),
        "midlayer.mlp.gate_proj.weight": (inner, H),
        "midlayer.mlp.up_proj.weight": (inner, H),
        "midlayer.mlp.down_proj.weight": (H, inner),
        "norm.weight": (H,),
        "lm_head.weight": (draft_vocabulary, H),
    }
    if head.fc_norm:
        shapes |= {f"fc_norm.{feature}.weight": (H,) for feature in range(3)}
    params = {
        name: 1 + 0.3 * rng.normal(size=shape) if len(shape) == 1 else rng.normal(size=shape) * 0.5
        for name, shape in shapes.items()
    }
    draft_ids = np.sort(rng.choice(vocabulary, draft_vocabulary, replace=False))
    garbage = np.where(segments > 0, 1.0, 30.0)[..., None]
    batch = Batch(
        tokens=rng.integers(0, vocabulary, turns.shape),
        turns=turns,
        segments=segments,
        positions=positions,
        aux=rng.normal(size=(*turns.shape, 3 * H)) * garbage,
        final=rng.normal(size=(*turns.shape, H)) * garbage,
    )
    teacher = Teacher(rng.normal(size=(vocabulary, H)), rng.normal(size=(vocabulary, H)) * 0.5)
    return Problem(head, params, teacher, draft_ids - np.arange(draft_vocabulary), batch)


def rms_norm(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight, over the last dimension."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1.0 + np.exp(-x))


def rotate(x, position, theta):
    """Rotary embedding of one head [d] at a position: dimension n turns with dimension n + d/2."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    first, second = x[:half], x[half:]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ]
    )


def attend(query, keys, values):
    """One query [d] over lists of keys and values [d], under one softmax."""
    scores = np.array([query @ key for key in keys]) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def document_states(params, head, embedding, tokens, aux, steps):
    """States after each step, one document alone: [K, n, H], NaN where x[i+1+k] is missing."""
    n, width = len(tokens), embedding.shape[1]
    shared = head.heads // head.kv_heads
    weight = {name: np.asarray(array, np.float64) for name, array in params.items()}
    attention = "midlayer.self_attn."
    states = np.full((steps, n, width), np.nan)
    keys = {}  # (step, row) -> [kv_heads][d]
    values = {}
    for k in range(steps):
        for i in range(n):
            if i + 1 + k >= n:
                continue
            state = fused(weight, head, aux[i]) if k == 0 else states[k - 1, i]
            embedded = embedding[tokens[i + 1 + k]]
            inputs = np.concatenate(
                [
                    rms_norm(embedded, weight["midlayer.input_layernorm.weight"], head.eps),
                    rms_norm(state, weight["midlayer.hidden_norm.weight"], head.eps),
                ]
            )
            query = (weight[attention + "q_proj.weight"] @ inputs).reshape(head.heads, -1)
            key = (weight[attention + "k_proj.weight"] @ inputs).reshape(head.kv_heads, -1)
            values[k, i] = (weight[attention + "v_proj.weight"] @ inputs).reshape(head.kv_heads, -1)
            keys[k, i] = [rotate(one, i + k, head.theta) for one in key]
            seen = [(0, j) for j in range(i + 1)] + [(step, i) for step in range(1, k + 1)]
            outputs = []
            for h in range(head.heads):
                group = h // shared
                outputs.append(
                    attend(
                        rotate(query[h], i + k, head.theta),
                        [keys[at][group] for at in seen],
                        [values[at][group] for at in seen],
                    )
                )
            state = state + weight[attention + "o_proj.weight"] @ np.concatenate(outputs)
            normed = rms_norm(state, weight["midlayer.post_attention_layernorm.weight"], head.eps)
            gate = weight["midlayer.mlp.gate_proj.weight"] @ normed
            up = weight["midlayer.mlp.up_proj.weight"] @ normed
            state = state + weight["midlayer.mlp.down_proj.weight"] @ (silu(gate) * up)
            if head.norm_output:
                state = rms_norm(state, weight["norm.weight"], head.eps)
            states[k, i] = state
    return states


def fused(weight, head, aux):
    """fc of one token's three features [3H]."""
    if head.fc_norm:
        features = np.split(aux, 3)
        for number, feature in enumerate(features):
            features[number] = rms_norm(feature, weight[f"fc_norm.{number}.weight"], head.eps)
        aux = np.concatenate(features)
    return weight["fc.weight"] @ aux


def log_softmax(x):
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def is_supervised(turns, i, k, alignment):
    """Whether row i of one document counts at step k, before the vocabulary is asked.

    serving: x[i+1] .. x[i+2+k] are all written by the assistant, in one turn, in this document.
    specforge: the mask is not shifted with the ids and slides left with k; the label must exist.
    """
    n = len(turns)
    if alignment == "serving":
        if i + 2 + k >= n:
            return False
        return all(turns[t] > 0 and turns[t] == turns[i + 1] for t in range(i + 1, i + 2 + k + 1))
    if alignment == "specforge":
        return i + 1 + k < n and bool(turns[i + k] > 0)
    raise ValueError(alignment)


def documents_of(segments):
    """(start, end) of every run of one positive segment number in a row."""
    found, start = [], 0
    for t in range(1, len(segments) + 1):
        if t == len(segments) or segments[t] != segments[start]:
            if segments[start] > 0:
                found.append((start, t))
            start = t
    return found


def unpack(problem):
    return problem.params, problem.head, problem.teacher, problem.d2t, problem.batch


@dataclasses.dataclass
class Rows:
    """What happened at step k in row i of batch row b; all arrays are [K, B, T]."""

    loss_mask: np.ndarray  # bool [K, B, T]
    in_vocab_loss_mask: np.ndarray  # bool [K, B, T]
    correct: np.ndarray
    loss: np.ndarray
    alpha: np.ndarray


def rollout(problem, steps, alignment="serving"):
    """Losses, hits and overlaps of every aligned row, each document on its own."""
    params, head, teacher, d2t, batch = unpack(problem)
    num_rows, length = batch.tokens.shape
    draft_ids = np.arange(len(d2t)) + np.asarray(d2t)  # target id of each draft id
    in_draft = set(draft_ids.tolist())
    norm, lm_head = (np.asarray(params[n], np.float64) for n in ("norm.weight", "lm_head.weight"))
    shape = (steps, num_rows, length)
    flags = [np.zeros(shape, bool) for _ in range(3)]
    rows = Rows(*flags, loss=np.zeros(shape), alpha=np.zeros(shape))
    for b in range(num_rows):
        for start, end in documents_of(batch.segments[b]):
            tokens, turns = batch.tokens[b, start:end], batch.turns[b, start:end]
            aux = np.asarray(batch.aux[b, start:end], np.float64)
            final = np.asarray(batch.final[b, start:end], np.float64)
            states = document_states(params, head, teacher.embedding, tokens, aux, steps)
            for k in range(steps):
                for i in range(end - start):
                    if not is_supervised(turns, i, k, alignment):
                        continue
                    target_logits = teacher.lm_head @ final[i + 1 + k]
                    best = int(np.argmax(target_logits))
                    p_full = np.exp(log_softmax(target_logits))
                    p = np.exp(log_softmax(target_logits[draft_ids]))
                    state = states[k, i]
                    if not head.norm_output:
                        state = rms_norm(state, norm, head.eps)
                    log_q = log_softmax(lm_head @ state)
                    at = (k, b, start + i)
                    rows.loss_mask[at] = True
                    rows.in_vocab_loss_mask[at] = best in in_draft
                    rows.correct[at] = draft_ids[int(np.argmax(log_q))] == best
                    rows.loss[at] = -np.sum(p * log_q)
                    rows.alpha[at] = sum(
                        min(p_full[target], np.exp(log_q[draft]))
                        for draft, target in enumerate(draft_ids)
                    )
    return rows


def total_loss(rows, decay=0.8, denominator="supervised"):
    """sum_k decay^k loss_k; each loss_k over its counted rows, or over all B*T positions."""
    steps, num_rows, length = rows.loss.shape
    total = 0.0
    for k in range(steps):
        count = (
            rows.in_vocab_loss_mask[k].sum() if denominator == "supervised" else num_rows * length
        )
        if count:
            total += decay**k * rows.loss[k][rows.in_vocab_loss_mask[k]].sum() / count
    return total


def metrics(rows):
    """acc, cond_acc and alpha per step, the loss per step, and the simulated acceptance length."""
    steps = rows.loss.shape[0]
    out = {"loss": [], "acc": [], "cond_acc": [], "alpha": []}
    for k in range(steps):
        aligned = hits = still = still_hits = 0
        alpha = 0.0
        for at in np.argwhere(rows.loss_mask[k]):
            at = tuple(at)
            aligned += 1
            hits += rows.correct[(k, *at)]
            alpha += rows.alpha[(k, *at)]
            if all(rows.correct[(before, *at)] for before in range(k)):
                still += 1
                still_hits += rows.correct[(k, *at)]
        counted = rows.in_vocab_loss_mask[k].sum()
        out["loss"].append(
            rows.loss[k][rows.in_vocab_loss_mask[k]].sum() / counted if counted else 0.0
        )
        out["acc"].append(hits / aligned if aligned else 0.0)
        out["alpha"].append(alpha / aligned if aligned else 0.0)
        out["cond_acc"].append(still_hits / still if still else 0.0)
    accepted, chance = 1.0, 1.0
    for a in out["cond_acc"]:
        chance *= a
        accepted += chance
    out["sim_accept_length"] = accepted
    return {name: np.asarray(value) for name, value in out.items()}


def torch_total(problem, steps, alignment="serving", denominator="supervised", decay=0.8):
    """(total, gradient of every parameter) by autograd in float64: one [T, T + k*T] mask per row.

    Here a packed row is NOT cut into documents: its mask separates them, and positions run through
    the whole row, which rotary embedding (relative by construction) must not notice.
    """
    import torch

    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
    params, head, teacher, d2t, batch = unpack(problem)
    f64 = torch.float64
    weight = {
        name: torch.tensor(np.asarray(array), dtype=f64, requires_grad=True)
        for name, array in params.items()
    }
    embedding, target_head = (
        torch.tensor(a, dtype=f64) for a in (teacher.embedding, teacher.lm_head)
    )
    draft_ids = torch.arange(len(d2t)) + torch.tensor(np.asarray(d2t), dtype=torch.int64)
    in_draft = torch.zeros(len(target_head), dtype=torch.bool)
    in_draft[draft_ids] = True
    num_rows, length = batch.tokens.shape
    half = head.head_dim // 2

    def norm(x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + head.eps)
        return x * scale * weight[name]

    def turn(x, positions):  # [T, heads, d] as complex numbers, one per rotated pair
        speed = torch.tensor(head.theta, dtype=f64) ** (-torch.arange(half, dtype=f64) / half)
        angle = positions[:, None, None] * speed
        pairs = torch.complex(x[..., :half], x[..., half:])
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], -1)

    def shift(x, by):  # x[t + by], zero past the end
        return torch.cat([x[by:], torch.zeros_like(x[:by])])[: len(x)]

    sums = [torch.zeros((), dtype=f64) for _ in range(steps)]
    counts = [0] * steps
    for b in range(num_rows):
        tokens = torch.tensor(batch.tokens[b], dtype=torch.int64)
        segments = torch.tensor(batch.segments[b], dtype=torch.int64)
        turns = torch.tensor(batch.turns[b], dtype=torch.int64)
        final = torch.tensor(batch.final[b], dtype=f64)
        target_logits = final @ target_head.T
        teacher_p = torch.softmax(target_logits[:, draft_ids], -1)
        teacher_in = in_draft[target_logits.argmax(-1)]
        index = torch.arange(length)
        causal = (index[:, None] >= index[None]) & (segments[:, None] == segments[None])
        own = torch.eye(length, dtype=torch.bool)
        features = torch.tensor(batch.aux[b], dtype=f64)
        if head.fc_norm:
            parts = features.chunk(3, -1)
            parts = [norm(part, f"fc_norm.{i}.weight") for i, part in enumerate(parts)]
            features = torch.cat(parts, -1)
        state = features @ weight["fc.weight"].T
        past_keys, past_values, masks = [], [], []
        for k in range(steps):
            inputs = torch.cat(
                [
                    norm(embedding[shift(tokens, 1 + k)], "midlayer.input_layernorm.weight"),
                    norm(state, "midlayer.hidden_norm.weight"),
                ],
                -1,
            )
            query, key, value = (
                (inputs @ weight[f"midlayer.self_attn.{p}_proj.weight"].T).view(
                    length, -1, head.head_dim
                )
                for p in "qkv"
            )
            query, key = turn(query, index + k), turn(key, index + k)
            spread = head.heads // head.kv_heads
            past_keys.append(key.repeat_interleave(spread, 1))
            past_values.append(value.repeat_interleave(spread, 1))
            masks.append(causal if k == 0 else own)
            scores = torch.einsum("thd,shd->hts", query, torch.cat(past_keys)) / head.head_dim**0.5
            scores = scores.masked_fill(~torch.cat(masks, 1), float("-inf"))
            mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), torch.cat(past_values))
            state = state + mixed.reshape(length, -1) @ weight["midlayer.self_attn.o_proj.weight"].T
            normed = norm(state, "midlayer.post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(normed @ weight["midlayer.mlp.gate_proj.weight"].T)
            up = normed @ weight["midlayer.mlp.up_proj.weight"].T
            state = state + (gate * up) @ weight["midlayer.mlp.down_proj.weight"].T
            normed = norm(state, "norm.weight")
            if head.norm_output:
                state = normed
            log_q = (normed @ weight["lm_head.weight"].T).log_softmax(-1)
            loss = -(shift(teacher_p, 1 + k) * log_q).sum(-1)

            if alignment == "serving":
                aligned = shift(turns, 1) > 0
                for ahead in range(1, k + 3):
                    aligned &= shift(turns, ahead) == shift(turns, 1)
                    aligned &= shift(segments, ahead) == segments
            else:
                aligned = shift(turns, k) > 0 if k else turns > 0
                aligned = aligned & (shift(segments, 1 + k) == segments)
            counted = aligned & (segments > 0) & shift(teacher_in, 1 + k)
            sums[k] = sums[k] + torch.where(counted, loss, torch.zeros_like(loss)).sum()
            counts[k] += int(counted.sum())
    if denominator != "supervised":
        counts = [num_rows * length] * steps
    total = sum(decay**k * sums[k] / max(counts[k], 1) for k in range(steps))
    total.backward()
    return total.item(), {name: tensor.grad.numpy() for name, tensor in weight.items()}
