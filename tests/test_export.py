"""What is exported, read back by what it is for: the data module, safetensors, PEFT and transformers."""

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

import diopt_lightning.export.adapter
import diopt_lightning.export.embeddings
from diopt_lightning import ConfigurationError
from diopt_lightning.backbones import Adapter, LoRA, RandomCausal, RandomSeq2Seq
from diopt_lightning.cli import main
from diopt_lightning.data import NaturalInstructionsDataModule, PromptFormat
from diopt_lightning.data.prompts import render, render_input
from diopt_lightning.data.tasks import read_tasks
from diopt_lightning.data.text_format import TextFormat
from diopt_lightning.export import (
    SavedRun,
    export_adapter,
    export_embeddings,
    export_model,
    export_text,
    instruction_embeddings,
)
from diopt_lightning.export.model import plain_model
from diopt_lightning.instructions import (
    CandidatePool,
    ChosenExemplar,
    Composition,
    Description,
    EmbedderDP,
    EmbedderIC,
    ExtractorDP,
    Linear,
    StraightThrough,
    TaskWeights,
)
from diopt_lightning.instructions.base import InstructionEmbeddings
from tests import backbones
from tests.backbones import CAUSAL, FAMILIES, TARGETS, TEXTS, made, some_tokenizer
from tests.conftest import TINY_T5
from tests.helpers import prepend, quiet_trainer
from tests.runs import data, optimization
from tests.test_cli import small_run

TASKS = [f"task00{i}_label_train" for i in range(1, 5)]
INPUTS = ["apple river", "storm apple bridge castle moon", "fish"]  # of several lengths, so that there is padding


class Run(NamedTuple):
    """A short run: its folder, its checkpoint and where its data are."""

    folder: Path
    checkpoint: Path
    data: Path

    @property
    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        return content


def run_of(root: Path, *arguments: str) -> Run:
    short = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", "--trainer.callbacks=[]"]
    assert main(["fit", *small_run(root), *short, "--test_after_fit=false", *arguments]) == 0
    folder = root / "lightning_logs" / "version_0"
    (checkpoint,) = folder.rglob("*.ckpt")
    return Run(folder, checkpoint, root / "data")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> Run:
    """A run that chose exemplars."""
    return run_of(tmp_path_factory.mktemp("chosen"))


@pytest.fixture(scope="module")
def soft(tmp_path_factory) -> Run:
    """A run that learned soft instructions."""
    form = tmp_path_factory.mktemp("form") / "form.yaml"
    form.write_text("{class_path: diopt_lightning.instructions.EmbedderDP, init_args: {length: 3}}")
    root = tmp_path_factory.mktemp("soft")
    return run_of(root, f"--model.instruction={form}")


def tokenizer_of(run: Run) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(run.data / "tokenizer")
    return tokenizer


def backbone_of(run: Run) -> RandomSeq2Seq:
    """The trained backbone, made without what is tested here."""
    backbone = RandomSeq2Seq(dict(TINY_T5))
    backbone.build(tokenizer_of(run))
    state = run.content["state_dict"]
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    return backbone.eval()


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    encoded = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert (encoded["attention_mask"] == 0).any()
    return dict(encoded), torch.tensor([[0, 5, 9, 4]] * len(texts))


