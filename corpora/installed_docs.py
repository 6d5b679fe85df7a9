"""The default corpus (§5.1): pairs of texts from the documentation and code that requirements.txt itself installs.

Paper: about 40 sources of text pairs, a title and its abstract among them. Ours: seven sources that are on every machine
this runs on, cut from the standard library and from the dependency closure of requirements.txt. Files are read as text,
never imported. The same Python and the same installed versions give the same bytes.

Nothing here knows what the pairs are for: no hold-out, no tokens, no model. data.py takes the manifest from here on.

    python -m corpora.installed_docs        builds what is not built yet, then prints the sources with examples
"""

import ast
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
from tqdm import tqdm

FORMAT = 1  # part of the fingerprint: add one with every change here that changes a pair
HERE = Path(__file__).resolve().parent

# Paper: each source is drawn at a rate that follows its quality and its size; the rates are not published. Ours: quality x
# sqrt(pairs). The root keeps the largest source (comments, noisy and short) from taking every other batch. A summary and
# its body stand highest: they are our title-abstract pairs, which the paper has for clustering, and the most like prose.
QUALITY = {"summary_body": 3.0, "summary_code": 1.5, "name_summary": 1.0, "parameter_description": 1.0,
           "error_raiser": 1.0, "comment_code": 0.75, "testname_test": 0.75}

QUERY_CHARS = 600  # a longer first sentence is no summary, and a longer comment describes more than the next lines
TARGET_CHARS = 1500  # about 400 tokens; longer targets are cut at a line or a word, as the tokenizer would cut them
TARGET_WORDS = 4  # `pass`, `return self.x`, "See above." say nothing of their query
FILE_BYTES = 2_000_000  # beyond the largest file a person wrote here; what is larger is a table
CODE_LINES = 12  # of a comment or before an error: what 128 tokens, the default --max-length, can hold
PROCESSES = 16  # each imports the main script anew; more would take longer to start than to read

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
GENERATED = re.compile(r"auto(matically|-| )?generated|generated (by|from)|do not (edit|modify)", re.I)
NOISE = re.compile(r"\W*(todo|fixme|xxx|hack|noqa|nosec|type:|py(lint|right|re)\b|pragma|fmt:|isort|mypy|ruff|flake8|yapf|"
                   r"(copied|adapted|taken|modified) from|see above|same as|>>>|:\w+)|.*(copyright|licen[sc]e|spdx|-\*-)", re.I | re.S)
# name (type): text, name : type, name: text, :param type name: text. Only names in the signature count, so no list of
# section titles is needed for the Google, numpy, reST and Hugging Face styles.
ENTRY = re.compile(r"(?P<indent>\s*)(?:[:@](?:param|arg)\s+(?:[^:]*\s)?(?P<rest>\w+):\s*|(?:[-*]\s+)?[*`]*(?P<name>\w+)[*`]*"
                   r"(?:,\s*\*{0,2}\w+)*(?:\s*\(.*?\)\s*:(?:\s+|$)|\s+:\s+(?P<type>.*)|:\s+|:$))(?P<text>.*)")


# text

def in_words(identifier):
    """HTTPServer_version -> http server version."""
    return re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", identifier).strip().lower()


def one_line(text):
    return " ".join(text.split())


