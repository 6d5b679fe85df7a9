"""The cross-encoder of §5.2: reads a query and a passage together, and says how relevant it is.

    [CLS] query [SEP] passage [SEP] -> JinaBertModel -> mean_pool of each text -> one logit (B, 1)

Axis letters: B pairs, T tokens. `save` puts a copy of this file beside the weights, next to
model.py's, so that other tools open them with `trust_remote_code=True`; it imports nothing else of
ours. Nothing here knows how it is trained, or what is done with its logits.
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (AutoModelForSequenceClassification, PreTrainedModel,
                          PreTrainedTokenizerBase)
from transformers.modeling_outputs import SequenceClassifierOutput

try:  # beside the weights, where transformers makes a package of the two files
    from .model import (BUFFERS, HEADS, JinaBertConfig, JinaBertModel, check_weights, mean_pool,
                        open_pretrained, write_pretrained)
except ImportError:
    from model import (BUFFERS, HEADS, JinaBertConfig, JinaBertModel, check_weights, mean_pool,
                       open_pretrained, write_pretrained)
    from plumbing import model_directory  # for `load`


class CrossEncoder(PreTrainedModel):
    """One relevance logit per pair: (input_ids, attention_mask, token_type_ids), all (B, T), ->
    logits (B, 1).

    Ours, as the paper does not describe its cross-encoder: u, v = the two texts' mean-pooled unit
    vectors, which attention has let see each other, and one linear layer on u * v. It begins as
    10 cos(u, v) - 5, what the encoder knows already; a layer on the mean of all tokens would begin
    as nothing, and learns too little in minutes.
    """

    config_class = JinaBertConfig
    base_model_prefix = "bert"  # so a JinaBertModel's directory fills the backbone
    _supports_sdpa = True

    def __init__(self, config: JinaBertConfig):
        super().__init__(config)
        config.num_labels = 1  # transformers' default is 2
        self.bert = JinaBertModel(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()
        # Not the backbone's list: a published reranker's head reads its pooler.
        self._keys_to_ignore_on_load_unexpected = None

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.classifier:
            nn.init.constant_(module.weight, 10.0)
            nn.init.constant_(module.bias, -5.0)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, **_
    ) -> SequenceClassifierOutput:
        # Without types for the backbone: stages I and II have trained type 0 alone.
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        u, v = (F.normalize(mean_pool(hidden, attention_mask * (token_type_ids == text)), dim=-1)
                for text in (0, 1))
        logits = self.classifier((u * v).to(self.classifier.weight.dtype))
        return SequenceClassifierOutput(logits=logits)


def load(
    name_or_path: str | Path, new_head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Opens a cross-encoder with one logit, as `model.load` opens an encoder: a CrossEncoder if it
    is a JinaBERT, or whatever AutoModelForSequenceClassification opens; fp32 weights.

    Raises what `model.load` does, and ValueError where there is no head, or one with more logits;
    with new_head such a model gets a head with random weights.
    """
    fields = {"num_labels": 1} if new_head else {}
    read = model_directory.read if new_head else model_directory.read_encoder
    network, tokenizer, report = open_pretrained(
        read(str(name_or_path)), CrossEncoder, AutoModelForSequenceClassification, **fields)
    if network.config.is_encoder_decoder:
        raise ValueError(f"model {name_or_path}: has a decoder; a cross-encoder has none")
    network.config.pad_token_id = tokenizer.pad_token_id  # a decoder's head reads the last token
    backbone = network.base_model_prefix + "."
    head = {name for name, _ in network.named_parameters() if not name.startswith(backbone)}
    if new_head:
        check_weights(name_or_path, report, "|".join([r"pooler\.", *head]),
                      "|".join([HEADS, BUFFERS, *head]))
        return network, tokenizer
    if head & set(report["missing_keys"]):
        raise ValueError(f"model {name_or_path}: is an encoder without a classification head; "
                         f"`python -m curation cross-encoder --model {name_or_path}` trains one "
                         f"from it")
    if network.config.num_labels != 1:
        raise ValueError(f"model {name_or_path}: its classification head has "
                         f"{network.config.num_labels} outputs; one logit is needed")
    check_weights(name_or_path, report, "(?!)", BUFFERS)  # (?!) matches nothing
    return network, tokenizer


def save(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path
) -> None:
    """Writes what `load`, AutoModelForSequenceClassification and AutoTokenizer open: safetensors,
    tokenizer and config.json; of a CrossEncoder also copies of model.py and of this file, which
    they run with trust_remote_code=True."""
    write_pretrained(network, tokenizer, directory, auto_map={
        "AutoConfig": "model.JinaBertConfig",
        "AutoModelForSequenceClassification": "cross_encoder.CrossEncoder"})
    if isinstance(network, CrossEncoder):
        source = Path(__file__).read_bytes()  # not copyfile: it may be this very file
        (Path(directory) / "cross_encoder.py").write_bytes(source)
