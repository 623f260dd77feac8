"""The alternation: against a loop written by hand, counted, interrupted, and on two processes."""

import copy
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from diopt_lightning import BilevelModule, ConfigurationError
from diopt_lightning.bilevel import (
    BilevelProblem,
    ConvergenceWarning,
    Hypergradient,
    HypergradientEstimator,
    Neumann,
    Nystrom,
    Penalty,
    Unrolled,
    second_order,
)
from diopt_lightning.callbacks import Results
from diopt_lightning.modules import LinearWithWarmup
from tests.estimators import Claim, claiming
from tests.helpers import quiet_trainer


class HyperCleaning(BilevelModule):
    """Learned weights of training rows: as a user would write it."""

    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "hypergradient": Neumann(terms=2, step_size=0.05),
            "inner_optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
            "outer_optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        }
        super().__init__(**(defaults | options))
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)).double()
        self.weights = nn.Parameter(torch.zeros(24, dtype=torch.float64))

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        errors = F.mse_loss(self.model(x), y, reduction="none").squeeze(1)
        return (self.weights[index].sigmoid() * errors).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        x, y, _ = batch
        return (self.model(x) - y).square().mean()

    def outer_parameters(self) -> list[nn.Parameter]:
        return [self.weights]


def loaders(batch_size: int = 4) -> dict[str, DataLoader]:
    """Unshuffled, so that a resumed run sees what an uninterrupted one sees."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        TensorDataset(
            torch.randn(24, 4, generator=generator).double(),
            torch.randn(24, 1, generator=generator).double(),
            torch.arange(24),
        )
        for _ in range(2)
    ]
    return {level: DataLoader(data, batch_size) for level, data in zip(("inner", "outer"), rows, strict=True)}


def by_hand(module: HyperCleaning, rounds: int, inner_steps: int) -> None:
    """The same training in plain PyTorch, without clipping."""
    inner = torch.optim.Adam(module.model.parameters(), lr=0.01)
    outer = torch.optim.Adam([module.weights], lr=0.1)
    pairs = [pair for _ in range(10) for pair in zip(*loaders().values(), strict=True)]
    for step in range(rounds * inner_steps):
        batch, outer_batch = pairs[step]
        inner.zero_grad()
        module.inner_loss(batch).backward()
        inner.step()
        if (step + 1) % inner_steps == 0:
            problem = BilevelProblem(
                lambda batch=batch: module.inner_loss(batch),
                lambda outer_batch=outer_batch: module.outer_loss(outer_batch),
                list(module.model.parameters()),
                [module.weights],
            )
            (module.weights.grad,) = Neumann(terms=2, step_size=0.05)(problem).gradient
            outer.step()


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_equals_the_loop_written_by_hand(inner_steps):
    module = HyperCleaning(inner_steps=inner_steps, inner_gradient_clip=None, outer_gradient_clip=None)
    expected = copy.deepcopy(module)
    quiet_trainer(max_steps=4 * inner_steps).fit(module, loaders())
    by_hand(expected, rounds=4, inner_steps=inner_steps)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), expected.parameters(), strict=True))


def test_steps_mean_inner_steps():
    module = HyperCleaning(inner_steps=3)
    trainer = quiet_trainer(max_steps=10)
    trainer.fit(module, loaders())
    assert trainer.global_step == 10
    assert (module.inner_steps_taken, module.outer_steps_taken) == (10, 3)
    assert {"inner_loss", "inner_gradient_norm"} <= trainer.callback_metrics.keys()
    module = HyperCleaning(inner_steps=3)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loaders())
    assert trainer.global_step == module.inner_steps_taken == 6
    logged = {"outer_loss", "hypergradient/norm", "hypergradient/residual", "hypergradient/products"}
    assert logged <= trainer.callback_metrics.keys()


def test_accumulated_batches_equal_one_large_batch():
    # Without outer steps, because the hypergradient of two batches of 4 is not that of one of 8.
    still = {"outer_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    whole, parts = HyperCleaning(**still), HyperCleaning(**still, inner_accumulation=2)
    quiet_trainer(max_steps=3).fit(whole, loaders(batch_size=8))
    quiet_trainer(max_steps=3).fit(parts, loaders(batch_size=4))
    assert (whole.inner_batches_seen, parts.inner_batches_seen) == (3, 6)
    torch.testing.assert_close(list(whole.parameters()), list(parts.parameters()), rtol=0, atol=1e-12)


def test_accumulated_hypergradients_are_averaged():
    module = HyperCleaning(
        inner_steps=3,
        outer_accumulation=2,
        inner_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        outer_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        outer_gradient_clip=None,
    )
    before = module.weights.detach().clone()
    inner, outer = (list(loader) for loader in loaders().values())
    gradients = [module.estimate_hypergradient(inner[i], outer[i]).gradient[0] for i in (1, 2)]
    quiet_trainer(max_steps=3).fit(module, loaders())
    torch.testing.assert_close(module.weights.detach(), before - (gradients[0] + gradients[1]) / 2)


def test_each_level_is_clipped_by_its_own_norm():
    options = {"inner_gradient_clip": 1e-3, "outer_gradient_clip": 1e-5}
    sgd = {f"{level}_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0) for level in ("inner", "outer")}
    module = HyperCleaning(**options, **sgd)
    before = copy.deepcopy(module)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, loaders())
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(module.model.parameters(), before.model.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert (module.weights - before.weights).norm().item() == pytest.approx(1e-5, rel=1e-3)
    assert trainer.callback_metrics["inner_gradient_norm"] > 1e-3  # what is logged is the norm before


def test_each_level_advances_its_own_schedule():
    module = HyperCleaning(
        inner_steps=2,
        inner_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        outer_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        inner_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        outer_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1),
    )
    trainer = quiet_trainer(max_steps=4)
    trainer.fit(module, loaders())
    inner, outer = (optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers)
    assert (inner, outer) == (pytest.approx(0.5**4), pytest.approx(0.1**2))


def test_inner_steps_leave_no_gradient_on_outer_parameters():
    module = HyperCleaning(inner_steps=100)
    quiet_trainer(max_steps=3).fit(module, loaders())
    assert module.weights.grad is None
    assert module.weights.requires_grad


def test_dropout_is_off_in_the_hypergradient_and_on_afterwards():
    module = HyperCleaning(dropout=0.5).train()
    inner, outer = (next(iter(loader)) for loader in loaders().values())
    estimates = [module.estimate_hypergradient(inner, outer).gradient[0] for _ in range(2)]
    assert torch.equal(*estimates)
    assert all(submodule.training for submodule in module.modules())
    assert not torch.equal(module.inner_loss(inner), module.inner_loss(inner))


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize(
    ("name", "inner_steps"),
    [*((name, 2) for name in claiming(Claim.GUARANTEES)), ("neumann", 1), ("chebyshev_warm", 4)],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, name, inner_steps):
    def make() -> HyperCleaning:
        return HyperCleaning(hypergradient=claiming(Claim.GUARANTEES)[name](), inner_steps=inner_steps)

    whole = make()
    quiet_trainer(max_epochs=3).fit(whole, loaders())
    callback = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    # A plain loader can be resumed at the end of an epoch only: the data module's own loaders are tested with it.
    quiet_trainer(max_epochs=1, callbacks=[callback], enable_checkpointing=True).fit(make(), loaders())
    resumed = make()
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(resumed, loaders(), ckpt_path=tmp_path / "step=6.ckpt", weights_only=True)
    assert resumed.inner_steps_taken == trainer.global_step == 18
    assert resumed.outer_steps_taken == whole.outer_steps_taken == 18 // inner_steps
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_module_of_somebody_else_becomes_bilevel_in_a_few_lines():
    class Weighted(BilevelModule):
        def __init__(self) -> None:
            super().__init__(inner_steps=2, inner_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
            self.boring = BoringModel()
            self.scale = nn.Parameter(torch.ones(32))

        def inner_loss(self, batch: Tensor) -> Tensor:
            return self.boring.loss(self.boring(self.scale * batch))

        def outer_loss(self, batch: Tensor) -> Tensor:
            return self.boring.loss(self.boring(batch))

        def outer_parameters(self) -> list[nn.Parameter]:
            return [self.scale]

    module = Weighted()
    theirs = module.boring.train_dataloader()
    quiet_trainer(max_steps=6).fit(module, {"inner": theirs, "outer": module.boring.val_dataloader()})
    assert module.outer_steps_taken == 3
    assert not torch.equal(module.scale, torch.ones(32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": 0}, "`inner_steps` must be 1 or more, got 0"),
        ({"inner_accumulation": 0}, "`inner_accumulation` must be 1 or more, got 0"),
        ({"outer_gradient_clip": 0.0}, "`outer_gradient_clip` must be positive or null, got 0.0"),
        ({"outer_accumulation": 5, "inner_steps": 2, "inner_accumulation": 2}, "has only 4 pairs"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigurationError, match=message):
        HyperCleaning(**options)


def test_loaders_without_levels_are_refused():
    with pytest.raises(ConfigurationError, match=r"needs \{'inner': batch, 'outer': batch\}, got list"):
        quiet_trainer(max_steps=1).fit(HyperCleaning(), loaders()["inner"])


def test_a_scheduler_that_needs_a_metric_is_refused():
    module = HyperCleaning(outer_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ConfigurationError, match="`outer_scheduler` is a ReduceLROnPlateau"):
        quiet_trainer(max_steps=1).fit(module, loaders())


def test_a_scaled_loss_is_refused(monkeypatch):
    # On a machine without a GPU Lightning refuses 16-mixed by itself, so its scaler is put in its place here.
    module, trainer = HyperCleaning(), quiet_trainer(max_steps=1)
    monkeypatch.setattr(trainer.precision_plugin, "scaler", object(), raising=False)
    with pytest.raises(ConfigurationError, match="loss scaling would divide the hypergradient"):
        trainer.fit(module, loaders())


def test_float16_without_a_scale_is_refused():
    with pytest.raises(ConfigurationError, match=r"`trainer\.precision` is 16-true, and float16 has no room"):
        quiet_trainer(max_steps=1, precision="16-true").fit(HyperCleaning(), loaders())


class EqualOnAllProcesses(pl.Callback):
    """Fails the run if the processes' parameters are not bitwise equal at its end."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.parameters():
            gathered = pl_module.all_gather(parameter.detach())
            assert torch.equal(gathered[0], gathered[1])


