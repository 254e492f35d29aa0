"""Where the points of each kind of block are. Written by tools/derive_roles.py; change that, not this."""

from __future__ import annotations

from typing import Any

# fmt: off
#: Block classes of transformers, and their common layout; `roles.Layout` explains the entries.
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    (
        "AfmoeDecoderLayer",
        {"attn_out": ["post_attention_layernorm"], "mid": ["pre_mlp_layernorm"], "mlp_out": ["post_mlp_layernorm"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "ApertusDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["feedforward_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.down_proj"], "norm": ["attention_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "ArceeDecoderLayer BitNetDecoderLayer DeepseekV2DecoderLayer DeepseekV3DecoderLayer "
        "Ernie4_5DecoderLayer Ernie4_5_MoeDecoderLayer GemmaDecoderLayer Glm4MoeDecoderLayer "
        "Glm4MoeLiteDecoderLayer GlmDecoderLayer GlmMoeDsaDecoderLayer HeliumDecoderLayer "
        "HunYuanDenseV1DecoderLayer Jais2DecoderLayer LagunaDecoderLayer LlamaDecoderLayer "
        "Ministral3DecoderLayer MistralDecoderLayer NemotronDecoderLayer OlmoDecoderLayer Phi3DecoderLayer "
        "Qwen2DecoderLayer Qwen2MoeDecoderLayer Qwen2VLDecoderLayer Qwen2_5_VLDecoderLayer Qwen3DecoderLayer "
        "Qwen3MoeDecoderLayer Qwen3VLMoeTextDecoderLayer Qwen3VLTextDecoderLayer SeedOssDecoderLayer "
        "SmolLM3DecoderLayer YoutuDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "BambaDecoderLayer JambaAttentionDecoderLayer JambaMambaDecoderLayer",
        {"attn_out": ["self_attn", "mamba"], "mid": ["pre_ff_layernorm"], "mlp_out": ["feed_forward"], "mlp_post": ["feed_forward.down_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "BertLayer DeiTLayer HubertEncoderLayer ModernBertEncoderLayer RobertaLayer ViTLayer",
        {"refuse": "its tokens see those behind them, and pads"},
    ),
    (
        "Block",
        {"attn_out": ["attn"], "behind": True, "mlp_out": ["mlp"], "mlp_post": ["mlp.c_proj"], "z": ["attn.c_proj"]},
    ),
    (
        "BloomBlock",
        {"attn_out": ["self_attention.dense"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp.dense_4h_to_h"], "mlp_post": ["mlp.dense_4h_to_h"], "norm": ["input_layernorm"], "z": ["self_attention.dense"]},
    ),
    (
        "CodeGenBlock GPTJBlock",
        {"attn_out": ["attn"], "mlp_out": ["mlp"], "mlp_post": ["mlp.fc_out"], "norm": ["ln_1"], "parallel": True, "z": ["attn.out_proj"]},
    ),
    (
        "Cohere2DecoderLayer CohereDecoderLayer",
        {"attn_out": ["self_attn"], "mlp_out": ["mlp"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "parallel": True, "z": ["self_attn.o_proj"]},
    ),
    (
        "DeepseekV4DecoderLayer Gemma3nTextDecoderLayer",
        {"refuse": "its residual stream has several streams side by side"},
    ),
    (
        "Exaone4DecoderLayer Olmo2DecoderLayer Olmo3DecoderLayer",
        {"attn_out": ["post_attention_layernorm"], "mid": ["mlp"], "mlp_out": ["post_feedforward_layernorm"], "mlp_post": ["mlp.down_proj"], "z": ["self_attn.o_proj"]},
    ),
    (
        "FalconDecoderLayer",
        {"attn_out": ["self_attention"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.dense_4h_to_h"], "norm": ["ln_attn", "input_layernorm"], "parallel": ["parallel_attn", "new_decoder_architecture"], "z": ["self_attention.dense"]},
    ),
    (
        "FalconH1DecoderLayer",
        {"mlp_out": ["feed_forward"], "mlp_post": ["feed_forward.down_proj"], "norm": ["input_layernorm"], "sum": "attention and Mamba are one branch", "z": ["self_attn.o_proj"]},
    ),
    (
        "FalconMambaBlock Mamba2Block MambaBlock NemotronHBlock RecurrentGemmaDecoderLayer RwkvBlock "
        "Zamba2MambaDecoderLayer",
        {},
    ),
    (
        "FlexOlmoDecoderLayer",
        {"attn_out": ["post_attention_layernorm"], "mid": ["mlp"], "mlp_out": ["post_feedforward_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "GPT2Block GPTBigCodeBlock",
        {"attn_out": ["attn"], "mid": ["ln_2"], "mlp_out": ["mlp"], "mlp_post": ["mlp.c_proj"], "norm": ["ln_1"], "z": ["attn.c_proj"]},
    ),
    (
        "GPTNeoBlock",
        {"attn_out": ["attn.attention"], "mid": ["ln_2"], "mlp_out": ["mlp"], "mlp_post": ["mlp.c_proj"], "norm": ["ln_1"], "z": ["attn.attention.out_proj"]},
    ),
    (
        "GPTNeoXLayer",
        {"attn_out": ["attention"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.dense_4h_to_h"], "norm": ["input_layernorm"], "parallel": ["use_parallel_residual"], "z": ["attention.dense"]},
    ),
    (
        "Gemma2DecoderLayer Gemma3DecoderLayer",
        {"attn_out": ["post_attention_layernorm"], "mid": ["pre_feedforward_layernorm"], "mlp_out": ["post_feedforward_layernorm"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "Gemma4TextDecoderLayer",
        {"attn_out": ["post_attention_layernorm"], "mid": ["pre_feedforward_layernorm"], "mlp_out": ["post_feedforward_layernorm"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "sum": "a per-layer input is added, and the sum is scaled", "z": ["self_attn.o_proj"]},
    ),
    (
        "Gemma4UnifiedTextDecoderLayer",
        {"attn_out": ["post_attention_layernorm"], "mid": ["pre_feedforward_layernorm"], "mlp_out": ["post_feedforward_layernorm"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "sum": "the sum is scaled", "z": ["self_attn.o_proj"]},
    ),
    (
        "Glm4DecoderLayer",
        {"attn_out": ["post_self_attn_layernorm"], "mid": ["post_attention_layernorm"], "mlp_out": ["post_mlp_layernorm"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "GptOssDecoderLayer MiniMaxM2DecoderLayer MixtralDecoderLayer OlmoeDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "GraniteDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "scale": "residual_multiplier", "z": ["self_attn.o_proj"]},
    ),
    (
        "GraniteMoeDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["block_sparse_moe"], "norm": ["input_layernorm"], "scale": "residual_multiplier", "z": ["self_attn.o_proj"]},
    ),
    (
        "GraniteMoeHybridDecoderLayer",
        {"attn_out": ["self_attn", "mamba"], "mid": ["post_attention_layernorm"], "norm": ["input_layernorm"], "scale": "residual_multiplier", "z": ["self_attn.o_proj"]},
    ),
    (
        "JetMoeDecoderLayer",
        {"attn_out": ["self_attention"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "norm": ["input_layernorm"]},
    ),
    (
        "Lfm2DecoderLayer Lfm2MoeDecoderLayer",
        {"attn_out": ["self_attn", "conv"], "mid": ["ffn_norm"], "mlp_out": ["feed_forward"], "mlp_post": ["feed_forward.w2"], "norm": ["operator_norm"], "z": ["self_attn.out_proj"]},
    ),
    (
        "Llama4TextDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["feed_forward"], "mlp_post": ["feed_forward.down_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "ModernBertDecoderLayer",
        {"attn_out": ["attn"], "mid": ["mlp_norm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.Wo"], "norm": ["attn_norm"], "z": ["attn.Wo"]},
    ),
    (
        "MptBlock",
        {"attn_out": ["attn"], "mid": ["norm_2"], "mlp_out": ["ffn.down_proj"], "mlp_post": ["ffn.down_proj"], "norm": ["norm_1"], "z": ["attn.out_proj"]},
    ),
    (
        "NanoChatDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.fc2"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "OPTDecoderLayer",
        {"attn_out": ["self_attn"], "behind": ["!do_layer_norm_before"], "mid": ["final_layer_norm"], "mlp_out": ["fc2"], "mlp_post": ["fc2"], "norm": ["self_attn_layer_norm"], "z": ["self_attn.out_proj"]},
    ),
    (
        "OlmoHybridAttentionDecoderLayer",
        {"attn_out": ["post_attention_layernorm"], "mid": ["mlp"], "mlp_out": ["post_feedforward_layernorm"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "OlmoHybridLinearAttentionDecoderLayer Qwen3NextDecoderLayer Qwen3_5DecoderLayer",
        {"attn_out": ["self_attn", "linear_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "PhiDecoderLayer",
        {"attn_out": ["self_attn"], "mlp_out": ["mlp"], "mlp_post": ["mlp.fc2"], "norm": ["input_layernorm"], "parallel": True, "z": ["self_attn.dense"]},
    ),
    (
        "Qwen3_5MoeDecoderLayer",
        {"attn_out": ["self_attn", "linear_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "StableLmDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "parallel": ["use_parallel_residual"], "z": ["self_attn.o_proj"]},
    ),
    (
        "Starcoder2DecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["post_attention_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.c_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "VaultGemmaDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["pre_feedforward_layernorm"], "mlp_out": ["mlp"], "mlp_post": ["mlp.down_proj"], "norm": ["input_layernorm"], "z": ["self_attn.o_proj"]},
    ),
    (
        "XGLMDecoderLayer",
        {"attn_out": ["self_attn"], "mid": ["final_layer_norm"], "mlp_out": ["fc2"], "mlp_post": ["fc2"], "norm": ["self_attn_layer_norm"], "z": ["self_attn.out_proj"]},
    ),
    (
        "Zamba2HybridLayer",
        {"attn_out": ["mamba"]},
    ),
]
# fmt: on
