"""Each part of a model is given the mask of its own positions, and no other that happens to fit."""

import pytest
import torch
import transformers as T
from torch import nn

from octavo.calibration.calibrating import calibrate
from octavo.calibration.objective import objective
from octavo.calibration.sides import Masks, sides_of
from octavo.sources.source import from_module

WORDS, WIDTH, LENGTH = 100, 32, 9
LENGTHS = [9, 4, 6, 5, 9, 7, 3, 8]
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PAIRED = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32,
    "init_std": 0.2, **MARKS,
}  # fmt: skip
BERT = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip


def t5():
    config = T.T5Config(
        vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, tie_word_embeddings=False,
        pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    return T.T5ForConditionalGeneration(config)


def pair():
    config = T.EncoderDecoderConfig.from_encoder_decoder_configs(T.BertConfig(**BERT), T.BertConfig(**BERT))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return T.EncoderDecoderModel(config)


MODELS = {
    "t5": t5,
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**PAIRED)),
    "marian": lambda: T.MarianMTModel(T.MarianConfig(**PAIRED)),
    "two berts": pair,
}


def gather(module, batches, name="kl"):
    source = from_module(module.eval())
    sites, _ = source.sites()
    return calibrate(source, sites, batches, objective(name)).evidence, {site.name: site for site in sites}


def sequences(seed):
    return torch.randint(5, WORDS, (len(LENGTHS), LENGTH), generator=torch.Generator().manual_seed(seed))


def masked(tokens, lengths):
    mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    return tokens * mask, mask


@pytest.mark.parametrize("decoder_padded", [False, True], ids=["whole decoder", "padded decoder"])
@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_of_data_without_padding(name, decoder_padded):
    """Encoder and decoder are equally long, so that either mask would fit the other side."""
    torch.manual_seed(0)
    module, said, answered = MODELS[name](), sequences(1), sequences(2)
    lengths = LENGTHS[::-1] if decoder_padded else [LENGTH] * len(LENGTHS)
    padded = dict(zip(("input_ids", "attention_mask"), masked(said, LENGTHS), strict=True))
    padded |= dict(zip(("decoder_input_ids", "decoder_attention_mask"), masked(answered, lengths), strict=True))
    if not decoder_padded:
        del padded["decoder_attention_mask"]
    alone = [
        {"input_ids": said[i : i + 1, : LENGTHS[i]], "decoder_input_ids": answered[i : i + 1, : lengths[i]]}
        for i in range(len(LENGTHS))
    ]
    (found, sites), (wanted, _) = gather(module, [padded]), gather(module, alone)
    compared = 0
    for site in sites.values():
        # Tables that both sides read have no mask of their own; the head gives a distribution where it is asked.
        if site.kind != "linear" or (decoder_padded and ("lm_head" in site.name or "predictions" in site.name)):
            continue
        one, other = found[site.name], wanted[site.name]
        assert one.samples == other.samples, site.name
        torch.testing.assert_close(one.columns, other.columns, rtol=1e-3, atol=1e-5)
        compared += 1
    assert compared >= 16


def test_sides_of_parts():
    module = t5()
    found = sides_of(module)
    layer = module.decoder.block[0].layer
    assert found[module.encoder.block[0].layer[0].SelfAttention.q] == "encoder"
    assert found[layer[0].SelfAttention.q] == found[layer[1].EncDecAttention.q] == "decoder"
    assert found[layer[1].EncDecAttention.k] == found[layer[1].EncDecAttention.v] == "encoder"
    assert found[module.shared] == "both"
    # A decoder that is a model of its own has layers that are called an encoder.
    module = pair()
    found, layer = sides_of(module), module.decoder.bert.encoder.layer[0]
    assert found[module.encoder.encoder.layer[0].output.dense] == "encoder"
    assert found[layer.output.dense] == found[layer.crossattention.self.query] == "decoder"
    assert found[layer.crossattention.self.key] == found[layer.crossattention.self.value] == "encoder"
    # Where there is one side there is one mask.
    assert sides_of(module.encoder) == {} == sides_of(nn.Linear(2, 2))


def test_masks_of_a_batch():
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    masks = Masks.of_batch({"attention_mask": one, "decoder_attention_mask": other})
    assert masks.of("") is masks.of("encoder") is one and masks.of("decoder") is other
    assert masks.of("none") is masks.of("both") is None
    assert Masks.of_batch({"attention_mask": one}).of("decoder") is None
    assert Masks.of_batch(torch.ones(2, 3)).of("") is None


VISION = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
#: Patches of an image and one place for its class.
PLACES = 17
TEXT = {**BERT, "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
del TEXT["initializer_range"]


def clip():
    text = T.CLIPTextConfig(**TEXT)
    return T.CLIPModel(T.CLIPConfig(text_config=text.to_dict(), vision_config=T.CLIPVisionConfig(**VISION).to_dict()))


def llava():
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION), text_config=T.LlamaConfig(**TEXT), image_token_id=3,
        vision_feature_layer=-1,
    )  # fmt: skip
    return T.LlavaForConditionalGeneration(config)


def siglip():
    text = T.SiglipTextConfig(**TEXT, projection_size=WIDTH)
    vision = T.SiglipVisionConfig(**{**VISION, "image_size": 40, "patch_size": 10})
    return T.SiglipModel(T.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))


def pictures(kind, mask):
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(5, WORDS, (8, 16 if kind is siglip else PLACES), generator=generator)
    if kind is llava:
        # Sixteen places of the image and the only word.
        words[:, :16] = 3
    if mask:
        lengths = torch.arange(words.shape[1]) >= torch.arange(8)[:, None]
        mask = lengths if kind is llava else lengths.flip(1)
    size = 40 if kind is siglip else 32
    made = {"input_ids": words, "pixel_values": torch.randn(8, 3, size, size, generator=generator)}
    return {**made, "attention_mask": (torch.ones_like(words) if mask is False else mask.long())}


@pytest.mark.parametrize("kind", [clip, siglip, llava])
def test_what_sees_gets_no_mask_of_tokens(kind):
    """Texts are as long as there are patches, so that their mask would fit."""
    torch.manual_seed(0)
    module = kind()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
    name = "kl" if kind is llava else "squared"
    (padded, sites), (whole, _) = (gather(module, [pictures(kind, mask)], name) for mask in (True, False))
    # Of a head that is not made of layers the gradients are seen, which depend on the texts.
    seeing = [
        site for name, site in sites.items() if "vision" in name and site.kind == "linear" and ".head." not in name
    ]
    assert len(seeing) >= 6
    for site in seeing:
        one, other = padded[site.name], whole[site.name]
        assert one.samples == other.samples
        torch.testing.assert_close(one.columns, other.columns, rtol=1e-4, atol=1e-6)
    reading = next(name for name, site in sites.items() if "vision" not in name and "q_proj" in name)
    assert padded[reading].samples < whole[reading].samples
