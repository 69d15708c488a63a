"""Entries of a GGUF file that are about the model: read, meaningless here, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fluxion_core.errors import UnsupportedModelError
from fluxion_core.models.entry_rules import EntryRules, Restriction

_NO: tuple[object, ...] = (False, 0)
_SCALED = "hidden states, scores or logits multiplied by a factor"
_CAPPED = "capped scores or logits"
_EXPERTS = "a mixture of experts"
_WINDOW = "attention over a window"
_YARN = "rotary scaling yarn"

# After the architecture and a dot.
ARCHITECTURE = EntryRules(
    read=frozenset(
        (
            *("block_count", "context_length", "embedding_length", "feed_forward_length"),
            *("vocab_size", "attention.head_count", "attention.head_count_kv"),
            *("attention.key_length", "attention.value_length", "attention.sliding_window"),
            *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
            *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
        )
    ),
    harmless=frozenset(
        (
            # Read with yarn alone, which is refused; or of how the model was trained.
            *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
            *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
            # Read with experts alone, which are refused.
            *("expert_used_count", "expert_weights_scale", "expert_weights_norm"),
            "expert_gating_func",
        )
    ),
    restricted={
        "attention.scale": Restriction(_NO, _SCALED),
        "attention.output_scale": Restriction((*_NO, 1), _SCALED),
        "attention.temperature_scale": Restriction(_NO, _SCALED),
        "attention.temperature_length": Restriction(_NO, _SCALED),
        "logit_scale": Restriction((*_NO, 1), _SCALED),
        "residual_scale": Restriction((*_NO, 1), _SCALED),
        "embedding_scale": Restriction((*_NO, 1), _SCALED),
        "attn_logit_softcapping": Restriction(_NO, _CAPPED),
        "final_logit_softcapping": Restriction(_NO, _CAPPED),
        "attention.clamp_kqv": Restriction(_NO, _CAPPED),
        "attention.max_alibi_bias": Restriction(_NO, "scores that depend on distance"),
        "attention.causal": Restriction((True,), "attention to what follows"),
        "attention.sliding_window_pattern": Restriction(_NO, _WINDOW),
        "attention.key_length_swa": Restriction(_NO, _WINDOW),
        "attention.value_length_swa": Restriction(_NO, _WINDOW),
        "attention.shared_kv_layers": Restriction(_NO, "layers that share keys and values"),
        "attention.kv_lora_rank": Restriction(_NO, "compressed keys and values"),
        "attention.q_lora_rank": Restriction(_NO, "compressed queries"),
        "rope.dimension_sections": Restriction(([],), "positions of pictures"),
        "rope.freq_base_swa": Restriction(_NO, _WINDOW),
        "rope.scaling.attn_factor": Restriction((1,), _SCALED),
        "rope.scaling.alpha": Restriction((*_NO, 1), "rotary scaling by alpha"),
        "rope.scaling.yarn_log_multiplier": Restriction(_NO, _YARN),
        "rope.scaling.yarn_ext_factor": Restriction((*_NO, -1), _YARN),
        "rope.scaling.yarn_attn_factor": Restriction((1, -1), _YARN),
        "expert_count": Restriction(_NO, _EXPERTS),
        "expert_shared_count": Restriction(_NO, _EXPERTS),
        "leading_dense_block_count": Restriction(_NO, _EXPERTS),
        "interleave_moe_layer_step": Restriction(_NO, _EXPERTS),
        "nextn_predict_layers": Restriction(_NO, "layers that predict several tokens"),
        "n_deepstack_layers": Restriction(_NO, "pictures"),
        "embedding_length_out": Restriction(_NO, "embeddings of another size than hidden states"),
        "pooling_type": Restriction(_NO, "an embedding of a whole text"),
        "use_parallel_residual": Restriction(_NO, "attention and feed-forward beside each other"),
        "tensor_data_layout": Restriction(("Meta AI original pth",), "another layout of tensors"),
        "activation_sparsity_scale": Restriction(([], *_NO), "sparse activations"),
        "swiglu_clamp_exp": Restriction(([], *_NO), _CAPPED),
        "swin_norm": Restriction(_NO, "other norms"),
    },
)
_FILE = EntryRules(
    read=frozenset(("general.architecture", "general.alignment", "split.count")),
    harmless=frozenset(("split.no", "split.tensors.count")),
    restricted={
        "general.type": Restriction(
            ("model",), "another kind of file (an adapter is to be merged into its model)"
        ),
        "general.quantization_version": Restriction((2,), "an older quantisation"),
    },
)
# Names, licences and origins, and how the file was made.
_ORIGINS = ("general.", "quantize.", "tokenizer.")
_SAMPLING = "general.sampling."


def check_entries(metadata: Mapping[str, object], architecture: str, path: Path) -> None:
    """Look at every entry but those of the tokenizer.

    Raises:
        UnsupportedModelError: an entry asks for something that is not implemented.
    """
    prefix = f"{architecture}."
    own = {key: value for key, value in metadata.items() if key.startswith(prefix)}
    ARCHITECTURE.check(own, path, prefix=prefix)
    if adapter := next((key for key in metadata if key.startswith("adapter.")), None):
        raise UnsupportedModelError(f"{path}: {adapter}: an adapter; merge it into its model")
    named = (*_FILE.read, *_FILE.restricted)
    others = {
        key: value
        for key, value in metadata.items()
        if key not in own and (key in named or not key.startswith(_ORIGINS))
    }
    _FILE.check(others, path)


def suggested_sampling(metadata: Mapping[str, object]) -> dict[str, object]:
    """Sampling that the file's makers suggest."""
    return {
        key.removeprefix(_SAMPLING): value
        for key, value in metadata.items()
        if key.startswith(_SAMPLING)
    }
