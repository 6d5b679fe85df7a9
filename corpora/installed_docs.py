"""The default corpus (§5.1): pairs from the documentation and code that requirements.txt installs.

Paper: about 40 sources of text pairs, a title and its abstract among them. Ours: seven sources that
are on every machine this runs on, cut from the standard library and the dependency closure of
requirements.txt. Files are read as text, never imported; the same Python and the same installed
versions give the same bytes. Nothing here knows what the pairs are for: no hold-out, no tokens, no
model.

    python -m corpora.installed_docs    builds what is not built yet, then prints it with examples
"""

import ast
import contextlib
import gc
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sysconfig
import textwrap
import threading
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from itertools import groupby
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

from plumbing.files import publish, sweep
from plumbing.refusals import run_command

FORMAT = 1  # raise it whenever the same files give other pairs
HERE = Path(__file__).resolve().parent

# Paper: a source's sampling rate follows its quality and its size; the rates are not published.
# Ours: quality x sqrt(pairs). The root keeps the largest source (comments, noisy and short) from
# filling every other batch. A summary and its body stand highest: they are our title-abstract
# pairs, which the paper has for clustering, and the most like prose.
QUALITY = {"summary_body": 3.0, "summary_code": 1.5, "name_summary": 1.0,
           "parameter_description": 1.0, "error_raiser": 1.0, "comment_code": 0.75,
           "testname_test": 0.75}
NAMED = ("name_summary", "parameter_description", "testname_test")  # a query of few, chosen words

QUERY_CHARS = 600  # a longer first sentence is no summary, a longer comment is about more
TARGET_CHARS = 1500  # about 400 tokens; what is longer is cut after a word, as it would be later
TARGET_WORDS = 4  # `pass`, `return self.x` and "See above." say nothing of their query
CODE_LINES = 12  # under a comment or before an error: about 128 tokens, the default --max-length
PROCESSES = 16  # each imports the main script anew; more would take longer to start than to read

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# A script writes half of transformers' models from the other half, and says so at their top.
GENERATED = re.compile(
    r"^#.*(auto(matically|-| )?generated|generated (by|from|content)|do not (edit|modify))",
    re.I | re.M)
# Texts that speak to tools or lawyers, or point elsewhere.
NOISE = re.compile(
    r"\W*(todo|fixme|xxx|hack|noqa|nosec|type:|py(lint|right|re)\b|pragma|fmt:|isort|mypy|ruff|"
    r"flake8|yapf|see above|same as|(copied|adapted|taken|modified) from)|"
    r".*(copyright|licen[sc]e|spdx|-\*-)", re.I | re.S)
# A list, where a summary should be.
LIST = re.compile(
    r"\W*(arg(ument)?|parameter|attribute|return|example)s?:|>>>|:\w+ |\W*\w+ \(`", re.I)
# name (type): text, name : type, name: text and :param type name: text. Only names in the signature
# will count, so the Google, numpy, reST and Hugging Face styles need no list of section titles.
ENTRY = re.compile(
    r"(?P<indent>\s*)(?:[:@](?:param|arg)\s+(?:[^:]*\s)?(?P<rest>\w+):\s*|"
    r"(?:[-*]\s+)?[*`]*(?P<name>\w+)[*`]*(?:,\s*\*{0,2}\w+)*"
    r"(?:\s*\(.*?\)\s*:(?:\s+|$)|\s+:\s+(?P<type>.*)|:\s+|:$))(?P<text>.*)")


# text

def in_words(identifier: str) -> str:
    """HTTPServer_version -> http server version, DTensor -> dtensor."""
    boundary = r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z]{2})(?=[A-Z][a-z])|_+"
    return re.sub(boundary, " ", identifier).strip().lower()


def one_line(text: str) -> str:
    return " ".join(text.split())


def code(lines: list[str | None]) -> str:
    """Lines without their common indentation; None is a line that is left out."""
    kept = [line for line in lines if line is not None]
    return textwrap.dedent("\n".join(kept)).strip("\n").rstrip()


