"""The pooled encoder of Jina Embeddings 2 (arXiv 2310.19923): JinaBERT (§2, Table 1) with mean
pooling on top (§5).

    texts -> tokenizer -> JinaBertModel -> hidden (B, T, D) -> mean_pool -> a vector per text (B, D)

Axis letters: B texts, T tokens, D width, H heads. Nothing here knows about losses, data or ranks.
`save` puts a copy of this file beside the weights, from which other tools take the classes
(`trust_remote_code=True`); only `load` and `save` need the rest of the project. Parameter names and
config fields are those of the published checkpoints.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
# PretrainedConfig: its name in transformers 4 too, which opens the copy as well
from transformers import (AutoModel, AutoModelForTextEncoding, AutoTokenizer, BertConfig,
                          PretrainedConfig, PreTrainedModel)
from transformers.modeling_outputs import BaseModelOutput

try:
    # `load` and `save` need them
    from plumbing import files, model_directory, probe, saved_tokenizer
except ImportError:
    pass  # this is the copy beside some weights


class JinaBertConfig(BertConfig):
    """BertConfig with the fields in which JinaBERT differs; the other defaults are those of
    `base`."""

    # what the published config.json files say; `position_embedding_type` tells the two apart
    model_type = "bert"
    vocab_size: int = 30528
    max_position_embeddings: int = 8192  # not a size of any parameter: ALiBi has none
    position_embedding_type: str = "alibi"
    feed_forward_type: str = "geglu"  # or "reglu" (large)
    emb_pooler: str = "mean"
    attention_probs_dropout_prob: float | int = 0.0  # BertConfig's 0.1 would come in silently


# Paper: Table 1, heads of dimension 64, dropout 0.1. Ours: tiny, which learns something in minutes
# on two CPU cores; it has no dropout, since in those minutes it sees no pair twice, and drawing the
# masks would take longer than the layers.
SIZES = {
    "tiny": dict(num_hidden_layers=2, hidden_size=256, num_attention_heads=4,
                 intermediate_size=1024, hidden_dropout_prob=0.0),
    "small": dict(num_hidden_layers=4, hidden_size=512, num_attention_heads=8,
                  intermediate_size=2048),
    "base": dict(num_hidden_layers=12, hidden_size=768, num_attention_heads=12,
                 intermediate_size=3072),
    "large": dict(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16,
                  intermediate_size=4096, feed_forward_type="reglu"),
}

NO_LIMIT = 1 << 30  # tokens of a text: what strict readers take for none
LONG = 1024  # tokens; above it no tensor of H x T x T numbers is made, forward or backward


def exporting() -> bool:
    """Whether torch.export or jit.trace looks on: what is decided by numbers or lengths then would
    be decided for good, by one sample."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def alibi_slopes(heads: int) -> list[float]:
    """Slopes 2^(-8 (h+1) / H), h = 0 .. H-1 (Press et al. 2022). When H is no power of two: those
    of the next lower power P, then every second one of 2P, until there are H."""
    lower = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / lower) for h in range(lower)]
    return slopes + [2 ** (-8 * (h + 1) / (2 * lower)) for h in range(0, 2 * (heads - lower), 2)]


