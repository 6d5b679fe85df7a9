"""What is put before a text when it is embedded, as "query: " or "passage: ": which prompts count
(--prompts, or else the manifest's, or else the model's), and that no text has them already. Texts
are told apart, kept and written without them."""

import json
from contextlib import suppress
from functools import partial
from pathlib import Path

from corpora.convert import read
from corpora.formats import DOCUMENT, Columns, Prompts, prompts_of, records
from corpora.index import hexdigest


def parse_prompts(text: str | None) -> Prompts | None:
    """The value of --prompts, a JSON object; None where it was not given."""
    if text is None:
        return None
    try:
        return prompts_of(json.loads(text), only=True)
    except json.JSONDecodeError:
        reason = 'not JSON; expected {"query": text, "document": text}'
    except ValueError as error:
        reason = error
    raise ValueError(f"--prompts {text}: {reason}")


def name_prompts(prompts: Prompts, named: dict[str, str]) -> dict[str, str]:
    """sentence-transformers' prompts by name, with these for queries and documents; where they are
    new, under a document's other names too."""
    names = DOCUMENT if prompts != prompts_of(named) else ()
    others = {name: prompts.document for name in names if name in named}
    return named | prompts._asdict() | others


def describe_prompts(prompts: Prompts, whose: str, named: dict[str, str]) -> str:
    """named: the model's, of which others may be meant."""
    others = [name for name in named if name not in ("query", *DOCUMENT) and named[name]]
    if not any(prompts) and others:
        return f"no prompts; the model has {', '.join(others)}, for --prompts to choose"
    if not any(prompts):
        return "no prompts"
    query, document = map(json.dumps, prompts)
    return f"prompts {query} and {document} ({whose})"


def with_prompt(prompt: str, text: str) -> str:
    """Raises ValueError where the text begins with it already: white space at its end aside, but
    not in the middle of a word."""
    ends = prompt.rstrip()
    if ends[-1:].isalnum():
        ends = prompt
    if ends and text.startswith(ends):
        raise ValueError(f'"{text[:40]}" already begins with the prompt "{prompt}"; take it out of '
                         f'the text, or give --prompts {{}}')
    return prompt + text


def set_prompts(sources: list, given: Prompts | None, own: Prompts) -> str:
    """Gives every source its prompts: `given` (--prompts), or else the manifest's, or else the
    model's `own`. -> whose they are."""
    whose = "the model's"
    if any(source.prompts is not None for source in sources):
        whose = "the manifest's"
    for source in sources:
        if given is not None:
            source.prompts = given
        elif source.prompts is None:
            source.prompts = own
    return whose if given is None else "--prompts"


def choose_prompts(sources: list, given: str | None, named: dict[str, str]
                   ) -> tuple[dict[str, str], str]:
    """Sets the prompts of the sources by --prompts, `given`, the manifest, and the model's `named`.
    -> those to save with the model, its own where the sources differ; and a line that says which
    and whose."""
    whose = set_prompts(sources, parse_prompts(given), prompts_of(named))
    chosen = {source.prompts for source in sources}
    if len(chosen) > 1:
        return named, f"prompts by source ({whose}); the model's own are kept for others"
    prompts = chosen.pop()
    return name_prompts(prompts, named), describe_prompts(prompts, whose, named)


def check_prompts(sources: list) -> None:
    """Reads all rows, and leaves word of it beside their index, for the next run with these
    prompts. Raises ValueError naming file and line where a text already begins with its prompt."""
    for source in sources:
        if not any(source.prompts):
            continue
        if source.eval:
            check_file(source.eval, source.prompts, source.columns)
        name = f"checked-{hexdigest(repr(source.prompts).encode())}"
        checked = Path(source.index.filename).with_name(name)
        if not checked.exists():
            check_file(source.path, source.prompts, source.columns)
            with suppress(OSError):  # another user's cache
                checked.touch()


def check_file(path: Path, prompts: Prompts, columns: Columns) -> None:
    for _ in read(path, partial(check_row, prompts=prompts, columns=columns)):
        pass  # it raises


def check_row(value: object, prompts: Prompts, columns: Columns) -> list:
    for query, positive, negatives, _ in records(value, columns):
        with_prompt(prompts.query, query)
        for text in (positive, *negatives):
            with_prompt(prompts.document, text)
    return []


def check_length(tokenizer, prompt: str, max_length: int) -> None:
    """Raises ValueError where a prompt leaves no token to a text."""
    if prompt and len(tokenizer(prompt)["input_ids"]) >= max_length:
        raise ValueError(f"the prompt {json.dumps(prompt)} alone fills the {max_length} tokens of "
                         f"a text; raise --max-length")
