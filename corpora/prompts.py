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


def describe_prompts(prompts: Prompts | None, whose: str) -> str:
    """None: they differ."""
    if prompts is None:
        return f"prompts by source ({whose}); those of the model's directory are kept as they are"
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


def choose_prompts(sources: list, given: Prompts | None, model: Prompts
                   ) -> tuple[Prompts | None, str]:
    """Gives every source its prompts: `given` (--prompts), or else the manifest's, or else the
    model's. -> those of all sources, None where they differ; and a line that says which and
    whose."""
    whose = "the model's"
    if given:
        whose = "--prompts"
    elif any(source.prompts for source in sources):
        whose = "the manifest's"
    for source in sources:
        source.prompts = given or source.prompts or model
    common = sources[0].prompts if len({source.prompts for source in sources}) == 1 else None
    return common, describe_prompts(common, whose)


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