def alibi_bias(slopes: list[float], mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The term added to the attention logits: -slope_h * |i - j|, symmetric since the encoder looks
    both ways (§2), and the most negative number for padded keys j.

    mask (B, T) of 0 and 1 -> (B, H, T, T), or (1, H, T, T) where nothing is padded. Made anew in
    every forward pass, and only up to LONG tokens: at 8,192 and 12 heads it would hold 3 GB.
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    distance = (position[:, None] - position[None, :]).abs()
    bias = (distance * -torch.tensor(slopes, device=mask.device)[:, None, None]).to(dtype)[None]
    if not exporting() and mask.all():
        return bias
    return bias.masked_fill(mask[:, None, None, :] == 0, torch.finfo(dtype).min)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(64) + bias) v for q, k, v (B, H, T, 64) and bias (B or 1, H, T, T)."""
    B, H, T, width = q.shape
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Ours: the fused kernel's bf16 backward on CPU takes about four times as long as these.
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        bias = bias.expand(B, -1, -1, -1).flatten(0, 1)
        logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5)
        return (logits.softmax(-1).to(v.dtype) @ v).view(B, H, T, width)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attend_texts(q: Tensor, k: Tensor, v: Tensor, ramp: Tensor, lengths: list[int]) -> Tensor:
    """`attend` for long texts, each over its own first n = lengths[b] tokens; padding's rows are 0.

    With keys and values back to front, j' = n-1 - j, which the softmax does not mind, the bias is
    -slope_h |i + j' - (n-1)|: a view, stride 1 both ways, of ramp (H, 2T-1), -slope_h |x| for x =
    1-T .. T-1. The fused kernel reads it in place.
    """
    T, texts = q.shape[2], [q[:0]]  # as cat wants one even of an empty batch
    for q, k, v, n in zip(q.split(1), k.flip(2).split(1), v.flip(2).split(1), lengths):
        bias = ramp.as_strided((1, len(ramp), n, n), (0, 2 * T - 1, 1, 1), T - n)
        k, v = k[:, :, T - n :], v[:, :, T - n :]
        text = F.scaled_dot_product_attention(q[:, :, :n], k, v, attn_mask=bias)
        texts.append(F.pad(text, (0, 0, 0, T - n)))
    return torch.cat(texts)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, mask: Tensor, flex: Callable
                ) -> Tensor:
    """`attend` for long texts on a GPU, where flex is torch's flex_attention, compiled: it makes
    the bias tile by tile."""
    def biased(logit, b, h, i, j):
        seen = (mask[b, j] > 0) | (i == j)  # itself at least: a softmax over nothing is NaN
        return torch.where(seen, logit - slopes[h] * (i - j).abs(), -math.inf)

    return flex(q, k, v, score_mod=biased)


def attention(slopes: list[float], mask: Tensor, dtype: torch.dtype) -> Callable:
    """What every layer calls with its q, k, v, by length and device. mask (B, T), products in
    dtype. Raises ValueError where long texts on a CPU are padded elsewhere than on their right."""
    T, slope = mask.shape[1], torch.tensor(slopes, device=mask.device)
    if exporting() or T <= LONG:
        return partial(attend, bias=alibi_bias(slopes, mask, dtype))
    if mask.device.type == "cuda":
        # fullgraph: an error where it would go on uncompiled, with H x T x T logits
        flex = torch.compile(flex_attention, fullgraph=True)
        return partial(attend_flex, slopes=slope, mask=mask, flex=flex)
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError(f"attention_mask: texts of more than {LONG} tokens must be padded on "
                         f"their right, 1 .. 1 0 .. 0")
    ramp = (-slope[:, None] * torch.arange(1 - T, T, device=mask.device).abs()).to(dtype)
    return partial(attend_texts, ramp=ramp, lengths=mask.sum(1).int().tolist())


class JinaBertEmbeddings(nn.Module):
    """Word and token-type embeddings; no position embeddings (§2)."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(types)
        return self.dropout(self.LayerNorm(hidden))


class JinaBertSelfAttention(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, attend: Callable) -> Tensor:
        B, T, D = hidden.shape
        q, k, v = (project(hidden).view(B, T, self.heads, D // self.heads).transpose(1, 2)
                   for project in (self.query, self.key, self.value))
        return attend(q, k, v).transpose(1, 2).reshape(B, T, D)


class JinaBertSelfOutput(nn.Module):
    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, context: Tensor, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(context)) + hidden)


