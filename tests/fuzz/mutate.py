"""Changes to bytes, numbers and JSON values, small ones and mean ones."""

from __future__ import annotations

import copy
from random import Random

_INTERESTING = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257),
    *(511, 512, 1023, 1024, 4095, 4096, 2**15, 2**16 - 1, 2**16, 2**20, 2**24, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1),
)
_ODD_TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a",
        "\n",
        "\ud7ff",
        "\U0001f600",
        "../../etc/passwd",
        "{{",
        "{% for %}",
        "%s%n",
    ),
    *("null", "nan", "-1", "1e999", "llama", "qwen2", "gpt2", "F32", "BF16", "Ġ", "<s>", "\\u0000"),
)


def odd_integer(random: Random, bits: int, near: int | None = None) -> int:
    """An integer of so many bits: an interesting one, any one, or one near `near`."""
    match random.randrange(3):
        case 0:
            value = random.choice(_INTERESTING)
        case 1 if near is not None:
            value = near + random.choice((-16, -2, -1, 1, 2, 16))
        case _:
            value = random.getrandbits(random.randint(1, bits))
    return value % (1 << bits)


def odd_text(random: Random) -> str:
    """A string that a parser might not expect."""
    text = random.choice(_ODD_TEXTS)
    return text * random.choice((1, 1, 1, 2, 1000))


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """One change: a bit, a byte, a number, a cut, a piece lost, doubled or added."""
    if not data:
        return random.randbytes(random.randint(1, 40))
    at = random.randrange(len(data))
    end = min(len(data), at + random.choice((1, 2, 4, 8, 32, 1000)))
    match random.randrange(8):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + random.randbytes(1) + data[at + 1 :]
        case 2:
            width = random.choice((2, 4, 8))
            value = odd_integer(random, 8 * width).to_bytes(width, "little")
            return data[:at] + value + data[at + width :]
        case 3:
            return data[:at]
        case 4:
            return data[:at] + data[end:]
        case 5:
            return data[:end] + data[at:]
        case 6:
            return data[:at] + random.randbytes(end - at) + data[at:]
        case _:
            return data + random.randbytes(random.choice((1, 4, 16, 64)))


def mutate_json(random: Random, value: object) -> object:
    """A copy with one part, anywhere in it, replaced, removed, doubled or moved down."""
    root = [copy.deepcopy(value)]
    holder, key = _any_part(random, root)
    old = holder[key]
    match random.randrange(6):
        case 0 if holder is not root:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(random.randint(0, len(holder)), copy.deepcopy(old))
        case 2 if isinstance(holder, dict):
            holder[odd_text(random)] = copy.deepcopy(old)
        case 3:
            for _ in range(random.choice((1, 2, 50))):
                old = [old] if random.random() < 0.5 else {"a": old}
            holder[key] = old
        case _:
            holder[key] = odd_value(random, old)
    return root[0]


def odd_value(random: Random, near: object = None) -> object:
    """A JSON value that a reader might not expect."""
    match random.randrange(8):
        case 0:
            return odd_integer(random, 64, near if isinstance(near, int) else None)
        case 1:
            return -odd_integer(random, 32)
        case 2:
            return random.choice((0.5, -0.0, 1e308, -1e-308, 1e22, float("nan"), float("inf")))
        case 3:
            return odd_text(random)
        case 4:
            return random.choice((None, True, False))
        case 5:
            return [odd_value(random) for _ in range(random.randrange(4))]
        case 6:
            return {odd_text(random): odd_value(random) for _ in range(random.randrange(3))}
        case _:
            return 10 ** random.choice((20, 100, 400))


def _any_part(random: Random, root: list[object]):
    """A container and a key in it; every depth is likely."""
    holder, key = root, 0
    while random.random() < 0.8:
        inner = holder[key]
        if isinstance(inner, dict) and inner:
            holder, key = inner, random.choice(list(inner))
        elif isinstance(inner, list) and inner:
            holder, key = inner, random.randrange(len(inner))
        else:
            break
    return holder, key
