"""A tiny model of every described architecture, with an input of each."""

import torch

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 44}
TEXT = {"vocab_size": 61, "max_position_embeddings": 24}
DECODER = {**SIZES, **TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {**SIZES, "image_size": 12, "patch_size": 4}
#: Class and settings by the type of model.
MODELS = {
    "bert": ("BertModel", {**SIZES, **TEXT}),
    "roberta": ("RobertaForMaskedLM", {**SIZES, **TEXT, "max_position_embeddings": 26}),
    "distilbert": (
        "DistilBertModel",
        {**TEXT, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 44, "max_position_embeddings": 24},
    ),
    "gpt2": (
        "GPT2LMHeadModel", {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 44}
    ),
    "llama": ("LlamaForCausalLM", DECODER),
    "mistral": ("MistralForCausalLM", DECODER),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 12}),
    "gemma": ("GemmaForCausalLM", {**DECODER, "head_dim": 12}),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 12}),
    "gemma3_text": ("Gemma3ForCausalLM", {**DECODER, "head_dim": 12}),
    "vit": ("ViTForImageClassification", {**IMAGES, "num_labels": 5}),
    "dinov2": ("Dinov2Model", {**{k: v for k, v in IMAGES.items() if k != "intermediate_size"}, "mlp_ratio": 2}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 61, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 44, "num_mel_bins": 5,
            "max_source_positions": 10, "max_target_positions": 14, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 1,
        },
    ),
}  # fmt: skip


def small(kind):
    """The model, with weights that are large enough for every part to matter."""
    import transformers

    name, settings = MODELS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    model.config.use_cache = False
    return model


def batch_of(kind, examples=6):
    """A batch that the model takes."""
    generator = torch.Generator().manual_seed(1)
    if kind in ("vit", "dinov2"):
        return {"pixel_values": torch.randn(examples, 3, 12, 12, generator=generator)}
    tokens = torch.randint(3, 61, (examples, 12), generator=generator)
    if kind == "whisper":
        sound = torch.randn(examples, 5, 20, generator=generator)
        return {"input_features": sound, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


@torch.no_grad()
def outputs_of(model, batch):
    """What the model returns first: logits, or hidden states."""
    return model.eval()(**batch)[0]
