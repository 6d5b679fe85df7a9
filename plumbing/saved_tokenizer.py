"""A model's tokenizer, from its directory and into one: read as tokenizer.json says, and written so
that transformers 4 and 5 open the same one.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from plumbing.files import read_json, write_json
from plumbing.model_directory import fetch

# scripts, accents, digits, white space: hardly read alike by two tokenizers
PROBE = "Ein Häuschen\tam See, 42.7 %: 你好，世界 привет don't re-read_it ÉTÉ "


def class_name(name: str) -> str | None:
    """As the directory's tokenizer_config.json says."""
    return (read_json(fetch(name) / "tokenizer_config.json") or {}).get("tokenizer_class")


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where transformers has built another tokenizer than tokenizer.json says."""
    path = fetch(name) / "tokenizer.json"
    if not path.is_file():
        return
    try:
        own = Tokenizer.from_file(str(path))
    except Exception as error:  # a bare one
        raise ValueError(f"{path}: is no tokenizer.json ({error}); fetch the model again") from None
    own.no_truncation()
    own.no_padding()
    text = PROBE + " ".join(token.content for token in own.get_added_tokens_decoder().values())
    if tokenizer(text)["input_ids"] != own.encode(text).ids:
        raise ValueError(f"model {name}: transformers' {class_name(name) or 'tokenizer'} reads a "
                         f"text otherwise than its tokenizer.json says, so its vectors would be "
                         f"wrong")


def make_lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds Lowercase to tokenizer.json's normalizer, unless it lower-cases already; other tools
    then do so too. Raises ValueError for a tokenizer that has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"do_lower_case: {type(tokenizer).__name__} has no normalizer for it")
    if backend.normalizer and backend.normalizer.normalize_str("A") == "a":
        return
    others = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
    # BertTokenizer would make its own again
    tokenizer.saved_class = "PreTrainedTokenizerFast"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, inputs: Iterable[str]
                   ) -> None:
    """inputs: the argument names of its model's forward. tokenizer.saved_class: the class that it
    came with."""
    if hasattr(tokenizer, "backend_tokenizer"):  # a few have none
        # else tokenizer.json would cut, or pad, everybody's texts
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = read_json(path)
    kind = getattr(tokenizer, "saved_class", None) or config["tokenizer_class"]
    if kind == "TokenizersBackend":  # which transformers 4 does not know
        kind = "PreTrainedTokenizerFast"
    if "Llama" in kind or "Gemma" in kind:  # version 4 adds tokens by these, not by tokenizer.json
        ids = tokenizer("a")["input_ids"]
        config["add_bos_token"] = ids[0] == tokenizer.bos_token_id
        config["add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    config["tokenizer_class"] = kind
    if isinstance(config.get("extra_special_tokens"), list):  # its name there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for field in ("is_local", "local_files_only"):  # of this machine
        config.pop(field, None)
    names = [name for name in tokenizer.model_input_names if name in inputs]
    write_json(path, config | {"padding_side": "right", "model_input_names": names})
