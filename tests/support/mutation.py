"""Damages bytes at random, as a broken disk, a cut-off download or a hostile hand would."""

import random


def mutated(data: bytes, seed: int) -> bytes:
    """Some bytes changed, cut out, put in, or the end cut off."""
    dice = random.Random(seed)
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 10, 100])):
        place, length = dice.randrange(len(changed) + 1), dice.choice([1, 1, 4, 100])
        kind = dice.choice(["set", "set", "cut", "insert", "end"])
        if kind == "set":
            changed[place : place + length] = dice.randbytes(length)
        elif kind == "cut":
            del changed[place : place + length]
        elif kind == "insert":
            changed[place:place] = dice.randbytes(length)
        elif dice.random() < 0.2:
            del changed[place:]
    return bytes(changed)
