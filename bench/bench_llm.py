"""fastdl.llm against llama.cpp and ik_llama.cpp: speed at every level, memory, and the accuracy at that speed.

    pytest bench/bench_llm.py                         demo model, all cores, 5 turns a side
    pytest bench/bench_llm.py --rounds 9 -k avx2      one level, more turns

A turn is one run of `fastdl bench -p 512 -n 128 -r 1 --json` or `llama-bench -p 512 -n 128 -r 1 -o json`: a process of
its own that loads the model, warms up, then times 512 prompt tokens from an empty cache and 128 single-token steps from
an empty cache. Sides take turns. Each peer runs with the fastest of its settings (bench/peers.py), found beforehand.
fastdl runs with activation="auto". Before a level is timed, its mean KL from the exact answer (transformers' fp32, or
fastdl's own torch back end where transformers is missing) must meet its limit, for 512 tokens as a prompt and for 128
tokens one at a time, and it stands in the same record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench import goals, hardware, limits, peers
from bench.accuracy import IncorrectResult, divergence
from bench.timing import paired_ratio, spread, take_turns

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW, TEXT_TOKENS = 512, 128, 512
STEPS = {"prefill": 0, "decode": NEW}  # as bench.llm_worker's logits takes it
BEST = hardware.best_level(hardware.describe()["flags"])
LEVELS = [level for level in hardware.LEVELS if hardware.LEVELS.index(level) >= hardware.LEVELS.index(BEST)] if (
    BEST in hardware.LEVELS) else []  # fmt: skip
CLI = "import sys; from fastdl.cli import main; sys.exit(main())"


def python(*arguments: object, level: str | None = None) -> str:
    """stdout of this interpreter, run at the root of the tree with FASTDL_ISA set to the level."""
    environment = {**os.environ, **({"FASTDL_ISA": level} if level else {})}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


def worker(*arguments: object, level: str | None = None) -> str:
    return python("-m", "bench.llm_worker", *arguments, level=level)


def fastdl_rates(model: str, threads: int, level: str, prompt: int = PROMPT, new: int = NEW) -> dict[str, float]:
    """One turn of fastdl: {"prefill", "decode"} in tokens/s."""
    out = python(
        "-c", CLI, "bench", "-m", model, "-p", prompt, "-n", new, "-t", threads, "-r", 1, "--json", level=level
    )
    found = json.loads(out)
    if found["level"] != level:
        raise RuntimeError(f"asked for level {level}, fastdl ran {found['level']}")
    return {"prefill": found["prefill_tokens_per_s"], "decode": found["decode_tokens_per_s"]}


@pytest.fixture(scope="session")
def model(request) -> str:
    given = request.config.getoption("--bench-model")
    if given:
        return given
    from fastdl.llm import pull

    return str(pull.pull())


class Texts:
    """Exact logits of 512 tokens of English and the divergence of every setting from them, each computed once."""

    def __init__(self, model: str, threads: int, folder: Path):
        self.model, self.threads, self.folder = model, threads, folder
        self.ids = folder / "ids.npy"
        worker("ids", model, TEXT_TOKENS, self.ids)
        ids = np.load(self.ids).tolist()
        try:
            self.exact, self.reference = peers.exact_logits(model, ids), "transformers fp32"
        except peers.MissingPeer:
            self.exact, self.reference = self._fastdl("fp32", "torch", None), "fastdl, torch back end, fp32"
        self._known: dict[tuple, dict] = {}

    def _fastdl(self, activation: str, backend: str, level: str | None, steps: int = 0) -> np.ndarray:
        out = self.folder / f"{activation}-{backend}-{level}-{steps}.npy"
        worker("logits", self.model, self.ids, self.threads, activation, backend, steps, out, level=level)
        return np.load(out)

    def fastdl(self, level: str, activation: str, metric: str = "prefill") -> dict:
        """Divergence on the path of that metric: "prefill" (all tokens at once) or "decode" (one at a time)."""
        key = (level, activation, metric)
        if key not in self._known:
            found = self._fastdl(activation, "cpu", level, STEPS[metric])
            self._known[key] = divergence(self.exact[: len(found)], found)
        return self._known[key]

    def llama(self, metric: str = "prefill") -> dict:
        """llama.cpp's divergence over the tokens that `fastdl` takes for that metric; MissingPeer if there is none."""
        if ("llama.cpp", metric) not in self._known:
            found = peers.llama_logits(self.model, np.load(self.ids).tolist(), self.threads)
            for name, steps in STEPS.items():
                rows = steps or len(found)
                self._known["llama.cpp", name] = divergence(self.exact[:rows], found[:rows])
        return self._known["llama.cpp", metric]

    def check(self, level: str) -> dict[str, dict]:
        """Divergence of activation="auto" on both paths; raises when one is too far from the exact answer."""
        found = {}
        for metric in STEPS:
            found[metric] = self.fastdl(level, "auto", metric)
            try:
                allowed = goals.KL_OVER_LLAMA.must * self.llama(metric)["mean_kl"]
            except peers.MissingPeer:
                allowed = goals.KL_INT8_ALONE
            if not found[metric]["mean_kl"] <= allowed:
                raise IncorrectResult(
                    f"{level}, {metric}: mean KL {found[metric]['mean_kl']} above {allowed:.3g}: not timed"
                )
        return found


