"""What is put before a text when it is embedded, as "query: " or "passage: ": whose it is, and that
it is not there already. Texts are told apart, kept and written without it."""

import json
from collections import deque

from corpora.formats import DOCUMENT, Prompts, prompts_of, read_lines, records


def parse_prompts(text: str | None) -> Prompts | None:
    """The value of --prompts, a JSON object; None where it was not given."""
    if text is None:
        return None
    try:
        return prompts_of(json.loads(text), only=True)
    except ValueError as error:
        raise ValueError(f"--prompts {text}: {error}") from None


def name_prompts(prompts: Prompts, named: dict[str, str]) -> dict[str, str]:
    """sentence-transformers' prompts by name, with these for queries and for documents, whichever
    of their names is looked for first."""
    documents = [name for name in DOCUMENT if name in named]
    return named | prompts._asdict() | dict.fromkeys(documents, prompts.document)


def describe_prompts(prompts: Prompts, whose: str) -> str:
    if not any(prompts):
        return "no prompts"
    query, document = map(json.dumps, prompts)
    return f"prompts {query} and {document} ({whose})"


def with_prompt(prompt: str, text: str) -> str:
    """Raises ValueError where the text begins with it already."""
    if prompt.strip() and text.startswith(prompt.strip()):
        raise ValueError(f'"{text[:40]}" already begins with the prompt "{prompt}"; take it out of '
                         f'the text, or give --prompts {{}}')
    return prompt + text


def choose_prompts(sources: list, given: str | None, named: dict[str, str]
                   ) -> tuple[dict[str, str], str]:
    """Gives every source its prompts: `given` (--prompts), or else the manifest's, or else the
    model's, `named`. -> those to save with the model, its own where the sources differ; and a line
    that says which and whose."""
    given, whose = parse_prompts(given), "the model's"
    if given:
        whose = "--prompts"
    elif any(source.prompts for source in sources):
        whose = "the manifest's"
    for source in sources:
        source.prompts = given or source.prompts or prompts_of(named)
    chosen = {source.prompts for source in sources}
    if len(chosen) > 1:
        return named, f"prompts by source ({whose}); the model's own are kept for others"
    prompts = chosen.pop()
    return name_prompts(prompts, named), describe_prompts(prompts, whose)


def check_prompts(sources: list) -> None:
    """Raises ValueError naming file and line where a text already begins with its prompt: then it
    would stand there twice, in training alone."""
    for source in sources:
        def check(value: object) -> list:
            for query, positive, negatives, _ in records(value):
                with_prompt(source.prompts.query, query)
                for text in (positive, *negatives):
                    with_prompt(source.prompts.document, text)
            return []

        if any(source.prompts):
            for path in filter(None, (source.path, source.eval)):
                deque(read_lines(path, check), maxlen=0)
