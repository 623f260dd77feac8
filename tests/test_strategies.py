"""Strategies of Lightning: models that are sharded by FSDP2, and what is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from diopt_lightning import ConfigurationError, InstructionOptimization, InstructionTuning
from diopt_lightning.backbones import LoRA, RandomCausal, RandomSeq2Seq
from diopt_lightning.backbones.sharding import shard
from diopt_lightning.bilevel import (
    SAMA,
    Chebyshev,
    DoubleBackward,
    FiniteDifference,
    Neumann,
    Nystrom,
    Unrolled,
)
from diopt_lightning.bilevel.sharding import is_sharded, whole
from diopt_lightning.callbacks import LearnedInstructions, Results
from diopt_lightning.instructions import EmbedderDP
from diopt_lightning.resuming.checkpoint_finding import find_checkpoint
from tests.conftest import TINY_T5
from tests.estimators import Claim, claiming
from tests.helpers import quiet_trainer
from tests.processes import on_two_processes, sharding_trainer
from tests.test_backbones import FAMILIES
from tests.test_bilevel_module import HyperCleaning, InTurn, loaders
from tests.test_text_modules import LEARNABLE, data


def differences() -> FiniteDifference:
    return FiniteDifference(check=False)


class Sharded(HyperCleaning):
    """The module of a user who shards the inner level."""

    def configure_model(self) -> None:
        if not is_sharded(next(self.model.parameters())):
            for module in (self.model[0], self.model):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])


ESTIMATORS = claiming(Claim.SHARDED)
QUICK = ("chebyshev_differences", "sama", "penalty_warm", "unrolled_differences", "natural_differences")
OPTIONS: dict[str, Any] = {"inner_steps": 2, "inner_gradient_clip": 0.1, "outer_gradient_clip": 0.01}


def share_a_model(name: str, micro_batches: int, expected: list[Tensor]) -> None:
    module = Sharded(hypergradient=ESTIMATORS[name](), micro_batches=micro_batches, **OPTIONS)
    trainer = sharding_trainer(max_steps=6)
    trainer.fit(module, InTurn())
    assert trainer.world_size == 2
    assert all(is_sharded(parameter) for parameter in module.model.parameters())
    torch.testing.assert_close(whole(list(module.parameters())), expected, rtol=0, atol=1e-7)
    first, second = module.all_gather(module.weights.detach())
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [*(pytest.param(name, 1, marks=() if name in QUICK else pytest.mark.slow) for name in ESTIMATORS), ("sama", 2)],
)
def test_two_processes_that_share_a_model_train_as_one(name, micro_batches):
    one = HyperCleaning(hypergradient=ESTIMATORS[name](), **OPTIONS)
    quiet_trainer(max_steps=6).fit(one, InTurn())
    assert one.weights.norm() > 0
    on_two_processes(share_a_model, name, micro_batches, [parameter.detach() for parameter in one.parameters()])


def optimization(form: str, backbone: Any = None) -> InstructionOptimization:
    return InstructionOptimization(
        backbone if backbone is not None else RandomSeq2Seq(TINY_T5 | {"feed_forward_proj": "gated-gelu"}),
        LEARNABLE[form](),
        hypergradient=Neumann(terms=1, step_size=1e-3, product=differences()),
        inner_steps=2,
        # Adam would divide what rounding leaves of a gradient of zero by its own size.
        inner_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        outer_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        max_new_tokens=3,
    )


def share_a_text_model(form: str, backbone: Any, expected: dict[str, Tensor], experiment: Any, root: Path) -> None:
    module, tasks = optimization(form, backbone()), data(experiment, root, batch_size=4, outer_batch_size=4)
    callbacks = [Results(table=False), LearnedInstructions()]
    trainer = sharding_trainer(max_steps=4, limit_val_batches=1, callbacks=callbacks, default_root_dir=root)
    trainer.fit(module, tasks)
    assert any(is_sharded(parameter) for parameter in module.inner_parameters())
    assert not any(is_sharded(parameter) for parameter in module.outer_parameters())
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = dict(zip(names, whole(parameters), strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    trainer.test(module, tasks, verbose=False)


BACKBONES = {
    "t5": lambda: RandomSeq2Seq(TINY_T5 | {"feed_forward_proj": "gated-gelu", "num_layers": 2}),
    "checkpointed": lambda: RandomSeq2Seq(TINY_T5 | {"feed_forward_proj": "gated-gelu"}, activation_checkpointing=True),
    "llama": lambda: RandomCausal(dict(FAMILIES["llama"])),
    "lora": lambda: RandomCausal(
        dict(FAMILIES["qwen2"]), inner_parameters=LoRA(rank=2, target_modules=["q_proj", "v_proj"])
    ),
}


@pytest.mark.parametrize(
    ("form", "backbone"),
    [
        ("embedder", "t5"),
        pytest.param("embedder", "lora", marks=pytest.mark.slow),
        pytest.param("soft", "t5", marks=pytest.mark.slow),
        pytest.param("embedder_ic", "checkpointed", marks=pytest.mark.slow),
        pytest.param("task_weights", "t5", marks=pytest.mark.slow),
        pytest.param("embedder", "llama", marks=pytest.mark.slow),
    ],
)
def test_two_processes_that_share_a_text_model_train_as_one(form, backbone, blank_exemplars, tmp_path):
    torch.manual_seed(0)
    module, tasks = optimization(form, BACKBONES[backbone]()), data(blank_exemplars, tmp_path / "one", batch_size=8)
    tasks.outer_batch_size = 8
    trainer = quiet_trainer(
        max_steps=4, limit_val_batches=1, callbacks=[Results(table=False)], default_root_dir=tmp_path / "one"
    )
    trainer.fit(module, tasks)
    trainer.test(module, tasks, verbose=False)
    expected = {name: parameter.detach() for name, parameter in module.named_parameters()}
    on_two_processes(share_a_text_model, form, BACKBONES[backbone], expected, blank_exemplars, tmp_path / "two")
    lines = [(tmp_path / place / "predictions.jsonl").read_text().splitlines() for place in ("one", "two")]
    assert [json.loads(line)["id"] for line in lines[0]] == [json.loads(line)["id"] for line in lines[1]]
    assert (tmp_path / "two" / "instructions.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["t5", "lora"])
@pytest.mark.parametrize("in_parts", [True, False])
def test_a_resumed_run_that_shares_a_model_is_the_uninterrupted_one(in_parts, backbone, blank_exemplars, tmp_path):
    def work() -> None:
        def run(steps: int, ckpt_path: Path | None = None) -> list[Tensor]:
            module, tasks = optimization("embedder", BACKBONES[backbone]()), data(blank_exemplars, tmp_path)
            module.hypergradient = Chebyshev(warm_start=True, product=differences())
            module.inner_level.make_optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
            module.outer_level.make_optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.1)
            callbacks = [
                ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1),
                LearnedInstructions(),
            ]
            options = {"limit_val_batches": 0, "callbacks": callbacks, "enable_checkpointing": True}
            trainer = sharding_trainer(in_parts, max_steps=steps, default_root_dir=tmp_path, **options)
            torch.manual_seed(0)
            trainer.fit(module, tasks, ckpt_path=ckpt_path)
            assert module.inner_steps_taken == steps
            return whole(list(module.parameters()))

        expected = run(4)
        (saved,) = (tmp_path / "kept").glob("*step=2.ckpt")
        assert saved.is_dir() == in_parts
        assert find_checkpoint(saved, tmp_path, training=True) == str(saved)
        found = run(4, saved)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    on_two_processes(work)


def test_a_checkpoint_of_one_file_is_that_of_any_other_strategy(blank_exemplars, tmp_path):
    def work() -> None:
        module = optimization("embedder", BACKBONES["t5"]())
        trainer = sharding_trainer(False, max_steps=2, limit_val_batches=0)
        trainer.fit(module, data(blank_exemplars, tmp_path))
        trainer.save_checkpoint(tmp_path / "one.ckpt")

    on_two_processes(work)
    module = optimization("embedder", BACKBONES["t5"]())
    quiet_trainer(max_steps=4, limit_val_batches=0).fit(
        module, data(blank_exemplars, tmp_path), ckpt_path=tmp_path / "one.ckpt"
    )
    assert module.inner_steps_taken == 4


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_processes_with_unequal_shares_evaluate_together(batch_size, blank_exemplars, tmp_path):
    five_rows = dataclasses.replace(blank_exemplars, test_tasks=1, instances=5)

    def work() -> None:
        module, tasks = optimization("embedder", BACKBONES["t5"]()), data(five_rows, tmp_path)
        tasks.evaluation_batch_size = batch_size
        trainer = sharding_trainer(default_root_dir=tmp_path, callbacks=[Results(table=False)])
        trainer.test(module, tasks, verbose=False)

    on_two_processes(work)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 5


ONE_OR_MORE = r"`ModelParallelStrategy` \(FSDP2\) with `data_parallel_size` .* and `tensor_parallel_size` to 1"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FSDPStrategy, rf"FSDPStrategy \(FSDP1\), which flattens parameters.*: use {ONE_OR_MORE}.*`SAMA`"),
        (DeepSpeedStrategy, rf"DeepSpeed's, which takes one optimizer.*: use {ONE_OR_MORE}.*`SAMA`.*`ddp`"),
    ],
)
def test_strategies_that_cannot_work_are_refused_by_name(kind, message, monkeypatch, blank_exemplars, tmp_path):
    # Neither can be made without a GPU; one that was not made is enough to be refused.
    trainer = quiet_trainer()
    monkeypatch.setattr(type(trainer), "strategy", object.__new__(kind))
    for module in (HyperCleaning(), optimization("embedder")):
        module.trainer = trainer
        with pytest.raises(ConfigurationError, match=message):
            module.configure_optimizers()
    with pytest.raises(ConfigurationError, match=message):
        module.setup("fit")


@pytest.mark.parametrize(
    ("estimator", "name"),
    [
        (Chebyshev(), "Chebyshev with `product` DoubleBackward"),
        (Unrolled(), "Unrolled with `product` DoubleBackward"),
        (SAMA(product=DoubleBackward()), "SAMA with `product` DoubleBackward"),
        (Nystrom(product=FiniteDifference()), "Nystrom with `product` FiniteDifference"),
    ],
)
def test_estimators_that_need_a_whole_model_are_refused_by_name(estimator, name):
    def work() -> None:
        with pytest.raises(ConfigurationError, match=rf"{name} cannot work under ModelParallelStrategy.* Use `SAMA`"):
            sharding_trainer(max_steps=1).fit(Sharded(hypergradient=estimator), loaders())

    on_two_processes(work)


def test_what_else_cannot_work_with_a_sharded_model_is_refused_by_name(blank_exemplars, tmp_path):
    def fit(module: Any, message: str, strategy: ModelParallelStrategy | None = None, **options: Any) -> None:
        trainer = sharding_trainer(max_steps=1, **options)
        if strategy is not None:
            trainer = quiet_trainer(max_steps=1, devices=2, strategy=strategy)
        with pytest.raises(ConfigurationError, match=message):
            trainer.fit(module, data(blank_exemplars, tmp_path))

    def work() -> None:
        fit(
            optimization("embedder"),
            "`tensor_parallel_size` of 2 .* set `data_parallel_size` to 2 and `tensor_parallel_size` to 1",
            ModelParallelStrategy(),
        )
        for half in ("bf16-true", "bf16-mixed"):
            fit(optimization("embedder"), f"`trainer.precision` is {half}.*use `32-true`", precision=half)
        tuning = InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), EmbedderDP(length=3))
        fit(tuning, "EmbedderDP has parameters, whose gradients nothing averages.*by `InstructionOptimization`")

    on_two_processes(work)


class AllSharded(Sharded):
    """Shards the outer level too."""

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


def test_sharded_outer_parameters_are_refused():
    def work() -> None:
        with pytest.raises(ConfigurationError, match="Outer parameters are sharded: call `fully_shard` on the modules"):
            sharding_trainer(max_steps=1).fit(AllSharded(hypergradient=SAMA()), loaders())

    on_two_processes(work)


def test_a_compiled_model_that_is_to_be_shared_is_refused():
    backbone = RandomCausal(dict(FAMILIES["llama"]), compile=True)
    with pytest.raises(ConfigurationError, match="`compile` is true, and a compiled model"):
        shard(backbone, None)
