"""Conversion to GGUF: bad input gives an error that names file and tensor; disasters never leave half a file."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import write_hf_model
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from fastdl.llm import ModelFileError
from fastdl.llm.atomic import atomic_file
from fastdl.llm.convert import quantize_file
from fastdl.llm.gguf import open_gguf


def only(folder: Path, pattern: str = "out.gguf*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_atomic_file_keeps_the_old_one_until_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    with pytest.raises(FileExistsError, match=r"a\.txt: exists already"), atomic_file(path):
        pass
    with pytest.raises(RuntimeError, match="stop"), atomic_file(path, overwrite=True) as part:
        part.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError("stop")
    assert path.read_text() == "old" and only(tmp_path, "*") == ["a.txt"]
    with atomic_file(path, overwrite=True) as part:
        part.write_text("new")
    assert path.read_text() == "new" and only(tmp_path, "*") == ["a.txt"]


def test_atomic_file_that_another_program_creates_meanwhile(tmp_path):
    with pytest.raises(FileExistsError, match="another program"), atomic_file(tmp_path / "a") as part:
        part.write_text("ours")
        (tmp_path / "a").write_text("theirs")
    assert (tmp_path / "a").read_text() == "theirs" and only(tmp_path, "*") == ["a"]


def test_atomic_file_mode_and_symlink(tmp_path):
    umask = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "real") as part:
            part.write_text("1")
    finally:
        os.umask(umask)
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link", overwrite=True) as part:
        part.write_text("2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "2"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("gguf") / "source.gguf", quant="F16")


def test_destination(tmp_path, source):
    for dst, error, message in (
        (tmp_path, IsADirectoryError, "is a folder"),
        (tmp_path / "no" / "out.gguf", NotADirectoryError, "does not exist"),
    ):
        with pytest.raises(error, match=message):
            quantize_file(source, dst, progress=False)
    (tmp_path / "out.gguf").write_text("precious")
    with pytest.raises(FileExistsError, match=r"out\.gguf: exists already"):
        quantize_file(source, tmp_path / "out.gguf", progress=False)
    assert (tmp_path / "out.gguf").read_text() == "precious"
    quantize_file(source, tmp_path / "out.gguf", progress=False, overwrite=True)
    assert only(tmp_path, "*") == ["out.gguf"]
    os.mkfifo(tmp_path / "pipe")  # stands for /dev/null, which root could replace
    with pytest.raises(FileExistsError, match="pipe: is not a regular file"):
        quantize_file(source, tmp_path / "pipe", progress=False, overwrite=True)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("how", ["same", "hardlink", "symlink", "shard"])
def test_destination_is_the_source(tmp_path, source, how):
    copy = Path(shutil.copy(source, tmp_path / "copy.gguf"))
    src, dst = copy, tmp_path / "dst.gguf"
    if how == "same":
        dst = copy
    elif how == "hardlink":
        dst.hardlink_to(copy)
    elif how == "symlink":
        dst.symlink_to(copy)
    else:
        src = tmp_path / "hf"
        write_hf_model(src)
        dst = src / "model.safetensors"
    before = dst.read_bytes()
    with pytest.raises(ValueError, match="is a file of the source"):
        quantize_file(src, dst, progress=False, overwrite=True)
    assert dst.read_bytes() == before


@pytest.mark.parametrize("kind", ["q4_2", "q6_k", "", None, 4])
def test_unknown_type(tmp_path, source, kind):
    with pytest.raises(ValueError, match=r"type: expected one of f32, f16, bf16, q8_0, q4_1, got"):
        quantize_file(source, tmp_path / "out.gguf", kind, progress=False)


def _tiny(**options):
    return lambda folder: write_tiny_model(folder / "source.gguf", **options)


def _cut(folder):
    path = Path(write_tiny_model(folder / "source.gguf"))
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def _text(folder):
    (folder / "source.gguf").write_text("no model")
    return folder / "source.gguf"


NAN = np.full((64, 64), np.nan, np.float16)
GGUF_SOURCES = {
    "missing": (lambda folder: folder / "source.gguf", "source.gguf: no such file"),
    "not-gguf": (_text, "source.gguf: not a GGUF file"),
    "truncated": (_cut, "truncated"),
    "architecture": (_tiny(architecture="gpt2"), "architecture 'gpt2' is not supported"),
    "experts": (_tiny(metadata={"llama.expert_count": 8}), "8 experts"),
    "split": (_tiny(metadata={"split.count": 3}), "one part of a split model"),
    "missing-tensor": (_tiny(tensors={"blk.1.ffn_up.weight": None}), "'blk.1.ffn_up.weight' is missing"),
    "wrong-shape": (
        _tiny(tensors={"blk.0.attn_v.weight": (np.zeros((64, 64), np.float32), "F32")}),
        "'blk.0.attn_v.weight': expected shape (32, 64), got (64, 64)",
    ),
    "nan": (_tiny(tensors={"blk.0.attn_q.weight": (NAN, "F16")}), "tensor 'blk.0.attn_q.weight': "),
    "infinite-norm": (
        _tiny(tensors={"output_norm.weight": (np.full(64, np.inf, np.float32), "F32")}),
        "tensor 'output_norm.weight': ",
    ),
    "too-large": (
        _tiny(tensors={"blk.0.attn_q.weight": (np.full((64, 64), 1e6, np.float32), "F32")}),
        "out of the range of q4_1",
    ),
}


@pytest.mark.parametrize("name", GGUF_SOURCES)
def test_bad_gguf(tmp_path, name):
    make, message = GGUF_SOURCES[name]
    path = make(tmp_path)
    with pytest.raises(ModelFileError, match=re.escape(message)) as raised:
        quantize_file(path, tmp_path / "out.gguf", progress=False)
    assert "source.gguf" in str(raised.value)
    assert only(tmp_path) == []


def _config(**changes):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def _weights(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _index(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def _shorten(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _missing_shard(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


UP = "model.layers.1.mlp.up_proj.weight"
HF_FOLDERS = {
    "no-config": (lambda folder: (folder / "config.json").unlink(), "without config.json"),
    "bad-json": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    "model-type": (_config(model_type="gpt_neox"), "config.json: model_type 'gpt_neox' is not supported"),
    "quantized": (_config(quantization_config={"quant_method": "gptq"}), "are quantized already"),
    "activation": (_config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "bias": (_config(attention_bias=True), "attention_bias are not supported"),
    "rope": (_config(rope_parameters={"rope_type": "longrope"}), "rope type 'longrope' is not supported"),
    "rope-incomplete": (_config(rope_parameters={"rope_type": "linear"}), "'factor' is missing"),
    "no-layers": (_config(num_hidden_layers=None), "'num_hidden_layers' is missing"),
    "negative": (_config(hidden_size=-64), "'hidden_size' must be a positive int, got -64"),
    "text": (_config(hidden_size="64"), "'hidden_size' must be a positive int, got '64'"),
    "heads": (_config(num_key_value_heads=3), "4 attention heads cannot share 3 key/value heads"),
    "no-weights": (_no_weights, "pytorch_model.bin is not read"),
    "missing-shard": (_missing_shard, "model-1.safetensors: no such file"),
    "outside": (_index, "lies outside the folder"),
    "truncated": (_shorten, "model.safetensors: damaged or cut off"),
    "missing-tensor": (_weights(lambda t: t.pop(UP)), f"tensor '{UP}' is missing"),
    "missing-head": (_weights(lambda t: t.pop("lm_head.weight")), "tie_word_embeddings is false"),
    "one-too-many": (_weights(lambda t: t.update(extra=torch.zeros(3))), "'extra' does not belong to a llama model"),
    "shape": (_weights(lambda t: t.update({UP: torch.zeros(64, 96)})), f"'{UP}' has the shape (64, 96)"),
    "integers": (_weights(lambda t: t.update({UP: t[UP].to(torch.int8)})), f"'{UP}' has the type I8"),
    "nan": (_weights(lambda t: t[UP].view(-1)[7].fill_(np.nan)), "tensor 'blk.1.ffn_up.weight': "),
}


@pytest.mark.parametrize("name", HF_FOLDERS)
def test_bad_hf_folder(tmp_path, name):
    spoil, message = HF_FOLDERS[name]
    write_hf_model(tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ModelFileError, match=re.escape(message)) as raised:
        quantize_file(tmp_path / "model", tmp_path / "out.gguf", progress=False)
    assert str(tmp_path / "model") in str(raised.value)
    assert only(tmp_path) == []


def test_folder_hints(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="LoRA adapter"):
        quantize_file(tmp_path, tmp_path / "out.gguf")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelFileError, match=r"did you mean .*model\.gguf"):
        quantize_file(tmp_path, tmp_path / "out.gguf")


# The child converts, says so after the first tensor, and then is slow enough for the parent to interfere.
CHILD = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits an ignored SIGINT
    from fastdl.llm import convert
    pad, calls = convert._pad, []
    def slow(out, alignment):
        pad(out, alignment)
        calls.append(1)
        if len(calls) == 3:
            out.flush()
            print("writing", flush=True)
            time.sleep(60)
    convert._pad = slow
    convert.quantize_file(sys.argv[1], sys.argv[2], "q8_0", progress=False, overwrite=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_killed_midway(tmp_path, source, how):
    """The old file stays as it was; Ctrl-C removes the part, after kill -9 it lies there under a name of its own."""
    (tmp_path / "out.gguf").write_text("old")
    command = [sys.executable, "-c", textwrap.dedent(CHILD), source, str(tmp_path / "out.gguf")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout.readline() == b"writing\n"
    time.sleep(0.1)
    child.send_signal(how)
    assert child.wait(timeout=30) != 0
    assert (tmp_path / "out.gguf").read_text() == "old"
    left = only(tmp_path, "*.part")
    assert len(left) == (how == signal.SIGKILL)
    if left:
        with pytest.raises(ModelFileError):
            open_gguf(tmp_path / left[0])
    report = quantize_file(source, tmp_path / "out.gguf", "q8_0", progress=False, overwrite=True)
    assert (tmp_path / "out.gguf").stat().st_size == report.bytes_after


@pytest.mark.parametrize("limit", [100, 20_000, 60_000], ids=["header", "metadata", "tensors"])
def test_file_size_limit(tmp_path, source, limit):
    """The system refuses to write on (ulimit -f): the error has its number and names the file, nothing is left."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"writing .*out\.gguf failed") as raised:
            quantize_file(source, tmp_path / "out.gguf", "f32", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG and only(tmp_path) == []


FULL_DISK = """
    import errno, os, sys
    from fastdl.llm.convert import quantize_file
    try:
        quantize_file(sys.argv[1], sys.argv[2] + "/out.gguf", "f32", progress=False)
    except OSError as error:
        print(errno.errorcode[error.errno], os.listdir(sys.argv[2]), error)
"""


def test_disk_full(tmp_path, source):
    """A file system of 256 KB, in a user's own mount namespace."""
    script = 'mount -t tmpfs -o size=256k none "$1" && exec "$2" -c "$3" "$4" "$1"'
    inside = ["sh", "-c", script, "sh", str(tmp_path), sys.executable, textwrap.dedent(FULL_DISK), source]
    try:
        done = subprocess.run(["unshare", "-rm", *inside], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"this system lets no user mount a tmpfs: {done.stderr.strip()}")
    assert done.stdout.startswith("ENOSPC []"), done.stdout + done.stderr
    assert "No space left on device" in done.stdout and "out.gguf" in done.stdout


def test_read_only_folder(tmp_path, source):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        quantize_file(source, tmp_path / "out.gguf", progress=False)
