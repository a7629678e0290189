"""Damage: of values, of texts and tables, of binary files and of folders. All of it by a seed."""

import copy
import gzip
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import yaml

NAN, INF = float("nan"), float("inf")
ODD = list(
    chain(
        (None, True, False, "", " ", "x", "-1", "1", "nan", "1e400", "null", "???", "~"),
        (0, 1, -1, 2, 3, 7, 0.5, 1.5, -0.0, NAN, INF, -INF, 1e308, 1e-320),
        (2**31, -(2**31), 2**63, 10**12, 10**30, 10**400),
        ([], {}, [None], [1, "x"], [[]], {"a": 1}, {"": None}, {"name": "x"}, [{}], [[1, 2], [3]]),
        (
            "\x00",
            "a\x00b",
            "größer 狗 🐈",
            "\u202e",
            "\ud800",
            "x" * 5000,
            "a\nb",
            "\t",
            "\x1b[31m",
        ),
        "../../x / /dev/null . .. ~ hf://x ${x} ${run_name ${oc.env:HOME}".split(),
        ("1ba", "0ba", "-1ba", "1e9ba", "99999999999999999999ba", "1.5dur", "0dur", "1ep", "inf"),
    )
)
# What is not in the characters of a JSON string is in the bytes of a file.
BLOBS = [
    b"",
    b"\x00" * 64,
    b"\xff\xfe\x00a",
    b"PK\x03\x04" + b"\x00" * 40,
    b"\x1f\x8b\x08\x00" + b"\x00" * 20,
    b"\x89PNG\r\n\x1a\n",
    *b'null [] {} "text" 1'.split(),
    b"\xef\xbb\xbf",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\n\n\n",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00cposix\nsystem\n.",
]
# Separated by bars.
YAML_LINES = (
    "extends: tiny.yaml|extends: [missing.yaml]|a: &a [*a]|run_name: a\nrun_name: b|"
    "model: !!python/object/apply:os.system ['true']|seed: !!binary aGVsbG8=|\tseed: 1|seed: [1|"
    "seed: {a|? [a, b]\n: c|1: 2|null: 1|true: false|<<: {seed: 1}|--- \n...\n---\na: 1|"
    "seed: 0x1_0|seed: 1:30|seed: 2001-01-01|%YAML 9.9|seed: *unknown|'': 1|sed: 1|data.train: []"
).split("|")


