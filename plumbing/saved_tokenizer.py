"""A model's tokenizer, from its directory and into one: read as tokenizer.json says, and written so
that transformers 4 and 5 open the same one.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from plumbing.model_directory import fetch, read_json, write_json

# scripts, accents, digits, white space: hardly read alike by two tokenizers
PROBE = "Ein Häuschen\tam See, 42.7 %: 你好，世界 привет don't re-read_it ÉTÉ "
# what transformers 5 reads and does not write again
FIELDS = "tokenizer_class", "add_bos_token", "add_eos_token"


def read_fields(name: str) -> dict:
    """Those of FIELDS that the directory's tokenizer_config.json has."""
    config = read_json(fetch(name) / "tokenizer_config.json") or {}
    return {field: config[field] for field in FIELDS if field in config}


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where transformers has built another tokenizer than tokenizer.json says.
    Fields of tokenizer_config.json may say otherwise which special tokens are added."""
    path = fetch(name) / "tokenizer.json"
    if not path.is_file():
        return
    own = Tokenizer.from_file(str(path))
    own.no_truncation()
    own.no_padding()
    fields = read_fields(name)
    special = not {"add_bos_token", "add_eos_token"} & set(fields)
    text = PROBE + " ".join(token.content for token in own.get_added_tokens_decoder().values())
    expected = own.encode(text, add_special_tokens=special).ids
    if tokenizer(text, add_special_tokens=special)["input_ids"] != expected:
        kind = fields.get("tokenizer_class", "tokenizer")
        raise ValueError(f"model {name}: transformers' {kind} reads a text otherwise than its "
                         f"tokenizer.json says, so its vectors would be wrong")


def make_lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """In tokenizer.json, so that other tools do too. Not where it is so already."""
    backend = tokenizer.backend_tokenizer
    if backend.normalizer and backend.normalizer.normalize_str("A") == "a":
        return
    others = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
    # BertTokenizer would make its own again
    tokenizer.saved_fields["tokenizer_class"] = "PreTrainedTokenizerFast"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, takes: Iterable[str]
                   ) -> None:
    """takes: the names of what its model takes. saved_fields of the tokenizer: `read_fields` of
    where it came from."""
    if hasattr(tokenizer, "backend_tokenizer"):  # a few have none
        # else tokenizer.json would cut, or pad, everybody's texts
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = read_json(path) | getattr(tokenizer, "saved_fields", {})
    if config["tokenizer_class"] == "TokenizersBackend":  # which transformers 4 does not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # its name there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for field in ("is_local", "local_files_only"):  # of this machine
        config.pop(field, None)
    inputs = [name for name in tokenizer.model_input_names if name in takes]
    write_json(path, config | {"padding_side": "right", "model_input_names": inputs})
