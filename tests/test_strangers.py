"""Run folders, addresses, models and tokenizers of strangers: no code of theirs runs, and one sentence says why."""

import io
import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.distributed import checkpoint as sharded
from transformers import AutoModel

from diopt_lightning import BilevelModule, ConfigurationError, InstructionOptimization, InstructionTuning
from diopt_lightning.backbones import Causal, RandomCausal, RandomSeq2Seq, Seq2Seq
from diopt_lightning.cli import main
from diopt_lightning.data import NaturalInstructionsDataModule
from diopt_lightning.data.files import load_pretrained
from diopt_lightning.data.synthetic import WORDS, word_tokenizer
from diopt_lightning.data.tokenization import load_tokenizer
from diopt_lightning.export import export_model
from diopt_lightning.instructions import EmbedderDP
from diopt_lightning.rebuilding import instantiate
from diopt_lightning.resuming import WholeCheckpoints, find_checkpoint
from diopt_lightning.resuming.checkpoint_reading import check_parts
from tests.audit import CANARY, nothing_run_or_written_outside
from tests.conftest import TINY_T5
from tests.helpers import quiet_trainer
from tests.runs import data, optimization
from tests.test_cli import ROOT, small_run

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CALLABLES = [
    ("demo.yaml", "inner_optimizer"),
    ("demo.yaml", "outer_optimizer"),
    ("demo.yaml", "inner_scheduler"),
    ("demo.yaml", "outer_scheduler"),
    ("demo_random_exemplars.yaml", "optimizer"),
    ("demo_random_exemplars.yaml", "scheduler"),
]
CALLED = {
    "os.system": {"command": "touch canary"},
    "pathlib.Path.touch": {"self": "canary"},
    "torch.serialization.load": {"f": "canary"},
    "torch.hub.load": {"repo_or_dir": "canary", "model": "x"},
    "torch.utils.cpp_extension.load": {"name": "x", "sources": "canary"},
    "subprocess.Popen": {"args": ["touch", "canary"]},
    "functools.partial": {"func": "os.system"},
    "torch.nn.Linear": {"in_features": 1, "out_features": 1},
}


def one_sentence(errors: str) -> str:
    """The one line that a command has ended with."""
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("diopt: error: ")]
    return line


def configuration(name: str, option: str, value: object) -> Path:
    """A shipped configuration with another value, in a file."""
    config = yaml.safe_load((ROOT / "configs" / name).read_text())
    config["model"]["init_args"][option] = value
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return Path("config.yaml")


@pytest.mark.parametrize(("config", "option"), CALLABLES)
def test_what_is_no_optimizer_is_not_called(config, option, tmp_path):
    for path in CALLED if option == "inner_optimizer" else ["os.system", "torch.serialization.load"]:
        file = configuration(config, option, {"class_path": path, "init_args": CALLED[path]})
        with nothing_run_or_written_outside(tmp_path), pytest.raises(ConfigurationError, match=option):
            instantiate(file)
    assert not Path("canary").exists()


def test_what_looks_like_a_class_is_left_as_it_is_where_any_value_is_allowed(tmp_path):
    backbone = {"class_path": "diopt_lightning.backbones.RandomSeq2Seq"}
    backbone["init_args"] = {"config": {"model_type": "t5", "a": {"class_path": "subprocess.Popen"}}}
    backbone["init_args"]["config"]["a"]["init_args"] = {"args": ["touch", "canary"]}
    with nothing_run_or_written_outside(tmp_path):
        made = instantiate(configuration("demo.yaml", "backbone", backbone)).model
    assert made.backbone.options == backbone["init_args"]["config"]