@pytest.fixture(scope="session")
def texts(model, threads, tmp_path_factory) -> Texts:
    return Texts(model, threads, tmp_path_factory.mktemp("logits"))


def fastest_settings(model: str, threads: int, level: str, recorder) -> tuple[dict, list[str]]:
    """{(peer, setting): side} with the settings that were fastest in one try each, and what is missing. A setting that
    was fastest for one metric only is timed for that one only."""
    sides, missing = {}, []
    for name, settings in peers.SETTINGS.items():
        try:
            builds = peers.llama_bench(name, level)
            ways = {}  # "fa=1", or "build 2, fa=1" where several builds were given -> how to run it
            for number, build in enumerate(builds, 1):
                label = f"build {number}, " if len(builds) > 1 else ""
                ways |= {label + s: partial(build.run, model, threads=threads, extra=x) for s, x in settings.items()}
            tried = {way: run(prompt=PROMPT, new=NEW) for way, run in ways.items()}
        except (peers.MissingPeer, RuntimeError) as error:
            missing.append(str(error))
            continue
        recorder.peers[f"{name} ({level})"] = ", ".join(dict.fromkeys(build.version(model) for build in builds))
        best = {metric: max(tried, key=lambda way, t=tried, m=metric: t[way][m]) for metric in STEPS}
        for way in sorted(set(best.values())):
            asked = {"prompt": PROMPT * (best["prefill"] == way), "new": NEW * (best["decode"] == way)}
            sides[name, way] = partial(ways[way], **asked)
    return sides, missing


@pytest.fixture(scope="session")
def native() -> None:
    """Skips where fastdl has no compiled library: the torch back end is a reference, not a claim of speed."""
    if worker("level").strip() == "none":
        pytest.skip("fastdl's compiled library is not loaded: make build")


@pytest.mark.parametrize("level", LEVELS)
def test_speed(benchmark, recorder, rounds, threads, model, texts, level):
    used = worker("level", level=level).strip()
    if used != level:
        pytest.skip(f"level {level}: this build of fastdl runs {used}")
    kl = texts.check(level)
    sides, missing = fastest_settings(model, threads, level, recorder)
    turns = {("fastdl", "auto"): lambda: fastdl_rates(model, threads, level), **sides}
    rates = take_turns(turns, rounds, benchmark)
    limit = recorder.limits[str(threads)]
    for metric in STEPS:
        series = {side: [turn[metric] for turn in found] for side, found in rates.items() if metric in found[0]}
        ours = series.pop(("fastdl", "auto"))
        record = {
            "level": level, "metric": metric, "activation": "auto", **kl[metric], "reference": texts.reference,
            "tokens_per_s": spread(ours), "share_of_limit": share(model, metric, spread(ours)["median"], limit, level),
            "missing": missing, "peers": {},
        }  # fmt: skip
        for (name, setting), theirs in series.items():
            ratio = paired_ratio(ours, theirs)
            record["peers"][name] = {"setting": setting, "tokens_per_s": spread(theirs), "ratio": ratio}
        recorder.add("llm", f"{level}/{metric}", record)