class InTurn(pl.LightningDataModule):
    """Deals rows to processes in turn, so that two batches of 2 make up one batch of 4, in order."""

    def train_dataloader(self) -> dict[str, DataLoader]:
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        return {
            level: DataLoader(
                loader.dataset,
                4 // world_size,
                sampler=DistributedSampler(loader.dataset, world_size, rank, shuffle=False),
            )
            for level, loader in loaders().items()
        }


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize("make", claiming(Claim.PROCESSES).values(), ids=claiming(Claim.PROCESSES))
def test_two_processes_equal_one_with_the_double_batch(make):
    options: dict[str, Any] = {"inner_steps": 2, "inner_gradient_clip": 0.1, "outer_gradient_clip": 0.01}
    one, two = (HyperCleaning(hypergradient=make(), **options) for _ in range(2))
    quiet_trainer(max_steps=6).fit(one, InTurn())
    quiet_trainer(max_steps=6, devices=2, strategy="ddp_fork", callbacks=[EqualOnAllProcesses()]).fit(two, InTurn())
    torch.testing.assert_close(list(two.parameters()), list(one.parameters()), rtol=0, atol=1e-10)
    assert not torch.equal(two.weights, torch.zeros_like(two.weights))


class Logged(pl.loggers.CSVLogger):
    """Keeps what was logged, in memory."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)


def test_the_statistics_of_the_default_estimator_reach_the_logger(tmp_path):
    logger = Logged(tmp_path)
    options: dict[str, Any] = {"inner_steps": 2, "hypergradient": None}
    quiet_trainer(max_steps=4, logger=logger, log_every_n_steps=1).fit(HyperCleaning(**options), loaders())
    (row, *_) = [row for row in logger.rows if "outer_loss" in row]
    names = ("residual", "largest_eigenvalue", "negative_curvature", "products", "seconds", "damping", "norm")
    assert {f"hypergradient/{name}" for name in names} <= row.keys()
    assert row["hypergradient/products"] == 8 + 5
    assert 0 < row["hypergradient/residual"] < 1.1


@pytest.mark.parametrize(
    "diverging", [Neumann(terms=5, step_size=100.0), Penalty(steps=8, step_size=100.0), Nystrom(1, damping=1e-6)]
)
def test_a_diverging_setting_is_warned_of_at_the_first_outer_step(diverging):
    with pytest.warns(ConvergenceWarning, match=r"diverges.*set `\w+` to \d"):
        quiet_trainer(max_steps=1).fit(HyperCleaning(hypergradient=diverging), loaders())


def test_micro_batches_equal_whole_batches():
    whole, split = HyperCleaning(), HyperCleaning(micro_batches=3)
    inner, outer = (next(iter(loader)) for loader in loaders(batch_size=8).values())
    assert [len(part[0]) for part in split.split_batch(inner, 3)] == [3, 3, 2]
    one, several = (module.estimate_hypergradient(inner, outer) for module in (whole, split))
    torch.testing.assert_close(several.gradient, one.gradient, rtol=1e-12, atol=0)
    torch.testing.assert_close(several.outer_loss, one.outer_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_in_micro_batches_is_training_on_whole_batches(accumulation):
    options = {"inner_steps": 2, "inner_accumulation": accumulation}
    whole, split = HyperCleaning(**options), HyperCleaning(**options, micro_batches=3)
    for module in (whole, split):
        quiet_trainer(max_steps=4).fit(module, loaders(batch_size=8))
    assert split.inner_batches_seen == whole.inner_batches_seen == 4 * accumulation
    torch.testing.assert_close(list(split.parameters()), list(whole.parameters()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [("text",), (torch.ones(3), torch.ones(4)), (torch.tensor(1.0),)])
def test_a_batch_that_cannot_be_split_is_named(batch):
    with pytest.raises(ConfigurationError, match="override `split_batch`, or set `micro_batches` to 1"):
        HyperCleaning(micro_batches=2).split_batch(batch, 2)


class Watching(HypergradientEstimator):
    """Compares what it is shown of the inner steps with what they do."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def observe(self, problem: BilevelProblem) -> None:
        loss = sum(weight * part() for part, weight in problem.inner_parts())
        expected = torch.autograd.grad(loss, problem.inner_parameters)
        for gradient, parameter in zip(expected, problem.inner_parameters, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)
        assert problem.inner_optimizer.param_groups[0]["lr"] == 0.01
        assert problem.inner_gradient_clip == 1.0
        self.gradients.append(expected[0])

    def __call__(self, problem: BilevelProblem) -> Hypergradient:
        return Neumann(step_size=0.05)(problem)


