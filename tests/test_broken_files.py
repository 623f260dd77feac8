"""Weights, tokenizers and token caches that are not whole: refused in one sentence, or built again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from diopt_lightning import ConfigurationError
from diopt_lightning.backbones import Causal, RandomCausal
from diopt_lightning.data.synthetic import WORDS, word_tokenizer
from diopt_lightning.data.tokenization import load_tokenizer
from diopt_lightning.export import export_model
from tests.runs import data
from tests.test_strangers import TINY_LLAMA

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"
NORM = "model.norm.weight"


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        weights = load_file(file)
        change(weights)
        save_file(weights, file, {"format": "pt"})

    return write


WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (lambda file: file.write_bytes(POINTER), "Git LFS pointer"),
    "half": (half, "not whole"),
    "empty": (lambda file: file.write_bytes(b""), "not whole"),
    "nonsense": (lambda file: file.write_bytes(b"\xff" * 1000), "not whole"),
    "gone": (lambda file: file.unlink(), "not whole"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "not whole"),
    "other shape": (with_weights(lambda weights: weights.update({NORM: torch.ones(3)})), "not whole"),
    "a weight less": (with_weights(lambda weights: weights.pop(NORM)), f"no weights for 1 .* such as `{NORM}`"),
    "other names": (with_weights(lambda weights: weights.update(a=weights.pop(NORM))), "no weights for 1"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_are_not_whole_are_refused_by_name(kind, sharded, tmp_path):
    tokenizer, backbone = word_tokenizer([*WORDS]), RandomCausal(dict(TINY_LLAMA))
    backbone.build(tokenizer)
    export_model(backbone.model, tokenizer, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    if sharded:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), "part.safetensors")}
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        file = file.rename(file.with_name("part.safetensors"))
    Causal(str(tmp_path / "model")).build(tokenizer)
    change, message = WEIGHTS[kind]
    change(file)
    with pytest.raises(ConfigurationError, match=message) as caught:
        Causal(str(tmp_path / "model")).build(tokenizer)
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", "", "{}", "null", '{"model": []}', "\0", '{"version": 1', POINTER.decode()])
def test_a_broken_tokenizer_is_refused_by_name(name, content, tmp_path):
    word_tokenizer([*WORDS]).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).write_text(content)
    try:
        load_tokenizer(str(tmp_path / "tokenizer"))
    except ConfigurationError as error:
        message = str(error)
    else:
        message = "" if name == "tokenizer_config.json" else "taken"  # without which the other file may do
    assert "\n" not in message
    assert message == "" or str(tmp_path / "tokenizer") in message


def foreign(file: Path) -> None:
    Dataset.from_dict({"text": ["a"] * 32}).save_to_disk(str(file.parent / "other"))
    shutil.copy(next((file.parent / "other").glob("*.arrow")), file)


CACHES: dict[str, Callable[[Path], Any]] = {
    "half": half,
    "empty": lambda file: file.write_bytes(b""),
    "without its file": lambda file: file.unlink(),
    "nonsense": lambda file: file.write_bytes(b"\xff" * file.stat().st_size),
    "another data set": foreign,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "no description": lambda file: (file.parent / "dataset_info.json").write_text(""),
    "description of nothing": lambda file: (file.parent / "dataset_info.json").write_text("{}"),
    "description less": lambda file: (file.parent / "dataset_info.json").unlink(),
    "damaged": lambda file: file.write_bytes(file.read_bytes()[:700] + b"\xff" * 400 + file.read_bytes()[1100:]),
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_broken_token_cache_is_built_again_and_that_is_said(kind, blank_exemplars, tmp_path, recwarn):
    first = data(blank_exemplars, tmp_path, cache_dir=str(tmp_path / "cache"))
    first.prepare_data()
    first.setup()
    rows = {split: list(found) for split, found in first._rows.items()}
    again = data(blank_exemplars, tmp_path, cache_dir=str(tmp_path / "cache"))
    again.prepare_data()
    assert not [each for each in recwarn if "token cache" in str(each.message)]
    (file,) = [file for file in (tmp_path / "cache").rglob("*.arrow") if file.stat().st_size == largest(tmp_path)]
    CACHES[kind](file)
    again = data(blank_exemplars, tmp_path, cache_dir=str(tmp_path / "cache"))
    again.prepare_data()
    again.setup()
    assert {split: list(found) for split, found in again._rows.items()} == rows
    said = [str(each.message) for each in recwarn if "token cache" in str(each.message)]
    assert kind == "description less" or len(said) == 1


def largest(root: Path) -> int:
    """The size of the train tasks' file, of which there are most."""
    return max(file.stat().st_size for file in (root / "cache").rglob("*.arrow"))


def test_a_cache_that_cannot_be_written_is_refused_by_name(blank_exemplars, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", Path("/proc/cache")):
        with pytest.raises(ConfigurationError, match=r"set `data\.cache_dir`") as caught:
            data(blank_exemplars, tmp_path, cache_dir=str(place)).prepare_data()
        assert str(place) in str(caught.value)


def test_a_bug_while_rows_are_made_keeps_its_traceback(blank_exemplars, tmp_path, monkeypatch):
    monkeypatch.setattr("diopt_lightning.data.tokenization.render", lambda *_: {}["a bug"])
    with pytest.raises(Exception) as caught:  # noqa: PT011
        data(blank_exemplars, tmp_path, cache_dir=str(tmp_path / "cache")).prepare_data()
    assert not isinstance(caught.value, ConfigurationError)
