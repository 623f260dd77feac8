"""Tasks for people who have nothing yet: a controlled experiment whose right answer is known."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from diopt_lightning.data.datamodule import NaturalInstructionsDataModule
from diopt_lightning.data.files import write_whole
from diopt_lightning.data.prompts import PromptFormat
from diopt_lightning.errors import ConfigurationError, require_at_least

BLANK = "blank"
DEFINITION = "Answer with the word that belongs to this task"
LABELS = """
    amber azure beige black bronze brown coral crimson cyan gold green indigo ivory jade lilac lime magenta maroon navy
    olive orange pink plum purple red rose ruby silver teal violet white yellow
""".split()
WORDS = """
    apple bear bird boat bread bridge candle castle cat chair cloud coin desk dog door drum eagle farm field fire fish
    flag flower forest fox frog garden gate glass goat grass hammer hat hill horse house island key king kite lake lamp
    leaf lion map moon mouse oak ocean owl paper pear piano plane queen rabbit rain ring river road rock roof rope
    school sheep ship shoe snow spoon star stone storm sun table tent tiger tower train tree valley wall wheel window
    wolf
""".split()


@dataclass(frozen=True)
class BlankExemplars:
    """The blank-exemplar experiment: a task's answer stands in one exemplar, and the other exemplars are blank.

    Every task has one label word, which is the answer to all of its instances. The input is random words and does not
    tell which task it belongs to, so the answer can only be copied from an exemplar that shows it. A train task has
    ``exemplars`` positive examples: the real one, at a random position, and blanks. Validation, dev and test tasks have
    the real one only. Which exemplar is real is written nowhere; a learner that finds out has done so through the
    validation tasks' loss.

    Args:
        exemplars: Positive examples of a train task, one of them real.
        train_tasks: Number of train tasks.
        validation_tasks: Number of validation tasks.
        dev_tasks: Number of dev tasks.
        test_tasks: Number of test tasks.
        instances: Instances of each task.
        labels: Number of different label words, 32 at most; tasks of all four sets share them.
        input_words: Words in an input.
        seed: Seed of the tasks.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    exemplars: int = 4
    train_tasks: int = 32
    validation_tasks: int = 32
    dev_tasks: int = 16
    test_tasks: int = 16
    instances: int = 100
    labels: int = 32
    input_words: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("exemplars", "train_tasks", "validation_tasks", "test_tasks", "instances")
        require_at_least(1, **{name: getattr(self, name) for name in at_least_one})
        require_at_least(0, dev_tasks=self.dev_tasks)
        require_at_least(2, labels=self.labels)
        if self.labels > len(LABELS):
            raise ConfigurationError(f"`labels` must be {len(LABELS)} or less, got {self.labels}.")

    def write(self, root: Path) -> None:
        """Write the tasks, their split lists and a tokenizer in the official layout, the same at every call.

        Other processes may read and write the same meanwhile: no file is ever there in part.
        """
        generator = random.Random(f"blank exemplars/{self.seed}")
        (root / "tasks").mkdir(parents=True, exist_ok=True)
        (root / "splits" / "default").mkdir(parents=True, exist_ok=True)
        number = 0
        for split in ("train", "validation", "dev", "test"):
            listed = []
            for _ in range(getattr(self, f"{split}_tasks")):
                number += 1
                # Labels take turns, so that each set of tasks has them in equal shares.
                name, label = f"task{number:03d}_label_{split}", LABELS[number % self.labels]
                document = self._task(name, label, self.exemplars if split == "train" else 1, generator)
                write_whole(root / "tasks" / f"{name}.json", json.dumps(document, indent=1))
                listed.append(name)
            list_file = root / "splits" / "default" / f"{split}_tasks.txt"
            if listed:
                write_whole(list_file, "\n".join(listed) + "\n")
            else:
                list_file.unlink(missing_ok=True)
        (root / "tokenizer").mkdir(exist_ok=True)
        with TemporaryDirectory() as folder:
            word_tokenizer(["definition", *DEFINITION.split(), BLANK, *LABELS, *WORDS]).save_pretrained(folder)
            for path in Path(folder).iterdir():
                write_whole(root / "tokenizer" / path.name, path.read_bytes())

    def _task(self, name: str, label: str, exemplars: int, generator: random.Random) -> dict[str, Any]:
        examples = [{"input": BLANK, "output": BLANK, "explanation": ""} for _ in range(exemplars)]
        real = {"input": self._words(generator), "output": label, "explanation": ""}
        examples[generator.randrange(exemplars)] = real
        return {
            "Source": ["synthetic"],
            "Categories": ["Label Recall"],
            "Definition": [DEFINITION],
            "Positive Examples": examples,
            "Negative Examples": [],
            "Instances": [
                {"id": f"{name.split('_')[0]}-{index}", "input": self._words(generator), "output": [label]}
                for index in range(self.instances)
            ],
        }

    def _words(self, generator: random.Random) -> str:
        return " ".join(generator.choices(WORDS, k=self.input_words))


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each of the given words and for what the prompt format adds.

    Words are lower-cased and stand apart from punctuation, so that detokenized text equals the original up to that.

    Args:
        words: The words to know; others become ``<unk>``.
    """
    template = "positive negative example now complete the following input output explanation . - : ? ! ,".split()
    digits = [str(digit) for digit in range(10)]
    vocabulary = ["<pad>", "</s>", "<unk>", *dict.fromkeys(word.lower() for word in [*template, *digits, *words])]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=1024
    )


class BlankExemplarsDataModule(NaturalInstructionsDataModule):
    """Writes the blank-exemplar experiment to a folder and reads it like any other data.

    Sources of train tasks hold the input alone, because the exemplar is what is learned; those of validation, dev and
    test tasks show their one exemplar.

    Args:
        root: Folder to write to.
        tasks: The tasks to write.
        batch_size: Instances in a training batch of the inner level, for each process.
        outer_batch_size: The same for the outer level.
        evaluation_batch_size: Instances in a batch of dev, test and prediction.
        num_workers: Processes that load ahead, for each loader.
        seed: Seed of the order of training batches.
        cache_dir: Folder of the token cache. Default: ``root/cache``.
    """

    def __init__(
        self,
        root: str = "results/blank_exemplars",
        tasks: BlankExemplars = BlankExemplars(),
        batch_size: int = 32,
        outer_batch_size: int = 96,
        evaluation_batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            root,
            tokenizer=str(Path(root) / "tokenizer"),
            dev_tasks=0,  # all that there are to be are written
            train_prompt=PromptFormat(definition=False, positive_examples=0),
            validation_prompt=PromptFormat(definition=False, positive_examples=1),
            test_prompt=PromptFormat(definition=False, positive_examples=1),
            instances_per_task=tasks.instances,
            test_instances_per_task=tasks.instances,
            batch_size=batch_size,
            outer_batch_size=outer_batch_size,
            evaluation_batch_size=evaluation_batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir if cache_dir is not None else str(Path(root) / "cache"),
        )
        self.experiment = tasks

    def prepare_data(self) -> None:
        """Write the tasks, then fill the token cache."""
        self.experiment.write(self.root)
        super().prepare_data()