ADDRESSES = [
    "http://127.0.0.1:1/a.ckpt",
    "https://a/b.ckpt",
    "s3://a/b",
    "ftp://a",
    "hf://a/b",
    "file:///a",
    "memory://a",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_address_is_asked_for_anything(address, tmp_path):
    for read in (
        lambda a: find_checkpoint(a, tmp_path, True),
        WholeCheckpoints().load_checkpoint,
        InstructionOptimization.load_from_checkpoint,
        InstructionTuning.load_from_checkpoint,
        BilevelModule.load_from_checkpoint,
        NaturalInstructionsDataModule.load_from_checkpoint,
        lambda a: load_pretrained(AutoModel, a, "a model"),
        load_tokenizer,
    ):
        with nothing_run_or_written_outside(tmp_path), pytest.raises(ConfigurationError, match="is an address"):
            read(address)


def test_no_trainer_asks_an_address(blank_exemplars, tmp_path):
    for module in (optimization(EmbedderDP(length=2)), InstructionTuning(RandomSeq2Seq(dict(TINY_T5)))):
        for task in ("fit", "test"):
            run = getattr(quiet_trainer(max_steps=1, limit_val_batches=0), task)
            allowed = tmp_path, Path(tempfile.gettempdir())  # where a tokenizer is compared with its copy
            with nothing_run_or_written_outside(*allowed), pytest.raises(ConfigurationError, match="is an address"):
                run(module, datamodule=data(blank_exemplars, tmp_path), ckpt_path=ADDRESSES[0])


class Code:
    """Has code run where it is read."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return eval, (CANARY,)


def test_code_in_a_sharded_checkpoint_is_not_run(tmp_path):
    optimizer = torch.optim.Adam(nn.Linear(3, 2).parameters())
    for name, content in (("right", 1.0), ("code", Code())):
        sharded.save(
            {"optimizer": optimizer.state_dict(), "other": content}, checkpoint_id=tmp_path / name, no_dist=True
        )
    check_parts(tmp_path / "right")
    (tmp_path / "description").mkdir()
    (tmp_path / "description" / ".metadata").write_bytes(pickle.dumps(Code()))
    for name in ("code", "description"):
        with nothing_run_or_written_outside(tmp_path), pytest.raises(ConfigurationError, match="Cannot read"):
            check_parts(tmp_path / name)


def with_code(folder: Path, name: str, **entries: object) -> None:
    """Make a file of a folder ask for code in it."""
    (folder / "stranger.py").write_text(f"{CANARY} = open('canary', 'w')")
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(content | entries))


def test_code_of_models_and_tokenizers_is_never_run_nor_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    tokenizer = word_tokenizer([*WORDS])
    for name in ("model", "tokenizer", "generation"):
        backbone = RandomCausal(dict(TINY_LLAMA))
        backbone.build(tokenizer)
        export_model(backbone.model, tokenizer, tmp_path / name)
    maps = {auto: f"stranger.{auto}" for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    maps["AutoModelForSeq2SeqLM"] = "stranger.AutoModelForSeq2SeqLM"
    with_code(tmp_path / "model", "config.json", auto_map=maps, model_type="stranger")
    tokens = {"AutoTokenizer": ["stranger.AutoTokenizer", "stranger.AutoTokenizer"]}
    with_code(tmp_path / "tokenizer", "tokenizer_config.json", auto_map=tokens, tokenizer_class="Stranger")
    with_code(tmp_path / "tokenizer", "config.json", auto_map=maps, model_type="stranger")
    (tmp_path / "generation" / "custom_generate").mkdir()
    (tmp_path / "generation" / "custom_generate" / "generate.py").write_text(f"{CANARY} = open('canary', 'w')")
    model = str(tmp_path / "model")
    with nothing_run_or_written_outside(tmp_path):
        for load in (
            lambda: Causal(model).build(tokenizer),
            lambda: Seq2Seq(model).build(tokenizer),
            lambda: load_pretrained(AutoModel, model, "an encoder"),
            lambda: load_tokenizer(str(tmp_path / "tokenizer")),
        ):
            with pytest.raises(ConfigurationError, match="code of its own, which is never run"):
                load()
        Causal(str(tmp_path / "generation")).build(tokenizer)  # which has a class of transformers' own
    assert not Path("canary").exists()


def test_a_command_says_so_in_one_sentence(layout, tmp_path, capfd):
    file = configuration("demo.yaml", "inner_optimizer", {"class_path": "os.system", "init_args": {"command": "ls"}})
    assert main(["fit", "--config", str(file)]) == 2
    assert "'os.system' is not allowed" in one_sentence(capfd.readouterr().err)
    file.write_text(file.read_text() + "seed_everything: !!python/object/apply:os.system ['touch canary']")
    with nothing_run_or_written_outside(tmp_path):
        for command in (
            ["fit", "--config", str(file)],
            ["fit", "--config", ADDRESSES[0]],
            ["fit", *small_run(tmp_path), "--model", ADDRESSES[0]],
            ["instructions", ADDRESSES[0]],
            ["export", ADDRESSES[0], str(tmp_path / "folder"), "--format=text"],
        ):
            assert main(command) == 2
            one_sentence(capfd.readouterr().err)
    root = layout()
    maps = {"AutoTokenizer": ["stranger.AutoTokenizer", None], "AutoConfig": "stranger.AutoConfig"}
    with_code(root / "tokenizer", "tokenizer_config.json", auto_map=maps, tokenizer_class="Stranger")
    with_code(root / "tokenizer", "config.json", auto_map=maps, model_type="stranger")
    arguments = [argument for argument in small_run(tmp_path) if not argument.startswith("--data.")]
    arguments += ["--data=diopt_lightning.data.NaturalInstructionsDataModule", f"--data.root={root}"]
    assert main(["fit", *arguments, f"--data.tokenizer={root}/tokenizer"]) == 2
    assert "code of its own" in one_sentence(capfd.readouterr().err)
