"""The data module: from a folder of tasks to batches of both levels."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.agreement import compare_processes
from diopt_lightning.data.collate import Batch, Collator
from diopt_lightning.data.files import refuse_address
from diopt_lightning.data.outer_batches import JoinedBatches, SplitCollator, outer_batches
from diopt_lightning.data.prompts import PromptFormat, prompts_of_evaluation
from diopt_lightning.data.reading import reading_of
from diopt_lightning.data.sampling import (
    EvaluationSampler,
    ResumableDataLoader,
    TokenRows,
    TrainSampler,
    check_positions,
    longest_batch,
)
from diopt_lightning.data.splits import TaskSplits, read_data
from diopt_lightning.data.tasks import Task, choose_instances
from diopt_lightning.data.tokenization import SourceTarget, load_tokenizer, summary, tokenize
from diopt_lightning.data.workers import HoldingSignalsBack, leave_signals_to_the_main_process
from diopt_lightning.errors import ConfigurationError, require_at_least

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "dev", "test")


class NaturalInstructionsDataModule(pl.LightningDataModule):
    """Super-NaturalInstructions, or anything in its layout, as four disjoint sets of tasks.

    Reads ``root/tasks/*.json`` and ``root/splits/SPLIT/{train,test}_tasks.txt`` untouched. Validation and dev tasks
    come from ``validation_tasks.txt`` and ``dev_tasks.txt`` beside those, and where a list does not exist they are
    drawn from the train tasks. Training batches are dictionaries with ``inner`` (train tasks) and, if there are
    validation tasks, ``outer``. Lightning's validation loop gets the dev tasks, its test and predict loops the test
    tasks.

    Args:
        root: Folder of the data.
        tokenizer: Name on the hub, or folder, of the backbone's tokenizer.
        split: Which of the folders in ``root/splits`` to use.
        validation_tasks: Tasks of the outer loss to draw from the train tasks, as a number or a fraction of them.
        dev_tasks: Tasks that select checkpoints, to draw likewise from what is left.
        whole_categories: Hold whole categories out for validation and dev tasks, instead of a share of each.
        split_seed: Seed of the draw. It is apart from the run's seed, so that runs with several seeds share their
            tasks.
        train_prompt: Human-written parts in the sources of train tasks, after the learned instruction. Default: none.
        validation_prompt: The same for validation tasks. Default: definition and two positive examples.
        test_prompt: The same for dev and test tasks. Default: definition and two positive examples. Several by name,
            ``{NAME: {definition: true, ...}, ...}``, are all tested (``test/NAME/rougeL``), and dev has the first.
        instances_per_task: Instances of each train and validation task, drawn at random where there are more.
        test_instances_per_task: Instances of each dev and test task, the first ones of the file: the first 100 of the
            official test tasks are balanced by label.
        max_source_length: Tokens of instruction and source together, those of a learned instruction included.
        max_target_length: Tokens of a target.
        official_cutting: Cut sources that are too long to the ids of Tk-Instruct, which decodes and encodes what fits.
        batch_size: Instances in a training batch of the inner level, for each process.
        outer_batch_size: The same for the outer level. Default: as ``batch_size``. Of several outer batches at a step
            (``model.outer_batches``) the size of each.
        evaluation_batch_size: Instances in a batch of dev, test and prediction. Default: as ``batch_size``.
        num_workers: Processes that load ahead, for each loader.
        pin_memory: Copy batches into pinned memory, which makes the way to a GPU faster.
        seed: Seed of the order of training batches and of the drawn instances and references.
        cache_dir: Folder of the token cache. Default: that of the ``datasets`` library.

    Raises:
        ConfigurationError: If an argument or a file cannot work; the message says which and why.

    Example:
        >>> data = NaturalInstructionsDataModule("no/such/folder", tokenizer="google/t5-base-lm-adapt")
        >>> data.prepare_data()
        Traceback (most recent call last):
        ...
        diopt_lightning.errors.ConfigurationError: There is no folder no/such/folder: set `data.root` to ...
    """

    def __init__(
        self,
        root: str,
        tokenizer: str,
        split: str = "default",
        validation_tasks: float = 0.1,
        dev_tasks: float = 0.05,
        whole_categories: bool = False,
        split_seed: int = 0,
        train_prompt: PromptFormat = PromptFormat(definition=False, positive_examples=0),
        validation_prompt: PromptFormat = PromptFormat(),
        test_prompt: PromptFormat | dict[str, PromptFormat] = PromptFormat(),
        instances_per_task: int = 100,
        test_instances_per_task: int = 100,
        max_source_length: int = 1024,
        max_target_length: int = 128,
        official_cutting: bool = False,
        batch_size: int = 16,
        outer_batch_size: int | None = None,
        evaluation_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        numbers: dict[str, Any] = {
            "instances_per_task": instances_per_task,
            "test_instances_per_task": test_instances_per_task,
            "max_source_length": max_source_length,
            "max_target_length": max_target_length,
            "batch_size": batch_size,
            "outer_batch_size": outer_batch_size,
            "evaluation_batch_size": evaluation_batch_size,
        }
        require_at_least(1, **{f"data.{name}": number for name, number in numbers.items()})
        self.root = Path(root)
        self.tokenizer_name = tokenizer
        self.split = split
        self.validation_tasks = validation_tasks
        self.dev_tasks = dev_tasks
        self.whole_categories = whole_categories
        self.split_seed = split_seed
        self.prompts = {"train": train_prompt, "validation": validation_prompt, **prompts_of_evaluation(test_prompt)}
        self.instances_per_task = instances_per_task
        self.test_instances_per_task = test_instances_per_task
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.official_cutting = official_cutting
        self.batch_size = batch_size
        self.outer_batch_size = outer_batch_size if outer_batch_size is not None else batch_size
        self.evaluation_batch_size = evaluation_batch_size if evaluation_batch_size is not None else batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._rows: dict[str, Dataset] = {}
        self._positions: dict[str, dict[str, int]] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    def splits(self) -> TaskSplits:
        """Names of the tasks in each set."""
        return self._read[1]

    @property
    def tasks(self) -> list[Task]:
        """All tasks; a batch's ``task`` indexes this list, in which the train tasks come first."""
        return [task for split in SPLITS for task in self.split_tasks(split)]

    def split_tasks(self, split: str) -> list[Task]:
        """The tasks of one set: ``train``, ``validation``, ``dev`` or ``test``, or ``test/NAME`` of a prompt."""
        tasks, splits = self._read
        return [tasks[name] for name in getattr(splits, split.split("/")[0])]

    def evaluations(self, stage: str) -> list[str]:
        """What is evaluated in a stage, ``dev`` or ``test``: itself, or ``test/NAME`` for each of several prompts."""
        return [split for split in self.prompts if split.split("/")[0] == stage]

    def prepare_data(self) -> None:
        """Check every file and fill the token cache, on one process only."""
        for split in self.prompts:
            if self.split_tasks(split):
                rank_zero_info(f"{split}: {summary(self._tokenize(split), self.tasks)}")

    def setup(self, stage: str | None = None) -> None:
        """Read the tasks and open the token cache."""
        if is_fitting(self.trainer):
            self._positions = {}  # those of an earlier run
        needed = {"fit": SPLITS[:3], "validate": ("dev",), "test": ("test",), "predict": ("test",), None: SPLITS}
        for split in self.prompts:
            if split.split("/")[0] in needed[stage] and split not in self._rows and self.split_tasks(split):
                self._rows[split] = self._tokenize(split)
        if self.trainer is not None:
            compare_processes(self._rows, f"{self.root} and {self.tokenizer_name}")

    def train_dataloader(self) -> dict[str, ResumableDataLoader]:
        """Endless streams of both levels, which go on within a run; an epoch is one pass over the train instances."""
        inner = self._train_loader("train", self.batch_size, None)
        loaders = {"inner": inner}
        if self.splits.validation:
            together = outer_batches(self.trainer.lightning_module if self.trainer is not None else None)
            loaders["outer"] = self._train_loader("validation", self.outer_batch_size, len(inner), together)
        # Not only those of a checkpoint: `reload_dataloaders_every_n_epochs` asks for loaders again.
        positions = self.state_dict() or self._positions
        for level in positions.keys() & loaders.keys():
            loaders[level].load_state_dict(positions[level])
        return loaders

    def state_dict(self) -> dict[str, Any]:
        """Return the positions in both streams, of the loaders that the trainer has: others may have been asked for.

        Lightning keeps those of loaders too, and restores them in the middle of an epoch alone: after a checkpoint of
        the end of an epoch, a resumed run would be given the batches of the first one again.
        """
        loaders: Any = self.trainer.train_dataloader if self.trainer is not None and is_fitting(self.trainer) else None
        return {level: loader.state_dict() for level, loader in (loaders or {}).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep positions for the loaders of a resumed run."""
        check_positions(state_dict)
        if is_fitting(self.trainer):
            self._positions = state_dict

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The dev tasks, or nothing if there are none."""
        return self._evaluation_loader("dev") if self.splits.dev else []

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test tasks, to test on or to predict; once for each of several prompts."""
        loaders = [self._evaluation_loader(name) for name in self.evaluations("test")]
        return loaders if len(loaders) > 1 else loaders[0]

    predict_dataloader = test_dataloader

    def longest_batch(self, split: str, rows: int) -> Batch:
        """A batch as large as batches of a set get; see :func:`~diopt_lightning.data.sampling.longest_batch`.

        Args:
            split: The set; :meth:`setup` has read it.
            rows: Rows of the batch.
        """
        return longest_batch(self._rows[split], rows, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)

    @cached_property
    def _read(self) -> tuple[dict[str, Task], TaskSplits]:
        """All tasks by name, and which set each is in."""
        wanted = {"validation": self.validation_tasks, "dev": self.dev_tasks}
        return read_data(self.root, self.split, wanted, self.split_seed, self.whole_categories)

    def _tokenize(self, split: str) -> "Dataset":
        tasks, module = self.tasks, self.trainer.lightning_module if self.trainer is not None else None
        reading = reading_of(module, self.tokenizer)
        reserved = reading.reserved_length(split.split("/")[0])
        if reserved >= self.max_source_length:
            raise ConfigurationError(
                f"`data.max_source_length` is {self.max_source_length}, and the learned instruction alone takes "
                f"{reserved} positions: raise the limit, or make the instruction shorter (`length`, `slots` or "
                "`candidate_length`)."
            )
        lengths = self.max_source_length - reserved, self.max_target_length
        options = SourceTarget(self.prompts[split], reading.text_format, *lengths, self.official_cutting)
        names = {task.name for task in self.split_tasks(split)}
        evaluated = split not in ("train", "validation")
        number, seed = (self.test_instances_per_task, None) if evaluated else (self.instances_per_task, self.seed)
        chosen = [(i, task, choose_instances(task, number, seed)) for i, task in enumerate(tasks) if task.name in names]
        return tokenize(chosen, self.tokenizer, options, self.cache_dir)

    def _train_loader(self, split: str, size: int, num_batches: int | None, together: int = 1) -> ResumableDataLoader:
        rows, pad = self._rows[split], self.tokenizer.pad_token_id
        stream = rows["length"][:], size, self.seed, num_batches, *processes_of(self.trainer)
        sampler = JoinedBatches(together, *stream) if together > 1 else TrainSampler(*stream)
        sampler.repeat(getattr(self.trainer, "overfit_batches", 0))
        collator = SplitCollator(together, pad) if together > 1 else Collator(pad)
        return ResumableDataLoader(TokenRows(rows), sampler, collator, self.num_workers, self.pin_memory)

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        rows, (replicas, rank) = self._rows[split], processes_of(self.trainer)
        return HoldingSignalsBack(
            TokenRows(rows),
            batch_size=None,
            sampler=EvaluationSampler(rows["length"][:], self.evaluation_batch_size, replicas, rank),
            collate_fn=Collator(self.tokenizer.pad_token_id),
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_the_main_process,
            pin_memory=self.pin_memory,
        )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Make a data module from a checkpoint in a file."""
        refuse_address(checkpoint_path)
        refuse_address(kwargs.get("hparams_file"))
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


def is_fitting(trainer: pl.Trainer | None) -> bool:
    """Whether a trainer is there and trains."""
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def processes_of(trainer: pl.Trainer | None) -> tuple[int, int]:
    """Number of processes and the index of this one."""
    return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
