"""The estimate of peak memory: against what a run takes, and that it leaves no trace."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils._pytree import tree_flatten

from diopt_lightning import ConfigurationError, InstructionOptimization, InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.bilevel import Chebyshev, Identity, Nystrom, Spectrum, Unrolled
from diopt_lightning.callbacks import MemoryEstimate
from diopt_lightning.cli import main
from diopt_lightning.data import BlankExemplars, BlankExemplarsDataModule
from diopt_lightning.instructions import CandidatePool, EmbedderDP, ExpectedLoss, ExtractorDP, GumbelStraightThrough
from diopt_lightning.memory.live import growth
from diopt_lightning.memory.optimizers import optimizer_memory
from diopt_lightning.memory.rehearsal import Rehearsal
from tests.helpers import quiet_trainer
from tests.memory import peak_memory
from tests.test_cli import small_run

T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.1,
}
LARGE = T5 | {"d_model": 64, "d_ff": 512, "vocab_size": 4000}
POOL = CandidatePool(instances=False)


def chebyshev() -> Chebyshev:
    return Chebyshev(products=2, spectrum=Spectrum(products=1))


def optimization(model: dict[str, Any], estimator: Any, instruction: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: InstructionOptimization(
        RandomSeq2Seq(dict(model)), instruction() if instruction else EmbedderDP(4), estimator(), **options
    )


def tuning(model: dict[str, Any]) -> Callable[[], Any]:
    return lambda: InstructionTuning(RandomSeq2Seq(dict(model)), EmbedderDP(4))


def fit(make: Callable[[], Any], root: Path, words: int, rows: tuple[int, int], *callbacks: Any, **options: Any) -> Any:
    tasks = BlankExemplars(
        exemplars=3, train_tasks=4, validation_tasks=4, dev_tasks=0, test_tasks=1, instances=8, input_words=words
    )
    torch.manual_seed(0)
    module, trainer = (
        make(),
        quiet_trainer(callbacks=list(callbacks), **({"max_steps": 3, "limit_val_batches": 0} | options)),
    )
    trainer.fit(module, BlankExemplarsDataModule(str(root), tasks, batch_size=rows[0], outer_batch_size=rows[1]))
    return trainer


EXTRACTOR = {"instruction": lambda: ExtractorDP(1, 3, 40, POOL, GumbelStraightThrough())}
CASES = {
    # make, words of an input, rows of both levels, the larger of vectors and activations
    "activations": (optimization(T5, chebyshev), 40, (8, 8), "activations"),
    "activations_in_micro_batches": (optimization(T5, Identity, micro_batches=2), 40, (8, 8), "activations"),
    "outer_activations": (optimization(T5, Identity), 40, (4, 16), "activations"),
    "vectors": (optimization(LARGE, chebyshev), 2, (4, 4), "gradients and vectors"),
    "vectors_in_micro_batches": (optimization(LARGE, Identity, micro_batches=2), 2, (8, 8), "gradients and vectors"),
    "one_row": (optimization(T5, Identity), 40, (1, 1), "gradients, vectors and activations"),
    "drawn_exemplars": (optimization(T5, Identity, **EXTRACTOR), 8, (8, 8), "activations"),
    "sketch": (optimization(LARGE, lambda: Nystrom(rank=3)), 2, (4, 4), "gradients and vectors"),
    "accumulation": (
        optimization(LARGE, Identity, inner_accumulation=2, outer_accumulation=2),
        20,
        (4, 4),
        "gradients and vectors",
    ),
    "unrolled": (optimization(LARGE, lambda: Unrolled(2)), 2, (4, 4), "gradients and vectors"),
    "tuning_activations": (tuning(T5), 40, (8, 8), "activations"),
    "tuning_vectors": (tuning(LARGE), 2, (4, 4), "gradients and vectors"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
def test_the_estimate_is_what_a_run_takes(case, tmp_path):
    make, words, rows, largest = CASES[case]
    callback = MemoryEstimate()
    fit(make, tmp_path, words, rows, callback, max_steps=1, limit_train_batches=1)
    taken = peak_memory(lambda: fit(make, tmp_path, words, rows))
    print(f"{case}: estimated {callback.peak / taken:.3f} of the {taken / 2**20:.1f} MiB that were taken")
    assert callback.peak == pytest.approx(taken, rel=0.2)
    parts = max(callback.estimate.values(), key=lambda parts: sum(parts.values()))
    assert max(set(parts) - {"weights", "optimizer states"}, key=lambda part: parts[part]) == largest


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW at once": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
    "Adafactor at once": lambda parameters: torch.optim.Adafactor(parameters, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_memory_of_an_optimizer(name):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((300, 20), (32, 32), (32, 32), (32,))]
    optimizer = OPTIMIZERS[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    taken = peak_memory(lambda: (optimizer.step(), optimizer.step()))
    memory = optimizer_memory(OPTIMIZERS[name], parameters)
    assert memory.states + memory.temporary == pytest.approx(taken, rel=0.2, abs=100)


class State(pl.Callback):
    """Keeps everything that a run has changed."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        estimator = getattr(pl_module, "hypergradient", None)
        self.kept = [
            dict(pl_module.state_dict()),
            [optimizer.state_dict() for optimizer in trainer.optimizers],
            estimator.state_dict() if estimator is not None else {},
            torch.get_rng_state(),
            {name: module.training for name, module in pl_module.named_modules()},
            {name: parameter.grad for name, parameter in pl_module.named_parameters()},
            sorted(vars(pl_module)),
            [len(module._forward_hooks) for module in pl_module.modules()],
            trainer.global_step,
        ]