class JinaBertGatedMLP(nn.Module):
    """Gated feed-forward (Shazeer 2020): wo(act(a) * b), both from one product without bias."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.act = {"geglu": F.gelu, "reglu": F.relu}[config.feed_forward_type]
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor) -> Tensor:
        a, b = self.gated_layers(hidden).chunk(2, dim=-1)
        return self.layernorm(self.wo(self.dropout(self.act(a) * b)) + hidden)


class JinaBertLayer(nn.Module):
    """Post-LayerNorm BERT layer. The two containers only spell the published names
    `attention.self`, `.output`."""

    def __init__(self, config: JinaBertConfig):
        super().__init__()
        self.attention = nn.ModuleDict({
            "self": JinaBertSelfAttention(config), "output": JinaBertSelfOutput(config)})
        self.mlp = JinaBertGatedMLP(config)

    def forward(self, hidden: Tensor, attend: Callable) -> Tensor:
        context = self.attention["self"](hidden, attend)
        return self.mlp(self.attention["output"](context, hidden))


class JinaBertModel(PreTrainedModel):
    """The backbone: (input_ids, attention_mask), both (B, T), -> last_hidden_state (B, T, D)."""

    config_class = JinaBertConfig
    base_model_prefix = "bert"  # published masked-language-model weights begin with "bert."
    _keys_to_ignore_on_load_unexpected = [r"^pooler\.", r"^cls\.", r"^bert\.pooler\."]
    _supports_sdpa = True

    def __init__(self, config: JinaBertConfig):
        super().__init__(config)
        self.slopes = alibi_slopes(config.num_attention_heads)
        self.embeddings = JinaBertEmbeddings(config)
        layers = nn.ModuleList(JinaBertLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        # transformers: weights from N(0, initializer_range), biases 0, LayerNorm 1 and 0
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None, **_) -> BaseModelOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.embeddings(input_ids, token_type_ids)
        # The bias in the dtype of the products (an empty one tells it), which under mixed precision
        # is not that of `hidden`: cast in every layer instead, the backward pass would keep a copy
        # per layer, and the lowest fp32 number would become bf16's -inf.
        attend = attention(self.slopes, mask, (hidden[:0] @ hidden[:0].mT).dtype)
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, attend)
        return BaseModelOutput(last_hidden_state=hidden)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """§5: the average of the token embeddings, padding left out. hidden (B, T, D), mask (B, T) ->
    (B, D), fp32."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weight = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def cls_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Ours, as some published models do: the first token's embedding. Padding is on the right; else
    as `mean_pool`."""
    return hidden[:, 0].float()


def last_token_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Ours, as decoders do, whose last token alone has seen the others."""
    return hidden[torch.arange(len(hidden)), mask.sum(1) - 1].float()


POOLING = {"mean": mean_pool, "cls": cls_pool, "lasttoken": last_token_pool}


class PooledEncoder(nn.Module):
    """§5: a backbone and mean pooling, with no further trainable parameters. (input_ids,
    attention_mask) -> (B, D).

    Ours, for other people's models: pooling is one of POOLING; head: what follows it, layers or a
    norm; settings: what else their directory says (plumbing/model_directory.py). prompts: what
    callers put before a text, by name; `forward` adds none. notes: for `describe` to print."""

    def __init__(self, backbone: PreTrainedModel, pooling: str = "mean",
                 head: Iterable[nn.Module] = (),
                 settings: "model_directory.Settings | None" = None):
        super().__init__()
        self.backbone, self.pooling, self.head = backbone, pooling, nn.Sequential(*head)
        self.settings = settings
        self.prompts = settings.prompts if settings else {}
        self.notes = []
        # of no use to one pass, and a checkpointed layer would fill a decoder's cache twice
        caches = "use_cache" in inspect.signature(backbone.forward).parameters
        self.options = {"use_cache": False} if caches else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, **self.options).last_hidden_state
        pooled = POOLING[self.pooling](hidden, attention_mask)
        with torch.autocast(pooled.device.type, enabled=False):  # as the pooling, in fp32
            return self.head(pooled)


# Weights that are no part of an encoder: language-modelling heads, and buffers that old versions
# saved. Any other unknown weight is part of what the model computes.
HEADS = (r"^(\w+\.)?(cls|lm_head|lm_loss|mlm|vocab_\w+|generator_\w+|discriminator_\w+|head"
         r"|decoder|lm_predictions|mask_predictions|pred_layer|predictions|sop_classifier|pooler)\."
         r"|^final_logits_bias$")
BUFFERS = r"(position_ids|inv_freq|masked_bias|attn\.bias)$"


def create(size: str) -> PooledEncoder:
    """A JinaBERT of one of SIZES with random weights."""
    return PooledEncoder(JinaBertModel(JinaBertConfig(**SIZES[size])))


