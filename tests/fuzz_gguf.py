"""Loads mutated model files under limits: python tests/fuzz_gguf.py MODEL FOLDER SEED COUNT [full|header]

Every case must end in a ModelFileError or in a model that works; anything else (another exception, 5 s, 2 GB, a crash)
ends this process with a message, and FOLDER/case.gguf is the file that did it. tests/test_gguf_fuzz.py runs it.
"""

from __future__ import annotations

import collections
import os
import random
import resource
import signal
import struct
import sys

import torch

from fastdl import llm
from fastdl.llm import gguf as reader
from fastdl.llm.config import check_tensors, read_config
from fastdl.llm.gguf import ModelFileError, open_gguf
from fastdl.llm.gguf_metadata import Cursor
from fastdl.llm.tokenizer import Tokenizer

SECONDS, EXTRA_BYTES = 5, 2 << 30
NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 14, 16, 30, 31, 32, 33, 48, 64, 127, 128, 255, 256, 4096, 65535, 65536)
NUMBERS += (2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-38, 1e38, float("inf"), float("-inf"), float("nan"))


def read_fields(path: str) -> tuple[int, list[tuple[int, int]]]:
    """(bytes of the header, place and size of every number the reader reads one by one)."""
    fields, ends = [], []

    class Recorder(Cursor):
        def scalar(self, code, thing="a value"):
            fields.append((self.pos, struct.calcsize(code)))
            value = super().scalar(code, thing)
            ends.append(self.pos)
            return value

    plain, reader.Cursor = reader.Cursor, Recorder
    try:
        open_gguf(path).close()
    finally:
        reader.Cursor = plain
    return max(ends), fields


def mutate(rng: random.Random, raw: bytes, header: int, fields: list[tuple[int, int]]) -> bytes:
    """One to three changes of the header, now and then a shorter file."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(8)
        place = rng.randrange(4, header)
        if kind == 0:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(header)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif kind in (2, 3, 4):
            place, size = rng.choice(fields)
            value = rng.choice((*NUMBERS, len(raw), len(raw) - place, header))
            if size == 4 and rng.random() < 0.3:
                data[place : place + 4] = struct.pack("<f", rng.choice(FLOATS))
            else:
                data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == 5:
            place, size = rng.choice(fields)
            old = int.from_bytes(data[place : place + size], "little")
            data[place : place + size] = ((old + rng.choice((-32, -8, -1, 1, 8, 32))) % (1 << 8 * size)).to_bytes(
                size, "little"
            )
        elif kind == 6:
            length, other = rng.randrange(1, 64), rng.randrange(4, header)
            data[place : place + length] = data[other : other + rng.choice((0, length, length, 2 * length))]
        else:
            del data[rng.choice((rng.randrange(len(data)), rng.randrange(header))) :]
            break
    return bytes(data)


def run_full(path: str) -> str:
    """The whole way: load, encode, compute, decode."""
    lm = llm.load(path, progress=False, threads=1)
    ids = lm.tokenizer.encode("the <|im_end|> 世界", add_special=True)
    lm.tokenizer.decode(range(lm.tokenizer.vocab_size))
    if lm.context >= 2:
        lm.logits([0, lm.tokenizer.vocab_size - 1])
    return f"loads, {'some' if ids else 'no'} ids"


def run_header(path: str) -> str:
    """Header, configuration and tokenizer: for large vocabularies without their weights."""
    with open_gguf(path) as file:
        check_tensors(file, read_config(file))
        Tokenizer.from_gguf(file.metadata).encode("the end")
        for name in list(file.tensors)[:3]:
            file.tensor_bytes(name)
    return "loads"


def limit_memory() -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, used + EXTRA_BYTES))


def main() -> None:
    model, folder, seed, count, depth = *sys.argv[1:5], (*sys.argv[5:], "full")[0]
    run = {"full": run_full, "header": run_header}[depth]
    case = os.path.join(folder, "case.gguf")
    header, fields = read_fields(model)
    size = os.path.getsize(model)
    with open(model, "rb") as source:
        raw = source.read() if depth == "full" else source.read(header)
    torch.set_num_threads(1)
    print(run(model), flush=True)  # the original must work, and imports belong before the limit
    limit_memory()
    rng, seen = random.Random(int(seed)), collections.Counter()
    for index in range(int(count)):
        data = mutate(rng, raw, header, fields)
        with open(case, "wb") as target:
            target.write(data)
            if depth == "header" and len(data) >= header // 2:
                target.truncate(size)  # a hole instead of the weights
        signal.alarm(SECONDS)  # kills the process: an exception might be caught on its way
        try:
            seen[run(case)] += 1
        except ModelFileError as error:
            if case not in str(error):
                sys.exit(f"case {index}: the message does not name the file: {error}")
            seen["ModelFileError"] += 1
        except BaseException as error:
            print(f"case {index} of seed {seed}: {type(error).__name__}: {error}", flush=True)
            raise
        signal.alarm(0)
    print(dict(seen))


if __name__ == "__main__":
    main()
