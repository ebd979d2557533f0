"""Text models of `transformers`: encoders, decoders, encoder-decoders, mixtures of experts, state-space models.

Shapes: B batch, T tokens. All batches are integer tensors [B, T] or [B].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.families.base import Family, Kind, Size, Task, generator
from benchmarks.families.huggingface import build_model, own_loss

Settings = Callable[[Size], dict[str, Any]]
Batches = Callable[[Size], Callable[[int], dict[str, torch.Tensor]]]
IGNORED = -100  # label that cross-entropy skips


def _tokens(size: Size, seed: int) -> torch.Tensor:
    return torch.randint(4, size.vocabulary, (size.batch, size.length), generator=generator(seed))


def causal_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    def batches(seed: int) -> dict[str, torch.Tensor]:
        tokens = _tokens(size, seed)
        return {"input_ids": tokens, "labels": tokens.clone()}

    return batches


def masked_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    """Padded sentences whose labels are IGNORED but for a few tokens, a different number in each row."""

    def batches(seed: int) -> dict[str, torch.Tensor]:
        tokens = _tokens(size, seed)
        chosen = torch.rand(tokens.shape, generator=generator(seed + 1)) < 0.25
        chosen[:, 1] = True
        lengths = torch.randint(size.length // 2, size.length + 1, (size.batch, 1), generator=generator(seed + 2))
        attention_mask = (torch.arange(size.length)[None] < lengths).long()
        labels = torch.where(chosen & attention_mask.bool(), tokens, IGNORED)
        return {"input_ids": torch.where(chosen, 3, tokens), "attention_mask": attention_mask, "labels": labels}

    return batches


def class_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    def batches(seed: int) -> dict[str, torch.Tensor]:
        labels = torch.randint(0, 3, (size.batch,), generator=generator(seed + 1))
        return {"input_ids": _tokens(size, seed), "labels": labels}

    return batches


def replaced_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    """For ELECTRA's discriminator: label 1 where a token was replaced."""

    def batches(seed: int) -> dict[str, torch.Tensor]:
        tokens = _tokens(size, seed)
        replaced = torch.rand(tokens.shape, generator=generator(seed + 1)) < 0.2
        return {"input_ids": torch.where(replaced, (tokens * 7) % size.vocabulary, tokens), "labels": replaced.long()}

    return batches