def is_code(line: str) -> bool:
    """Whether a line of a comment is commented-out code: it parses, and is more than words."""
    if not re.search(r"[=(\[.:@]", line):
        return False
    try:
        ast.parse(line + " pass" if line.endswith(":") else line)
        return True
    except (SyntaxError, ValueError):
        return line.endswith(("(", "[", "{"))


def is_pair(source: str, query: str, target: str) -> bool:
    words = len(query.split())
    if source in NAMED:
        good_query = words >= 2
    else:
        good_query = words >= 3 and share_of_letters(query) >= 0.7 and not LIST.match(query)
    enough_words = len(re.findall(r"[^\W\d_]{2,}", target)) >= TARGET_WORDS
    good_target = enough_words and share_of_letters(target) >= 0.4  # no tables, no drawings
    noisy = NOISE.match(query) or NOISE.match(target)
    return bool(good_query and good_target and not noisy and len(query) <= QUERY_CHARS
                and query.casefold() != target.casefold())


def share_of_letters(text: str) -> float:
    """Of what is not white space."""
    letters, spaces = sum(map(str.isalpha, text)), sum(map(str.isspace, text))
    return letters / max(1, len(text) - spaces)


def hashes(text: str) -> tuple[bytes, bytes]:
    """One of the text without case, spacing and numbers, and one that near copies share: of the
    three smallest among its three-word shingles. Words with capitals are left out of these, for the
    name of the class or model is what copies change."""
    plain = re.sub(r"\d+", "0", one_line(text).casefold())
    words = [word for word in re.findall(r"[^\W\d_]+", text) if word.islower()]
    words = words[:100]  # a model reads little more
    shingles = {zlib.crc32(" ".join(words[i:i + 3]).encode()) for i in range(len(words) - 2)}
    # Too short a text has no near copies, only copies.
    near = str(sorted(shingles)[:3]) if len(shingles) >= 8 else plain
    return hash_of(plain), hash_of(near)


def hash_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


# one file

def survey(tree: ast.Module, lines: list[str]) -> tuple[list, list, set]:
    """(definition, name of the class it is in), (raise or assert, its message, function it is in),
    and the numbers of the lines that begin inside a string.

    Walks statements only, since most of a tree is expressions; of those, only where a string may
    hold a line with a `#`."""
    definitions, errors, inside = [], [], set()
    stack = [(tree, "", None)]
    while stack:
        node, owner, function = stack.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
            definitions.append((node, owner))
            owner = node.name if isinstance(node, ast.ClassDef) else ""
            function = node if isinstance(node, FUNCTIONS) else function
        elif isinstance(node, (ast.Raise, ast.Assert)) and function:
            message = message_of(node)
            if message_text(message):
                errors.append((node, message, function))
        blocks = []
        for field in ("body", "cases", "handlers", "orelse", "finalbody"):
            blocks += getattr(node, field, [])
        stack += [(child, owner, function) for child in reversed(blocks)]
        if not blocks and any(is_comment(line) for line in lines[node.lineno:node.end_lineno]):
            for part in ast.walk(node):
                if isinstance(part, (ast.Constant, ast.JoinedStr)):
                    inside.update(range(part.lineno + 1, part.end_lineno + 1))
    return definitions, errors, inside


def is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def message_of(node: ast.Raise | ast.Assert) -> ast.expr | None:
    """The message of an assertion, or the first argument of what is raised."""
    if isinstance(node, ast.Assert):
        return node.msg
    arguments = getattr(node.exc, "args", [])
    return arguments[0] if arguments else None


