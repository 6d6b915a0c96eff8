"""Valid content made invalid: bytes turned, cut and spliced, lengths edited, JSON values replaced by hostile ones.

Everything is drawn from the generator that is given, so that a seed and a number make an input again.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

OUTSIDE = "outside"
"""A folder beside the one that inputs are read from: no input may have a file of it opened."""

_DEEP = "@@deep{}@@"  # json.dumps cannot write what is nested that deep
_LENGTHS = (0, 1, 2, 127, 255, 256, 65_535, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
_NUMBER = re.compile(rb"\d+")

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 64, 1000, 65_537, 1 << 31, -(1 << 31), 1 << 53, 1 << 63, 1 << 64, 10**30, 10**400, 2.5, 1e308),
    *(-0.0, 1e-320, math.nan, math.inf, -math.inf, True, False, None),
)
TEXTS: tuple[str, ...] = (
    *("", " ", "\0", "a", ".", "..", "/", "~", "~root", "~nobody-of-this-name/x", "-", "--5", "\u0663", "nan", "inf"),
    *(
        f"../{OUTSIDE}/secret",
        f"../{OUTSIDE}/secret.png",
        f"../{OUTSIDE}/model.safetensors",
        f"x/../../{OUTSIDE}/secret",
    ),
    *(
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        "C:\\secret",
        "file:///etc/passwd",
        "con",
        "model.safetensors/",
    ),
    *("https://user:hf_abcdefghijklmnop@huggingface.co/owner/model", "owner/model", "random:vit_b_32", "tiny"),
    *("\ud800", "\udfff\ud800", "\u202eevil", "\x1b[2J\x1b]0;owned\x07", "a\nb", "\r", "\ufeff", "e\u0301" * 40),
    *(
        "a" * 300,
        "a/" * 3000,
        "1" * 5000,
        "[" * 3000,
        "(" * 400,
        "0x10",
        "1e999",
        "1_000",
        "+1",
        "None",
        "null",
        "true",
    ),
    *("(", "*", "(a|aa|a?)+$", "(.|.|.|.)*x", "(.*)*(.*)*y", "a{1000000}", "(?:(?:a{999}){999}){999}", "(?P<layer>x)"),
    *(r"\1", "(?R)", "[", "q_proj|", ".*", "^(?!.*v).*$", "all-linear"),
    *("{0.__class__}", "%s%n", "${HOME}", "`id`", "$(id)", "<script>alert(1)</script>", "{{ 7 * 7 }}", "=1+1", "'; --"),
    *("__import__('os').system('id')", "!!python/object/apply:os.system [id]", "cos\nsystem\n(S'id'\ntR.", "os.system"),
    *("float64", "int8", "object", "O", "F8_E5M2", "BF16", "V100000000", "complex64", "bfloat16", "key<fry>", "pickle"),
    *("gelu", "LORA", "PROMPT_TUNING", "lora", "bottleneck", "stack", "attn_q", "every 0th", "0:999999999", "last 5"),
)


def value(random: Random) -> Any:
    """A value that nobody expects."""
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 8:
        return random.choice(TEXTS)
    if kind == 8:
        return random.choice(
            ([], {}, [[]], [None], {"": {}}, {"..": 1}, [0] * 40, [1, "a"], [[1, 2], [3]], [2**40] * 3)
        )
    return random.choice((_DEEP.format(50), _DEEP.format(5000), ["x"] * 3000, {str(n): n for n in range(3000)}))


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every place in JSON, as what holds it and where."""
    found: list[tuple[Any, Any]] = []
    left = [content]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        found += [(holder, key) for key in keys]
        left += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found


def mutated_value(random: Random, content: Any) -> Any:
    """JSON with some values, keys or lengths changed, most of them deep within; ``content`` itself is changed."""
    box = [content]
    for _ in range(random.choice((1, 1, 2, 3))):
        holder, place = random.choice(_places(box))
        inner = holder[place]
        action = random.randrange(10)
        if action == 0:
            del holder[place]
        elif action == 1 and isinstance(holder, dict):
            holder[str(value(random))[:200]] = holder.pop(place)
        elif action == 2:
            holder[place] = [inner] * random.choice((1, 2, 12))
        elif action == 3:  # something else that stands there
            other, key = random.choice(_places(box))
            holder[place] = json.loads(json.dumps(other[key]))
        elif action == 4 and isinstance(inner, str) and inner:
            cut = random.randrange(len(inner))
            holder[place] = inner[:cut] + random.choice(TEXTS) + inner[cut:]
        elif action in (5, 6) and isinstance(inner, int | float):
            holder[place] = random.choice((inner + 1, inner - 1, 2 * inner, -inner, 1000 * inner, str(inner)))
        else:
            holder[place] = value(random)
        box = box or [{}]
    return box[0]


def dumped(random: Random, content: Any) -> bytes:
    """JSON as bytes, surrogates and nesting included."""
    text = json.dumps(content, ensure_ascii=random.random() < 0.5)
    for depth in (50, 5000):
        text = text.replace(f'"{_DEEP.format(depth)}"', "[" * depth + "]" * depth)
    return text.encode(errors="surrogatepass")