def sequence_batches(size: Size) -> Callable[[int], dict[str, torch.Tensor]]:
    """Source and target sentences; the last quarter of every second target is IGNORED."""

    def batches(seed: int) -> dict[str, torch.Tensor]:
        labels = _tokens(size, seed + 1)
        labels[::2, -size.length // 4 :] = IGNORED
        return {"input_ids": _tokens(size, seed), "labels": labels}

    return batches


def bert_like(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.hidden,
        "max_position_embeddings": size.length + 4,
    }


def llama_like(size: Size) -> dict[str, Any]:
    """Rotary positions and grouped keys; the special tokens are moved into the vocabulary."""
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
    return {**bert_like(size), "num_key_value_heads": size.heads // 2, **special}


def bart_like(size: Size) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": size.depth, f"{side}_attention_heads": size.heads, f"{side}_ffn_dim": size.hidden}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2, "use_cache": False}
    common = {"vocab_size": size.vocabulary, "d_model": size.width, "max_position_embeddings": size.length + 4}
    return {**common, **sides, **special, "forced_eos_token_id": None}


def _family(
    name: str,
    kind: Kind,
    model: str,
    settings: Settings,
    batches: Batches,
    *,
    keep_dropout: bool = False,
    **constant: Any,
) -> Family:
    config = _config_name(model)

    def build(size: Size) -> Task:
        built = build_model(model, config, keep_dropout=keep_dropout, **settings(size))
        return Task(model=built, loss_fn=own_loss(**constant), batches=batches(size))

    return Family(name=name, kind=kind, build=build, source="transformers", draws=keep_dropout)


def _config_name(model: str) -> str:
    if model == "MarianMTModel":
        return "MarianConfig"
    return model.split("For")[0].removesuffix("LMHeadModel") + "Config"


def _with(settings: Settings, **more: Any) -> Settings:
    return lambda size: {**settings(size), **more}


def _gpt2(size: Size) -> dict[str, Any]:
    extents = {"n_embd": size.width, "n_layer": size.depth, "n_head": size.heads, "n_positions": size.length}
    return {**extents, "vocab_size": size.vocabulary, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}


def _bloom(size: Size) -> dict[str, Any]:
    extents = {"hidden_size": size.width, "n_layer": size.depth, "n_head": size.heads, "vocab_size": size.vocabulary}
    return {**extents, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}


def _opt(size: Size) -> dict[str, Any]:
    settings = llama_like(size)
    del settings["num_key_value_heads"], settings["intermediate_size"]
    return {**settings, "ffn_dim": size.hidden, "word_embed_proj_dim": size.width}


def _t5(size: Size) -> dict[str, Any]:
    extents = {"d_model": size.width, "d_kv": size.width // size.heads, "d_ff": size.hidden, "num_layers": size.depth}
    special = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "use_cache": False}
    return {**extents, "num_heads": size.heads, "vocab_size": size.vocabulary, **special}


def _distilbert(size: Size) -> dict[str, Any]:
    extents = {"dim": size.width, "hidden_dim": size.hidden, "n_layers": size.depth, "n_heads": size.heads}
    positions = {"max_position_embeddings": size.length + 4, "num_labels": 3}
    return {**extents, **positions, "vocab_size": size.vocabulary}


def _gemma(size: Size) -> dict[str, Any]:
    return {**llama_like(size), "head_dim": size.width // size.heads}


def _phi(size: Size) -> dict[str, Any]:
    return {**llama_like(size), "partial_rotary_factor": 0.5}


def _mixtral(size: Size) -> dict[str, Any]:
    return {**llama_like(size), "num_local_experts": 4, "num_experts_per_tok": 2}


def _qwen_moe(size: Size) -> dict[str, Any]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": size.width}
    return {**llama_like(size), **experts, "shared_expert_intermediate_size": size.width, "output_router_logits": True}


def _mamba(size: Size) -> dict[str, Any]:
    extents = {"hidden_size": size.width, "state_size": 8, "num_hidden_layers": size.depth, "time_step_rank": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
    return {**extents, "vocab_size": size.vocabulary, **special}


_batched_experts = _with(_qwen_moe, experts_implementation="batched_mm")

TRANSFORMERS_TEXT: tuple[Family, ...] = (
    _family("bert", "encoder", "BertForMaskedLM", bert_like, masked_batches, keep_dropout=True),
    _family("distilbert", "encoder", "DistilBertForSequenceClassification", _distilbert, class_batches),
    _family("roberta", "encoder", "RobertaForMaskedLM", _with(bert_like, pad_token_id=1), masked_batches),
    _family("electra", "encoder", "ElectraForPreTraining", _with(bert_like, embedding_size=16), replaced_batches),
    _family("albert", "encoder", "AlbertForMaskedLM", _with(bert_like, embedding_size=16), masked_batches),
    _family("gpt2", "decoder", "GPT2LMHeadModel", _gpt2, causal_batches, keep_dropout=True),
    _family("gpt_neox", "decoder", "GPTNeoXForCausalLM", _with(llama_like), causal_batches),
    _family("llama", "decoder", "LlamaForCausalLM", llama_like, causal_batches),
    _family("mistral", "decoder", "MistralForCausalLM", _with(llama_like, sliding_window=8), causal_batches),
    _family("qwen2", "decoder", "Qwen2ForCausalLM", _with(llama_like, tie_word_embeddings=True), causal_batches),
    _family("gemma", "decoder", "GemmaForCausalLM", _gemma, causal_batches),
    _family("opt", "decoder", "OPTForCausalLM", _opt, causal_batches),
    _family("bloom", "decoder", "BloomForCausalLM", _bloom, causal_batches),
    _family("phi", "decoder", "PhiForCausalLM", _phi, causal_batches),
    _family("t5", "encoder-decoder", "T5ForConditionalGeneration", _t5, sequence_batches, keep_dropout=True),
    _family("bart", "encoder-decoder", "BartForConditionalGeneration", bart_like, sequence_batches),
    _family("marian", "encoder-decoder", "MarianMTModel", bart_like, sequence_batches),
    _family("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", bart_like, sequence_batches),
    _family("mixtral", "mixture-of-experts", "MixtralForCausalLM", _mixtral, causal_batches),
    _family("qwen2_moe", "mixture-of-experts", "Qwen2MoeForCausalLM", _batched_experts, causal_batches),
    _family("mamba", "state-space", "MambaForCausalLM", _mamba, causal_batches),
)