def cut(text, limit=TARGET_CHARS):
    if len(text) <= limit:
        return text
    return text[:max(text.rfind("\n", limit // 2, limit), text.rfind(" ", limit - 80, limit), limit // 2)].rstrip()


def is_prose(text):
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text) <= QUERY_CHARS and len(text.split()) >= 3 and letters >= 0.75 * len(text) and not NOISE.match(text)


def is_code(line):
    """Whether a line of a comment is code: it parses, and is more than words."""
    if not re.search(r"[=(\[.:@]", line):
        return False
    try:
        ast.parse(line + " pass" if line.endswith(":") else line)
    except (SyntaxError, ValueError):
        return line.endswith(("(", "[", "{"))
    return True


def keys(text):
    """Two hashes of a text: of its words, and one that near copies share: of the three smallest among its lower-case
    three-word shingles, which sample the text. Names of classes and models (capitals) and numbers do not count."""
    plain = re.sub(r"\d+", "0", one_line(text).casefold())
    words = [word for word in re.findall(r"[^\W\d_]+", text) if word.islower()]
    shingles = {zlib.crc32(" ".join(words[i:i + 3]).encode()) for i in range(len(words) - 2)}
    near = str(sorted(shingles)[:3]) if len(shingles) >= 8 else plain
    return tuple(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in (plain, near))


# one file

def survey(tree):
    """(definition, class it is in), (raise or assert, its message, function it is in), lines inside a string."""
    definitions, errors, inside = [], [], set()
    stack = [(tree, "", None)]
    while stack:
        node, owner, function = stack.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
            definitions.append((node, owner))
            owner = node.name if isinstance(node, ast.ClassDef) else ""
            function = node if isinstance(node, FUNCTIONS) else function
        elif isinstance(node, (ast.Constant, ast.JoinedStr)):
            inside.update(range(node.lineno + 1, node.end_lineno + 1))
            continue
        elif isinstance(node, (ast.Raise, ast.Assert)) and function:
            message = node.msg if isinstance(node, ast.Assert) else next(iter(getattr(node.exc, "args", [])), None)
            errors += [(node, message, function)] if message_text(message) else []
        stack += [(child, owner, function) for child in reversed(list(ast.iter_child_nodes(node)))]
    return definitions, errors, inside


def message_text(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(message_text(part) or "{" + ast.unparse(part.value) + "}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return message_text(node.left) + (message_text(node.right) if isinstance(node.op, ast.Add) else "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return message_text(node.func.value)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def docstring(node):
    """First sentence on one line, the rest, and the line the code begins after."""
    text = ast.get_docstring(node) or ""
    first, _, rest = text.partition("\n\n")
    sentence, *more = re.split(r"(?<=[a-z)`'\"][.!?])\s+(?=[A-Z`])", one_line(first), maxsplit=1)
    start = node.body[0].end_lineno if text else getattr(node.body[0], "lineno", 1) - 1
    return text, sentence, "\n\n".join([*more, rest]).strip(), start


def signature(node):
    """Names that a docstring may describe: the parameters, or those of __init__ and the annotated fields of a class."""
    if isinstance(node, FUNCTIONS):
        args = node.args
        return {arg.arg for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg] if arg}
    names = set()
    for child in node.body:
        if isinstance(child, FUNCTIONS) and child.name in ("__init__", "__new__", "forward", "__call__"):
            names |= signature(child)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            names.add(child.target.id)
    return names


def parameters(text, names):
    """(parameter, description): the rest of the entry's line and the deeper lines that follow it up to an empty one."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        entry = ENTRY.fullmatch(line)
        if entry and (name := entry["rest"] or entry["name"]) in names:
            description = [] if entry["type"] else [entry["text"]]
            for follower in lines[i + 1:]:
                if len(follower) - len(follower.lstrip()) <= len(entry["indent"]) or not follower.strip():
                    break
                description.append(follower)
            yield name, one_line(" ".join(description))


def without(lines, node):
    """Replaces a node by `...` in lines; what it leaves empty becomes None. Columns are bytes of UTF-8."""
    first, last = node.lineno - 1, node.end_lineno - 1
    if lines[first] is None or lines[last] is None:
        return
    head, tail = lines[first].encode()[:node.col_offset], lines[last].encode()[node.end_col_offset:]
    lines[first:last + 1] = [(head + b"..." + tail).decode("utf-8", "ignore")] + [None] * (last - first)


def code(lines):
    return textwrap.dedent("\n".join(line for line in lines if line is not None)).strip("\n").rstrip()


def documented(definitions, lines):
    for node, owner in definitions:
        text, summary, rest, start = docstring(node)
        if not text or isinstance(node, ast.Module):
            yield "summary_body", summary, rest
            continue
        name = in_words(f"{owner}_{node.name}" if node.name != "__init__" else owner)
        if is_prose(summary):
            yield "summary_body", summary, rest
            yield "summary_code", summary, code(lines[start:node.end_lineno])
            yield "name_summary", name, summary
        for parameter, description in parameters(text, signature(node)):
            yield "parameter_description", f"{name}: {in_words(parameter)}", description


def raised(errors, definitions, lines):
    """The message against the function's first line and the lines up to the error. The message is taken out, and so is
    every other message in reach: it would match a query word for word, once rightly and once wrongly."""
    silent = list(lines)
    for _, message, _ in sorted(errors, key=lambda error: (error[1].lineno, error[1].col_offset), reverse=True):
        without(silent, message)
    begin = {id(node): docstring(node)[3] for node, _ in definitions}
    for node, message, function in errors:
        start = max(begin[id(function)], node.end_lineno - CODE_LINES)
        yield "error_raiser", one_line(message_text(message)), code([lines[function.lineno - 1], *silent[start:node.end_lineno]])


def commented(lines, inside, first):
    """A block of comment lines against the code right under it, down to an empty line, a comment or an outer block.
    Comments above the first statement of the file are its licence."""
    i = first
    while i < len(lines):
        block = i
        while i < len(lines) and lines[i].lstrip().startswith("#") and i + 1 not in inside:
            i += 1
        comment = [line.strip().lstrip("#!:").strip() for line in lines[block:i]]
        indent, end = len(lines[block]) - len(lines[block].lstrip()), i
        while end < min(i + CODE_LINES, len(lines)) and re.match(rf"\s{{{indent}}}\s*[^#\s]", lines[end]):
            end += 1
        if comment and end > i and not any(map(is_code, comment)):
            yield "comment_code", one_line(" ".join(line for line in comment if re.search(r"\w", line))), code(lines[i:end])
        i = max(i, block + 1)


def tested(definitions, lines):
    """The name of a test, its class before it, against the body alone: the first line would be the name again."""
    for node, owner in definitions:
        if isinstance(node, FUNCTIONS) and node.name.startswith("test"):
            name = [word for word in in_words(f"{owner}_{node.name}").split() if word not in ("test", "tests", "case")]
            yield "testname_test", " ".join(name), code(lines[docstring(node)[3]:node.end_lineno])


def pairs_of_file(text):
    """{source: [(query, target), ...]} of one Python file, in the order of the file; {} if it is not to be used."""
    pairs = {source: [] for source in QUALITY}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes and comparisons in other people's code
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return pairs
    if not tree.body or GENERATED.search(text[:2000]):
        return pairs
    lines = text.split("\n")
    definitions, errors, inside = survey(tree)
    for source, query, target in [*documented(definitions, lines), *raised(errors, definitions, lines),
                                  *commented(lines, inside, tree.body[0].lineno - 1), *tested(definitions, lines)]:
        query, target = (side.encode("utf-8", "ignore").decode() for side in (query, cut(target)))  # no lone surrogates
        named = source in ("name_summary", "parameter_description", "testname_test")
        good = len(query.split()) >= 2 and len(query) <= QUERY_CHARS if named else is_prose(query)
        if good and len(re.findall(r"[^\W\d_]{2,}", target)) >= TARGET_WORDS and not NOISE.match(target) and query != target:
            pairs[source].append((query, target))
    return pairs


def read(path):
    """pairs_of_file for a path, each pair with its keys. Runs in a worker."""
    try:
        with tokenize.open(path) as file:  # honours the coding line
            text = file.read() if os.path.getsize(path) <= FILE_BYTES else ""
    except (OSError, SyntaxError, UnicodeDecodeError):
        text = ""
    return {source: [(*pair, keys(pair[0]), keys(pair[1])) for pair in pairs] for source, pairs in pairs_of_file(text).items()}


# all files

def closure(requirements):
    """{name: distribution} of what the lines need here, with their dependencies; what else is installed does not count.
    A dependency that is not installed is left out: the corpus is of what there is, and its fingerprint says so."""
    found, seen, queue = {}, set(), [Requirement(line) for line in requirements]
    while queue:
        requirement = queue.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        for extra in ["", *sorted(requirement.extras)]:
            if (name, extra) in seen or requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            seen.add((name, extra))
            try:
                found[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            for line in found[name].requires or []:
                needed = Requirement(line)
                if not needed.marker or needed.marker.evaluate({"extra": extra}):
                    needed.marker = None
                    queue.append(needed)
    return dict(sorted(found.items()))


def installed():
    """{"name==version": its Python files} for Python itself and the closure of requirements.txt."""
    lines = (HERE.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    library = Path(sysconfig.get_paths()["stdlib"])
    roots = {f"python=={platform.python_version()}": sorted(
        path for path in library.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.relative_to(library).parts))}
    for name, distribution in closure([line for line in lines if line.strip() and not line.startswith("#")]).items():
        files = sorted(file for file in distribution.files or [] if file.suffix == ".py" and file.parts[0] != "..")
        roots[f"{name}=={distribution.version}"] = [Path(distribution.locate_file(file)) for file in files]
    return roots


def unique(files):
    """{source: pairs}, of each query and of each target the first, copies and near copies (keys) of either dropped."""
    pairs = {source: [] for source in QUALITY}
    seen = {source: (set(), set()) for source in QUALITY}
    # spawn, since train.py has imported torch by now, and forking a process that has threads can hang
    with ProcessPoolExecutor(min(os.cpu_count() or 1, PROCESSES), multiprocessing.get_context("spawn")) as pool:
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
    total = sum(QUALITY[source] * math.sqrt(len(rows)) for source, rows in pairs.items())
    for source, rows in pairs.items():
        with open(directory / f"{source}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in rows)
    manifest = [{"name": source, "path": f"{source}.jsonl", "rate": round(QUALITY[source] * math.sqrt(len(rows)) / total, 6)}
                for source, rows in pairs.items()]
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def build(directory: Path | None = None, roots: dict[str, list[Path]] | None = None) -> Path:
    """The path of manifest.json under `directory` (default: corpora/built), built there first if it is not there yet.

    roots: {"name==version": files} to read instead of what is installed; the names decide the folder's name.
    Raises OSError if the folder cannot be written. What is interrupted leaves nothing behind.
    """
    roots = installed() if roots is None else roots
    fingerprint = hashlib.sha256("\n".join([f"format {FORMAT}", *roots]).encode()).hexdigest()[:12]
    final = Path(directory or HERE / "built") / f"installed_docs-{fingerprint}"
    if (final / "manifest.json").exists():
        return final / "manifest.json"
    partial = final.with_name(f".{final.name}.{os.getpid()}")
    files = [path for paths in roots.values() for path in paths]
    print(f"installed_docs: building {final} from {len(files):,} files of {len(roots)} packages, once per environment")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{partial.parent} cannot be written ({error}); give build() another directory") from error
    try:
        write(unique(files), partial)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return final / "manifest.json"


def main():
    path = build()
    print(path)
    print(f"{'source':24} {'pairs':>8}  words q / t    rate")
    for entry in json.loads(path.read_text(encoding="utf-8")):
        rows = [json.loads(line) for line in open(path.parent / entry["path"], encoding="utf-8")]
        query, target = (sum(len(row[side].split()) for row in rows) / len(rows) for side in (0, 1))
        print(f"{entry['name']:24} {len(rows):8,} {query:6.1f} / {target:<5.1f} {entry['rate']:6.3f}")
        for row in rows[len(rows) // 6::len(rows) // 3 or 1][:3]:
            print("    " + " -> ".join(textwrap.shorten(side, 70, placeholder=" ...") for side in row))


if __name__ == "__main__":
    main()