def mutated_json(random: Random, content: bytes) -> bytes:
    """A JSON file with other values, and now and then other bytes."""
    changed = dumped(random, mutated_value(random, json.loads(content)))
    return mutated_bytes(random, changed) if random.random() < 0.07 else changed


def mutated_bytes(random: Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Bytes turned, cut out, doubled, exchanged or spliced; numbers and lengths edited; or the end cut off."""
    changed = bytearray(content)
    for _ in range(1 + random.randrange(4)):
        size = len(changed)
        at = random.randrange(size + 1)
        action = random.randrange(9)
        if action == 0:
            del changed[at:]
        elif action == 1:
            del changed[at : at + random.choice((1, 4, 16, 200))]
        elif action == 2:
            changed[at:at] = changed[random.randrange(size + 1) :][: random.choice((1, 8, 64, 1000))]
        elif action == 3:
            other = random.choice((*others, content))
            changed[at:] = other[random.randrange(len(other) + 1) :]
        elif action == 4:
            changed[at:at] = random.choice(TEXTS).encode(errors="surrogatepass")
        elif action == 5:
            width, order = random.choice((1, 2, 4, 8)), random.choice(("little", "big"))
            number = random.choice(_LENGTHS) & ((1 << 8 * width) - 1)
            changed[at : at + width] = number.to_bytes(width, order)
        elif action == 6 and (found := list(_NUMBER.finditer(bytes(changed)))):
            where = random.choice(found)
            changed[where.start() : where.end()] = str(random.choice((*_LENGTHS, -1, 10**30, "1e400", "NaN"))).encode()
        elif size:
            for _ in range(random.choice((1, 2, 8))):
                changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        if not changed:
            break
    return bytes(changed)


def mutated_safetensors(random: Random, content: bytes) -> bytes:
    """A safetensors file with another header (shapes, offsets, metadata and the JSON within), or other bytes."""
    if random.random() < 0.15:
        return mutated_bytes(random, content)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.get("__metadata__", {})
    inner = [name for name, text in metadata.items() if text.startswith("{")]
    if inner and random.random() < 0.7:
        name = random.choice(inner)
        metadata[name] = mutated_json(random, metadata[name].encode()).decode(errors="replace")
    elif random.random() < 0.5:
        header = mutated_value(random, header)
    else:
        _same_bytes(random, header)
    if random.random() < 0.1:
        data = mutated_bytes(random, data)
    raw = dumped(random, header)
    told = len(raw) if random.random() < 0.9 else random.choice(_LENGTHS)
    return struct.pack("<Q", told & (1 << 64) - 1) + raw + data


def _same_bytes(random: Random, header: dict[str, Any]) -> None:
    """Changes a tensor's name, shape or dtype so that the file is as whole as before."""
    name = random.choice([name for name in header if name != "__metadata__"])
    tensor = header.pop(name)
    size = math.prod(tensor["shape"])
    action = random.randrange(4)
    if action == 0:
        name = random.choice((*TEXTS, name.upper(), f"{name}/x", f"{name}.x", name.rpartition("/")[0], f"/{name}"))
        name = name.encode(errors="ignore").decode()
    elif action == 1:
        tensor["shape"] = random.choice(([size], [1, size], [size, 1], [1] * 70 + [size], tensor["shape"][::-1]))
    elif action == 2:
        tensor["dtype"] = random.choice(("I32", "U32", "F32", "F16", "BF16", "F64", "F8_E4M3", "BOOL", "C64", "F4"))
    else:
        header[f"{name}/empty"] = {"dtype": "F32", "data_offsets": [0, 0]} | {
            "shape": random.choice(([0], [0, 1 << 40], [(1 << 64) - 1, 0], [0] * 65))
        }
    header[name] = tensor


def mutated_png(random: Random, content: bytes) -> bytes:
    """A PNG whose chunks are edited and summed again, so that what is wrong lies behind the checksum."""
    chunks, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(1 + random.randrange(2)):
        which = random.randrange(len(chunks))
        name, body = chunks[which]
        if name == b"IHDR" and random.random() < 0.7:
            sizes = [random.choice((0, 1, 2, 15, 5000, 60_000, 1 << 20, (1 << 31) - 1)) for _ in range(2)]
            body = struct.pack(">II", *sizes) + body[8:]
            if random.random() < 0.3:
                body = body[:8] + bytes(random.choice((0, 1, 2, 3, 4, 6, 8, 16)) for _ in range(5))
        elif random.random() < 0.3:
            extra = random.choice(
                (b"tEXt", b"zTXt", b"iTXt", b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"gAMA")
            )
            bomb = zlib.compress(b"0" * random.choice((10, 10_000, 3_000_000)), 9)
            chunks.insert(which + 1, (extra, b"a\0\0" + random.choice((bomb, body[:40], bytes(6)))))
            continue
        else:
            body = mutated_bytes(random, body) if body else random.randbytes(8)
        chunks[which] = (name, body)
    parts = [content[:8]]
    for name, body in chunks:
        parts += [struct.pack(">I", len(body)), name, body, struct.pack(">I", zlib.crc32(name + body))]
    return b"".join(parts)