def share(model: str, metric: str, tokens_per_s: float, limit: dict[str, float], level: str) -> float:
    """Share of the machine's limit. Decode: bytes of the matrices that a token reads (the KV cache is left out, 3 % at
    128 tokens of the demo model) over the read bandwidth. Prefill: two operations per weight of the blocks over the
    rate of the level's own instruction for auto's activations."""
    from fastdl.llm.gguf import open_gguf
    from fastdl.ops import auto_activation

    tensors = open_gguf(model).tensors
    matrices = {name: t for name, t in tensors.items() if len(t.shape) == 2}
    if metric == "decode":
        skipped = {"token_embd.weight"} if "output.weight" in matrices else set()  # an untied embedding is one row
        read = sum(t.nbytes for name, t in matrices.items() if name not in skipped)
        return round(tokens_per_s * read / 1e9 / limits.read_limit(limit, read), 3)
    import torch

    weights = sum(t.shape[0] * t.shape[1] for name, t in matrices.items() if name.startswith("blk."))
    activation = auto_activation(level, torch.float32, PROMPT)
    return round(2 * weights * tokens_per_s / 1e9 / limits.product_limit(limit, level, activation), 3)


@pytest.mark.parametrize("level", LEVELS)
def test_accuracy(recorder, texts, level):
    """Mean KL of every activation precision; with llama.cpp's on the same text. Nothing here is timed."""
    used = worker("level", level=level).strip()
    if used != level:
        pytest.skip(f"level {level}: this build of fastdl runs {used}")
    record = {"level": level, "reference": texts.reference, "tokens": TEXT_TOKENS, "missing": []}
    record["fastdl"] = {a: texts.fastdl(level, a) for a in ("fp32", "bf16", "int8", "auto")}
    record["fastdl"]["auto, one at a time"] = texts.fastdl(level, "auto", "decode")
    try:
        record["llama.cpp"] = texts.llama()
        ratio = record["fastdl"]["int8"]["mean_kl"] / record["llama.cpp"]["mean_kl"]
        record["int8_over_llama.cpp"] = round(ratio, 3)
    except peers.MissingPeer as error:
        record["missing"].append(str(error))
    recorder.add("llm", f"{level}/accuracy", record)


def test_memory(native, recorder, texts, model, threads):
    """Peak of `fastdl generate` (512 + 128 tokens) less the peak of `import torch`, over the file's size."""
    found = json.loads(worker("memory", model, texts.ids.with_suffix(".txt"), threads, NEW))
    size = os.path.getsize(model)
    ratio = (found["peak_bytes"] - found["import_torch_bytes"]) / size
    record = {"level": BEST, **found, "file_bytes": size, "over_file_size": round(ratio, 3)}
    recorder.add("llm", f"{BEST}/memory", record)


def test_first_token(native, benchmark, recorder, rounds, model):
    """Seconds from process start to the first text on stdout, model in the page cache."""
    command = [sys.executable, "-c", CLI, "generate", "-m", model, "-n", "1", "The capital of France is"]

    def first_token() -> float:
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            first = process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if not first or process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} printed nothing or failed with {process.returncode}")
        return seconds

    first_token()  # brings the file into the page cache
    seconds = take_turns({"fastdl": first_token}, rounds, benchmark)["fastdl"]
    recorder.add("llm", f"{BEST}/first_token", {"level": BEST, "seconds": spread(seconds)})
