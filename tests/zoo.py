"""Other people's models, tiny (width 32, 2 layers) and with random weights: encoders of thirteen
architectures as transformers writes them, and a BERT as sentence-transformers writes one, made by
hand so that it need not be installed.

Tokenizers know letters, or bytes: no vocabulary has to be trained.
"""

import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

LETTERS = string.ascii_lowercase + string.digits
TEXTS = ["a b c", "left12 and right", "g", "what is put before a text when it is embedded 77"]


# tokenizers

def wordpiece(kind: type = transformers.BertTokenizer) -> transformers.PreTrainedTokenizerBase:
    """BERT's: [CLS] text [SEP], lower case."""
    entries = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + [*LETTERS] + [f"##{x}" for x in LETTERS]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    return kind(vocab=vocabulary, model_max_length=512)


def byte_level(special: str, before: str, after: str, length: int, **names
               ) -> transformers.PreTrainedTokenizerBase:
    """Bytes with these special tokens, of which `before` and `after` stand around a text."""
    entries = special.split() + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    around = [(token, vocabulary[token]) for token in (before, after) if token]
    tokens.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=around)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, model_max_length=length, **names)


def roberta(length: int = 512) -> transformers.PreTrainedTokenizerBase:
    """<s> text </s>; the padding is token 1."""
    return byte_level(
        "<s> <pad> </s> <unk> <mask>", "<s>", "</s>", length, bos_token="<s>", cls_token="<s>",
        pad_token="<pad>", eos_token="</s>", sep_token="</s>", unk_token="<unk>",
        mask_token="<mask>")


def decoder() -> transformers.PreTrainedTokenizerBase:
    """text <end>, as models that pool the last token want it; the padding is token 0."""
    return byte_level("<pad> <end>", "", "<end>", 131072, pad_token="<pad>", eos_token="<end>")


def llama_like(before: str, after: str) -> transformers.PreTrainedTokenizerBase:
    """Bytes between <s> and </s>, tokens 1 and 2, or where they are "", without; the padding is
    token 0."""
    return byte_level("<pad> <s> </s>", before, after, 600, pad_token="<pad>", bos_token="<s>",
                      eos_token="</s>")


def unigram() -> transformers.PreTrainedTokenizerBase:
    """T5's: text </s>, with a "_" for a space."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -3.0) for piece in ("▁", *LETTERS)]
    tokens = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=512)


# encoders

BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
ROBERTA = BERT | dict(max_position_embeddings=514, pad_token_id=1, bos_token_id=0, eos_token_id=2)
LLAMA = BERT | dict(num_key_value_heads=1, head_dim=16, pad_token_id=0, max_position_embeddings=600)

# its class without "Model", its tokenizer, and the fields of its configuration
ARCHITECTURES = {
    "bert": ("Bert", wordpiece, BERT),
    "distilbert": ("DistilBert", lambda: wordpiece(transformers.DistilBertTokenizer), dict(
        dim=32, n_layers=2, n_heads=2, hidden_dim=64)),
    "electra": ("Electra", wordpiece, BERT | dict(embedding_size=16)),
    "albert": ("Albert", wordpiece, BERT | dict(embedding_size=16)),
    "roberta": ("Roberta", roberta, ROBERTA | dict(type_vocab_size=1)),
    "mpnet": ("MPNet", roberta, ROBERTA),
    "deberta-v2": ("DebertaV2", wordpiece, BERT | dict(
        relative_attention=True, position_buckets=32, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
        type_vocab_size=0)),
    "modernbert": ("ModernBert", lambda: roberta(8192), BERT | dict(
        max_position_embeddings=8192, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        cls_token_id=0, sep_token_id=2)),
    "t5": ("T5Encoder", unigram, dict(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=0)),
    "bart": ("Bart", roberta, dict(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, max_position_embeddings=512)),
    "qwen3": ("Qwen3", decoder, LLAMA),
    "llama": ("Llama", decoder, LLAMA),
    "gpt2": ("GPT2", decoder, dict(n_embd=32, n_layer=2, n_head=2, n_positions=512)),
}


def make(architecture: str, directory: Path, whole: str = "", **fields) -> Path:
    """A directory as transformers writes it. whole: a class of the family with more than the
    encoder. fields: more for its config.json. Weights of deviation 0.1: at 0.02 all texts would
    have nearly one vector."""
    kind, tokenizer, sizes = ARCHITECTURES[architecture]
    tokens = tokenizer()
    config_class = getattr(transformers, kind.removesuffix("Encoder") + "Config")
    torch.manual_seed(1)
    backbone = getattr(transformers, whole or f"{kind}Model")(
        config_class(**{"vocab_size": len(tokens), **sizes, **fields}))
    for parameter in backbone.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    backbone.save_pretrained(directory)
    tokens.save_pretrained(directory)
    return directory


# sentence-transformers' directories

def make_sentence_transformer(
    directory: Path, pooling: dict = {"pooling_mode": "mean"}, after: Sequence[dict] = (),
    prompts: dict | None = None, transformer: dict | None = None, encoder: str = "", **more
) -> Path:
    """A BERT and what stands around it. pooling: 1_Pooling/config.json. after: for each further
    module its config.json, empty of a Normalize. transformer: sentence_bert_config.json. prompts
    and more: config_sentence_transformers.json. encoder: the BERT's folder, once 0_Transformer."""
    make("bert", directory / encoder)
    kinds = ["Transformer", "Pooling"] + ["Dense" if one else "Normalize" for one in after]
    paths = [encoder] + [f"{i}_{kind}" for i, kind in enumerate(kinds) if i > 0]
    write(directory / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, kinds))])
    write(directory / paths[1] / "config.json", {"word_embedding_dimension": 32} | pooling)
    for path, config in zip(paths[2:], after):
        write(directory / path / "config.json", config)
        if config:
            make_dense(directory / path, config)
    if prompts or more:
        write(directory / "config_sentence_transformers.json", {"prompts": prompts or {}} | more)
    if transformer:
        write(directory / encoder / "sentence_bert_config.json", transformer)
    return directory


def make_dense(folder: Path, config: dict) -> None:
    shape = config["out_features"], config["in_features"]
    weights = {"linear.weight": torch.randn(shape, generator=torch.Generator().manual_seed(2))}
    if config.get("bias", True):
        weights["linear.bias"] = torch.linspace(-1, 1, shape[0])
    save_file(weights, folder / "model.safetensors")


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
