"""The default corpus (§5.1): pairs of texts from the documentation and code that requirements.txt itself installs.

Paper: about 40 sources of text pairs, a title and its abstract among them. Ours: seven sources that are on every machine
this runs on, cut from the standard library and the dependency closure of requirements.txt. Files are read as text, never
imported; the same Python and the same installed versions give the same bytes. Nothing here knows what the pairs are for:
no hold-out, no tokens, no model.

    python -m corpora.installed_docs        builds what is not built yet, then prints the sources with examples
"""

import ast
import gc
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import sysconfig
import textwrap
import tokenize
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

FORMAT = 1  # raise it whenever the same files give other pairs
HERE = Path(__file__).resolve().parent

# Paper: a source's sampling rate follows its quality and its size; the rates are not published. Ours: quality x sqrt(pairs).
# The root keeps the largest source (comments, noisy and short) from filling every other batch. A summary and its body stand
# highest: they are our title-abstract pairs, which the paper has for clustering, and the most like prose.
QUALITY = {"summary_body": 3.0, "summary_code": 1.5, "name_summary": 1.0, "parameter_description": 1.0,
           "error_raiser": 1.0, "comment_code": 0.75, "testname_test": 0.75}
NAMED = ("name_summary", "parameter_description", "testname_test")  # the query is a name: few words, but each one chosen

QUERY_CHARS = 600  # a longer first sentence is no summary, a longer comment is about more than the next lines
TARGET_CHARS = 1500  # about 400 tokens; what is longer is cut after a word, as the tokenizer would cut it later
TARGET_WORDS = 4  # `pass`, `return self.x` and "See above." say nothing of their query
CODE_LINES = 12  # under a comment or before an error: about what 128 tokens, the default --max-length, can hold
PROCESSES = 16  # each imports the main script anew; more would take longer to start than to read

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# A script writes half of transformers' models from the other half, and says so in a comment at the top.
GENERATED = re.compile(r"^#.*(auto(matically|-| )?generated|generated (by|from|content)|do not (edit|modify))", re.I | re.M)
# Texts that speak to tools or lawyers, or point elsewhere; and queries that are a list where a summary should be.
NOISE = re.compile(r"\W*(todo|fixme|xxx|hack|noqa|nosec|type:|py(lint|right|re)\b|pragma|fmt:|isort|mypy|ruff|flake8|yapf|"
                   r"see above|same as|(copied|adapted|taken|modified) from)|.*(copyright|licen[sc]e|spdx|-\*-)", re.I | re.S)
LIST = re.compile(r"\W*(arg(ument)?|parameter|attribute|return|example)s?:|>>>|:\w+ |\W*\w+ \(`", re.I)
# name (type): text, name : type, name: text and :param type name: text. Only names in the signature will count, so the
# Google, numpy, reST and Hugging Face styles need no list of section titles.
ENTRY = re.compile(r"(?P<indent>\s*)(?:[:@](?:param|arg)\s+(?:[^:]*\s)?(?P<rest>\w+):\s*|(?:[-*]\s+)?[*`]*(?P<name>\w+)[*`]*"
                   r"(?:,\s*\*{0,2}\w+)*(?:\s*\(.*?\)\s*:(?:\s+|$)|\s+:\s+(?P<type>.*)|:\s+|:$))(?P<text>.*)")


# text

def in_words(identifier):
    """HTTPServer_version -> http server version, DTensor -> dtensor."""
    return re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z]{2})(?=[A-Z][a-z])|_+", " ", identifier).strip().lower()


def one_line(text):
    return " ".join(text.split())


def code(lines):
    return textwrap.dedent("\n".join(line for line in lines if line is not None)).strip("\n").rstrip()


def is_code(line):
    """Whether a line of a comment is commented-out code: it parses, and is more than words."""
    try:
        return bool(re.search(r"[=(\[.:@]", line) and ast.parse(line + " pass" if line.endswith(":") else line))
    except (SyntaxError, ValueError):
        return line.endswith(("(", "[", "{"))


