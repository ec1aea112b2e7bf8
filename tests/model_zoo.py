"""Model classes of every family, with random small configs.

An entry is the name of a ``transformers`` class and a function from random sizes to the arguments of its config. The
names differ from family to family; where a config asks for much, that is what its model needs to be small.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch import nn

Sizes = dict[str, int]
Make = Callable[[Sizes], dict[str, Any]]


def sizes(name: str) -> Sizes:
    """Random small sizes that are the same in every run."""
    rng = random.Random(name)
    heads = rng.choice([2, 4])
    return {"heads": heads, "hidden": heads * rng.choice([4, 8]), "layers": rng.randint(1, 3),
            "vocab": rng.randint(17, 99), "inner": 4 * rng.randint(2, 9)}  # fmt: skip


def text(s: Sizes, **more: Any) -> dict[str, Any]:
    return {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
            "intermediate_size": s["inner"], "vocab_size": s["vocab"], "max_position_embeddings": 24,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}  # fmt: skip


def grouped(s: Sizes, **more: Any) -> dict[str, Any]:
    return text(s, num_key_value_heads=2, head_dim=s["hidden"] // s["heads"], **more)


def vision(s: Sizes, **more: Any) -> dict[str, Any]:
    return {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
            "intermediate_size": s["inner"], "image_size": 16, "patch_size": 8, **more}  # fmt: skip


def bart(s: Sizes, **more: Any) -> dict[str, Any]:
    return {"d_model": s["hidden"], "encoder_layers": s["layers"], "decoder_layers": s["layers"],
            "encoder_attention_heads": s["heads"], "decoder_attention_heads": s["heads"], "encoder_ffn_dim": s["inner"],
            "decoder_ffn_dim": s["inner"], "vocab_size": s["vocab"], "max_position_embeddings": 24,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, **more}  # fmt: skip


def t5(s: Sizes, **more: Any) -> dict[str, Any]:
    return {"d_model": s["hidden"], "d_ff": s["inner"], "d_kv": 4, "num_layers": s["layers"],
            "num_heads": s["heads"], "vocab_size": s["vocab"], **more}  # fmt: skip


def wav(s: Sizes, **more: Any) -> dict[str, Any]:
    return {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
            "intermediate_size": s["inner"], "vocab_size": s["vocab"], "conv_dim": (8, 8), "conv_stride": (5, 2),
            "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2, "num_codevectors_per_group": 4, "codevector_dim": 8,
            "proj_codevector_dim": 8, **more}  # fmt: skip


DECODERS: dict[str, Make] = {
    "GPT2LMHeadModel": lambda s: {"n_embd": s["hidden"], "n_layer": s["layers"], "n_head": s["heads"],
                                  "vocab_size": s["vocab"], "n_positions": 24},
    "OpenAIGPTLMHeadModel": lambda s: {"n_embd": s["hidden"], "n_layer": s["layers"], "n_head": s["heads"],
                                       "vocab_size": s["vocab"], "n_positions": 24},
    "GPTNeoForCausalLM": lambda s: {"hidden_size": s["hidden"], "num_layers": 2, "num_heads": s["heads"],
                                    "attention_types": [[["global", "local"], 1]], "vocab_size": s["vocab"],
                                    "max_position_embeddings": 24},
    "GPTNeoXForCausalLM": text,
    "GPTJForCausalLM": lambda s: {"n_embd": s["hidden"], "n_layer": s["layers"], "n_head": s["heads"],
                                  "vocab_size": s["vocab"], "n_positions": 24, "rotary_dim": 4},
    "OPTForCausalLM": lambda s: text(s, ffn_dim=s["inner"], word_embed_proj_dim=s["hidden"]),
    "BloomForCausalLM": lambda s: {"hidden_size": s["hidden"], "n_layer": s["layers"], "n_head": s["heads"],
                                   "vocab_size": s["vocab"]},
    "FalconForCausalLM": text,
    "MptForCausalLM": lambda s: {"d_model": s["hidden"], "n_layers": s["layers"], "n_heads": s["heads"],
                                 "vocab_size": s["vocab"], "max_seq_len": 24},
    "CodeGenForCausalLM": lambda s: {"n_embd": 4 * s["hidden"], "n_layer": s["layers"], "n_head": 4,
                                     "vocab_size": s["vocab"], "n_positions": 24, "rotary_dim": 4},
    "LlamaForCausalLM": grouped,
    "MistralForCausalLM": grouped,
    "Qwen2ForCausalLM": grouped,
    "Qwen3ForCausalLM": grouped,
    "GemmaForCausalLM": grouped,
    "Gemma2ForCausalLM": grouped,
    "Gemma3ForCausalLM": grouped,
    "PhiForCausalLM": text,
    "Phi3ForCausalLM": grouped,
    "StableLmForCausalLM": grouped,
    "Starcoder2ForCausalLM": grouped,
    "CohereForCausalLM": grouped,
    "OlmoForCausalLM": grouped,
    "Olmo2ForCausalLM": grouped,
    "GraniteForCausalLM": grouped,
    "XGLMForCausalLM": lambda s: {"d_model": s["hidden"], "num_layers": s["layers"], "attention_heads": s["heads"],
                                  "ffn_dim": s["inner"], "vocab_size": s["vocab"], "max_position_embeddings": 24},
    "CTRLLMHeadModel": lambda s: {"n_embd": s["hidden"], "n_layer": s["layers"], "n_head": s["heads"],
                                  "dff": s["inner"], "vocab_size": s["vocab"], "n_positions": 24},
}  # fmt: skip

MIXTURES: dict[str, Make] = {
    "MixtralForCausalLM": lambda s: grouped(s, num_local_experts=3),
    "Qwen2MoeForCausalLM": lambda s: grouped(s, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
                                             shared_expert_intermediate_size=8),
    "Qwen3MoeForCausalLM": lambda s: grouped(s, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8),
    "OlmoeForCausalLM": lambda s: grouped(s, num_experts=3, num_experts_per_tok=2),
    "DeepseekV3ForCausalLM": lambda s: text(s, num_key_value_heads=s["heads"], n_routed_experts=4, n_group=2,
                                            topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8,
                                            q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4,
                                            v_head_dim=4, first_k_dense_replace=1),
    "SwitchTransformersForConditionalGeneration": lambda s: t5(s, num_experts=3, num_decoder_layers=2,
                                                               num_sparse_encoder_layers=1,
                                                               num_sparse_decoder_layers=1),
}  # fmt: skip

STATE_SPACES: dict[str, Make] = {
    "MambaForCausalLM": lambda s: {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"],
                                   "vocab_size": s["vocab"], "state_size": 4},
    "Mamba2ForCausalLM": lambda s: {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"],
                                    "vocab_size": s["vocab"], "state_size": 4, "num_heads": 4,
                                    "head_dim": s["hidden"] // 2, "n_groups": 1},
    "RwkvForCausalLM": lambda s: {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"],
                                  "attention_hidden_size": s["hidden"], "intermediate_size": s["inner"],
                                  "vocab_size": s["vocab"], "context_length": 24},
    "JambaForCausalLM": lambda s: grouped(s, num_experts=2, attn_layer_period=2, attn_layer_offset=1,
                                          use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4),
    "RecurrentGemmaForCausalLM": lambda s: grouped(s, lru_width=s["hidden"], attention_window_size=8),
}  # fmt: skip

ENCODERS: dict[str, Make] = {
    "BertForMaskedLM": text,
    "RobertaForMaskedLM": text,
    "XLMRobertaForMaskedLM": text,
    "AlbertForMaskedLM": lambda s: text(s, embedding_size=8),
    "DistilBertForMaskedLM": lambda s: {"dim": s["hidden"], "n_layers": s["layers"], "n_heads": s["heads"],
                                        "hidden_dim": s["inner"], "vocab_size": s["vocab"],
                                        "max_position_embeddings": 24},
    "ElectraForPreTraining": lambda s: text(s, embedding_size=8),
    "DebertaV2ForMaskedLM": lambda s: text(s, relative_attention=True, position_buckets=4,
                                           pos_att_type=["p2c", "c2p"]),
    "MPNetForMaskedLM": text,
    "CamembertForMaskedLM": text,
    "ModernBertForMaskedLM": lambda s: text(s, cls_token_id=1, sep_token_id=2),
    "MegatronBertForMaskedLM": text,
    "MobileBertForMaskedLM": lambda s: text(s, embedding_size=8, intra_bottleneck_size=s["hidden"],
                                            true_hidden_size=s["hidden"]),
    "SqueezeBertForMaskedLM": lambda s: text(s, embedding_size=s["hidden"]),
    "FNetForMaskedLM": lambda s: text(s, type_vocab_size=2),
    "FunnelForMaskedLM": lambda s: {"d_model": s["hidden"], "n_head": s["heads"], "d_head": 4, "d_inner": s["inner"],
                                    "block_sizes": [1, 1], "vocab_size": s["vocab"]},
    "XLNetLMHeadModel": lambda s: {"d_model": s["hidden"], "n_layer": s["layers"], "n_head": s["heads"],
                                   "d_inner": s["inner"], "vocab_size": s["vocab"]},
    "LongformerForMaskedLM": lambda s: text(s, attention_window=4),
    "BigBirdForMaskedLM": lambda s: text(s, block_size=4),
    "NystromformerForMaskedLM": lambda s: text(s, num_landmarks=4, segment_means_seq_len=24),
    "CanineModel": lambda s: text(s, num_hash_functions=2, num_hash_buckets=8),
}  # fmt: skip

ENCODER_DECODERS: dict[str, Make] = {
    "T5ForConditionalGeneration": t5,
    "MT5ForConditionalGeneration": t5,
    "UMT5ForConditionalGeneration": t5,
    "LongT5ForConditionalGeneration": t5,
    "BartForConditionalGeneration": bart,
    "MBartForConditionalGeneration": bart,
    "PegasusForConditionalGeneration": bart,
    "MarianMTModel": lambda s: bart(s, decoder_vocab_size=s["vocab"]),
    "BlenderbotForConditionalGeneration": bart,
    "M2M100ForConditionalGeneration": bart,
    "LEDForConditionalGeneration": lambda s: bart(s, max_encoder_position_embeddings=24,
                                                  max_decoder_position_embeddings=24, attention_window=4),
    "ProphetNetForConditionalGeneration": lambda s: {
        "hidden_size": s["hidden"], "num_encoder_layers": s["layers"], "num_decoder_layers": s["layers"],
        "num_encoder_attention_heads": s["heads"], "num_decoder_attention_heads": s["heads"],
        "encoder_ffn_dim": s["inner"], "decoder_ffn_dim": s["inner"], "vocab_size": s["vocab"],
        "max_position_embeddings": 24},
}  # fmt: skip

VISION: dict[str, Make] = {
    "ViTForImageClassification": vision,
    "DeiTForImageClassification": vision,
    "BeitForImageClassification": lambda s: vision(s, use_relative_position_bias=True, layer_scale_init_value=0.1,
                                                   out_indices=[0]),
    "Data2VecVisionModel": lambda s: vision(s, out_indices=[0]),
    "ViTMAEForPreTraining": lambda s: vision(s, decoder_hidden_size=8, decoder_num_hidden_layers=1,
                                             decoder_num_attention_heads=2, decoder_intermediate_size=8),
    "Dinov2Model": vision,
    "SwinModel": lambda s: {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2],
                            "window_size": 2},
    "Swinv2Model": lambda s: {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2],
                              "window_size": 2},
    "ConvNextModel": lambda s: {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 2, 1]},
    "ConvNextV2Model": lambda s: {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 2, 1]},
    "ResNetForImageClassification": lambda s: {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 2]},
    "RegNetModel": lambda s: {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
                              "groups_width": 4},
    "MobileNetV2Model": lambda s: {"depth_multiplier": 0.25, "image_size": 32},
    "MobileViTModel": lambda s: {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
                                 "num_attention_heads": 2, "image_size": 32},
    "SegformerModel": lambda s: {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
                                 "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8},
    "PvtV2Model": lambda s: {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "PoolFormerModel": lambda s: {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "EfficientNetModel": lambda s: {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 16,
                                    "image_size": 32},
    "LevitModel": lambda s: {"hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
                             "key_dim": [4, 4, 4], "image_size": 64},
    "DPTModel": lambda s: vision(s, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False,
                                 neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4),
    "YolosModel": lambda s: vision(s, image_size=[16, 16], num_detection_tokens=4),
    "SamModel": lambda s: {"vision_config": {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"],
                                             "num_attention_heads": s["heads"], "mlp_dim": s["inner"],
                                             "image_size": 16, "patch_size": 8, "output_channels": 8,
                                             "global_attn_indexes": [0], "window_size": 2},
                           "prompt_encoder_config": {"hidden_size": 8, "image_size": 16, "patch_size": 8},
                           "mask_decoder_config": {"hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 2,
                                                   "iou_head_hidden_dim": 8}},
}  # fmt: skip

AUDIO: dict[str, Make] = {
    "WhisperForConditionalGeneration": lambda s: bart(s, max_source_positions=16, max_target_positions=16),
    "Wav2Vec2ForPreTraining": wav,
    "HubertModel": wav,
    "WavLMModel": wav,
    "SEWModel": lambda s: wav(s, squeeze_factor=2),
    "UniSpeechForCTC": wav,
    "Data2VecAudioModel": lambda s: wav(s, num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
    "Wav2Vec2ConformerModel": wav,
    "ASTModel": lambda s: vision(s, max_length=32, num_mel_bins=16),
    "Speech2TextForConditionalGeneration": lambda s: bart(s, conv_channels=8, input_feat_per_channel=8,
                                                          max_source_positions=16, max_target_positions=16),
    "SpeechT5ForTextToSpeech": lambda s: {
        "hidden_size": s["hidden"], "encoder_layers": s["layers"], "decoder_layers": s["layers"],
        "encoder_attention_heads": s["heads"], "decoder_attention_heads": s["heads"], "encoder_ffn_dim": s["inner"],
        "decoder_ffn_dim": s["inner"], "vocab_size": s["vocab"], "conv_dim": (8, 8), "conv_stride": (5, 2),
        "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
        "speech_decoder_prenet_units": 8, "speech_decoder_postnet_units": 8, "num_mel_bins": 8,
        "speaker_embedding_dim": 4},
    "EncodecModel": lambda s: {"num_filters": 4, "hidden_size": 8, "codebook_size": 16, "codebook_dim": 8,
                               "upsampling_ratios": [4, 2]},
    "VitsModel": lambda s: {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8,
                            "flow_size": 8, "spectrogram_bins": 9, "vocab_size": s["vocab"],
                            "upsample_initial_channel": 16, "upsample_rates": [2, 2],
                            "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3],
                            "resblock_dilation_sizes": [[1, 3]], "prior_encoder_num_flows": 2,
                            "posterior_encoder_num_wavenet_layers": 2, "prior_encoder_num_wavenet_layers": 2},
}  # fmt: skip

MULTIMODAL: dict[str, Make] = {
    "CLIPModel": lambda s: {"text_config": text(s, projection_dim=8), "vision_config": vision(s, projection_dim=8),
                            "projection_dim": 8},
    "SiglipModel": lambda s: {"text_config": text(s), "vision_config": vision(s)},
    "AlignModel": lambda s: {"text_config": text(s), "projection_dim": 8,
                             "vision_config": {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 16,
                                               "image_size": 32}},
    "BlipForConditionalGeneration": lambda s: {"text_config": text(s, encoder_hidden_size=s["hidden"]),
                                               "vision_config": vision(s)},
    "Blip2ForConditionalGeneration": lambda s: {
        "vision_config": vision(s), "qformer_config": text(s, encoder_hidden_size=s["hidden"]),
        "text_config": {"model_type": "opt", **text(s, ffn_dim=8, word_embed_proj_dim=s["hidden"])},
        "num_query_tokens": 4},
    "FlavaModel": lambda s: {"text_config": text(s), "image_config": vision(s),
                             "multimodal_config": {"hidden_size": s["hidden"], "num_hidden_layers": 1,
                                                   "num_attention_heads": 2, "intermediate_size": 8},
                             "hidden_size": s["hidden"], "projection_dim": 8},
    "LlavaForConditionalGeneration": lambda s: {
        "text_config": {"model_type": "llama", **grouped(s)},
        "vision_config": {"model_type": "clip_vision_model", **vision(s, projection_dim=8)}},
    "PaliGemmaForConditionalGeneration": lambda s: {
        "text_config": {"model_type": "gemma", **grouped(s)},
        "vision_config": {"model_type": "siglip_vision_model", **vision(s)}, "projection_dim": s["hidden"]},
    "GitForCausalLM": lambda s: text(s, vision_config=vision(s)),
    "ViltModel": lambda s: text(s, image_size=16, patch_size=8),
    "OwlViTModel": lambda s: {"text_config": text(s), "vision_config": vision(s), "projection_dim": 8},
    "CLIPSegModel": lambda s: {"text_config": text(s), "vision_config": vision(s), "projection_dim": 8},
    "Idefics2ForConditionalGeneration": lambda s: {
        "vision_config": vision(s), "text_config": {"model_type": "mistral", **grouped(s)},
        "perceiver_config": {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                             "resampler_head_dim": 4, "num_key_value_heads": 2}},
    "Qwen2VLForConditionalGeneration": lambda s: {
        "text_config": grouped(s, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 0],
                                                   "rope_theta": 10000.0}),
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": s["hidden"], "patch_size": 8}},
    "ClapModel": lambda s: {"text_config": text(s), "projection_dim": 8,
                            "audio_config": {"depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 16,
                                             "patch_embeds_hidden_size": 8, "spec_size": 32, "num_mel_bins": 8,
                                             "patch_size": 4, "window_size": 4}},
}  # fmt: skip

OTHERS: dict[str, Make] = {
    "DecisionTransformerModel": lambda s: {"hidden_size": s["hidden"], "n_layer": s["layers"], "n_head": s["heads"],
                                           "state_dim": 3, "act_dim": 2, "max_ep_len": 8},
    "TimeSeriesTransformerModel": lambda s: {"prediction_length": 4, "context_length": 8, "d_model": s["hidden"],
                                             "encoder_layers": 1, "decoder_layers": 1, "lags_sequence": [1, 2]},
    "InformerModel": lambda s: {"prediction_length": 4, "context_length": 8, "d_model": s["hidden"],
                                "encoder_layers": 2, "decoder_layers": 1, "lags_sequence": [1, 2]},
    "PatchTSTModel": lambda s: {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4,
                                "d_model": s["hidden"], "num_attention_heads": 2, "num_hidden_layers": 1,
                                "ffn_dim": 8},
    "EsmModel": lambda s: text(s, mask_token_id=3, position_embedding_type="rotary"),
    "LayoutLMModel": lambda s: text(s, max_2d_position_embeddings=32),
    "TapasModel": lambda s: text(s),
    "PerceiverModel": lambda s: {"num_latents": 4, "d_latents": 8, "d_model": 8, "num_blocks": 1,
                                 "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
                                 "num_cross_attention_heads": 2},
    "ReformerModel": lambda s: {"hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8,
                                "feed_forward_size": 16, "vocab_size": s["vocab"], "axial_pos_shape": [4, 6],
                                "axial_pos_embds_dim": [8, 8], "max_position_embeddings": 24,
                                "attn_layers": ["local", "lsh"], "is_decoder": False},
}  # fmt: skip

FAMILIES: dict[str, dict[str, Make]] = {
    "decoder": DECODERS, "mixture of experts": MIXTURES, "state space": STATE_SPACES, "encoder": ENCODERS,
    "encoder-decoder": ENCODER_DECODERS, "vision": VISION, "audio": AUDIO, "multimodal": MULTIMODAL, "other": OTHERS,
}  # fmt: skip


def build(name: str, make: Make) -> nn.Module:
    """Build the model class `name` of transformers with random weights."""
    import transformers

    model_class = getattr(transformers, name)
    config = model_class.config_class(**make(sizes(name)))
    model: nn.Module = model_class(config)
    return model
