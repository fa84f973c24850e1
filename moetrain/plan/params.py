"""Parameters and floating-point operations of a model, from its config by arithmetic alone: no torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass

from moetrain.config.model import ModelConfig


@dataclass(frozen=True)
class ParamCount:
    """total: every parameter. active: those that one token uses (its top_k experts and the shared ones, and all else).

    embedding: the embedding and, when untied, the head; both are in total and in active, as published counts have it.
    """

    total: int
    active: int
    embedding: int


def count(config: ModelConfig) -> ParamCount:
    """Parameters of `model.decoder.Decoder`; balance biases are state, not parameters, and do not count."""
    d, moe = config.d_model, config.moe
    moe_layers = sum(config.is_moe(layer) for layer in range(config.n_layers))
    dense_layers = config.n_layers - moe_layers
    embedding = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    norms = 2 * d * config.n_layers + d
    every_token = (
        embedding
        + norms
        + config.n_layers * (_attention_matrices(config) + _attention_vectors(config))
        + dense_layers * 3 * d * config.d_ff
        + moe_layers * _router_and_shared(config)
    )
    expert = 3 * d * moe.d_expert
    return ParamCount(
        total=every_token + moe_layers * moe.n_experts * expert,
        active=every_token + moe_layers * moe.top_k * expert,
        embedding=embedding,
    )


def flops_per_token(config: ModelConfig, seq_len: int, attended: float | None = None) -> float:
    """Training flops of one token, forward and backward, a multiply-add being two:

        6 * P + 6 * n_layers * n_heads * (qk_dim + v_dim) * attended

    P: active parameters that multiply (the head counts; embedding look-up, norms and biases do not). Each attended
    position costs qk_dim multiply-adds for its score and v_dim for its value, in every head; backward costs twice
    forward. attended: positions a token looks at, on average; causal rows of one document have (seq_len + 1) / 2,
    packed documents fewer. With attended = seq_len and n_heads * qk_dim = n_heads * v_dim = d_model the second term is
    the usual 12 * n_layers * d_model * seq_len. Recomputation is not counted.
    """
    a, d, moe = config.attention, config.d_model, config.moe
    moe_layers = sum(config.is_moe(layer) for layer in range(config.n_layers))
    matrices = (
        config.vocab_size * d
        + config.n_layers * _attention_matrices(config)
        + (config.n_layers - moe_layers) * 3 * d * config.d_ff
        + moe_layers * (_router_and_shared(config) + moe.top_k * 3 * d * moe.d_expert)
    )
    looked_at = (seq_len + 1) / 2 if attended is None else attended
    return 6.0 * matrices + 6.0 * config.n_layers * a.n_heads * (a.qk_dim + a.v_dim) * looked_at


def format_table(config: ModelConfig) -> str:
    """What `python -m moetrain params` prints: name, total, active, and embedding parameters, exact and rounded."""
    counted = count(config)
    rows = [("model", config.name)]
    rows += [(name, f"{n:,} ({_short(n)})") for name, n in vars(counted).items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _attention_matrices(config: ModelConfig) -> int:
    a, d = config.attention, config.d_model
    out = a.n_heads * a.v_dim * d
    if a.kind == "gqa":
        return d * a.n_heads * a.head_dim + 2 * d * a.n_kv_heads * a.head_dim + out
    query_in = a.q_lora_rank or d
    query = d * a.q_lora_rank + query_in * a.n_heads * a.qk_dim
    latent = d * (a.kv_lora_rank + a.qk_rope_head_dim)
    return query + latent + a.kv_lora_rank * a.n_heads * (a.qk_nope_head_dim + a.v_head_dim) + out


def _attention_vectors(config: ModelConfig) -> int:
    """Biases and the norms inside attention."""
    a = config.attention
    if a.kind == "mla":
        return a.q_lora_rank + a.kv_lora_rank
    query, key = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    norms = {"none": 0, "head": 2 * a.head_dim, "full": query + key}[a.qk_norm]
    return norms + (query + 2 * key) * a.qkv_bias + config.d_model * a.out_bias


def _router_and_shared(config: ModelConfig) -> int:
    """What every token uses of a MoE layer besides its experts."""
    moe, d = config.moe, config.d_model
    return moe.n_experts * d + 3 * d * moe.d_shared + d * moe.shared_gate


def _short(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.2f}{unit}"
    return str(n)
