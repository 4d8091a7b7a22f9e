"""Tiny random models of many architectures of ``transformers``, with batches that they take.

Every row is built from a configuration with a fixed seed. Matrices have a standard deviation of 0.1, with which the
outputs of a few layers depend on every weight, so that losses are visible.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

WORDS, WIDTH, EXAMPLES, LENGTH = 200, 48, 24, 12
#: Tokens from here on have no meaning of their own: padding, beginning, end and images have smaller numbers.
PLAIN = 10
STD = 0.1


@dataclass(frozen=True)
class Row:
    """An architecture: how its model and a batch for it are made."""

    name: str
    group: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    wide: bool = False

    @property
    def generates(self) -> bool:
        """Whether the class writes text."""
        return (
            re.search("ForCausalLM|ForConditionalGeneration|LMHeadModel|EncoderDecoderModel|MTModel", self.name)
            is not None
        )

    def model(self) -> nn.Module:
        """The model, the same at every call."""
        torch.manual_seed(0)
        model = self.build().float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "A_log" not in name:
                    parameter.normal_(0, STD)
                elif name.endswith("bias"):
                    parameter.normal_(0, STD / 4)
        model.tie_weights()
        return model


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def tokens(length: int = LENGTH) -> dict[str, Tensor]:
    """Sequences of random tokens, without padding."""
    return {"input_ids": torch.randint(PLAIN, WORDS, (EXAMPLES, length), generator=generator())}


def padded() -> dict[str, Tensor]:
    """Sequences of several lengths, padded on the right."""
    batch = tokens()
    mask = (torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (EXAMPLES, 1), generator=generator())).long()
    return {"input_ids": batch["input_ids"] * mask + (1 - mask), "attention_mask": mask}


def both() -> dict[str, Tensor]:
    """Sequences for an encoder, padded, and shorter ones for its decoder."""
    return {**padded(), "decoder_input_ids": tokens(7)["input_ids"]}


def equally_long() -> dict[str, Tensor]:
    """Sequences for a decoder as long as those of its encoder, whose mask would fit them."""
    return {**padded(), "decoder_input_ids": tokens()["input_ids"].flip(0)}


def images(size: int = 32, channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(EXAMPLES, channels, size, size, generator=generator())}


def pairs() -> dict[str, Tensor]:
    """Texts and images."""
    return {**padded(), **images()}


def frames(key: str, *shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {key: torch.randn(EXAMPLES, *shape, generator=generator())}


def heard() -> dict[str, Tensor]:
    """Spectrograms and the tokens that are said in them."""
    return {**frames("input_features", 16, 100)(), "decoder_input_ids": tokens(7)["input_ids"]}


def told(image: int, places: int) -> Callable[[], dict[str, Tensor]]:
    """Texts that begin with the places of an image."""

    def batch() -> dict[str, Tensor]:
        words = tokens()["input_ids"]
        where = torch.full((EXAMPLES, places), image)
        both = torch.cat([words[:, :1], where, words], 1)
        return {"input_ids": both, "attention_mask": torch.ones_like(both), **images()}

    return batch


#: What most configurations call their sizes.
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": 1}
MARKS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
GROUPED = {**TEXT, **MARKS, "num_key_value_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8, "num_channels": 3}
PAIRED = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    **MARKS, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": WORDS, "d_model": WIDTH, "d_ff": 96, "d_kv": 12, "num_layers": 2, "num_heads": 4, "pad_token_id": 1,
    "eos_token_id": 3, "decoder_start_token_id": 1,
}  # fmt: skip
SPEECH = {
    **SIZES, "vocab_size": 32, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **TEXT, **MARKS, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_group": 2, "topk_group": 1,
}  # fmt: skip


def row(
    group: str,
    model: str,
    config: str,
    options: dict[str, Any],
    batch: Callable[[], dict[str, Tensor]] = tokens,
    *,
    wide: bool = False,
) -> Row:
    """A row whose model is of the class ``model`` and the configuration ``config`` with ``options``."""

    def build() -> nn.Module:
        return getattr(T, model)(getattr(T, config)(**options))

    return Row(model, group, build, batch, wide)


ENCODERS = [
    row("encoder", "BertForMaskedLM", "BertConfig", TEXT, padded),
    row("encoder", "BertModel", "BertConfig", TEXT, padded, wide=True),
    row("encoder", "BertForPreTraining", "BertConfig", TEXT, padded, wide=True),
    row("encoder", "BertForMultipleChoice", "BertConfig", TEXT, lambda: choices(), wide=True),
    row("encoder", "RobertaForSequenceClassification", "RobertaConfig", {**TEXT, "num_labels": 5}, padded),
    row("encoder", "RobertaForQuestionAnswering", "RobertaConfig", TEXT, padded, wide=True),
    row("encoder", "XLMRobertaForTokenClassification", "XLMRobertaConfig", {**TEXT, "num_labels": 5}, padded, wide=True),
    row("encoder", "DistilBertModel", "DistilBertConfig",
        {"vocab_size": WORDS, "dim": WIDTH, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "pad_token_id": 1,
         "max_position_embeddings": 64}, padded),
    row("encoder", "AlbertForMaskedLM", "AlbertConfig", {**TEXT, "embedding_size": 32}, padded),
    row("encoder", "ElectraForPreTraining", "ElectraConfig", {**TEXT, "embedding_size": 32}, padded),
    row("encoder", "MPNetForMaskedLM", "MPNetConfig", TEXT, padded, wide=True),
    row("encoder", "DebertaV2ForMaskedLM", "DebertaV2Config",
        {**TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "legacy": False},
        padded),
    row("encoder", "XLNetLMHeadModel", "XLNetConfig",
        {"vocab_size": WORDS, "d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 96, **MARKS}, wide=True),
    row("encoder", "ModernBertForMaskedLM", "ModernBertConfig",
        {**TEXT, **MARKS, "cls_token_id": 2, "sep_token_id": 3, "attn_implementation": "eager"}, padded),
    row("encoder", "NomicBertModel", "NomicBertConfig", TEXT, padded, wide=True),
    row("encoder", "FNetForMaskedLM", "FNetConfig", TEXT, wide=True),
    row("encoder", "LongformerForMaskedLM", "LongformerConfig",
        {**TEXT, "attention_window": 4, "max_position_embeddings": 66}, padded, wide=True),
    row("encoder", "CamembertForMaskedLM", "CamembertConfig", TEXT, padded, wide=True),
    row("encoder", "ConvBertForMaskedLM", "ConvBertConfig", {**TEXT, "embedding_size": 32}, padded, wide=True),
]  # fmt: skip

DECODERS = [
    row("decoder", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    row("decoder", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    row("decoder", "GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    row("decoder", "GPTJForCausalLM", "GPTJConfig",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}, wide=True),
    row("decoder", "OPTForCausalLM", "OPTConfig",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}, padded),
    row("decoder", "MistralForCausalLM", "MistralConfig", GROUPED, wide=True),
    row("decoder", "Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, "tie_word_embeddings": True}, wide=True),
    row("decoder", "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 12}, wide=True),
    row("decoder", "GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 12}, wide=True),
    row("decoder", "Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 12}, wide=True),
    row("decoder", "Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 12}),
    row("decoder", "PhiForCausalLM", "PhiConfig", GROUPED, wide=True),
    row("decoder", "Phi3ForCausalLM", "Phi3Config", GROUPED),
    row("decoder", "FalconForCausalLM", "FalconConfig", {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2}),
    row("decoder", "BloomForCausalLM", "BloomConfig",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}),
    row("decoder", "StableLmForCausalLM", "StableLmConfig",
        {**GROUPED, "num_attention_heads": 3, "num_key_value_heads": 3}, wide=True),
    row("decoder", "CohereForCausalLM", "CohereConfig", {**GROUPED, "logit_scale": 1.0}, wide=True),
    row("decoder", "Olmo2ForCausalLM", "Olmo2Config", GROUPED, wide=True),
    row("decoder", "SmolLM3ForCausalLM", "SmolLM3Config", GROUPED, wide=True),
    row("decoder", "GraniteForCausalLM", "GraniteConfig", GROUPED, wide=True),
    row("decoder", "LlamaForSequenceClassification", "LlamaConfig", {**GROUPED, "num_labels": 4}, padded, wide=True),
]  # fmt: skip

ENCODER_DECODERS = [
    row("encoder-decoder", "T5ForConditionalGeneration", "T5Config", T5, equally_long),
    row("encoder-decoder", "T5EncoderModel", "T5Config", T5, padded, wide=True),
    row("encoder-decoder", "MT5ForConditionalGeneration", "MT5Config", {**T5, "feed_forward_proj": "gated-gelu"}, both,
        wide=True),
    row("encoder-decoder", "BartForConditionalGeneration", "BartConfig", PAIRED, both),
    row("encoder-decoder", "MBartForConditionalGeneration", "MBartConfig", PAIRED, both, wide=True),
    row("encoder-decoder", "PegasusForConditionalGeneration", "PegasusConfig", PAIRED, both, wide=True),
    row("encoder-decoder", "MarianMTModel", "MarianConfig", PAIRED, equally_long, wide=True),
    row("encoder-decoder", "M2M100ForConditionalGeneration", "M2M100Config", PAIRED, both, wide=True),
]  # fmt: skip

EXPERT_MIXTURES = [
    row("mixture", "MixtralForCausalLM", "MixtralConfig",
        {**GROUPED, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}),
    row("mixture", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 48}, wide=True),
    row("mixture", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 12}),
    row("mixture", "OlmoeForCausalLM", "OlmoeConfig", {**EXPERTS, "intermediate_size": 48}, wide=True),
    row("mixture", "DeepseekV2ForCausalLM", "DeepseekV2Config", LATENT, wide=True),
    row("mixture", "DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    row("mixture", "GptOssForCausalLM", "GptOssConfig",
        {**GROUPED, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    row("mixture", "GraniteMoeForCausalLM", "GraniteMoeConfig",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, wide=True),
]  # fmt: skip


def llava() -> nn.Module:
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION), text_config=T.LlamaConfig(**GROUPED), image_token_index=5,
        vision_feature_layer=-1,
    )  # fmt: skip
    return T.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = T.PaliGemmaConfig(
        vision_config=T.SiglipVisionConfig(**VISION).to_dict(),
        text_config=T.GemmaConfig(**GROUPED, head_dim=12).to_dict(),
        image_token_index=5, projection_dim=WIDTH,
    )  # fmt: skip
    return T.PaliGemmaForConditionalGeneration(config)


def idefics3() -> nn.Module:
    config = T.Idefics3Config(
        vision_config=VISION, text_config=T.LlamaConfig(**GROUPED), image_token_id=5, scale_factor=2, pad_token_id=1
    )
    return T.Idefics3ForConditionalGeneration(config)


def seen_by_idefics() -> dict[str, Tensor]:
    batch = told(5, 4)()
    return {**batch, "pixel_values": batch["pixel_values"][:, None]}


def qwen_vl() -> nn.Module:
    vision = {
        "depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    text = {
        **GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    config = T.Qwen2VLConfig(
        vision_config=vision, text_config=text, image_token_id=5, video_token_id=6, vision_start_token_id=7,
        vision_end_token_id=8,
    )  # fmt: skip
    return T.Qwen2VLForConditionalGeneration(config)


def vision_text() -> nn.Module:
    vision, text = T.ViTConfig(**VISION), T.GPT2Config(
        vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True, is_decoder=True
    )  # fmt: skip
    config = T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return T.VisionEncoderDecoderModel(config)


def captioned() -> dict[str, Tensor]:
    return {**images(), "decoder_input_ids": tokens(7)["input_ids"]}


SEEING = [
    Row("LlavaForConditionalGeneration", "vision-language", llava, told(5, 16)),
    Row("PaliGemmaForConditionalGeneration", "vision-language", paligemma, told(5, 16), wide=True),
    Row("Idefics3ForConditionalGeneration", "vision-language", idefics3, seen_by_idefics, wide=True),
    Row("Qwen2VLForConditionalGeneration", "vision-language", qwen_vl, tokens),
    Row("VisionEncoderDecoderModel", "vision-language", vision_text, captioned, wide=True),
]

VISUAL = [
    row("vision", "ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 5}, images),
    row("vision", "ViTModel", "ViTConfig", VISION, images, wide=True),
    row("vision", "DeiTForImageClassification", "DeiTConfig", {**VISION, "num_labels": 5}, images, wide=True),
    row("vision", "Dinov2Model", "Dinov2Config", {**VISION, "mlp_ratio": 2}, images),
    row("vision", "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
         "num_labels": 5}, images),
    row("vision", "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 5}, images),
    row("vision", "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}, images),
    row("vision", "CLIPVisionModel", "CLIPVisionConfig", VISION, images, wide=True),
    row("vision", "BeitForImageClassification", "BeitConfig",
        {**VISION, "num_labels": 5, "out_indices": [1, 2], "use_relative_position_bias": True}, images, wide=True),
    row("vision", "YolosForObjectDetection", "YolosConfig",
        {**VISION, "image_size": [32, 32], "num_detection_tokens": 6, "num_labels": 5}, images),
    row("vision", "SegformerForSemanticSegmentation", "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
         "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32,
         "num_labels": 5}, images),
    row("vision", "DPTForDepthEstimation", "DPTConfig",
        {**VISION, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16,
         "is_hybrid": False}, images, wide=True),
    row("vision", "ViTMAEForPreTraining", "ViTMAEConfig",
        {**VISION, "decoder_hidden_size": 32, "decoder_intermediate_size": 64, "decoder_num_hidden_layers": 1,
         "decoder_num_attention_heads": 4}, lambda: {**images(), **frames("noise", 16)()}, wide=True),
]  # fmt: skip


def clip() -> nn.Module:
    return T.CLIPModel(T.CLIPConfig(text_config={**TEXT, **MARKS}, vision_config=VISION, projection_dim=32))


def siglip() -> nn.Module:
    return T.SiglipModel(T.SiglipConfig(text_config=TEXT, vision_config=VISION))


def clap() -> nn.Module:
    audio = {
        "hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 4],
        "spec_size": 64, "num_mel_bins": 16, "window_size": 4, "patch_size": 4, "patch_stride": [4, 4], "num_classes": 4,
        "projection_dim": 32,
    }  # fmt: skip
    return T.ClapModel(T.ClapConfig(text_config={**TEXT, "projection_dim": 32}, audio_config=audio, projection_dim=32))


def sounds() -> dict[str, Tensor]:
    return {**tokens(), **frames("input_features", 1, 64, 16)()}


CONTRASTIVE = [
    Row("CLIPModel", "contrastive", clip, pairs),
    Row("SiglipModel", "contrastive", siglip, pairs, wide=True),
    Row("ClapModel", "contrastive", clap, sounds, wide=True),
    row("contrastive", "CLIPTextModelWithProjection", "CLIPTextConfig", {**TEXT, **MARKS, "projection_dim": 32}, padded,
        wide=True),
]  # fmt: skip

WHISPER = {**PAIRED, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 64}
del WHISPER["max_position_embeddings"]

HEARING = [
    row("speech", "Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH, frames("input_values", 800)),
    row("speech", "HubertForCTC", "HubertConfig", SPEECH, frames("input_values", 800), wide=True),
    row("speech", "WavLMModel", "WavLMConfig", {**SPEECH, "num_buckets": 20, "max_bucket_distance": 40},
        frames("input_values", 800), wide=True),
    row("speech", "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, heard),
    row("speech", "ASTForAudioClassification", "ASTConfig",
        {**SIZES, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8, "frequency_stride": 8,
         "num_labels": 5}, frames("input_values", 32, 16)),
    row("speech", "Speech2TextForConditionalGeneration", "Speech2TextConfig",
        {**{key: value for key, value in PAIRED.items() if key != "max_position_embeddings"}, "input_feat_per_channel": 16,
         "conv_channels": 32, "max_source_positions": 64, "max_target_positions": 64},
        lambda: {**frames("input_features", 40, 16)(), "decoder_input_ids": tokens(7)["input_ids"]}, wide=True),
]  # fmt: skip

STATES = {**TEXT, **MARKS, "state_size": 8, "time_step_rank": 4}
del STATES["num_attention_heads"], STATES["max_position_embeddings"], STATES["intermediate_size"]

RECURRENT = [
    row("state-space", "MambaForCausalLM", "MambaConfig", STATES),
    row("state-space", "Mamba2ForCausalLM", "Mamba2Config",
        {**{key: value for key, value in STATES.items() if key != "time_step_rank"}, "num_heads": 6, "head_dim": 16,
         "n_groups": 1, "chunk_size": 8}),
    row("state-space", "RwkvForCausalLM", "RwkvConfig",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "attention_hidden_size": WIDTH, "num_hidden_layers": 2,
         "intermediate_size": 96, "context_length": 64}, wide=True),
    row("state-space", "FalconMambaForCausalLM", "FalconMambaConfig", STATES, wide=True),
]  # fmt: skip


def choices() -> dict[str, Tensor]:
    """Questions with three answers each."""
    words = torch.randint(PLAIN, WORDS, (EXAMPLES, 3, LENGTH), generator=generator())
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


ZOO = [
    *ENCODERS, *DECODERS, *ENCODER_DECODERS, *EXPERT_MIXTURES, *SEEING, *VISUAL, *CONTRASTIVE, *HEARING, *RECURRENT,
]  # fmt: skip
