"""Architectures of ``transformers`` as data: where heads, neurons, layers, columns and token rows lie.

A new architecture is one more entry of :data:`DESCRIPTIONS`. Paths are those of the library's modules, below a layer or
below the model; fields are those of its config.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A pattern of tensor names, and the dimensions of them that are columns of the residual stream.
StreamPlace = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Attention:
    """The projections of one attention, as paths below the layer.

    The three of GPT-2 are one matrix: then ``query``, ``key`` and ``value`` are the same path.
    """

    query: str
    key: str
    value: str
    output: str


@dataclass(frozen=True)
class Stack:
    """Layers that are built alike.

    Parameters
    ----------
    layers
        Path of their list.
    attentions
        Attentions of a layer.
    inner
        Matrices whose outputs are the neurons: one, or a gate and another.
    outer
        The matrix that reads the neurons.
    depth, heads, shared, neurons
        Config fields: number of layers, query heads, key and value heads, and neurons; None if there is no such field.
    """

    layers: str
    attentions: tuple[Attention, ...]
    inner: tuple[str, ...]
    outer: str
    depth: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    shared: str | None = None
    neurons: str | None = "intermediate_size"


@dataclass(frozen=True)
class Description:
    """An architecture.

    Parameters
    ----------
    stacks
        Its lists of layers: one, or those of an encoder and a decoder.
    stream
        The first pattern that fits the name of a tensor says which of its dimensions are columns of the stream. Empty
        where the number of columns scales what runs, so that none can go.
    hidden
        Config fields that hold the number of columns.
    head_size
        The config field of the size of a head. None if it is the number of columns over the number of heads.
    tokens
        Patterns of tensors with one row for each token.
    numbered
        A config field by which the number of a layer changes what it computes. If it is true, no layer can go.
    """

    stacks: tuple[Stack, ...]
    stream: tuple[StreamPlace, ...] = ()
    hidden: tuple[str, ...] = ("hidden_size",)
    head_size: str | None = None
    tokens: tuple[str, ...] = ()
    numbered: str | None = None


_BERT = Description(
    stacks=(
        Stack(
            "encoder.layer",
            (
                Attention(
                    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
                ),
            ),
            ("intermediate.dense",),
            "output.dense",
        ),
    ),
    stream=(
        ("*embeddings.*_embeddings.weight", (1,)),
        ("*attention.self.*.weight", (1,)),
        ("*output.dense.*", (0,)),
        ("*intermediate.dense.weight", (1,)),
        ("*LayerNorm.*", (0,)),
        ("*layer_norm.*", (0,)),
        # Square by their config: what a head reads is what it writes.
        ("*pooler.dense.weight", (0, 1)),
        ("*pooler.dense.bias", (0,)),
        ("*transform.dense.weight", (0, 1)),
        ("*transform.dense.bias", (0,)),
        ("lm_head.dense.weight", (0, 1)),
        ("lm_head.dense.bias", (0,)),
        ("classifier.dense.weight", (0, 1)),
        ("classifier.dense.bias", (0,)),
        ("classifier.out_proj.weight", (1,)),
        ("*decoder.weight", (1,)),
        ("*seq_relationship.weight", (1,)),
        ("classifier.weight", (1,)),
        ("qa_outputs.weight", (1,)),
    ),
    tokens=("*word_embeddings.weight", "*decoder.weight", "*predictions.bias", "*decoder.bias", "lm_head.bias"),
)

_DISTILBERT = Description(
    stacks=(
        Stack(
            "transformer.layer",
            (Attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),),
            ("ffn.lin1",),
            "ffn.lin2",
            depth="n_layers",
            heads="n_heads",
            neurons="hidden_dim",
        ),
    ),
    stream=(
        ("*embeddings.*_embeddings.weight", (1,)),
        ("*attention.[qkv]_lin.weight", (1,)),
        ("*attention.out_lin.*", (0,)),
        ("*ffn.lin1.weight", (1,)),
        ("*ffn.lin2.*", (0,)),
        ("*LayerNorm.*", (0,)),
        ("*layer_norm.*", (0,)),
        ("vocab_transform.weight", (0, 1)),
        ("vocab_transform.bias", (0,)),
        ("vocab_projector.weight", (1,)),
        ("pre_classifier.weight", (0, 1)),
        ("pre_classifier.bias", (0,)),
        ("classifier.weight", (1,)),
        ("qa_outputs.weight", (1,)),
    ),
    hidden=("dim",),
    tokens=("*word_embeddings.weight", "vocab_projector.*"),
)

_GPT2 = Description(
    stacks=(
        Stack(
            "h",
            (Attention("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),),
            ("mlp.c_fc",),
            "mlp.c_proj",
            depth="n_layer",
            heads="n_head",
            neurons="n_inner",
        ),
    ),
    stream=(
        ("*wte.weight", (1,)),
        ("*wpe.weight", (1,)),
        ("*attn.c_attn.weight", (0,)),
        ("*mlp.c_fc.weight", (0,)),
        ("*c_proj.weight", (1,)),
        ("*c_proj.bias", (0,)),
        ("*ln_*", (0,)),
        ("lm_head.weight", (1,)),
        ("score.weight", (1,)),
        ("classifier.weight", (1,)),
        ("qa_outputs.weight", (1,)),
    ),
    hidden=("n_embd",),
    tokens=("*wte.weight", "lm_head.weight"),
    numbered="scale_attn_by_inverse_layer_idx",
)

_DECODER = Stack(
    "layers",
    (Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),),
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    shared="num_key_value_heads",
)
_DECODER_TOKENS = ("*embed_tokens.weight", "lm_head.weight")
_LLAMA = Description(
    stacks=(_DECODER,),
    stream=(
        ("*embed_tokens.weight", (1,)),
        ("*self_attn.[qkv]_proj.weight", (1,)),
        ("*o_proj.*", (0,)),
        ("*mlp.gate_proj.weight", (1,)),
        ("*mlp.up_proj.weight", (1,)),
        ("*down_proj.*", (0,)),
        ("*_layernorm.weight", (0,)),
        ("norm.weight", (0,)),
        ("*.norm.weight", (0,)),
        ("lm_head.weight", (1,)),
        ("score.weight", (1,)),
        ("qa_outputs.weight", (1,)),
    ),
    head_size="head_dim",
    tokens=_DECODER_TOKENS,
)
#: Gemma scales its embeddings by the square root of the number of columns.
_GEMMA = Description((_DECODER,), head_size="head_dim", tokens=_DECODER_TOKENS)

_VIT_STREAM: tuple[StreamPlace, ...] = (
    ("*embeddings.cls_token", (2,)),
    ("*embeddings.mask_token", (1, 2)),
    ("*embeddings.position_embeddings", (2,)),
    ("*patch_embeddings.projection.*", (0,)),
    ("*attention.[qkv]_proj.weight", (1,)),
    ("*o_proj.*", (0,)),
    ("*mlp.fc1.weight", (1,)),
    ("*mlp.fc2.*", (0,)),
    ("*mlp.gate_proj.weight", (1,)),
    ("*mlp.up_proj.weight", (1,)),
    ("*mlp.down_proj.*", (0,)),
    ("*layernorm*", (0,)),
    ("*norm[12].*", (0,)),
    ("*lambda1", (0,)),
    ("*pooler.dense.weight", (0, 1)),
    ("*pooler.dense.bias", (0,)),
    ("classifier.weight", (1,)),
)
_VIT_ATTENTION = Attention("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_VIT = Description(
    stacks=(Stack("layers", (_VIT_ATTENTION,), ("mlp.fc1",), "mlp.fc2"),),
    stream=_VIT_STREAM,
    hidden=("hidden_size", "pooler_output_size"),
    head_size="head_dim",
)
_DINOV2 = Description(
    stacks=(Stack("encoder.layer", (_VIT_ATTENTION,), ("mlp.fc1",), "mlp.fc2", neurons=None),),
    stream=_VIT_STREAM,
    head_size="head_dim",
)

_WHISPER_SELF = Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_WHISPER_CROSS = Attention("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj", "encoder_attn.out_proj")
_WHISPER = Description(
    stacks=(
        Stack(
            "encoder.layers", (_WHISPER_SELF,), ("fc1",), "fc2",
            depth="encoder_layers", heads="encoder_attention_heads", neurons="encoder_ffn_dim",
        ),
        Stack(
            "decoder.layers", (_WHISPER_SELF, _WHISPER_CROSS), ("fc1",), "fc2",
            depth="decoder_layers", heads="decoder_attention_heads", neurons="decoder_ffn_dim",
        ),
    ),
    stream=(
        ("*conv1.*", (0,)),
        ("*conv2.weight", (0, 1)),
        ("*conv2.bias", (0,)),
        ("*embed_positions.weight", (1,)),
        ("*embed_tokens.weight", (1,)),
        ("*_attn.[qkv]_proj.weight", (1,)),
        ("*_attn.out_proj.*", (0,)),
        ("*fc1.weight", (1,)),
        ("*fc2.*", (0,)),
        ("*layer_norm.*", (0,)),
        ("proj_out.weight", (1,)),
        ("projector.weight", (1,)),
    ),
    hidden=("d_model",),
    tokens=("*embed_tokens.weight", "proj_out.weight"),
)  # fmt: skip

#: By ``model_type`` of a config.
DESCRIPTIONS = {
    "bert": _BERT,
    "camembert": _BERT,
    "dinov2": _DINOV2,
    "distilbert": _DISTILBERT,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "vit": _VIT,
    "whisper": _WHISPER,
    "xlm-roberta": _BERT,
}
