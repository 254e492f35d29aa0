"""Tiny random models of many architectures, from the configurations of transformers."""

from __future__ import annotations

import tempfile
from functools import cache

import torch
import transformers as hf

# fmt: off

V = 100
TOK = dict(pad_token_id=97, bos_token_id=98, eos_token_id=99)
L, D, H, KV, DH, F = 3, 32, 4, 2, 8, 64
BASE = dict(vocab_size=V, initializer_range=0.2, **TOK)
STD = dict(BASE, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
           max_position_embeddings=128)
GQA = dict(STD, num_key_value_heads=KV)
GQAH = dict(GQA, head_dim=DH)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

def c(kind, cfg, **kw):
    return lambda: (getattr(hf, kind), getattr(hf, cfg)(architectures=[kind], **kw))

def vis(**kw):
    return dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, **kw)

ARCHS = {
 "gpt2": c("GPT2LMHeadModel", "GPT2Config", n_embd=D, n_layer=L, n_head=H, n_positions=128, **BASE),
 "gpt_neo": c("GPTNeoForCausalLM", "GPTNeoConfig", hidden_size=D, num_layers=L, num_heads=H, attention_types=[[["global","local","global"],1]], window_size=4, intermediate_size=F, max_position_embeddings=128, **BASE),
 "pythia": c("GPTNeoXForCausalLM", "GPTNeoXConfig", use_parallel_residual=True, rotary_pct=0.5, **STD),
 "gptj": c("GPTJForCausalLM", "GPTJConfig", n_embd=D, n_layer=L, n_head=H, n_positions=128, rotary_dim=4, n_inner=F, tie_word_embeddings=False, **BASE),
 "llama": c("LlamaForCausalLM", "LlamaConfig", **GQAH),
 "mistral": c("MistralForCausalLM", "MistralConfig", sliding_window=6, **GQAH),
 "mixtral": c("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, **GQAH),
 "qwen2": c("Qwen2ForCausalLM", "Qwen2Config", **GQA),
 "qwen2_moe": c("Qwen2MoeForCausalLM", "Qwen2MoeConfig", shared_expert_intermediate_size=32, **MOE, **GQA),
 "qwen3": c("Qwen3ForCausalLM", "Qwen3Config", **GQAH),
 "qwen3_bighead": c("Qwen3ForCausalLM", "Qwen3Config", **dict(GQA, head_dim=16)),
 "qwen3_moe": c("Qwen3MoeForCausalLM", "Qwen3MoeConfig", decoder_sparse_step=1, mlp_only_layers=[], **MOE, **GQAH),
 "qwen3_moe_mixed": c("Qwen3MoeForCausalLM", "Qwen3MoeConfig", decoder_sparse_step=1, mlp_only_layers=[0], **MOE, **GQAH),
 "qwen3_next": c("Qwen3NextForCausalLM", "Qwen3NextConfig", layer_types=["linear_attention","full_attention","linear_attention","full_attention"], shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, **MOE, **dict(GQAH, num_hidden_layers=4)),
 "qwen3_5": c("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", layer_types=["linear_attention","full_attention","linear_attention","full_attention"], linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, **dict(GQAH, num_hidden_layers=4)),
 "gemma1": c("GemmaForCausalLM", "GemmaConfig", **GQAH),
 "gemma2": c("Gemma2ForCausalLM", "Gemma2Config", sliding_window=8, query_pre_attn_scalar=8, **GQAH),
 "gemma3": c("Gemma3ForCausalLM", "Gemma3TextConfig", sliding_window=8, query_pre_attn_scalar=8, layer_types=["sliding_attention","full_attention","sliding_attention"], **GQAH),
 "gemma3n": c("Gemma3nForCausalLM", "Gemma3nTextConfig", vocab_size_per_layer_input=V, hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=0, altup_num_inputs=2, activation_sparsity_pattern=[0.0]*4, layer_types=["sliding_attention","full_attention","sliding_attention","full_attention"], sliding_window=8, **dict(GQAH, num_hidden_layers=4)),
 "gemma4": c("Gemma4ForCausalLM", "Gemma4TextConfig", vocab_size_per_layer_input=V, hidden_size_per_layer_input=8, global_head_dim=8, num_global_key_value_heads=2, layer_types=["sliding_attention","full_attention","full_attention"], sliding_window=8, num_kv_shared_layers=0, **GQAH),
 "gemma4_kvshared": c("Gemma4ForCausalLM", "Gemma4TextConfig", vocab_size_per_layer_input=V, hidden_size_per_layer_input=8, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True, layer_types=["sliding_attention","full_attention","sliding_attention","full_attention"], sliding_window=8, num_kv_shared_layers=2, **dict(GQAH, num_hidden_layers=4)),
 "gemma4_moe": c("Gemma4ForCausalLM", "Gemma4TextConfig", vocab_size_per_layer_input=V, hidden_size_per_layer_input=0, global_head_dim=8, num_global_key_value_heads=2, layer_types=["sliding_attention","full_attention","full_attention"], sliding_window=8, num_kv_shared_layers=0, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24, **GQAH),
 "phi": c("PhiForCausalLM", "PhiConfig", partial_rotary_factor=0.5, **GQA),
 "phi3": c("Phi3ForCausalLM", "Phi3Config", **GQA),
 "olmo": c("OlmoForCausalLM", "OlmoConfig", **GQA),
 "olmo2": c("Olmo2ForCausalLM", "Olmo2Config", **GQA),
 "olmo3": c("Olmo3ForCausalLM", "Olmo3Config", sliding_window=8, layer_types=["sliding_attention","full_attention","sliding_attention"], **GQA),
 "olmoe": c("OlmoeForCausalLM", "OlmoeConfig", num_experts=4, num_experts_per_tok=2, **GQA),
 "falcon_new": c("FalconForCausalLM", "FalconConfig", vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, num_kv_heads=2, new_decoder_architecture=True, parallel_attn=True, bias=False, ffn_hidden_size=F, initializer_range=0.2, **TOK),
 "falcon_alibi_seq": c("FalconForCausalLM", "FalconConfig", vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, multi_query=False, parallel_attn=False, new_decoder_architecture=False, alibi=True, bias=True, ffn_hidden_size=F, initializer_range=0.2, **TOK),
 "bloom": c("BloomForCausalLM", "BloomConfig", hidden_size=D, n_layer=L, n_head=H, **BASE),
 "opt": c("OPTForCausalLM", "OPTConfig", hidden_size=D, ffn_dim=F, num_hidden_layers=L, num_attention_heads=H, max_position_embeddings=128, word_embed_proj_dim=D, init_std=0.2, vocab_size=V, **TOK),
 "opt_wide": c("OPTForCausalLM", "OPTConfig", hidden_size=D, ffn_dim=4*D, num_hidden_layers=L, num_attention_heads=H, max_position_embeddings=128, word_embed_proj_dim=D, init_std=0.2, vocab_size=V, **TOK),
 "opt_postnorm": c("OPTForCausalLM", "OPTConfig", hidden_size=D, ffn_dim=F, num_hidden_layers=L, num_attention_heads=H, max_position_embeddings=128, word_embed_proj_dim=16, do_layer_norm_before=False, init_std=0.2, vocab_size=V, **TOK),
 "stablelm": c("StableLmForCausalLM", "StableLmConfig", partial_rotary_factor=0.5, **GQA),
 "smollm3": c("SmolLM3ForCausalLM", "SmolLM3Config", **GQA),
 "gpt_oss": c("GptOssForCausalLM", "GptOssConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=8, layer_types=["sliding_attention","full_attention","sliding_attention"], **GQAH),
 "gpt_oss_square": c("GptOssForCausalLM", "GptOssConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=8, layer_types=["sliding_attention","full_attention","sliding_attention"], **dict(GQAH, intermediate_size=D)),
 "deepseek_v2": c("DeepseekV2ForCausalLM", "DeepseekV2Config", q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1, **dict(STD, num_key_value_heads=H)),
 "deepseek_v3": c("DeepseekV3ForCausalLM", "DeepseekV3Config", q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=24, first_k_dense_replace=1, **dict(STD, num_key_value_heads=H)),
 "cohere": c("CohereForCausalLM", "CohereConfig", **GQA),
 "cohere2": c("Cohere2ForCausalLM", "Cohere2Config", sliding_window=8, layer_types=["sliding_attention","full_attention","sliding_attention"], **GQA),
 "granite": c("GraniteForCausalLM", "GraniteConfig", residual_multiplier=0.3, embedding_multiplier=2.0, logits_scaling=2.0, attention_multiplier=0.3, **GQA),
 "glm": c("GlmForCausalLM", "GlmConfig", **GQAH),
 "glm4": c("Glm4ForCausalLM", "Glm4Config", **GQAH),
 "nemotron": c("NemotronForCausalLM", "NemotronConfig", **GQAH),
 "gpt_bigcode": c("GPTBigCodeForCausalLM", "GPTBigCodeConfig", n_embd=D, n_layer=L, n_head=H, n_positions=128, n_inner=F, multi_query=True, **BASE),
 "mpt": c("MptForCausalLM", "MptConfig", d_model=D, n_layers=L, n_heads=H, expansion_ratio=2, max_seq_len=128, **BASE),
 "ministral3": c("Ministral3ForCausalLM", "Ministral3Config", **GQAH),
 "llama4_text": c("Llama4ForCausalLM", "Llama4TextConfig", num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=64, interleave_moe_layer_step=2, **GQAH),
 "jamba": c("JambaForCausalLM", "JambaConfig", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, use_mamba_kernels=False, mamba_d_state=4, mamba_d_conv=2, **dict(GQA, num_hidden_layers=4)),
 "falcon_h1": c("FalconH1ForCausalLM", "FalconH1Config", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16, **GQAH),
 "lfm2": c("Lfm2ForCausalLM", "Lfm2Config", layer_types=["conv","full_attention","conv"], block_multiple_of=8, **GQA),
 "openai_gpt": c("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", n_embd=D, n_layer=L, n_head=H, n_positions=128, **BASE),
 "mamba": c("MambaForCausalLM", "MambaConfig", hidden_size=D, state_size=4, num_hidden_layers=L, use_mambapy=False, initializer_range=0.2, vocab_size=V, **TOK),
 "mamba2": c("Mamba2ForCausalLM", "Mamba2Config", hidden_size=D, num_heads=8, head_dim=8, state_size=8, n_groups=1, num_hidden_layers=L, initializer_range=0.2, vocab_size=V, **TOK),
 "t5": c("T5ForConditionalGeneration", "T5Config", vocab_size=V, d_model=D, d_kv=8, d_ff=F, num_layers=2, num_heads=H, decoder_start_token_id=97, pad_token_id=97, eos_token_id=99),
 "bert_masked": c("BertForMaskedLM", "BertConfig", **{k:v for k,v in STD.items() if k not in ("bos_token_id", "eos_token_id")}),
 "gemma3_vlm": lambda: (hf.Gemma3ForConditionalGeneration, hf.Gemma3Config(architectures=["Gemma3ForConditionalGeneration"], text_config=hf.Gemma3TextConfig(sliding_window=8, query_pre_attn_scalar=8, layer_types=["sliding_attention","full_attention","sliding_attention"], **GQAH), vision_config=hf.SiglipVisionConfig(**vis()), mm_tokens_per_image=4, image_token_index=96, boi_token_index=95, eoi_token_index=94, image_token_id=96)),
 "gemma4_vlm": lambda: (hf.Gemma4ForConditionalGeneration, hf.Gemma4Config(architectures=["Gemma4ForConditionalGeneration"], text_config=hf.Gemma4TextConfig(vocab_size_per_layer_input=V, hidden_size_per_layer_input=8, global_head_dim=8, num_global_key_value_heads=2, layer_types=["sliding_attention","full_attention","full_attention"], sliding_window=8, num_kv_shared_layers=0, **GQAH), vision_config=None, audio_config=None, image_token_id=96, boi_token_id=95, eoi_token_id=94, audio_token_id=93)),
 "gemma3n_vlm": lambda: (hf.Gemma3nForConditionalGeneration, hf.Gemma3nConfig(architectures=["Gemma3nForConditionalGeneration"], text_config=ARCHS["gemma3n"]()[1])),
 "llava": lambda: (hf.LlavaForConditionalGeneration, hf.LlavaConfig(architectures=["LlavaForConditionalGeneration"], text_config=hf.LlamaConfig(**GQAH), vision_config=hf.CLIPVisionConfig(projection_dim=16, **vis()), image_token_index=96, image_token_id=96, vision_feature_layer=-1)),
 "qwen2_5_vl": lambda: (hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig(architectures=["Qwen2_5_VLForConditionalGeneration"], text_config=dict(GQA, rope_parameters={"rope_type":"default","mrope_section":[1,1,2],"rope_theta":10000.0}), vision_config=dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=8, out_hidden_size=D, fullatt_block_indexes=[0]), image_token_id=96, video_token_id=95, vision_start_token_id=94, vision_end_token_id=93)),
 "qwen3_vl": lambda: (hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"], text_config=dict(GQAH, rope_parameters={"rope_type":"default","mrope_section":[1,1,2],"rope_theta":10000.0,"mrope_interleaved":True}), vision_config=dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=8, out_hidden_size=D, deepstack_visual_indexes=[0], num_position_embeddings=16), image_token_id=96, video_token_id=95, vision_start_token_id=94, vision_end_token_id=93)),
}

# fmt: on


def build(name, seed=0, dtype=torch.float32):
    """The model, its norms and biases spread, so that a norm in front or behind makes a difference."""
    kind, config = ARCHS[name]()
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        generator = torch.Generator().manual_seed(seed + 1)
        for path, weight in model.named_parameters():
            if weight.ndim == 1 and not any(word in path for word in ("A_log", "dt_bias", "sinks")):
                weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
            elif weight.ndim >= 2 and weight.std() < 0.05 and "vision" not in path:
                weight.data.normal_(0, 0.15, generator=generator)
        for path, value in model.named_buffers():
            if path.endswith("layer_scalar"):
                value.fill_(0.7)
    return model.to(dtype).eval()


@cache
def _folder():
    """Kept as long as the process: TransformerLens loads the tokenizer again by its path."""
    return tempfile.TemporaryDirectory(prefix="words-")


@cache
def tokenizer():
    """One word a token, `w0 ... w96`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{index}": index for index in range(97)} | {"<pad>": 97, "<bos>": 98, "<eos>": 99}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    made.save_pretrained(_folder().name)
    return hf.PreTrainedTokenizerFast.from_pretrained(_folder().name)