def open_pretrained(settings: "model_directory.Settings", jina: type, auto: type, **fields
                    ) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase, dict]:
    """Model, tokenizer and transformers' load report of what a directory says, by class `jina` if
    it is a JinaBERT, else by class `auto` with these config fields. Raises OSError where there is
    no model, ValueError where it is one that is not built here; whether weights are missing or
    unknown, `check_weights` says."""
    name = settings.encoder
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # `check_weights` says what its report does
    huggingface_hub.utils.logging.set_verbosity_error()  # a warning for every retry
    try:
        config, _ = PretrainedConfig.get_config_dict(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # TypeError and KeyError too, for JSON of another shape
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"model {name}: neither a directory with a config.json and a tokenizer, nor "
                      f"a name that the hub gave us ({reason})") from error
    if not config:
        raise OSError(f"model {name}: no config.json there")
    # what transformers makes up without a file
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(f"model {name}: no tokenizer there")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"model {name}: its tokenizer has no padding token")
    saved_tokenizer.check_tokenizer(name, tokenizer)
    tokenizer.saved_class = saved_tokenizer.class_name(name)  # `write_pretrained` keeps it
    tokenizer.padding_side = "right"  # as everything here pads
    if settings.lower_case:
        saved_tokenizer.make_lower_case(tokenizer)
    is_jina = config.get("position_embedding_type") == "alibi"
    if not is_jina and "AutoModel" in (config.get("auto_map") or {}):
        code = config["auto_map"]["AutoModel"]
        raise ValueError(f"model {name}: names code of its own ({code}), which is not run here; "
                         f"where transformers' own class computes the same, remove auto_map from "
                         f"config.json")
    if is_jina:
        check_layout(name, config)
        config.pop("attn_implementation", None)  # of the published code, the same numbers by either
        fields = {"config": JinaBertConfig.from_dict(config)}
    if auto is AutoModel and config.get("model_type") in ("t5", "mt5", "umt5"):
        auto = AutoModelForTextEncoding  # without the decoder
    # fp32: the published files are in half precision. Mismatched sizes: else an error that names
    # no weight.
    options = dict(dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True,
                   trust_remote_code=False)
    try:
        model, report = (jina if is_jina else auto).from_pretrained(name, **options, **fields)
    except Exception as error:  # a truncated file, no weights, an unknown architecture ...
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"model {name}: its weights do not open ({reason})") from error
    limit = settings.max_length or tokenizer.model_max_length
    tokenizer.model_max_length = min(limit, longest_text(model))
    return model, tokenizer, report  # from_pretrained leaves it in eval mode


def check_layout(name: str, config: dict) -> None:
    """Raises ValueError for JinaBERTs of another layout than Table 1's: base-code, -de, -es, -zh
    name other code."""
    code, _, _ = (config.get("auto_map") or {}).get("AutoModel", "").rpartition("--")
    if code not in ("", "jinaai/jina-bert-implementation"):
        raise ValueError(f"model {name}: its layout is that of {code}, which is not built here; "
                         f"jinaai/jina-bert-implementation's is")
    kind = config.get("feed_forward_type", "geglu")
    if kind not in ("geglu", "reglu"):
        raise ValueError(f'model {name}: feed_forward_type "{kind}" is not built here; geglu and '
                         f'reglu are')


def longest_text(backbone: PreTrainedModel) -> int:
    """Tokens that its positions take. A table with a padding row begins behind it: RoBERTa's 514
    rows take 512."""
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None
                                            else module.padding_idx + 1)
    count = getattr(backbone.config, "max_position_embeddings", None) or 0
    return count if count > 0 else NO_LIMIT


def check_weights(name: str | Path, report: dict, may_miss: str, may_have: str) -> None:
    """Raises ValueError where weights are missing or misshapen, unless the regex may_miss finds
    them, or unknown, unless may_have does."""
    for kind, spare, what in (
            ("missing_keys", may_miss, "are missing"),
            ("mismatched_keys", may_miss, "are of another shape"),
            ("unexpected_keys", may_have, "are unknown here, like the head of a reranker")):
        wrong = [str(key) for key in report[kind] if not re.search(spare, str(key))]
        if wrong:
            raise ValueError(f"model {name}: {len(wrong)} weights {what}, among them {min(wrong)}")


