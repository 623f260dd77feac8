"""The one list of forms of instruction, and what must hold of each.

A new form is one line of ``FORMS``. One that is not part of the package is put through the same by

    for check in CHECKS:
        check(Form(lambda: MyInstruction()), tmp_path)
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from diopt_lightning import ConfigurationError, InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.callbacks import LearnedInstructions, RandomState
from diopt_lightning.data.collate import Batch, pad
from diopt_lightning.data.synthetic import WORDS, word_tokenizer
from diopt_lightning.data.tasks import Example, Instance, Task
from diopt_lightning.export import export_text, instruction_embeddings
from diopt_lightning.inspection import Report, load, page
from diopt_lightning.instructions import (
    Annealed,
    CandidatePool,
    Composition,
    Definition,
    Description,
    EmbedderDP,
    EmbedderFromDefinition,
    EmbedderIC,
    ExpectedLoss,
    ExtractorDP,
    ExtractorIC,
    FixedExemplar,
    GumbelStraightThrough,
    Instruction,
    Linear,
    Pooled,
    RandomExemplar,
    Soft,
    TaskWeights,
    TokenWise,
    Transformer,
)
from tests.conftest import SMALL_EXPERIMENT, TINY_T5
from tests.helpers import InDouble, quiet_trainer
from tests.runs import EqualOnAllProcesses, data, moved, optimization


class Form(NamedTuple):
    """How a form is made, and what cannot be claimed of it.

    Args:
        make: Makes it; with up to 3 candidates of a task, where it takes some.
        smooth: Whether its derivative is that of its value: not where a choice is drawn, or made straight-through.
        learns: Whether it has parameters.
    """

    make: Callable[[], Instruction]
    smooth: bool = True
    learns: bool = True


# One real task has two positive examples, of which one is an instance: negative ones make up for it.
POOL = CandidatePool(negative_examples=True, instances=False)
FORMS = {
    "embedder": Form(lambda: EmbedderDP(length=3)),
    "embedder_definition": Form(lambda: EmbedderDP(length=3, init=Definition())),
    "embedder_ic": Form(lambda: EmbedderIC(Linear(length=3))),
    "embedder_ic_hidden": Form(lambda: EmbedderIC(Linear(length=2, encoding=Pooled(hidden=4)))),
    "embedder_ic_token_wise": Form(lambda: EmbedderIC(TokenWise(max_length=6))),
    "embedder_ic_relu": Form(lambda: EmbedderIC(TokenWise(max_length=16, relu=True))),
    "embedder_ic_transformer": Form(lambda: EmbedderIC(Linear(length=3, encoding=Transformer(heads=2)))),
    "embedder_ic_encoder": Form(lambda: EmbedderIC(TokenWise(max_length=6, encoder=Transformer(heads=2)))),
    "embedder_from_definition": Form(lambda: EmbedderFromDefinition(Linear(length=3))),
    "embedder_from_definition_encoder": Form(
        lambda: EmbedderFromDefinition(TokenWise(9, encoder=Transformer(heads=2)))
    ),
    "straight_through": Form(lambda: ExtractorDP(2, 3, 32, POOL), smooth=False),
    "soft": Form(lambda: ExtractorDP(2, 3, 32, POOL, Soft())),
    "expected_loss": Form(lambda: ExtractorDP(1, 3, 32, POOL, ExpectedLoss())),
    "instances_too": Form(lambda: ExtractorDP(1, 8, 32), smooth=False),
    "gumbel": Form(lambda: ExtractorDP(2, 3, 32, POOL, GumbelStraightThrough(Annealed(2.0, 0.5, 4))), smooth=False),
    "drawn_choices": Form(lambda: ExtractorDP(2, 3, 32, POOL, ExpectedLoss(samples=3)), smooth=False),
    "every_kind": Form(
        lambda: ExtractorDP(1, 8, 32, CandidatePool(definitions=True), candidates_per_instance=4), smooth=False
    ),
    "extractor_ic": Form(lambda: ExtractorIC(2, 3, 32, POOL), smooth=False),
    "extractor_ic_soft": Form(lambda: ExtractorIC(2, 3, 32, relaxation=Soft())),
    "extractor_ic_expected_loss": Form(lambda: ExtractorIC(1, 3, 32, POOL, ExpectedLoss(), encoding=Pooled(hidden=8))),
    "extractor_ic_transformer": Form(lambda: ExtractorIC(1, 3, 32, POOL, Soft(), encoding=Transformer(heads=2))),
    "task_weights": Form(TaskWeights),
    "composition": Form(
        lambda: Composition([EmbedderDP(3), ExtractorDP(1, 3, 32, POOL, ExpectedLoss()), TaskWeights()])
    ),
    "fixed_exemplar": Form(lambda: FixedExemplar(2, 3, 32, POOL), smooth=False, learns=False),
    "exemplar_by_index": Form(lambda: FixedExemplar(1, 3, 32, POOL, index=2), smooth=False, learns=False),
    "random_exemplar": Form(lambda: RandomExemplar(1, 3, 32, POOL), smooth=False, learns=False),
}
LEARNABLE = {name: form.make for name, form in FORMS.items() if form.learns}

INPUTS = ["Now complete the following example -\nInput: wolf.\nOutput: ", "Input: sun sun sun.\nOutput: ", "wolf"]


def some_tasks() -> list[Task]:
    """Three tasks of two categories with annotated examples of both kinds, two definitions and a few instances."""

    def task(name: str, category: str, words: list[str]) -> Task:
        positive = tuple(Example(" ".join(words[: n + 1]), words[n]) for n in range(3))
        negative = (Example(words[4], words[5]),)
        instances = tuple(Instance(f"{name}-{n}", words[n + 3], (words[n + 2],)) for n in range(4))
        definitions = (" ".join(words[:4]), " ".join(words[4:6]))
        return Task(name, (category,), definitions, positive, negative, instances)

    names = [("task001", "a"), ("task002", "b"), ("task003", "a")]
    return [task(name, category, WORDS[20 * i : 20 * i + 10]) for i, (name, category) in enumerate(names)]


def some_tokenizer() -> Any:
    return word_tokenizer([*WORDS, "definition", "name", "the", "negative"])


def batch_of(tokenizer: Any, texts: list[str], task: list[int]) -> Batch:
    ids = [tokenizer(text)["input_ids"] for text in texts]
    labels = pad([tokenizer(WORDS[index % 50])["input_ids"] for index in range(len(texts))], -100)
    mask = pad([[1] * len(row) for row in ids], 0)
    return Batch(pad(ids, 0), mask, labels, torch.tensor(task), torch.full((len(task),), 99))


def built(instruction: Instruction, tasks: list[Task], tokenizer: Any, backbone: RandomSeq2Seq) -> Any:
    """An instruction with random parameters, so that nothing is symmetric."""
    instruction.build(tasks, tokenizer, backbone.embedding)
    instruction.to(backbone.embedding.weight.dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in instruction.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return instruction


def check_gradient(form: Form, folder: Path) -> None:
    """The gradient through the whole model is right in float64."""
    if not form.smooth:
        return
    tokenizer = some_tokenizer()
    backbone = RandomSeq2Seq(dict(TINY_T5) | {"feed_forward_proj": "gated-gelu"})
    backbone.build(tokenizer)
    instruction = built(form.make(), some_tasks(), tokenizer, backbone.double())
    batch = batch_of(tokenizer, INPUTS[:2], [0, 1])
    names, values = zip(*instruction.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        found = torch.func.functional_call(instruction, parameters, (batch, backbone.embedding))
        return backbone.loss(batch, found)

    start = tuple(value.detach().clone().requires_grad_() for value in values)
    with InDouble():  # T5's layer norm computes in float32 otherwise, which no gradient check survives
        # One random direction in all parameters at once: each has hundreds of entries.
        assert torch.autograd.gradcheck(loss, start, fast_mode=True)
        gradients = torch.autograd.grad(loss(*start), start, allow_unused=True)
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients)


def check_description(form: Form, folder: Path) -> None:
    """What it says of itself is plain data, changes no random number, and fits the embeddings that it has of tasks."""
    tokenizer, tasks = some_tokenizer(), some_tasks()
    backbone = RandomSeq2Seq(dict(TINY_T5))
    backbone.build(tokenizer)
    instruction = built(form.make(), tasks, tokenizer, backbone)
    before = torch.get_rng_state()
    described = instruction.describe(tokenizer, backbone.embedding)
    of_tasks, representatives = instruction.task_embeddings(backbone.embed), instruction.representatives(backbone.embed)
    assert torch.equal(before, torch.get_rng_state())
    assert [description.task for description in described] == [task.name for task in tasks]
    for index, description in enumerate(described):
        plain = json.loads(json.dumps(description.as_plain_data()))
        assert Description.from_plain_data(plain) == description
        said = [part for part in description.walk() if part.slots or part.nearest_tokens]
        if of_tasks is None:  # then what is said must not look like an instruction of the task
            assert any(part.of_instance for part in said) or not said
        else:
            assert not any(part.of_instance for part in said)
            assert len(of_tasks[index]) <= instruction.length
        assert not said or representatives is not None
    if instruction.task_parameter is not None:
        assert torch.equal(torch.stack(of_tasks), instruction.get_parameter(instruction.task_parameter))


def module_of(form: Form) -> pl.LightningModule:
    if form.learns:
        return optimization(form.make())
    return InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), form.make(), max_new_tokens=3)


def check_training(form: Form, folder: Path) -> None:
    """Both levels learn."""
    distances = moved(module_of(form), SMALL_EXPERIMENT, folder)
    assert distances["backbone"] > 0
    assert (distances["instruction"] > 0) == form.learns


def check_resuming(form: Form, folder: Path) -> None:
    """A resumed run is bitwise the uninterrupted one."""

    def fit(name: str, steps: int, **options: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        module = module_of(form)
        saving = ModelCheckpoint(folder / name, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        callbacks = [saving, RandomState()]
        trainer = quiet_trainer(max_steps=steps, limit_val_batches=0, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, data(SMALL_EXPERIMENT, folder), **options)
        return module.state_dict()

    whole = fit("whole", 6)
    fit("first", 3)
    resumed = fit("second", 6, ckpt_path=folder / "first" / "step=3.ckpt", weights_only=True)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]) if isinstance(value, Tensor) else value == resumed[name], name


def check_two_processes(form: Form, folder: Path) -> None:
    """Two processes end with the same parameters."""
    options = {"devices": 2, "strategy": "ddp_fork", "callbacks": [EqualOnAllProcesses()]}
    quiet_trainer(max_steps=4, limit_val_batches=0, **options).fit(module_of(form), data(SMALL_EXPERIMENT, folder))


def check_what_is_left(form: Form, folder: Path) -> None:
    """A run's file, its checkpoint, the report, the page and the exports say what the instruction says."""
    module, tasks = module_of(form), data(SMALL_EXPERIMENT, folder / "data")
    callbacks = [LearnedInstructions()]
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0, default_root_dir=folder, callbacks=callbacks)
    trainer.fit(module, tasks)
    trainer.save_checkpoint(folder / "run.ckpt")
    written = json.loads((folder / "instructions.json").read_text())
    assert written == load(folder / "run.ckpt")
    described, report = module.learned(), Report.of(written)
    assert page(report).count("<section>") == len(described)
    for description, task in zip(described, report.tasks, strict=True):
        parts = list(description.walk())
        assert task.name == description.task
        assert [token for token, _ in task.tokens] == [token for part in parts for token in part.nearest_tokens]
        assert [c.exemplar for c in task.choices] == [slot.exemplar for part in parts for slot in part.slots]
        assert all(len(choice.history) > 1 for choice in task.choices)
    name = type(module.instruction).__name__
    of_tasks = module.instruction.task_embeddings(module.backbone.embed)
    if of_tasks is not None and any(len(rows) for rows in of_tasks):
        assert list(instruction_embeddings(module)) == [description.task for description in described]
    else:
        with pytest.raises(ConfigurationError, match=f"{name} .*export the model instead"):
            instruction_embeddings(module)
    parts = list(described[0].walk())
    if any(part.slots or (part.nearest_tokens and not part.of_instance) for part in parts):
        export_text(Path(tasks.root), folder / "text", described[:1], name, tasks.tokenizer)
        document = json.loads((folder / "text" / "tasks" / f"{described[0].task}.json").read_text())
        lossy = any(part.nearest_tokens or (part.slots and part.of_instance) for part in parts)
        assert document["diopt_lightning"]["lossy"] == lossy
    else:
        with pytest.raises(ConfigurationError, match=f"{name} has no text for the task `{described[0].task}`"):
            export_text(Path(tasks.root), folder / "text", described[:1], name, tasks.tokenizer)


CHECKS = [check_gradient, check_description, check_training, check_resuming, check_two_processes, check_what_is_left]
