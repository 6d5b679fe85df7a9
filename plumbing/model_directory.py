"""What a model's directory says beyond its weights, in sentence-transformers' files.

    modules.json                       the modules in order: encoder, pooling, Dense, Normalize
    1_Pooling/config.json              mean, cls or lasttoken
    2_Dense                            a layer after the pooling
    config_sentence_transformers.json  prompts, similarity
    sentence_bert_config.json          the longest text, lower case

What changes a vector is used or refused by name; the rest is carried over to the next save. Nothing
here knows how the model is trained.
"""

import json
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from corpora.formats import Prompts, prompts_of
from corpora.prompts import name_prompts
from plumbing.files import follow_umask, read_json, write_json

POOLING_FLAGS = {  # sentence-transformers' fields of 1_Pooling, before its version 6 and since
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean"}
# what these files say of an ordinary encoder of texts; another value changes what it computes
KNOWN_POOLING = {"word_embedding_dimension": ..., "embedding_dimension": ..., "pooling_mode": ...,
                  "include_prompt": True, **dict.fromkeys(POOLING_FLAGS, ...)}
KNOWN_HEAD = {"in_features": ..., "out_features": ..., "bias": ..., "activation_function": ...,
              "module_input_name": "sentence_embedding",
              "module_output_name": "sentence_embedding", "use_residual": False}
KNOWN_TRANSFORMER = {
    "max_seq_length": ..., "do_lower_case": ..., "unpad_inputs": ..., "model_args": {},
    "tokenizer_args": {}, "config_args": {}, "processing_kwargs": {}, "query_length": None,
    "document_length": None, "query_expansion": None, "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}}
# sentence_NAME_config.json, the first that there is, in sentence-transformers' order
SENTENCE_CONFIGS = "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"


class Settings(NamedTuple):
    """What a directory says; a bare encoder says nothing."""

    encoder: str  # folder or hub name of the encoder's own files
    pooling: str | None = None
    head: tuple[nn.Module, ...] = ()  # what follows the pooling
    max_length: int | None = None
    lower_case: bool = False
    similarity: str = "cosine"
    prompts: dict[str, str] = {}  # by name
    more: dict = {}  # all of config_sentence_transformers.json


class Dense(nn.Sequential):
    """A linear layer and what it is passed through."""

    def __init__(self, linear: nn.Linear, activation: nn.Module):
        super().__init__(OrderedDict(linear=linear, activation_function=activation))


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


# reading

def fetch(name: str) -> Path:
    """The directory, or of a hub name the local folder that has all its files but the encoder's
    weights. Raises OSError."""
    if Path(name).is_dir():
        for weights in Path(name).glob("*.safetensors"):
            weights.open("rb").close()  # PermissionError; safetensors says "no file"
        return Path(name)
    try:
        return download(name)
    except Exception as error:  # no such name, no network, not even a name
        raise OSError(f"model {name}: neither a directory nor a name that the hub gave us "
                      f"({str(error).strip().splitlines()[0]})") from error


@cache
def download(name: str) -> Path:
    return Path(snapshot_download(
        name, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja", "[0-9]*_*/*"],
        ignore_patterns=["*.h5", "*.onnx", "*.msgpack", "*.ot"]))


def check_fields(path: Path, found: dict, known: dict) -> None:
    """Raises ValueError for a field that is not known, or has another value than the known one
    (...: any)."""
    for field, value in found.items():
        if field not in known:
            raise ValueError(f'{path}: field "{field}" is unknown here; remove it if it changes no '
                             f'vector')
        if known[field] is not ... and value != known[field]:
            raise ValueError(f'{path}: field "{field}": found {json.dumps(value)}, only '
                             f'{json.dumps(known[field])} is known here')


def read(name: str) -> Settings:
    """What the directory, or hub name, says. Raises OSError where it is none, and ValueError, one
    line each, where it says what is not known here."""
    root = fetch(name)
    check_adapter(name, root)
    modules = read_json(root / "modules.json", list)
    if modules is None:
        check_bare(name, root)
        return Settings(name)
    try:
        kinds = [str(one["type"]) for one in modules]
        folders = [root / one["path"] for one in modules]
    except (TypeError, KeyError):
        raise ValueError(f"{root / 'modules.json'}: expected a list of modules, each with a type "
                         f"and a path") from None
    own = [kind for kind in kinds if not kind.startswith("sentence_transformers.")]
    if own:
        raise ValueError(f"model {name}: its module {own[0]} is code of its own, which is not run "
                         f"here")
    kinds = [kind.rpartition(".")[2] for kind in kinds]
    if kinds[:2] != ["Transformer", "Pooling"] or {*kinds[2:]} - {"Dense", "Normalize"}:
        raise ValueError(f"model {name}: its modules are {', '.join(kinds)}; known are Transformer "
                         f"and Pooling, and after these Dense and Normalize")
    more = read_json(root / "config_sentence_transformers.json") or {}
    if more.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise ValueError(f"model {name}: is a {more['model_type']}, not a SentenceTransformer")
    check_adapter(name, folders[0])
    check_sentence_config(root / "config_sentence_transformers.json", more)
    head = tuple(read_head_module(kind, folder) for kind, folder in zip(kinds[2:], folders[2:]))
    length, lower_case = read_transformer(folders[0])
    encoder = name if folders[0] == root else str(folders[0])
    return Settings(encoder, read_pooling(folders[1] / "config.json"), head, length, lower_case,
                    more.get("similarity_fn_name") or "cosine", read_prompts(more), more)


def check_bare(name: str, root: Path) -> None:
    """Raises ValueError where there is no modules.json, but should be."""
    for found in ("1_Pooling", "config_sentence_transformers.json"):
        if (root / found).exists():
            raise ValueError(f"model {name}: has {found}, but no modules.json that says it counts; "
                             f"add that, or remove {found}")
    if Path(name).is_dir():
        return
    try:
        hf_hub_download(name, "modules.json")
    except LocalEntryNotFoundError:  # and no network to ask
        if try_to_load_from_cache(name, "modules.json") is None:
            raise ValueError(f"model {name}: its modules.json was never asked for, so its pooling "
                             f"is not known; open it once with a network") from None
    except EntryNotFoundError:
        pass


def read_encoder(name: str) -> Settings:
    """Of a directory whose other modules do not count, as a reranker's."""
    check_adapter(name, fetch(name))
    length, lower_case = read_transformer(fetch(name))
    return Settings(name, max_length=length, lower_case=lower_case)


def check_adapter(name: str, folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"model {name}: a LoRA adapter; merge it into its model "
                         f"(merge_and_unload of peft) and give that")


def check_sentence_config(path: Path, more: dict) -> None:
    """Raises ValueError where config_sentence_transformers.json says what is not done here."""
    try:
        prompts_of(more.get("prompts") or {})
    except ValueError as error:
        raise ValueError(f'{path}: field "prompts": {error}') from None
    default, prompts = more.get("default_prompt_name"), more.get("prompts") or {}
    if default is not None and default not in list(prompts):
        raise ValueError(f'{path}: field "default_prompt_name": found {json.dumps(default)}, which '
                         f'is none of its prompts')
    if more.get("truncate_dim") is not None:
        raise ValueError(f'{path}: field "truncate_dim": vectors are not cut here; remove it')


def read_prompts(more: dict) -> dict[str, str]:
    """By name, "document" among them: sentence-transformers always has one, and looks for it
    first."""
    prompts = {name: prompt or "" for name, prompt in (more.get("prompts") or {}).items()}
    return name_prompts(prompts_of(prompts), prompts) if prompts else {}


def read_pooling(path: Path) -> str:
    """By name; of several "mean and max", of none "nothing", which no encoder does here."""
    config = read_json(path)
    if not config:
        raise ValueError(f"{path}: no such file, or it is empty")
    check_fields(path, config, KNOWN_POOLING)
    flags = set(POOLING_FLAGS) & set(config)
    if not flags and "pooling_mode" not in config:
        return "mean"  # sentence-transformers' default
    modes = config.get("pooling_mode", [])
    modes = modes if isinstance(modes, list) else [modes]
    modes += [POOLING_FLAGS[flag] for flag in POOLING_FLAGS
              if config.get(flag) and POOLING_FLAGS[flag] not in modes]
    return " and ".join(map(str, modes)) or "nothing"


def read_head_module(kind: str, folder: Path) -> nn.Module:
    """A Dense or Normalize."""
    path = folder / "config.json"
    config = read_json(path) or {}
    check_fields(path, config, KNOWN_HEAD)
    if kind == "Normalize":
        return Normalize()
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    made = getattr(nn, activation.rpartition(".")[2], None)
    if made is None or not activation.startswith("torch.nn."):
        raise ValueError(f'{path}: field "activation_function": found {activation}, expected one '
                         f'of torch.nn')
    try:
        # without random weights, and so without a draw
        linear = nn.utils.skip_init(nn.Linear, config["in_features"], config["out_features"],
                                    config.get("bias", True))
        dense = Dense(linear, made())
        if (folder / "model.safetensors").is_file():
            weights = load_file(folder / "model.safetensors")
        else:
            weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
        dense.load_state_dict(weights)
    except Exception as error:  # a field, the file, or a weight is missing or of another shape
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: this layer does not open ({reason})") from error
    return dense


def check_widths(settings: Settings, width: int) -> None:
    """Raises ValueError where a Dense does not take what comes before it, at first the pooling."""
    for number, module in enumerate(settings.head, 2):
        if isinstance(module, Dense):
            if module.linear.in_features != width:
                raise ValueError(f"model {settings.encoder}: its Dense, module {number}, takes "
                                 f"{module.linear.in_features} numbers, but {width} come in")
            width = module.linear.out_features


def read_transformer(folder: Path) -> tuple[int | None, bool]:
    """The longest text in tokens, if said, and whether texts are made lower case."""
    for name in SENTENCE_CONFIGS:
        path = folder / f"sentence_{name}_config.json"
        config = read_json(path)
        if config is None:
            continue
        check_fields(path, config, KNOWN_TRANSFORMER)
        length = config.get("max_seq_length")
        if length is not None and (type(length) is not int or length < 3):
            raise ValueError(f'{path}: field "max_seq_length": found {json.dumps(length)}, '
                             f'expected a whole number from 3 on: [CLS], a token, [SEP]')
        lower_case = config.get("do_lower_case") or False
        if type(lower_case) is not bool:
            raise ValueError(f'{path}: field "do_lower_case": found {json.dumps(lower_case)}, '
                             f'expected true or false')
        return length, lower_case
    return None, False


# describing

def describe(encoder: nn.Module) -> str:
    """A line on how a text becomes a vector, and whose choice that is."""
    settings = encoder.settings or Settings("")
    paper = encoder.pooling == "mean" and not settings.pooling
    parts = [f"{encoder.pooling} pooling ({'the paper' if paper else 'the model'}'s)"]
    for module in encoder.head:
        if isinstance(module, Dense):
            parts.append(f"Dense {module.linear.in_features} -> {module.linear.out_features}, "
                         f"trained too, which the paper does without")
        else:
            parts.append("Normalize")
    if settings.similarity != "cosine":
        parts.append(f"similarity {settings.similarity}, kept for others, while the loss takes "
                     f"cosines")
    parts += encoder.notes
    return "; ".join(parts)


def prompts_for(encoder: nn.Module, one_sided: bool) -> Prompts:
    """The model's. one_sided: for texts that are neither queries nor documents, the prompt that
    sentence-transformers' `encode` puts before them, by default none."""
    if not one_sided:
        return prompts_of(encoder.prompts)
    settings = encoder.settings or Settings("")
    prompt = encoder.prompts.get(settings.more.get("default_prompt_name") or "", "")
    return Prompts(prompt, prompt)


# writing

def write(directory: Path, encoder: nn.Module, max_length: int) -> None:
    """modules.json and what it names, beside a PooledEncoder's backbone that is written already.
    Every field is there, for other readers than sentence-transformers have no defaults."""
    settings, head = encoder.settings or Settings(""), encoder.head
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [(f"{i}_{type(one).__name__}", type(one).__name__) for i, one in enumerate(head, 2)]
    write_json(directory / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)])
    for path, _ in modules[1:]:
        (directory / path).mkdir(exist_ok=True)
    write_json(directory / "1_Pooling" / "config.json", {
        "word_embedding_dimension": encoder.backbone.config.hidden_size,
        **{field: mode == encoder.pooling for field, mode in POOLING_FLAGS.items()},
        "include_prompt": True})
    for (path, _), module in zip(modules[2:], head):
        if isinstance(module, Dense):
            linear, activation = module
            kind = type(activation)
            write_json(directory / path / "config.json", {
                "in_features": linear.in_features, "out_features": linear.out_features,
                "bias": linear.bias is not None,
                "activation_function": f"{kind.__module__}.{kind.__name__}"})
            weights = {name: x.contiguous() for name, x in module.state_dict().items()}
            save_file(weights, directory / path / "model.safetensors", {"format": "pt"})
    write_json(directory / "sentence_bert_config.json",  # no reader's integer is as large as 1e30
               {"max_seq_length": min(max_length, 1 << 30), "do_lower_case": settings.lower_case})
    write_json(directory / "config_sentence_transformers.json", settings.more | {
        "prompts": encoder.prompts, "default_prompt_name": settings.more.get("default_prompt_name"),
        "similarity_fn_name": settings.similarity})
    follow_umask(directory)


def rotary_fields(config: dict) -> dict:
    """The fields in which transformers 4, and others, look for the base of rotary positions."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = rope if rope.get("rope_type", "default") != "default" else None
        return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return {f"{name}_rope_theta": rope[f"{kind}_attention"]["rope_theta"]
            for name, kind in (("global", "full"), ("local", "sliding"))
            if f"{kind}_attention" in rope and config["model_type"] == "modernbert"}