@torch.no_grad()
def logits_of(model: torch.nn.Module, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    encoded, decoder = encode(tokenizer, texts)
    logits: Tensor = model(**encoded, decoder_input_ids=decoder).logits
    return logits


@torch.no_grad()
def logits_here(backbone: RandomSeq2Seq, rows: Tensor, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Logits with an instruction ``(length, dim)`` before each input."""
    encoded, decoder = encode(tokenizer, texts)
    instruction = InstructionEmbeddings(rows.expand(len(texts), -1, -1), torch.ones(len(texts), len(rows)).bool())
    embeddings, mask = prepend(instruction, backbone.embedding(encoded["input_ids"]), encoded["attention_mask"])
    logits: Tensor = backbone.model(inputs_embeds=embeddings, attention_mask=mask, decoder_input_ids=decoder).logits
    return logits


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def export(run: Run, format: str, *arguments: str) -> Path:
    folder = Path(format).absolute()
    assert main(["export", str(run.checkpoint), str(folder), "--format", format, *arguments]) == 0
    return folder


def test_transformers_alone_loads_the_model_and_its_tokenizer(chosen):
    folder = export(chosen, "model")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    same(
        logits_of(model, INPUTS, tokenizer),
        logits_of(backbone_of(chosen).model, INPUTS, tokenizer_of(chosen)),
    )


def test_an_adapter_gives_the_logits_of_the_soft_instruction(soft):
    model, adapter = export(soft, "model"), export(soft, "adapter")
    assert sorted(path.name for path in adapter.iterdir()) == TASKS
    backbone, tokenizer = backbone_of(soft), tokenizer_of(soft)
    found = []
    for name, rows in zip(TASKS, soft.content["state_dict"]["instruction.weight"], strict=True):
        loaded = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(model), adapter / name).eval()
        found.append(logits_of(loaded, INPUTS, tokenizer))
        same(found[-1], logits_here(backbone, rows, INPUTS, tokenizer))
    # They are instructions of their own, which the model can tell apart.
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_an_adapter_generates_as_the_soft_instruction_does(soft):
    model, adapter = export(soft, "model"), export(soft, "adapter", "--tasks", TASKS[2])
    assert [path.name for path in adapter.iterdir()] == [TASKS[2]]
    backbone, tokenizer = backbone_of(soft), tokenizer_of(soft)
    loaded = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(model), adapter / TASKS[2]).eval()
    encoded, _ = encode(tokenizer, INPUTS)
    rows = soft.content["state_dict"]["instruction.weight"][2]
    instruction = InstructionEmbeddings(rows.expand(len(INPUTS), -1, -1), torch.ones(len(INPUTS), len(rows)).bool())
    embeddings, mask = prepend(instruction, backbone.embedding(encoded["input_ids"]), encoded["attention_mask"])
    options = {"max_new_tokens": 5, "do_sample": False}
    here = backbone.model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
    assert torch.equal(loaded.generate(**encoded, **options), here)


def read_embeddings(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


def test_embeddings_of_soft_instructions_are_the_parameters(soft):
    embeddings, metadata = read_embeddings(export(soft, "embeddings") / "instructions.safetensors")
    assert json.loads(metadata["tasks"]) == TASKS
    assert (metadata["form"], metadata["backbone"]) == ("EmbedderDP", "random t5")
    for name, rows in zip(TASKS, soft.content["state_dict"]["instruction.weight"], strict=True):
        assert torch.equal(embeddings[name], rows)


def test_embeddings_of_chosen_exemplars_give_the_logits_of_their_text(chosen):
    embeddings, _ = read_embeddings(export(chosen, "embeddings") / "instructions.safetensors")
    backbone, tokenizer = backbone_of(chosen), tokenizer_of(chosen)
    for row in chosen.content["instruction"]["learned"]:
        text = f" Positive Example 1 -\n{row['slots'][0]['exemplar']}\n\n"
        with_text = logits_of(backbone.model, [text + words for words in INPUTS], tokenizer)
        same(logits_here(backbone, embeddings[row["task"]], INPUTS, tokenizer), with_text)


def test_a_copy_of_the_data_with_the_chosen_exemplars_gives_the_same_logits(chosen):
    embeddings, _ = read_embeddings(export(chosen, "embeddings") / "instructions.safetensors")
    folder = export(chosen, "text")
    read = NaturalInstructionsDataModule(str(folder), str(chosen.data / "tokenizer"))
    backbone, tokenizer = backbone_of(chosen), tokenizer_of(chosen)
    tasks = read.split_tasks("train")
    assert [task.name for task in tasks] == TASKS
    prompt = PromptFormat(definition=False, positive_examples=1)
    for task in tasks:
        assert len(task.positive_examples) == 3
        prompts = [render(task, words, prompt, lambda text: True).text for words in INPUTS]
        inputs = [render_input(words) for words in INPUTS]
        same(
            logits_of(backbone.model, prompts, tokenizer),
            logits_here(backbone, embeddings[task.name], inputs, tokenizer),
        )


def test_text_leaves_everything_else_as_it_is(soft):
    folder = export(soft, "text", f"--tasks={TASKS[1]}")
    files = sorted(
        path.relative_to(soft.data) for part in ("tasks", "splits") for path in (soft.data / part).rglob("*")
    )
    assert sorted(path.relative_to(folder) for path in folder.rglob("*") if path.parent != folder) == files
    changed = [p for p in files if (folder / p).is_file() and (folder / p).read_bytes() != (soft.data / p).read_bytes()]
    assert changed == [Path("tasks") / f"{TASKS[1]}.json"]
    before, after = (json.loads((root / changed[0]).read_text()) for root in (soft.data, folder))
    row = soft.content["instruction"]["learned"][1]
    assert after.pop("diopt_lightning") == {"form": "EmbedderDP", "lossy": True, "parts": [{"cosine": row["cosine"]}]}
    assert after.pop("Definition") == [" ".join(row["nearest_tokens"]), *before.pop("Definition")]
    assert after == before


def test_every_kind_of_candidate_goes_where_a_task_file_has_it(layout, tmp_path):
    slots = [
        ChosenExemplar(1, 0.5, kind=kind, input=text, output=answer)
        for kind, text, answer in (
            ("Negative", "sun", "owl"),
            ("Definition", "Name it", ""),
            ("Positive", "oak", "fox"),
        )
    ]
    parts = [Description(form="TaskWeights", weight=1.0), Description(form="X", slots=slots)]
    export_text(layout(), tmp_path / "text", [Description("task001", parts=parts)], "Composition")
    after = json.loads((tmp_path / "text" / "tasks" / "task001.json").read_text())
    assert after["Definition"] == ["Name it", "Name the castle"]
    assert [len(after[f"{kind} Examples"]) for kind in ("Positive", "Negative")] == [4, 2]
    assert after["Negative Examples"][0] == {"input": "sun", "output": "owl", "explanation": ""}
    assert after["Positive Examples"][0]["input"] == "oak"
    assert not after["diopt_lightning"]["lossy"]


@pytest.mark.parametrize("form", ["soft", "composition"])
def test_live_objects_are_exported_without_a_checkpoint(form, blank_exemplars, tmp_path):
    exemplar = ExtractorDP(1, 3, 32, CandidatePool(instances=False), StraightThrough())
    module = optimization(EmbedderDP(2) if form == "soft" else Composition([EmbedderDP(2), exemplar, TaskWeights()]))
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(module, data(blank_exemplars, tmp_path / "data"))
    module.eval()
    embeddings, tokenizer = instruction_embeddings(module), module.data.tokenizer
    name = type(module.instruction).__name__
    written = export_embeddings(embeddings, tmp_path / "embeddings", name, module.backbone.name)
    batch = next(iter(module.data.train_dataloader()["inner"]))
    instruction = module.instruction(batch, module.backbone.embedding)
    for task, rows, mask in zip(batch.task.tolist(), instruction.embeddings, instruction.mask, strict=True):
        same(read_embeddings(written)[0][TASKS[task]], rows[mask].detach())
    export_model(module.backbone.model, tokenizer, tmp_path / "model")
    export_adapter(embeddings, tmp_path / "adapter", base=str(tmp_path / "model"))
    export_text(module.data.root, tmp_path / "text", module.learned(), name, tokenizer)
    config = json.loads((tmp_path / "adapter" / TASKS[0] / "adapter_config.json").read_text())
    model = AutoModelForSeq2SeqLM.from_pretrained(config["base_model_name_or_path"])
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter" / TASKS[0]).eval()
    same(
        logits_of(loaded, INPUTS, tokenizer),
        logits_here(module.backbone, embeddings[TASKS[0]], INPUTS, tokenizer),
    )


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (lambda: EmbedderIC(Linear(length=2)), "EmbedderIC makes an instruction for each instance"),
        (TaskWeights, "TaskWeights puts nothing before an input"),
    ],
)
def test_a_form_without_an_instruction_of_a_task_has_no_embeddings_and_no_text(
    instruction, message, blank_exemplars, tmp_path
):
    module = optimization(instruction())
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(module, data(blank_exemplars, tmp_path))
    with pytest.raises(ConfigurationError, match=f"{message}.*export the model instead"):
        instruction_embeddings(module)
    with pytest.raises(ConfigurationError, match=r"has no text for the task `task001_label_train` as a whole"):
        export_text(tmp_path, tmp_path / "text", module.learned(), type(module.instruction).__name__)


def test_a_checkpoint_that_does_not_say_what_depends_on_the_instance_is_read_by_its_form():
    """As those written before it was said."""
    tokens, slot = {"nearest_tokens": ["a"], "cosine": [0.5]}, {"candidate": 1, "probability": 0.5}
    for form, of_instance in (("EmbedderIC", True), ("ExtractorIC", True), ("EmbedderDP", False), ("Own", False)):
        assert Description.from_plain_data({"task": "t", **tokens}, form).of_instance == of_instance
        row = {"task": "t", "parts": [{"form": "EmbedderDP", **tokens}, {"form": form, "slots": [slot]}]}
        parts = Description.from_plain_data(row, "Composition").parts
        assert [part.of_instance for part in parts] == [False, of_instance]
        assert parts[1].slots == [ChosenExemplar(1, 0.5)]


def test_free_parameters_are_exported_from_the_checkpoint_alone(soft, tmp_path):
    alone = SavedRun(Path(shutil.copy(soft.checkpoint, tmp_path / "alone.ckpt")))
    assert torch.equal(torch.stack(list(alone.embeddings().values())), soft.content["state_dict"]["instruction.weight"])
    content = soft.content
    del content["task_embeddings"]  # as those written before it was said: the run is rebuilt
    torch.save(content, soft.folder / "checkpoints" / "before.ckpt")
    rebuilt = SavedRun(soft.folder / "checkpoints" / "before.ckpt").embeddings()
    assert all(torch.equal(rows, rebuilt[name]) for name, rows in alone.embeddings().items())


def test_read_only_data_is_copied_and_never_into_itself(layout, tmp_path):
    root = layout()
    for path in (root / "tasks").iterdir():
        path.chmod(0o444)
    row = Description("task001", nearest_tokens=["castle"], cosine=[0.5])
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    export_text(root, tmp_path / "text", [row], "EmbedderDP", tokenizer)
    assert (tmp_path / "text" / "tasks" / "task001.json").stat().st_mode & 0o200
    with pytest.raises(ConfigurationError, match=r"is within .*tasks, which is copied: give another one"):
        export_text(root, root / "tasks" / "text", [row], "EmbedderDP", tokenizer)


def test_what_is_chosen_for_each_instance_is_marked_as_lossy(layout, tmp_path):
    slot = ChosenExemplar(1, 0.5, input="oak", output="fox")
    export_text(layout(), tmp_path / "text", [Description("task001", of_instance=True, slots=[slot])], "ExtractorIC")
    assert json.loads((tmp_path / "text" / "tasks" / "task001.json").read_text())["diopt_lightning"]["lossy"]


def test_pieces_of_words_are_put_together(layout, tmp_path, t5_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(t5_tokenizer)
    rows = [
        Description("task001", nearest_tokens=tokenizer.tokenize("Rephrase unbelievably"), cosine=[0.5]),
        Description("task002", nearest_tokens=["▁", "▁"], cosine=[0.5, 0.5]),
    ]
    export_text(layout(), tmp_path / "text", rows, "EmbedderDP", tokenizer)
    read = read_tasks(tmp_path / "text", ["task001", "task002"])
    assert [task.definitions[0] for task in read.values()] == ["Rephrase unbelievably", "▁ ▁"]


def test_a_checkpoint_and_data_that_have_moved_are_found_where_one_says(chosen, tmp_path):
    checkpoint = Path(shutil.copy(chosen.checkpoint, tmp_path / "moved.ckpt"))
    shutil.copytree(chosen.data, tmp_path / "data")
    moved = Run(tmp_path, checkpoint, tmp_path / "data")
    export(moved, "text", f"--data={moved.data}")  # needs no configuration
    with pytest.raises(ConfigurationError, match=r"no file .*config.yaml.*give the run's `config.yaml` as `config`"):
        _ = SavedRun(checkpoint).modules
    folder = export(moved, "embeddings", f"--data={moved.data}", f"--config={chosen.folder / 'config.yaml'}")
    assert len(read_embeddings(folder / "instructions.safetensors")[0]) == 4


def refused(capfd, *arguments: Any) -> str:
    """The one line that a mistake ends with."""
    capfd.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("diopt: error:")]
    return line


@pytest.mark.parametrize("format", ["text", "embeddings", "adapter"])
def test_an_unknown_task_is_named_with_those_there_are(soft, capfd, format):
    said = refused(capfd, soft.checkpoint, "out", "--format", format, "--tasks", "task01_label_train")
    assert "there is no `task01_label_train` among the 4 train tasks" in said
    assert f"`{TASKS[0]}`" in said
    assert not Path("out").exists()


def test_what_a_form_does_not_have_is_said(chosen, capfd):
    said = refused(capfd, chosen.checkpoint, "out", "--format=adapter")
    assert "holds the soft instruction of a task, and ExtractorDP has none: export another `format` (`text`" in said
    said = refused(capfd, chosen.checkpoint, "out", "--format=model", f"--tasks={TASKS[0]}")
    assert "The model is the same for all tasks: leave out `tasks`" in said


def test_what_is_no_checkpoint_is_said(capfd):
    assert "There is no file none.ckpt" in refused(capfd, "none.ckpt", "out", "--format=text")
    Path("text.ckpt").write_text("hello")
    assert "Cannot read text.ckpt as a checkpoint" in refused(capfd, "text.ckpt", "out", "--format=text")
    torch.save({"weight": torch.zeros(1)}, "weights.ckpt")
    assert "as it has no `state_dict`" in refused(capfd, "weights.ckpt", "out", "--format=text")


def test_a_run_without_an_instruction_has_its_model_alone(chosen, capfd):
    content = chosen.content
    del content["instruction"]
    torch.save(content, "baseline.ckpt")
    said = refused(capfd, "baseline.ckpt", "out", "--format=text")
    assert "baseline.ckpt has no learned instruction, as its run trained without one: export the model" in said
    export(Run(chosen.folder, Path("baseline.ckpt"), chosen.data), "model", f"--config={chosen.folder}/config.yaml")


def test_a_configuration_of_something_else_is_refused(chosen, soft, capfd):
    Path("config.yaml").write_text("lr: 1\n")
    said = refused(capfd, chosen.checkpoint, "out", "--format=model", "--config=config.yaml")
    assert "config.yaml is not the configuration of a run (KeyError: 'model'): give" in said
    said = refused(capfd, chosen.checkpoint, "out", "--format=embeddings", f"--config={soft.folder}/config.yaml")
    assert "do not fit the configuration" in said
    assert "give the `config.yaml` of the same run as `config`" in said


def test_other_data_than_the_runs_are_refused(chosen, layout, capfd):
    said = refused(capfd, chosen.checkpoint, "out", "--format=text", f"--data={Path('nowhere')}")
    assert "There is no folder nowhere/tasks: set `data` to the folder" in said
    other = layout()
    said = refused(capfd, chosen.checkpoint, "out", "--format=text", f"--data={other}")
    assert f"Cannot read the task file {other}/tasks/{TASKS[0]}.json" in said
    said = refused(capfd, chosen.checkpoint, "out", "--format=embeddings", f"--data={other}")
    assert f"train tasks of {other} are not the 4 of the checkpoint" in said


@pytest.mark.parametrize("format", ["text", "embeddings", "adapter", "model"])
def test_nothing_is_overwritten(soft, capfd, format):
    folder = Path("full")
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    said = refused(capfd, soft.checkpoint, folder, f"--format={format}")
    assert "The folder full is not empty, and an export overwrites nothing: give a new one" in said
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    Path("file").write_text("")
    assert "Cannot make the folder file (" in refused(capfd, soft.checkpoint, "file", f"--format={format}")


def test_without_peft_one_is_told_how_to_install_it(soft, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    said = refused(capfd, soft.checkpoint, "out", "--format=adapter")
    assert "pip install 'diopt_lightning[peft]'" in said
    assert not Path("out").exists()


def test_training_does_without_the_export():
    code = "import sys, diopt_lightning.cli; print('diopt_lightning.export' in sys.modules, 'peft' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


def test_the_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "diopt export | instructions" in capsys.readouterr().out


def test_every_argument_is_described(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith("usage: diopt export")
    assert "Write what a run has learned to a folder" in help_text
    assert "A new folder to write to." in help_text


ADAPTED = {
    "llama": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "wte", "lm_head"],
    "t5": ["q", "wo", "shared", "lm_head"],
    "bart": ["q_proj", "fc1", "embed_tokens", "lm_head"],
    "umt5": ["q", "wo", "shared", "lm_head"],
}


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(choice=st.data(), family=st.sampled_from(list(ADAPTED)), tied=st.booleans(), half=st.booleans())
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_exported_model_is_what_was_trained_whatever_is_adapted(choice, family, tied, half):
    assume(tied or family != "bart")  # whose encoder then has another embedding than the model says: refused when built
    targets = choice.draw(st.lists(st.sampled_from(ADAPTED[family]), min_size=1, unique=True))
    kind, auto = (RandomCausal, AutoModelForCausalLM) if family in CAUSAL else (RandomSeq2Seq, AutoModelForSeq2SeqLM)
    tokenizer, config = some_tokenizer(), FAMILIES[family] | {"tie_word_embeddings": tied}
    adapter = LoRA(2, target_modules=targets, base_dtype="bfloat16" if half else None)
    backbone = made(lambda **options: kind(config, **options), tokenizer, adapter).float().eval()
    batch = backbones.rows(backbone, tokenizer, TEXTS, TARGETS)
    if family == "umt5" and {"shared", "lm_head"} & set(targets):  # computes in another way if nothing is tied
        with pytest.raises(ConfigurationError, match="with the adapters in its weights is not what was trained"):
            plain_model(backbone.model)
        return
    with tempfile.TemporaryDirectory() as root, torch.no_grad():
        trained = backbone.target_losses(batch, None)
        export_model(plain_model(backbone.model), tokenizer, folder := Path(root) / "model")
        assert torch.equal(backbone.target_losses(batch, None), trained)  # it is left as it was
        backbone.model = auto.from_pretrained(folder)
        # Losses of up to 30, of which float32 keeps 2e-6, by weights that were summed in another order.
        torch.testing.assert_close(backbone.target_losses(batch, None), trained, rtol=0, atol=4e-5)


KINDS = [{"peft_type": kind.value} for kind in sorted(PEFT_TYPE_TO_CONFIG_MAPPING)]
KINDS += [{"peft_type": "LORA", option: True} for option in ("use_dora", "use_rslora", "ensure_weight_tying")]
KINDS += [{"peft_type": "LORA", "modules_to_save": ["lm_head"]}, {"peft_type": "LORA", "bias": "all"}]
# Those that need a number of each row's task, adapters that are there already, or vectors before the input.
REFUSED = {"POLY", "XLORA", "PREFIX_TUNING", "PROMPT_TUNING"}


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_of_any_method_are_exported_as_they_were_trained_or_refused_by_name(options, family):
    kind, tokenizer = options["peft_type"], some_tokenizer()
    fields = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)].__dataclass_fields__
    targets = {"target_modules": ["q_proj", "v_proj"] if family == "llama" else ["q", "v"]}
    more = {"total_step": 10} if kind == "ADALORA" else {}
    adapter = Adapter((targets if "target_modules" in fields else {}) | more | options)
    try:
        backbone = made(family, tokenizer, adapter).float().eval()
        merged = plain_model(backbone.model)
    except ConfigurationError as error:
        assert kind in str(error)  # noqa: PT017
        assert kind not in {"LORA", "IA3", "VERA", "LOHA", "LOKR", "ADALORA", "OFT", "BOFT", "LN_TUNING"}
        return
    assert kind not in REFUSED
    batch = backbones.rows(backbone, tokenizer, TEXTS, TARGETS)
    with torch.no_grad():
        trained = backbone.target_losses(batch, None)
        backbone.model = merged.eval()
        torch.testing.assert_close(backbone.target_losses(batch, None), trained, rtol=0, atol=1e-4)


def test_what_is_written_as_something_else_is_refused_and_removed(monkeypatch, tmp_path):
    tokenizer = some_tokenizer()
    backbone = made("t5", tokenizer)
    embeddings = {"task001": torch.randn(2, 16), "task002": torch.randn(2, 16)}

    def zeros(tensors: dict[str, Tensor], *arguments: Any) -> None:
        save_file({name: 0 * tensor for name, tensor in tensors.items()}, *arguments)

    for module in (diopt_lightning.export.adapter, diopt_lightning.export.embeddings):
        monkeypatch.setattr(module, "save_file", zeros)
    with pytest.raises(ConfigurationError, match=r"The adapter of `task001` is not what was trained: on a batch"):
        export_adapter(embeddings, tmp_path / "out", model=backbone.model)
    with pytest.raises(ConfigurationError, match=r"The vectors in .* are not what was trained"):
        export_embeddings(embeddings, tmp_path / "out", "EmbedderDP", "t5")
    save = type(backbone.model).save_pretrained

    def changed(model: Any, folder: Path) -> None:
        model = copy.deepcopy(model)
        model.lm_head.weight.data *= 2
        save(model, folder)

    monkeypatch.setattr(type(backbone.model), "save_pretrained", changed)
    with pytest.raises(
        ConfigurationError, match=r"The T5ForConditionalGeneration written to .* is not what was trained"
    ):
        export_model(backbone.model, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_stands_before_everything_or_is_refused(soft, capfd, monkeypatch):
    monkeypatch.setattr(RandomSeq2Seq, "text_format", lambda self, tokenizer: TextFormat(before=(1,)))
    said = refused(capfd, soft.checkpoint, "out", "--format=adapter")
    assert "reads 1 tokens before a learned instruction" in said
    assert not Path("out").exists()
