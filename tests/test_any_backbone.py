"""Runs with causal models, adapters, checkpointed layers and half precision, from fitting to taking the result away."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from diopt_lightning import ConfigurationError, InstructionOptimization, InstructionTuning
from diopt_lightning.backbones import Backbone, Causal, LastLayers, LoRA, RandomCausal, RandomSeq2Seq
from diopt_lightning.bilevel import Chebyshev, FiniteDifference, HypergradientEstimator, Identity, Neumann
from diopt_lightning.callbacks import RandomState
from diopt_lightning.cli import main
from diopt_lightning.data import BlankExemplarsDataModule
from diopt_lightning.export import export_adapter, export_model, instruction_embeddings
from diopt_lightning.export.model import plain_model
from diopt_lightning.instructions import EmbedderDP, Instruction
from tests.backbones import FAMILIES
from tests.forms import LEARNABLE
from tests.helpers import quiet_trainer
from tests.runs import data, moved
from tests.tolerances import Error

LLAMA = FAMILIES["llama"]
GPT2 = FAMILIES["gpt2"] | {"n_positions": 2048}  # for the data module's limits
T5 = FAMILIES["t5"] | {"feed_forward_proj": "gated-gelu"}


def optimization(
    backbone: Backbone,
    instruction: Instruction | None = None,
    estimator: HypergradientEstimator | None = None,
    **options: Any,
) -> InstructionOptimization:
    return InstructionOptimization(
        backbone,
        instruction if instruction is not None else EmbedderDP(length=3),
        hypergradient=estimator or Neumann(terms=1, step_size=1e-3),
        inner_steps=2,
        inner_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        outer_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        max_new_tokens=3,
        **options,
    )


def pretrained(folder: Path, experiment: Any, config: dict[str, Any]) -> str:
    """Write a model and return its folder, as one from a hub would be."""
    tasks = data(experiment, folder)
    tasks.prepare_data()
    backbone = RandomCausal(dict(config))
    backbone.build(tasks.tokenizer)
    export_model(backbone.model, tasks.tokenizer, folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize("form", ["embedder", "embedder_ic", "straight_through"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_both_levels_of_a_causal_model_learn_and_it_is_tested(form, config, blank_exemplars, tmp_path):
    module = optimization(RandomCausal(dict(config)), LEARNABLE[form]())
    distances = moved(module, blank_exemplars, tmp_path)
    assert distances["backbone"] > 0
    assert distances["instruction"] > 0
    trainer = quiet_trainer()
    trainer.test(module, data(blank_exemplars, tmp_path), verbose=False)
    assert trainer.callback_metrics["test/loss"] > 0


@pytest.mark.parametrize("estimator", [Chebyshev, Identity, lambda: Neumann(product=FiniteDifference())])
def test_checkpointed_layers_in_micro_batches_train_as_the_plain_model_does(estimator, blank_exemplars, tmp_path):
    found = []
    for options, made in (
        ({}, {}),
        ({"micro_batches": 2}, {"activation_checkpointing": True}),
    ):
        torch.manual_seed(0)
        module = optimization(RandomSeq2Seq(dict(T5), **made), estimator=estimator(), **options)
        moved(module, blank_exemplars, tmp_path)
        found.append(torch.cat([parameter.detach().flatten() for parameter in module.instruction.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(blank_exemplars, tmp_path, monkeypatch):
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile(self, backend=backend, **options))
    found = []
    for options in ({}, {"compile": True}):
        torch.manual_seed(0)
        module = optimization(RandomCausal(dict(LLAMA), **options), estimator=Chebyshev(products=2))
        moved(module, blank_exemplars, tmp_path)
        found.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert compiled
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


class TestAdapters:
    """Runs that train adapters beside a frozen model."""

    def fit(self, backbone: Backbone, root: Path, experiment: Any, **options: Any) -> tuple[Any, pl.Trainer]:
        torch.manual_seed(0)
        module = optimization(backbone)
        every_three = ModelCheckpoint(
            root / options.pop("name", "run"), every_n_train_steps=3, save_top_k=-1, filename="{step}"
        )
        trainer = quiet_trainer(
            max_steps=options.pop("max_steps", 6),
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[every_three, RandomState()],
        )
        trainer.fit(module, data(experiment, root), **options)
        return module, trainer

    def test_resume_bitwise_from_checkpoints_without_the_frozen_weights(self, blank_exemplars, tmp_path):
        folder = pretrained(tmp_path, blank_exemplars, LLAMA)

        def backbone() -> Causal:
            return Causal(folder, inner_parameters=LoRA(rank=2))

        whole, _ = self.fit(backbone(), tmp_path, blank_exemplars)
        path = tmp_path / "run" / "step=3.ckpt"
        held = {name for name in torch.load(path, weights_only=True)["state_dict"] if name.startswith("backbone")}
        assert held
        assert all("lora" in name for name in held)
        resumed, _ = self.fit(backbone(), tmp_path, blank_exemplars, name="second", ckpt_path=path, weights_only=True)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_other_frozen_weights_are_refused(self, blank_exemplars, tmp_path):
        folder = pretrained(tmp_path, blank_exemplars, LLAMA)
        self.fit(Causal(folder, inner_parameters=LoRA(rank=2)), tmp_path, blank_exemplars)
        torch.manual_seed(7)
        other = tmp_path / "other"
        pretrained(other, blank_exemplars, LLAMA)
        with pytest.raises(ConfigurationError, match=r"beside the frozen weights of .*other/model` has others"):
            self.fit(
                Causal(str(other / "model"), inner_parameters=LoRA(rank=2)),
                tmp_path,
                blank_exemplars,
                ckpt_path=tmp_path / "run" / "step=3.ckpt",
            )

    def test_random_models_and_whole_ones_are_held_whole(self, blank_exemplars, tmp_path):
        for backbone in (RandomCausal(dict(LLAMA), inner_parameters=LastLayers(1)), RandomCausal(dict(LLAMA))):
            module, trainer = self.fit(backbone, tmp_path, blank_exemplars)
            trainer.save_checkpoint(tmp_path / "saved.ckpt")
            content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
            assert content["state_dict"].keys() == module.state_dict().keys()

    def test_the_exported_model_has_the_adapters_in_its_weights(self, blank_exemplars, tmp_path):
        folder = pretrained(tmp_path, blank_exemplars, GPT2)
        arguments = [
            "fit",
            *("--model", "diopt_lightning.InstructionOptimization"),
            *("--model.backbone", "diopt_lightning.backbones.Causal", "--model.backbone.pretrained", folder),
            *("--model.backbone.inner_parameters", "diopt_lightning.backbones.LoRA"),
            *("--model.instruction", "diopt_lightning.instructions.EmbedderDP", "--model.instruction.length", "3"),
            *("--model.hypergradient", "diopt_lightning.bilevel.Identity", "--model.inner_optimizer", "Adam"),
            *("--model.inner_optimizer.lr", "0.01"),
            *("--data", "diopt_lightning.data.NaturalInstructionsDataModule", "--data.root", str(tmp_path)),
            *("--data.tokenizer", folder, "--data.dev_tasks", "0", "--data.max_source_length", "128"),
            *("--data.validation_tasks", "0.3", "--trainer.max_steps", "4", "--trainer.accelerator", "cpu"),
            *("--trainer.default_root_dir", str(tmp_path / "results"), "--trainer.enable_progress_bar", "false"),
        ]
        assert main(arguments) == 0
        (checkpoint,) = (tmp_path / "results").rglob("*.ckpt")
        out = tmp_path / "exported"
        assert main(["export", str(checkpoint), str(out), "--format", "model"]) == 0
        model = AutoModelForCausalLM.from_pretrained(out).eval()
        tasks = data(blank_exemplars, tmp_path)
        backbone = Causal(folder, inner_parameters=LoRA())
        backbone.build(tasks.tokenizer)
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        held = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone")}
        backbone.load_state_dict(held, strict=False)
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            expected = backbone.eval().model(input_ids=ids).logits
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
            before = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        assert (before - expected).abs().max() > 1e-3


def test_an_exported_instruction_is_an_adapter_of_a_causal_model(blank_exemplars, tmp_path):
    module = optimization(RandomCausal(dict(LLAMA)))
    moved(module, blank_exemplars, tmp_path)
    tokenizer = module.data.tokenizer
    export_model(plain_model(module.backbone.model), tokenizer, tmp_path / "model")
    embeddings = instruction_embeddings(module)
    export_adapter(embeddings, tmp_path / "adapters", encoder_decoder=False)
    name, rows = next(iter(embeddings.items()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapters" / name).eval()
    encoded = AutoTokenizer.from_pretrained(tmp_path / "model")("the castle moon", return_tensors="pt")
    with torch.no_grad():
        logits = adapted(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        backbone = module.backbone.eval()
        whole = torch.cat([rows[None], backbone.embed(encoded["input_ids"])], dim=1)
        expected = backbone.model(inputs_embeds=whole).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


class TestPrecision:
    """What half precision costs, and what stays in single."""

    def hypergradient(self, precision: str, experiment: Any, root: Path, **options: Any) -> Tensor:
        """The hypergradient of the first batches, as a training step computes it."""
        found: list[Tensor] = []

        class Estimate(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
                with trainer.precision_plugin.train_step_context():
                    estimate = pl_module.estimate_hypergradient(batch["inner"], batch["outer"])
                found.extend(estimate.gradient)

        torch.manual_seed(0)
        module = optimization(RandomCausal(dict(LLAMA), **options), estimator=Chebyshev(products=3))
        tasks = BlankExemplarsDataModule(str(root), experiment, batch_size=4)
        quiet_trainer(max_steps=1, precision=precision, limit_val_batches=0, callbacks=[Estimate()]).fit(module, tasks)
        assert all(entry.dtype == torch.float32 for entry in found)
        assert all(parameter.dtype == torch.float32 for parameter in module.instruction.parameters())
        return torch.cat([entry.flatten() for entry in found])

    @pytest.mark.parametrize("checkpointed", [False, True])
    @pytest.mark.parametrize(("precision", "least"), [("bf16-mixed", 0.995), ("bf16-true", 0.99)])
    def test_half_precision_turns_a_hypergradient_a_little(
        self, precision, least, checkpointed, blank_exemplars, tmp_path
    ):
        exact = self.hypergradient("32-true", blank_exemplars, tmp_path)
        rounded = self.hypergradient(precision, blank_exemplars, tmp_path, activation_checkpointing=checkpointed)
        cosine = torch.nn.functional.cosine_similarity(exact, rounded, dim=0).item()
        error = ((exact - rounded).norm() / exact.norm()).item()
        print(f"{precision}: cosine {cosine:.5f}, relative error {error:.4f}")
        assert 1e-7 < Error(1 - cosine) < 1 - least  # rounded indeed
        assert Error(error) < 0.2

    @pytest.mark.parametrize("form", LEARNABLE)
    def test_every_form_of_instruction_trains_beside_a_model_in_half_precision(self, form, blank_exemplars, tmp_path):
        module = optimization(RandomSeq2Seq(dict(T5)), LEARNABLE[form]())
        trainer = quiet_trainer(max_steps=4, precision="bf16-true", limit_val_batches=1)
        trainer.fit(module, data(blank_exemplars, tmp_path))
        assert next(module.backbone.parameters()).dtype == torch.bfloat16
        assert all(parameter.dtype == torch.float32 for parameter in module.instruction.parameters())

    def test_plain_tuning_of_an_adapter_in_half_precision(self, blank_exemplars, tmp_path):
        backbone = RandomCausal(dict(LLAMA), inner_parameters=LoRA(rank=2, base_dtype="bfloat16"))
        module = InstructionTuning(backbone, max_new_tokens=3)
        quiet_trainer(max_steps=2, limit_val_batches=0).fit(module, data(blank_exemplars, tmp_path))
        (group,) = module.optimizers().param_groups
        assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in module.parameters() if p.requires_grad)