def is_pair(source, query, target):
    def letters(text):
        return sum(map(str.isalpha, text)) / max(1, len(text) - sum(map(str.isspace, text)))

    words = len(query.split())
    good_query = words >= 2 if source in NAMED else words >= 3 and letters(query) >= 0.7 and not LIST.match(query)
    good_target = len(re.findall(r"[^\W\d_]{2,}", target)) >= TARGET_WORDS and letters(target) >= 0.4  # no tables, no drawings
    noisy = NOISE.match(query) or NOISE.match(target)
    return good_query and good_target and not noisy and len(query) <= QUERY_CHARS and query.casefold() != target.casefold()


def keys(text):
    """Two hashes: one of the text without case, spacing and numbers, and one that near copies share, of the three smallest
    among its three-word shingles. Words with capitals are left out: the name of the class or model is what copies change."""
    plain = re.sub(r"\d+", "0", one_line(text).casefold())
    words = [word for word in re.findall(r"[^\W\d_]+", text) if word.islower()][:100]  # a model reads little more
    shingles = {zlib.crc32(" ".join(words[i:i + 3]).encode()) for i in range(len(words) - 2)}
    near = str(sorted(shingles)[:3]) if len(shingles) >= 8 else plain  # too short a text has no near copies, only copies
    return tuple(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in (plain, near))


# one file

def survey(tree, lines):
    """(definition, class it is in), (raise or assert, its message, function it is in), numbers of lines inside a string.

    Walks statements only, since most of a tree is expressions; of those, only where a string may hold a line with a `#`."""
    definitions, errors, inside = [], [], set()
    stack = [(tree, "", None)]
    while stack:
        node, owner, function = stack.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
            definitions.append((node, owner))
            owner = node.name if isinstance(node, ast.ClassDef) else ""
            function = node if isinstance(node, FUNCTIONS) else function
        elif isinstance(node, (ast.Raise, ast.Assert)) and function:
            message = node.msg if isinstance(node, ast.Assert) else next(iter(getattr(node.exc, "args", [])), None)
            errors += [(node, message, function)] if message_text(message) else []
        blocks = [child for field in ("body", "cases", "handlers", "orelse", "finalbody") for child in getattr(node, field, [])]
        stack += [(child, owner, function) for child in reversed(blocks)]
        if not blocks and any(line.lstrip().startswith("#") for line in lines[node.lineno:node.end_lineno]):
            for part in ast.walk(node):
                if isinstance(part, (ast.Constant, ast.JoinedStr)):
                    inside.update(range(part.lineno + 1, part.end_lineno + 1))
    return definitions, errors, inside