def places(node: Any, here: tuple = ()) -> Iterator[tuple]:
    """The path of every value in nested dicts and lists, without that of the whole."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*here, key)
        if isinstance(value, dict | list):
            yield from places(value, (*here, key))


def _parent(tree: Any, path: tuple) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def change_tree(tree: Any, random: Random) -> Any:
    """One to three values replaced, removed, doubled, renamed, enlarged or of another type."""
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            return tree
        path = random.choice(found)
        parent, key = _parent(tree, path), path[-1]
        random.choice(CHANGES)(parent, key, random)
    return tree


def _replace(parent: Any, key: Any, random: Random) -> None:
    parent[key] = copy.deepcopy(random.choice(ODD))


def _remove(parent: Any, key: Any, random: Random) -> None:
    del parent[key]


def _retype(parent: Any, key: Any, random: Random) -> None:
    value = parent[key]
    parent[key] = random.choice([str(value), [value], {"value": value}, bool(value)])


def _scale(parent: Any, key: Any, random: Random) -> None:
    value = parent[key]
    if type(value) in (int, float):
        parent[key] = value * random.choice([-1, 0, 2, 0.5, 10**6, 10**12, 1e300])
    else:
        _replace(parent, key, random)


def _rename(parent: Any, key: Any, random: Random) -> None:
    if isinstance(parent, dict):
        name = str(key)
        other = random.choice([name[:-1], name + "s", name.upper(), "", "x" * 3000])
        parent[other] = parent.pop(key)
    else:
        parent.append(copy.deepcopy(parent[key]))


CHANGES = [_replace, _replace, _replace, _remove, _retype, _scale, _rename]


def change_bytes(content: bytes, random: Random) -> bytes:
    """Cut off, with changed or more bytes, in another encoding, or something else altogether."""
    return random.choice(BYTE_CHANGES)(bytearray(content), random)


def _place(content: bytes, random: Random) -> int:
    # Headers are short and matter most.
    return random.randrange(max(1, min(len(content), random.choice([16, 400, 10**9]))))


def _cut(content: bytearray, random: Random) -> bytes:
    return bytes(content[: _place(content, random)])


def _flip(content: bytearray, random: Random) -> bytes:
    for _ in range(random.choice((1, 1, 3, 20))):
        if content:
            content[_place(content, random)] ^= 1 << random.randrange(8)
    return bytes(content)


def _insert(content: bytearray, random: Random) -> bytes:
    at = _place(content, random)
    piece = random.choice([b"\x00", b"\xff", b"\n", b'"', b",", b"{", b"\r", b"x" * 200_000])
    return bytes(content[:at] + piece + content[at:])


def _drop(content: bytearray, random: Random) -> bytes:
    at = _place(content, random)
    del content[at : at + random.choice((1, 8, 1000))]
    return bytes(content)


def _blob(content: bytearray, random: Random) -> bytes:
    return random.choice(BLOBS)


def _recode(content: bytearray, random: Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(random.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1"]), "replace")


def _grow(content: bytearray, random: Random) -> bytes:
    return bytes(content * 2 + content[: len(content) // 2])


def _size(content: bytearray, random: Random) -> bytes:
    """A length where formats hold one."""
    at = random.choice([0, 8, _place(content, random)])
    number = random.choice([0, 1, 2**31, 2**40, 2**63])
    content[at : at + 8] = struct.pack("<Q", number)
    return bytes(content)


BYTE_CHANGES = [_cut, _flip, _flip, _insert, _drop, _blob, _recode, _grow, _size]


def change_lines(content: bytes, random: Random) -> bytes:
    """Of a table or JSON lines: rows without, with more or with other columns, or doubled."""
    lines = content.decode("utf-8", "replace").split("\n")
    for _ in range(random.choice((1, 2))):
        at = random.randrange(len(lines))
        line = lines[at]
        separator = "\t" if "\t" in line else ","
        cells = line.split(separator)
        odd = random.choice(ODD)
        try:
            quoted = json.dumps(odd)
        except ValueError:
            quoted = "1e400"
        lines[at] = random.choice(
            [
                "",
                line + separator,
                separator.join(cells[:-1]),
                separator.join([*cells, *cells]),
                separator.join([*cells[:-1], str(odd)[:6000]]),
                separator.join([quoted, *cells[1:]]),
                f'"{line}',
                line.replace('"', "'"),
                line + "\n" + line,
                "x" * 200_000,
                line.replace("1", "nan").replace(".", ",,"),
                line[: len(line) // 2],
                " ",
                line + "\x00",
                quoted,
            ]
        )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def change_json(content: bytes, random: Random) -> bytes:
    """A JSON file with other values, or damaged as a file."""
    try:
        tree = json.loads(content)
        if random.random() < 0.15:
            tree = random.choice(ODD)
        if isinstance(tree, dict | list):
            tree = change_tree(tree, random)
        return json.dumps(tree).encode()
    except ValueError:
        return change_bytes(content, random)


def change_json_lines(content: bytes, random: Random) -> bytes:
    """One row of a file of JSON lines with other values."""
    lines = content.splitlines()
    if not lines:
        return change_bytes(content, random)
    at = random.randrange(len(lines))
    lines[at] = change_json(lines[at], random)
    return b"\n".join(lines)


def change_yaml(content: bytes, random: Random, whole: dict[str, Any]) -> bytes:
    """A configuration with other values, also of keys that it does not name, or damaged as text."""
    kind = random.randrange(10)
    if kind == 0:
        return change_bytes(content, random)
    if kind == 1:
        line = random.choice(YAML_LINES).encode()
        return content + line if random.random() < 0.7 else line
    tree = yaml.safe_load(content)
    if kind < 6:
        tree = change_tree(tree, random)
    else:
        path = random.choice(list(places(whole)))
        node = tree
        for key in path[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[path[-1]] = copy.deepcopy(random.choice(ODD))
    return dump_yaml(tree)


def dump_yaml(tree: Any) -> bytes:
    text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
    return text.encode("utf-8", "surrogatepass")


def change_safetensors(content: bytes, random: Random) -> bytes:
    """Other values in the header, which says where the tensors lie."""
    if random.random() < 0.3:
        return change_bytes(content, random)
    (size,) = struct.unpack("<Q", content[:8])
    header = change_json(content[8 : 8 + size], random)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def change_gzip(content: bytes, random: Random) -> bytes:
    packed = gzip.compress(content, mtime=0)
    return change_bytes(packed, random) if random.random() < 0.8 else packed


Change = Callable[[bytes, Random], bytes]
BY_SUFFIX: dict[str, Change] = {
    ".json": change_json,
    ".jsonl": change_json_lines,
    ".csv": change_lines,
    ".tsv": change_lines,
    ".txt": change_lines,
    ".md": change_bytes,
    ".safetensors": change_safetensors,
}


def change_file(path: Path, random: Random) -> str:
    """Damage a file as its kind is damaged, or remove it; says what was done."""
    kind = random.random()
    content = path.read_bytes()
    if kind < 0.04:
        path.unlink()
        return f"{path.name} removed"
    if kind < 0.07:
        path.unlink()
        path.mkdir()
        return f"{path.name} a folder"
    if kind < 0.25:
        path.write_bytes(change_bytes(content, random))
        return f"bytes of {path.name}"
    path.write_bytes(BY_SUFFIX.get(path.suffix, change_bytes)(content, random))
    return f"{path.name} changed"


def change_folder(folder: Path, random: Random, only: str = "*") -> str:
    """Damage one file of a folder; the small ones that say how to read the others most often."""
    files = sorted(p for p in folder.rglob(only) if p.is_file())
    small = [p for p in files if p.suffix == ".json"]
    if random.random() < 0.03:
        shutil.rmtree(folder)
        return f"{folder.name} removed"
    return change_file(random.choice(small if small and random.random() < 0.5 else files), random)