def load(name_or_path: str | Path) -> tuple[PooledEncoder, transformers.PreTrainedTokenizerBase]:
    """Opens a directory or a hub name, with what it says of pooling, further layers, prompts and
    lengths: JinaBERT without remote code, or any encoder that AutoModel opens; fp32 weights.

    Raises OSError where there is no model, ValueError where weights are missing or unknown, where
    texts do not go through it, or where it says what is not built here: transformers would go on,
    with random weights or without a word. Its messages and bars are silenced for the rest of the
    process.
    """
    settings = model_directory.read(str(name_or_path))
    backbone, tokenizer, report = open_pretrained(settings, JinaBertModel, AutoModel)
    check_weights(name_or_path, report, may_miss=r"pooler\.", may_have=f"{HEADS}|{BUFFERS}")
    pooling = settings.pooling or backbone.config.to_dict().get("emb_pooler") or "mean"
    if pooling not in POOLING:
        where = "1_Pooling/config.json" if settings.pooling else "config.json"
        raise ValueError(f"{Path(name_or_path) / where}: pooling by {pooling} is not built here; "
                         f"by {', '.join(POOLING)} is")
    model_directory.check_widths(settings, backbone.config.hidden_size)
    encoder = PooledEncoder(backbone, pooling, settings.head, settings).eval()
    probe.try_texts(encoder, tokenizer, str(name_or_path))
    left_out = {key.split(".")[0] for key in report["unexpected_keys"] if re.search(HEADS, key)}
    if "EncoderModel" in type(backbone).__name__ and backbone.config.architectures != [
            type(backbone).__name__]:
        left_out.add("decoder")  # of a whole T5, whose weights transformers passes over
    if left_out:
        encoder.notes.append(f"left out, as no part of an encoder: {', '.join(sorted(left_out))}")
    frozen = {name.rpartition(".")[0] for name, p in encoder.named_parameters()
              if not p.requires_grad}
    if frozen:
        encoder.notes.append(f"frozen, as embeddings do not use it: {', '.join(sorted(frozen))}")
    return encoder, tokenizer


def write_pretrained(network: PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase,
                     directory: str | Path, **fields) -> None:
    """Writes safetensors, tokenizer and config.json. A JinaBERT also gets a copy of this file, and
    these fields into config.json, its `auto_map` among them."""
    directory = Path(directory)
    transformers.utils.logging.disable_progress_bar()
    network.save_pretrained(directory)
    inputs = inspect.signature(type(network).forward).parameters  # memory.py may wrap the other
    saved_tokenizer.save_tokenizer(tokenizer, directory, inputs)
    config = files.read_json(directory / "config.json")
    config |= model_directory.rotary_fields(config)
    if isinstance(network.config, JinaBertConfig):
        # transformers 5 leaves out every field that is at its default.
        config = network.config.to_dict() | fields
        # what others compute with, where we take feed_forward_type
        config["hidden_act"] = {"geglu": "gelu", "reglu": "relu"}[config["feed_forward_type"]]
        # not copyfile: it may be this very file
        (directory / "model.py").write_bytes(Path(__file__).read_bytes())
    files.write_json(directory / "config.json", config)
    files.follow_umask(directory)


def save(encoder: PooledEncoder, tokenizer: transformers.PreTrainedTokenizerBase,
         directory: str | Path) -> None:
    """Writes what `load`, AutoTokenizer and sentence-transformers open: safetensors, tokenizer,
    config.json, and modules.json with what it names.

    A JinaBERT also gets a copy of this file and an `auto_map`. Outside `load` such a directory
    needs trust_remote_code=True: without it transformers builds a plain BERT with *random* weights
    and only reports it.
    """
    # Text Embeddings Inference picks the architecture by `_name_or_path`; transformers 5 drops that
    # field, and writes its own class name.
    write_pretrained(
        encoder.backbone, tokenizer, directory,
        architectures=["JinaBertForMaskedLM"], _name_or_path="jinaai/jina-bert-implementation",
        auto_map={"AutoConfig": "model.JinaBertConfig", "AutoModel": "model.JinaBertModel"},
        emb_pooler=encoder.pooling)
    model_directory.write(Path(directory), encoder, tokenizer.model_max_length)