def test_estimators_are_shown_every_inner_step_with_all_its_batches():
    watching = Watching()
    module = HyperCleaning(hypergradient=watching, inner_accumulation=2, inner_steps=2)
    quiet_trainer(max_steps=4, max_epochs=3).fit(module, loaders())
    assert len(watching.gradients) == 4


def test_results_have_an_outer_loss_for_every_outer_step_alone(tmp_path):
    quiet_trainer(max_steps=7, callbacks=[Results(table=False)], default_root_dir=tmp_path).fit(
        HyperCleaning(inner_steps=3), loaders()
    )
    rows = [line.split(",") for line in (tmp_path / "losses.csv").read_text().splitlines()]
    assert rows[0] == ["step", "inner_loss", "outer_loss"]
    assert [row[0] for row in rows[1:]] == [str(step) for step in range(1, 8)]
    assert all(row[1] for row in rows[1:])
    assert [row[0] for row in rows[1:] if row[2]] == ["3", "6"]
    assert (tmp_path / "losses.png").stat().st_size > 5000


class Bringing(HyperCleaning):
    """What a user may bring beside the parameters of the example."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.frozen, self.loose = nn.Linear(1, 1).requires_grad_(False), torch.ones(2, requires_grad=True)
        self.phase, self.lazy = nn.Parameter(torch.zeros(2, dtype=torch.complex128)), nn.LazyLinear(1)
        self.table = nn.Embedding(2, 1, sparse=True)
        self.short = nn.Parameter(torch.zeros(2, dtype=torch.float16))

    def inner_parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())


def bringing(**changes: Any) -> HyperCleaning:
    """A module with other methods, which are functions of it, or other options."""
    methods = {name: changes.pop(name) for name in list(changes) if hasattr(HyperCleaning, name)}
    return type("Changed", (Bringing,), methods)(**changes)


@pytest.mark.parametrize("estimator", [Neumann(terms=2, step_size=0.05), Penalty(steps=2), Unrolled()])
def test_parameters_may_come_from_a_generator_and_twice(estimator):
    trained = []
    for changes in (
        {},
        {"outer_parameters": lambda module: (p for p in [module.weights])},
        {"inner_parameters": lambda module: module.model.parameters()},
        {"outer_parameters": lambda module: [module.weights] * 2},
        {"inner_parameters": lambda module: [*module.model.parameters()] * 2},
    ):
        module = bringing(**changes, hypergradient=copy.deepcopy(estimator), inner_steps=2)
        quiet_trainer(max_steps=4).fit(module, loaders())
        assert module.outer_steps_taken == 2
        trained.append([*module.model.parameters(), module.weights])
    assert all(torch.equal(a, b) for other in trained[1:] for a, b in zip(trained[0], other, strict=True))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outer_parameters": lambda m: []}, r"`outer_parameters\(\)` of Changed is empty"),
        ({"inner_parameters": lambda m: iter(())}, r"`inner_parameters\(\)` of Changed is empty"),
        ({"outer_parameters": lambda m: None}, r"`outer_parameters\(\)` of Changed returned NoneType"),
        ({"outer_parameters": lambda m: m.weights}, r"`outer_parameters\(\)` of Changed returned Parameter"),
        ({"inner_parameters": lambda m: m.model.state_dict()}, r"`inner_parameters\(\)` .* returned OrderedDict"),
        ({"inner_parameters": lambda m: m.model.named_parameters()}, r"Entry 0 .* is tuple and no parameter"),
        ({"outer_parameters": lambda m: [m.weights, m.loose]}, r"Entry 1 of `outer_parameters\(\)`.* of shape \(2,\)"),
        ({"outer_parameters": lambda m: [2 * m.weights]}, "is no parameter of the module"),
        ({"outer_parameters": lambda m: m.frozen.parameters()}, "`frozen.weight` .* does not require a gradient"),
        ({"outer_parameters": lambda m: [m.phase]}, "`phase` of .* is torch.complex128"),
        ({"inner_parameters": lambda m: m.lazy.parameters()}, "`lazy.weight` of .* has no shape yet"),
        ({"inner_parameters": lambda m: m.table.parameters()}, "`table` has sparse gradients"),
        ({"inner_parameters": lambda m: [*m.model.parameters(), m.weights]}, "`weights` of .* is both inner and outer"),
        ({"inner_loss": lambda m, batch: {"loss": 1.0}}, "`inner_loss` returned dict, expected a scalar tensor"),
        ({"outer_loss": lambda m, batch: 1j * m.model(batch[0]).mean()}, "`outer_loss` returned torch.complex128"),
        ({"inner_loss": lambda m, batch: m.model(batch[0])}, r"`inner_loss` returned a tensor of shape \(4, 1\)"),
        ({"inner_loss": lambda m, batch: torch.ones(())}, "`inner_loss` returned a tensor without a gradient graph"),
        ({"outer_loss": lambda m, batch: (torch.ones(()), 1)}, "`outer_loss` returned tuple, expected a scalar tensor"),
        ({"inner_optimizer": sgd([nn.Parameter(torch.ones(1))])}, "`inner_optimizer` is SGD, and must be a function"),
        ({"outer_optimizer": lambda parameters: None}, "`outer_optimizer` made NoneType"),
        ({"inner_optimizer": lambda parameters: sgd(parameters[:1])}, "SGD with 1 of the 4 parameters"),
        ({"outer_optimizer": lambda p: sgd([nn.Parameter(torch.ones(1))])}, "0 of the 1 parameters .* and 1 others"),
        ({"inner_optimizer": torch.optim.LBFGS}, "`inner_optimizer` is LBFGS, which evaluates the loss several times"),
        ({"outer_parameters": property(lambda m: [m.weights])}, r"`outer_parameters\(\)` .* is list and no method"),
        ({"inner_parameters": lambda m: [*m.model.parameters()][: 1 + m.global_step]}, "has 1 that its optimizer does"),
        ({"outer_parameters": lambda m: [m.short], "outer_optimizer": torch.optim.Adam}, "`eps` of Adam is 1e-08"),
        ({"outer_optimizer": torch.optim.Muon}, "`outer_optimizer` cannot be made .*Muon only supports 2D"),
        ({"inner_optimizer": lambda: None}, "`inner_optimizer` cannot be made .*TypeError"),
        ({"inner_optimizer": torch.optim.SparseAdam}, "`inner_optimizer` .* cannot take a step with SparseAdam"),
        ({"inner_scheduler": lambda optimizer: None}, "`inner_scheduler` made NoneType"),
        ({"outer_scheduler": torch.optim.lr_scheduler.StepLR}, "`outer_scheduler` cannot be made .*'step_size'"),
        ({"outer_scheduler": lambda o: LinearWithWarmup(sgd([nn.Parameter(torch.ones(1))]))}, "is no scheduler of the"),
        (
            {"inner_scheduler": lambda o: OneCycleLR(o, 0.1, 1)},
            "`inner_scheduler` cannot take a step with .*total steps",
        ),
    ],
)
def test_what_a_level_cannot_be_trained_with_is_named(change, message):
    with pytest.raises(ConfigurationError, match=message):
        quiet_trainer(max_steps=2).fit(bringing(**change), loaders())


class OwnProduct(HypergradientEstimator):
    """Differentiates the gradient as a user would write it."""

    def __init__(self, attentive: bool) -> None:
        self.attentive = attentive

    def __call__(self, problem: BilevelProblem) -> Hypergradient:
        with second_order() if self.attentive else nullcontext():
            (loss, _), *_ = problem.inner_parts()
            value = loss()
            gradient = torch.autograd.grad(value, problem.inner_parameters, create_graph=True)
            product = torch.autograd.grad(sum(g.sum() for g in gradient), problem.outer_parameters)
        return Hypergradient(list(product), value.detach(), value.detach())


class Attentive(HyperCleaning):
    """A module whose attention runs in PyTorch's fused kernel."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.attention = nn.Linear(4, 4).double()

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        hidden = self.attention(x)[None, None]
        found = F.scaled_dot_product_attention(hidden, hidden, hidden)[0, 0]
        return super().inner_loss([found, y, index])