def message_text(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(message_text(part) or "{" + ast.unparse(part.value) + "}" for part in node.values)
    if isinstance(node, ast.BinOp):  # "a" + "b", "a %s" % b
        return message_text(node.left) + (message_text(node.right) if isinstance(node.op, ast.Add) else "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return message_text(node.func.value)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def docstring(node):
    """The text, its first sentence, the rest, and the index of the line at which the code begins."""
    text = ast.get_docstring(node) or ""
    first, _, rest = text.partition("\n\n")
    summary, *more = re.split(r"(?<=[a-z)`'\"][.!?])(?<!\.[a-z]\.)\s+(?=[A-Z`])", one_line(first), maxsplit=1)  # not e.g.
    start = node.body[0].end_lineno if text else node.body[0].lineno - 1
    return text, summary, "\n\n".join([*more, rest]).strip(), start


def signature(node):
    """Names that a docstring may describe: the parameters, or those of __init__ and the annotated fields of a class."""
    if isinstance(node, FUNCTIONS):
        args = node.args
        return [arg.arg for arg in [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg] if arg]
    methods = [child for child in node.body if isinstance(child, FUNCTIONS) and child.name in ("__init__", "forward")]
    fields = [child.target.id for child in node.body if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)]
    return fields + [name for method in methods for name in signature(method)]


def parameters(text, names):
    """(parameter, description): the rest of an entry's line and the deeper lines under it, up to an empty one."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        entry = ENTRY.fullmatch(line)
        if entry and (entry["rest"] or entry["name"]) in names:
            deeper = re.compile(re.escape(entry["indent"]) + r"\s+\S")
            end = next((j for j in range(i + 1, len(lines)) if not deeper.match(lines[j])), len(lines))
            yield entry["rest"] or entry["name"], one_line(" ".join([entry["text"], *lines[i + 1:end]]))


def defined(definitions, lines):
    """All sources but two. A test is given without its first line, which would be the name again."""
    for node, owner in definitions:
        text, summary, rest, start = docstring(node)
        name = in_words(owner if getattr(node, "name", "__init__") == "__init__" else f"{owner}_{node.name}")
        body = code(lines[start:getattr(node, "end_lineno", start)])
        if isinstance(node, FUNCTIONS) and node.name.startswith("test"):
            yield "testname_test", " ".join(word for word in name.split() if word not in ("test", "tests", "case")), body
        yield "summary_body", summary, rest
        if text and not isinstance(node, ast.Module):
            yield "summary_code", summary, body
            yield "name_summary", name, "" if LIST.match(summary) else summary
            for parameter, description in parameters(text, signature(node)):
                yield "parameter_description", f"{name}: {in_words(parameter)}", description


def raised(errors, lines):
    """The message against the function's head and the lines up to the error. The message is taken out (`...`), and so is
    every other message in reach: it would match a query word for word, once rightly and once wrongly."""
    silent = list(lines)
    for _, message, _ in sorted(errors, key=lambda error: (error[1].lineno, error[1].col_offset), reverse=True):
        first, last = message.lineno - 1, message.end_lineno - 1
        before, after = silent[first].encode()[:message.col_offset], silent[last].encode()[message.end_col_offset:]  # in bytes
        silent[first:last + 1] = [(before + b"..." + after).decode()] + [None] * (last - first)
    for node, message, function in errors:
        head = f"{' ' * function.col_offset}def {function.name}({', '.join(signature(function))}):"
        start = max(docstring(function)[3], node.end_lineno - CODE_LINES)
        yield "error_raiser", one_line(message_text(message)), code([head, *silent[start:node.end_lineno]])


def commented(lines, inside, first):
    """A block of comment lines against the code right under it, down to an empty line, a comment or an outer block.
    Comments above the first statement of a file are its licence."""
    blocks = {}  # {line that begins one: line after it}
    for i in range(len(lines) - 1, first - 1, -1):
        if lines[i].lstrip().startswith("#") and i + 1 not in inside:
            blocks[i] = blocks.pop(i + 1, i + 1)
    for begin, end in sorted(blocks.items()):
        comment = [line.strip().lstrip("#!:").strip() for line in lines[begin:end] if re.search(r"\w", line)]  # no # -----
        below = re.compile(rf"\s{{{len(lines[begin]) - len(lines[begin].lstrip())},}}[^#\s]")
        last = next((i for i in range(end, len(lines)) if i == end + CODE_LINES or not below.match(lines[i])), len(lines))
        if not any(NOISE.match(line) or is_code(line) for line in comment):
            yield "comment_code", one_line(" ".join(comment)), code(lines[end:last])


def pairs_of_file(text):
    """{source: [(query, target), ...]} of one Python file, in the order of the file; all empty if it does not parse."""
    pairs = {source: [] for source in QUALITY}
    try:
        tree = ast.parse("" if GENERATED.search(text[:1000]) else text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a NUL
        return pairs
    if not tree.body:
        return pairs
    lines = text.split("\n")
    definitions, errors, inside = survey(tree, lines)
    for source, query, target in [*defined(definitions, lines), *raised(errors, lines),
                                  *commented(lines, inside, tree.body[0].lineno - 1)]:
        query, target = (side.encode("utf-8", "ignore").decode() for side in (query, target))  # no lone surrogates
        target = target if len(target) <= TARGET_CHARS else target[:TARGET_CHARS].rsplit(None, 1)[0]
        if is_pair(source, query, target):
            pairs[source].append((query, target))
    return pairs


def start_worker():
    gc.disable()  # trees have no cycles: the collector would walk them for nothing, a tenth of the time
    warnings.simplefilter("ignore")  # other people's escapes and comparisons


def read(path):
    """pairs_of_file for a path, with the keys of both sides. Runs in a worker."""
    try:
        with tokenize.open(path) as file:  # honours the coding line
            pairs = pairs_of_file(file.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    return {source: [(*pair, *map(keys, pair)) for pair in rows] for source, rows in pairs.items()}


# all files

def closure(lines):
    """{name: distribution} of the requirements and all that they need here; what else is installed does not count.
    What they need and is not installed is left out: the corpus is of what there is, and its fingerprint says so."""
    found, seen, queue = {}, set(), [(line, "") for line in lines]
    while queue:
        line, extra = queue.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in {(canonicalize_name(requirement.name), extra) for extra in {"", *requirement.extras}} - seen:
            seen.add(wanted)
            try:
                found[wanted[0]] = metadata.distribution(wanted[0])
            except metadata.PackageNotFoundError:
                continue
            queue += [(line, wanted[1]) for line in found[wanted[0]].requires or []]
    return dict(sorted(found.items()))


def installed():
    """{"name==version": its Python files} for Python itself and the closure of requirements.txt."""
    text = (HERE.parent / "requirements.txt").read_text(encoding="utf-8")
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in library.rglob("*.py") if "-packages" not in str(path.relative_to(library))]  # site-, dist-
    roots = {f"python=={platform.python_version()}": sorted(files)}
    for name, package in closure([line for line in text.splitlines() if line.strip() and not line.startswith("#")]).items():
        files = sorted(file for file in package.files or [] if file.suffix == ".py" and file.parts[0] != "..")
        roots[f"{name}=={package.version}"] = [Path(package.locate_file(file)) for file in files]
    return roots


def unique(files):
    """{source: pairs}: of equal and nearly equal queries the first only, and likewise of targets."""
    pairs, seen = {source: [] for source in QUALITY}, {source: (set(), set()) for source in QUALITY}
    # spawn: train.py has imported torch by now, and to fork a process that has threads can hang.
    workers, context = min(os.cpu_count() or 1, PROCESSES), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        for found in tqdm(pool.map(read, files, chunksize=16), total=len(files), unit="file", desc="installed_docs"):
            for source, rows in found.items():
                queries, targets = seen[source]
                for query, target, query_keys, target_keys in rows:
                    if queries.isdisjoint(query_keys) and targets.isdisjoint(target_keys):
                        queries.update(query_keys)
                        targets.update(target_keys)
                        pairs[source].append((query, target))
    return {source: rows for source, rows in pairs.items() if rows}


def write(pairs, directory):
    weights = {source: QUALITY[source] * math.sqrt(len(rows)) for source, rows in pairs.items()}
    for source, rows in pairs.items():
        with open(directory / f"{source}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in rows)
    manifest = [{"name": source, "path": f"{source}.jsonl", "rate": round(weight / sum(weights.values()), 6)}
                for source, weight in weights.items()]
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def build(directory: Path | None = None, roots: dict[str, list[Path]] | None = None) -> Path:
    """The path of manifest.json in a folder under `directory` (corpora/built), built first if it is not there yet.

    roots: {"name==version": files} to read instead of what is installed; the names alone decide the folder's name.
    Raises OSError if the folder cannot be written. What is interrupted leaves nothing that looks complete.
    """
    roots = installed() if roots is None else roots
    files = [path for paths in roots.values() for path in paths]
    fingerprint = hashlib.sha256("\n".join([f"format {FORMAT}", *roots]).encode()).hexdigest()[:12]
    final = Path(directory or HERE / "built") / f"installed_docs-{fingerprint}"
    partial, manifest = final.with_name(f".{final.name}.{os.getpid()}"), final / "manifest.json"
    if manifest.exists():
        return manifest
    print(f"installed_docs: building {final} from {len(files):,} files of {len(roots)} packages, once for these versions")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{partial.parent} cannot be written ({error}): make it writable, or give build() another") from error
    try:
        write(unique(files), partial)
        os.rename(partial, final)
    except OSError:
        if not manifest.exists():  # otherwise another process was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def main():
    manifest = build()
    print(f"{manifest}\n{'source':24} {'pairs':>8}  words q / t    rate")
    for entry in json.loads(manifest.read_text(encoding="utf-8")):
        rows = [json.loads(line) for line in (manifest.parent / entry["path"]).read_text(encoding="utf-8").split("\n")[:-1]]
        query, target = (sum(len(row[side].split()) for row in rows) / len(rows) for side in (0, 1))
        print(f"{entry['name']:24} {len(rows):8,} {query:6.1f} / {target:<5.1f} {entry['rate']:6.3f}")
        for row in rows[len(rows) // 6::len(rows) // 3 or 1][:3]:
            print("    " + " -> ".join(textwrap.shorten(side, 70, placeholder=" ...") for side in row))


if __name__ == "__main__":
    main()