@pytest.mark.parametrize(
    "make",
    [
        optimization(T5, lambda: Chebyshev(2, warm_start=True), **EXTRACTOR),
        optimization(T5, Identity, lambda: ExtractorDP(1, 3, 40, POOL, ExpectedLoss()), micro_batches=2),
        optimization(T5, lambda: Nystrom(rank=2)),
        tuning(T5),
    ],
)
@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
def test_a_run_is_bitwise_the_one_without_an_estimate(make, tmp_path):
    states, logged = [], []
    for callbacks in ([], [MemoryEstimate()]):
        state = State()
        trainer = fit(make, tmp_path, 4, (8, 8), *callbacks, state)
        states.append(state.kept)
        logged.append({name: value for name, value in trainer.callback_metrics.items() if "seconds" not in name})
    for without, beside in (states, logged):
        (expected, structure), (found, same) = tree_flatten(without), tree_flatten(beside)
        assert structure == same
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_it_is_given_in_yaml_and_prints_its_table(tmp_path, capfd):
    callbacks = [{"class_path": "diopt_lightning.callbacks.MemoryEstimate"}]
    options = [
        f"--trainer.callbacks={json.dumps(callbacks)}",
        "--trainer.limit_val_batches=0",
        "--test_after_fit=false",
    ]
    assert main(["fit", *small_run(tmp_path), "--trainer.max_epochs=1", "--test_after_fit=false", *options]) == 0
    printed = capfd.readouterr().out
    assert "Estimated peak memory: " in printed
    for words in ("inner step", "outer step", "weights", "optimizer states", "gradients and vectors", "activations"):
        assert words in printed


def test_every_process_estimates_its_own_memory(tmp_path):
    class Check(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            (estimate,) = [c for c in trainer.callbacks if isinstance(c, MemoryEstimate)]
            theta = sum(parameter.nbytes for parameter in pl_module.backbone.parameters())
            assert estimate.estimate["outer step"]["buckets of ddp"] == theta

    options = {"devices": 2, "strategy": "ddp_fork", "max_steps": 2}
    fit(optimization(T5, Identity), tmp_path, 2, (4, 4), MemoryEstimate(), Check(), **options)


def test_what_does_not_fit_is_said_and_not_raised(tmp_path, monkeypatch, capsys):
    def raises(rehearsal: Rehearsal) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Rehearsal, "steps", raises)
    fit(tuning(T5), tmp_path, 2, (4, 4), MemoryEstimate(), max_steps=1)
    assert "not even steps on two or three rows fit" in " ".join(capsys.readouterr().out.split())


def test_another_module_or_strategy_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"needs an InstructionOptimization .* got BoringModel with"):
        quiet_trainer(max_steps=1, callbacks=[MemoryEstimate()]).fit(BoringModel())
    data = object.__new__(BlankExemplarsDataModule)
    module = object.__new__(InstructionTuning)
    with pytest.raises(ConfigurationError, match="got the strategy SimpleNamespace: remove the callback"):
        MemoryEstimate().on_train_start(SimpleNamespace(datamodule=data, strategy=SimpleNamespace()), module)


def test_runs_of_a_solver_that_differ_in_length_are_compared_where_they_did_the_same():
    few = list(zip("abcxyz", (1, 2, 3, 4, 5, 6), strict=True))
    more = list(zip("abcdexyz", (2, 3, 4, 9, 9, 5, 6, 7), strict=True))
    assert growth(few, more) == [1] * 6
    assert growth(more, few) == [-1, -1, -1, 0, 0, -1, -1, -1]