def test_an_own_second_derivative_through_fused_attention_names_what_allows_it():
    with pytest.raises(ConfigurationError, match=r"OwnProduct needs second derivatives, and attention runs in a fused"):
        quiet_trainer(max_steps=1).fit(Attentive(hypergradient=OwnProduct(attentive=False)), loaders())
    module = Attentive(hypergradient=OwnProduct(attentive=True))
    quiet_trainer(max_steps=1).fit(module, loaders())
    assert module.weights.abs().sum() > 0


def test_under_fabric_a_training_step_says_what_works_and_that_does():
    module, fabric = HyperCleaning(), Fabric(accelerator="cpu", devices=1)
    expected = copy.deepcopy(module)
    inner, outer = (configured["optimizer"] for configured in module.configure_optimizers())
    module, inner, outer = fabric.setup(module, inner, outer)
    batches = [next(iter(loader)) for loader in loaders().values()]
    with pytest.raises(ConfigurationError, match=r"needs a `Trainer`.*`estimate_hypergradient\(inner_batch"):
        module.training_step(dict(zip(("inner", "outer"), batches, strict=True)), 0)
    module.mark_forward_method("inner_loss")
    fabric.backward(module.inner_loss(batches[0]))
    torch.nn.utils.clip_grad_norm_(module.model.parameters(), 1.0)
    inner.step()
    (module.weights.grad,) = module.estimate_hypergradient(*batches).gradient
    torch.nn.utils.clip_grad_norm_([module.weights], 1.0)
    outer.step()
    quiet_trainer(max_steps=1).fit(expected, loaders())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), expected.parameters(), strict=True))