def message_text(node: ast.expr | None) -> str:
    if isinstance(node, ast.JoinedStr):
        parts = [message_text(part) or "{" + ast.unparse(part.value) + "}" for part in node.values]
        return "".join(parts)
    if isinstance(node, ast.BinOp):  # "a" + "b", "a %s" % b
        added = message_text(node.right) if isinstance(node.op, ast.Add) else ""
        return message_text(node.left) + added
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) \
            and node.func.attr == "format":
        return message_text(node.func.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ""


def docstring(node: ast.AST) -> tuple[str, str, str, int]:
    """The text, its first sentence, the rest, and the index of the line where the code begins."""
    text = ast.get_docstring(node) or ""
    first, _, rest = text.partition("\n\n")
    end_of_sentence = r"(?<=[a-z)`'\"][.!?])(?<!\.[a-z]\.)\s+(?=[A-Z`])"  # not after e.g.
    summary, *more = re.split(end_of_sentence, one_line(first), maxsplit=1)
    start = node.body[0].end_lineno if text else node.body[0].lineno - 1
    return text, summary, "\n\n".join([*more, rest]).strip(), start


def signature(node: ast.AST) -> list[str]:
    """Names that a docstring may describe: the parameters; of a class those of __init__ and
    forward, and the annotated fields."""
    if isinstance(node, FUNCTIONS):
        args = node.args
        every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
        return [arg.arg for arg in every if arg]
    fields, parameters = [], []
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            fields.append(child.target.id)
        elif isinstance(child, FUNCTIONS) and child.name in ("__init__", "forward"):
            parameters += signature(child)
    return fields + parameters


def parameters(text: str, names: list[str]) -> Iterator[tuple[str, str]]:
    """(parameter, description): the rest of an entry's line and the deeper lines under it, up to an
    empty one."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        entry = ENTRY.fullmatch(line)
        if entry and (entry["rest"] or entry["name"]) in names:
            deeper = re.compile(re.escape(entry["indent"]) + r"\s+\S")
            end = i + 1
            while end < len(lines) and deeper.match(lines[end]):
                end += 1
            description = one_line(" ".join([entry["text"], *lines[i + 1:end]]))
            yield entry["rest"] or entry["name"], description


def defined(definitions: list, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """(source, query, target) of all sources but two."""
    for node, owner in definitions:
        text, summary, rest, start = docstring(node)
        if getattr(node, "name", "__init__") == "__init__":  # or a module
            name = in_words(owner)
        else:
            name = in_words(f"{owner}_{node.name}")
        body = code(lines[start:getattr(node, "end_lineno", start)])  # without the first line
        if isinstance(node, FUNCTIONS) and node.name.startswith("test"):
            words = [word for word in name.split() if word not in ("test", "tests", "case")]
            yield "testname_test", " ".join(words), body
        yield "summary_body", summary, rest
        if text and not isinstance(node, ast.Module):
            yield "summary_code", summary, body
            yield "name_summary", name, "" if LIST.match(summary) else summary
            for parameter, description in parameters(text, signature(node)):
                yield "parameter_description", f"{name}: {in_words(parameter)}", description


def raised(errors: list, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """The message against the function's head and the lines up to the error. The message is taken
    out (`...`), and so is every other message in reach: it would match a query word for word, once
    rightly and once wrongly."""
    silent = list(lines)
    by_place = sorted(errors, key=lambda error: (error[1].lineno, error[1].col_offset))
    for _, message, _ in reversed(by_place):  # from the end, so that places before it stay
        first, last = message.lineno - 1, message.end_lineno - 1
        before = silent[first].encode()[:message.col_offset]  # ast counts columns in bytes
        after = silent[last].encode()[message.end_col_offset:]
        silent[first:last + 1] = [(before + b"..." + after).decode()] + [None] * (last - first)
    for node, message, function in errors:
        indent, names = " " * function.col_offset, ", ".join(signature(function))
        start = max(docstring(function)[3], node.end_lineno - CODE_LINES)
        target = code([f"{indent}def {function.name}({names}):", *silent[start:node.end_lineno]])
        yield "error_raiser", one_line(message_text(message)), target


def commented(lines: list[str], inside: set[int], first: int) -> Iterator[tuple[str, str, str]]:
    """A block of comment lines against the code right under it, down to an empty line, a comment or
    an outer block. Comments above the first statement of a file are its licence."""
    def in_comment(i: int) -> bool:
        return is_comment(lines[i]) and i + 1 not in inside

    for found, block in groupby(range(first, len(lines)), in_comment):
        if not found:
            continue
        block = list(block)
        indent = len(lines[block[0]]) - len(lines[block[0]].lstrip())
        below = re.compile(rf"\s{{{indent},}}[^#\s]")
        comment = [lines[i].strip().lstrip("#!:").strip() for i in block
                   if re.search(r"\w", lines[i])]  # no # -----
        start = end = block[-1] + 1
        while end < min(start + CODE_LINES, len(lines)) and below.match(lines[end]):
            end += 1
        if not any(NOISE.match(line) or is_code(line) for line in comment):
            yield "comment_code", one_line(" ".join(comment)), code(lines[start:end])


def pairs_of_file(text: str) -> dict[str, list[tuple[str, str]]]:
    """{source: [(query, target), ...]} of one Python file, in the order of the file; all empty if
    it does not parse."""
    pairs = {source: [] for source in QUALITY}
    try:
        tree = ast.parse("" if GENERATED.search(text[:1000]) else text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a NUL
        return pairs
    if not tree.body:
        return pairs
    lines = text.split("\n")
    definitions, errors, inside = survey(tree, lines)
    found = [*defined(definitions, lines), *raised(errors, lines),
             *commented(lines, inside, tree.body[0].lineno - 1)]
    for source, query, target in found:
        query, target = without_surrogates(query), without_surrogates(target)
        if len(target) > TARGET_CHARS:
            target = target[:TARGET_CHARS].rsplit(None, 1)[0]
        if is_pair(source, query, target):
            pairs[source].append((query, target))
    return pairs


def without_surrogates(text: str) -> str:
    """An escape in a string may give half of a pair, which no file can hold."""
    return text.encode("utf-8", "ignore").decode()


def start_worker() -> None:
    gc.disable()  # trees have no cycles: to walk them for nothing took a tenth of the time
    warnings.simplefilter("ignore")  # other people's escapes and comparisons
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A pool whose own process is killed would leave this one running."""
    multiprocessing.parent_process().join()
    os._exit(1)


def read(path: Path) -> dict[str, list[tuple]]:
    """pairs_of_file for a path, with the hashes of both sides. Runs in a worker."""
    try:
        with tokenize.open(path) as file:  # honours the coding line
            pairs = pairs_of_file(file.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    return {source: [(query, target, hashes(query), hashes(target)) for query, target in rows]
            for source, rows in pairs.items()}


# all files

def closure(lines: list[str]) -> dict[str, metadata.Distribution]:
    """{name: distribution} of the requirements and all that they need here; what else is installed
    does not count. What they need and is not installed is left out: the corpus is of what there is,
    and its fingerprint says so."""
    found, seen = {}, set()
    queue = [(line, "") for line in lines]  # and the extra that asks for it
    while queue:
        line, asked_by = queue.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": asked_by}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            queue += [(needed, extra) for needed in found[name].requires or []]
    return dict(sorted(found.items()))


def installed() -> dict[str, list[Path]]:
    """{"name==version": its Python files} for Python itself and the closure of requirements.txt."""
    text = (HERE.parent / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in library.rglob("*.py")
             if "-packages" not in str(path.relative_to(library))]  # site-, dist-
    roots = {f"python=={platform.python_version()}": sorted(files)}
    for name, package in closure(lines).items():
        files = [file for file in package.files or []
                 if file.suffix == ".py" and file.parts[0] != ".."]
        roots[f"{name}=={package.version}"] = [Path(package.locate_file(file))
                                               for file in sorted(files)]
    return roots


def read_all(files: list[Path]) -> Iterator[dict[str, list[tuple]]]:
    """`read` of each file, in their order. Raises OSError where a process that reads is killed."""
    # spawn: train.py has imported torch by now, and to fork a process that has threads can hang.
    workers, context = min(os.cpu_count() or 1, PROCESSES), multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker)
    # A Ctrl-C goes to every process of a terminal, and is for this one: the others are started with
    # it blocked. (Their tracker, whose start unblocks it, was started by the pool's queues.)
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        try:
            results = pool.map(read, files, chunksize=16)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        yield from results
    except BrokenProcessPool:
        raise OSError("a process that reads the packages' files has ended: memory ran out (free "
                      "some, and begin again), or its own error stands above") from None
    finally:
        pool.shutdown(cancel_futures=True)


def unique(files: list[Path]) -> dict[str, list[tuple[str, str]]]:
    """{source: pairs}: of equal and nearly equal queries the first only; of targets likewise."""
    pairs = {source: [] for source in QUALITY}
    seen_queries = {source: set() for source in QUALITY}
    seen_targets = {source: set() for source in QUALITY}
    with contextlib.closing(read_all(files)) as results:
        for found in tqdm(results, total=len(files), unit="file", desc="installed_docs"):
            for source, rows in found.items():
                queries, targets = seen_queries[source], seen_targets[source]
                for query, target, query_hashes, target_hashes in rows:
                    if queries.isdisjoint(query_hashes) and targets.isdisjoint(target_hashes):
                        queries.update(query_hashes)
                        targets.update(target_hashes)
                        pairs[source].append((query, target))
    return {source: rows for source, rows in pairs.items() if rows}


def write(pairs: dict[str, list[tuple[str, str]]], directory: Path) -> None:
    weights = {source: QUALITY[source] * math.sqrt(len(rows)) for source, rows in pairs.items()}
    total = sum(weights.values())
    manifest = []
    for source, rows in pairs.items():
        with open(directory / f"{source}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in rows)
        manifest.append({"name": source, "path": f"{source}.jsonl",
                         "rate": round(weights[source] / total, 6)})
    text = json.dumps(manifest, indent=1) + "\n"
    (directory / "manifest.json").write_text(text, encoding="utf-8")


def build(directory: Path | None = None, roots: dict[str, list[Path]] | None = None) -> Path:
    """The path of manifest.json in a folder under `directory` (corpora/built), built first if it is
    not there yet: complete or absent.

    roots: {"name==version": files} to read instead of what is installed; the names alone decide the
    folder's name. Raises OSError if it cannot be written.
    """
    roots = installed() if roots is None else roots
    files = [path for paths in roots.values() for path in paths]
    versions = "\n".join([f"format {FORMAT}", *roots])
    fingerprint = hashlib.sha256(versions.encode()).hexdigest()[:12]
    final = Path(directory or HERE / "built") / f"installed_docs-{fingerprint}"
    sweep(final.parent)
    if not final.is_dir():
        print(f"installed_docs: building {final} from {len(files):,} files of {len(roots)} "
              f"packages, once for these versions")
        publish(final, lambda part: write(unique(files), part), replace=False)
    return final / "manifest.json"


def main() -> None:
    manifest = build()
    print(f"{manifest}\n{'source':24} {'pairs':>8}  words q / t    rate")
    for entry in json.loads(manifest.read_text(encoding="utf-8")):
        text = (manifest.parent / entry["path"]).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
        query, target = (sum(len(row[side].split()) for row in rows) / len(rows) for side in (0, 1))
        print(f"{entry['name']:24} {len(rows):8,} {query:6.1f} / {target:<5.1f} "
              f"{entry['rate']:6.3f}")
        for row in rows[len(rows) // 6::len(rows) // 3 or 1][:3]:
            print("    " + " -> ".join(textwrap.shorten(side, 70, placeholder=" ...")
                                       for side in row))


if __name__ == "__main__":
    run_command("installed_docs", main, memory="free some, and begin again")
