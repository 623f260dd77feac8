"""Prompts and targets to token ids, once, into an Arrow cache."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diopt_lightning.data.files import load_pretrained
from diopt_lightning.data.long_texts import shortened
from diopt_lightning.data.prompts import PromptFormat, render
from diopt_lightning.data.tasks import Task
from diopt_lightning.data.text_format import TextFormat
from diopt_lightning.errors import ConfigurationError, one_line, users_mistake

if TYPE_CHECKING:
    from datasets import Dataset

# Part of every fingerprint: a change in how rows are made must not meet an old cache.
FORMAT_VERSION = 4


@dataclass(frozen=True)
class SourceTarget:
    """How one set of tasks becomes token ids.

    Args:
        prompt: The human-written parts of the source.
        text_format: What stands around both.
        max_source_length: Tokens of a source, end token included. Longer ones are cut at the end.
        max_target_length: Tokens of a target, end token included.
        official_cutting: Cut a source as Tk-Instruct does: by decoding the tokens that fit, and encoding their text.

    Raises:
        ConfigurationError: If a target is to go on from a source that is cut so, which has lost its end.
    """

    prompt: PromptFormat
    text_format: TextFormat
    max_source_length: int
    max_target_length: int
    official_cutting: bool = False

    def __post_init__(self) -> None:
        if self.official_cutting and self.text_format.continued:
            raise ConfigurationError(
                "`data.official_cutting` is how Tk-Instruct cuts sources of encoder-decoder models, and would leave a "
                "causal one without the words that ask for the output: set it to false."
            )

    def source(self, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], bool]:
        """Return the ids of a source, and whether anything was cut."""
        text = shortened(tokenizer, text, self.max_source_length)
        ids, was_cut = self.text_format.source(tokenizer, text, self.max_source_length)
        if was_cut and self.official_cutting:
            # Unknown and special tokens are lost on the way, and some spaces; see the tokenizer's own options.
            kept = list(tokenizer(text, verbose=False)["input_ids"])[: self.max_source_length]
            again = str(tokenizer.decode(kept, skip_special_tokens=True))
            ids, _ = self.text_format.source(tokenizer, again, self.max_source_length)
        return ids, was_cut

    def target(self, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], bool]:
        """Return the ids of a target, and whether anything was cut."""
        before = self.text_format.continued + self.text_format.separator
        text = shortened(tokenizer, text, self.max_target_length, before)
        return self.text_format.target(tokenizer, text, self.max_target_length)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub name or folder, and check that it has what padding and stopping need.

    One without a pad token, as GPT-2's, pads with its end token: what is padding is told by masks alone.

    Raises:
        ConfigurationError: If it cannot be loaded, or has no end token.
    """
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, name, "a tokenizer")
    if tokenizer.eos_token_id is None:
        raise ConfigurationError(
            f"The tokenizer `{name}` has no eos token: set one and save it again, e.g. "
            "`tokenizer.eos_token = ...; tokenizer.save_pretrained(folder)`."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(
    tasks: Sequence[tuple[int, Task, Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    options: SourceTarget,
    cache_dir: Path | None = None,
) -> "Dataset":
    """Return a dataset of token ids, from the Arrow cache of the ``datasets`` library where it is already there.

    Args:
        tasks: For each task its index, the task, and the positions of the instances to take.
        tokenizer: The tokenizer.
        options: Prompt and limits.
        cache_dir: Folder of the cache. Default: that of the ``datasets`` library.

    Returns:
        One row an instance with ``input_ids``, ``targets`` (a list of ids for each reference), ``task`` and
        ``instance`` (indices), ``length`` (of the source), ``cut_source``, ``cut_targets``, ``unknown_targets`` (of
        nothing but words that the tokenizer does not know) and ``dropped_examples`` (counts).

    Raises:
        ConfigurationError: If a text cannot be tokenized; the message names its task. Or if the cache cannot be
            written; one that cannot be read is built again.
    """
    from datasets import config
    from datasets.exceptions import DatasetGenerationError

    folder = cache_dir if cache_dir is not None else Path(config.HF_DATASETS_CACHE)
    place = folder / "generator" / f"default-fingerprint={fingerprint(tasks, tokenizer, options)}"
    number = sum(len(instances) for _, _, instances in tasks)
    advice = "set `data.cache_dir` to a folder that can be written to."
    with users_mistake(OSError, what=f"Cannot keep the token cache in {folder}", then=advice):
        try:
            return check_rows(from_generator(tasks, tokenizer, options, cache_dir), number)
        except (ConfigurationError, DatasetGenerationError) as error:  # while rows were made
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error
            raise
        except Exception as error:  # what it is depends on where a file is broken
            if not place.exists():
                raise
            rank_zero_warn(f"The token cache {place} cannot be read ({one_line(error, 150)}): it is built again.")
            shutil.rmtree(place)
            return check_rows(from_generator(tasks, tokenizer, options, cache_dir), number)


def check_rows(rows: "Dataset", number: int) -> "Dataset":
    """Check that a data set is whole, and return it.

    Raises:
        ValueError: If it has other rows, or what says where they are is damaged.
    """
    if rows.data.schema.types != rows.features.arrow_schema.types or "input_ids" not in rows.column_names:
        raise ValueError("it has other columns")
    if len(rows) != number:
        raise ValueError(f"{len(rows)} rows of {number}")
    rows.data.validate(full=True)
    return rows


def from_generator(
    tasks: Sequence[tuple[int, Task, Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    options: SourceTarget,
    cache_dir: Path | None,
) -> "Dataset":
    """Tokenize, or read what is in the cache; see :func:`tokenize`."""
    # Imported here, so that the engine and the modules need no `datasets`.
    from datasets import Dataset, Features, List, Value, disable_progress_bars, enable_progress_bars
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import is_progress_bar_enabled

    ids = List(Value("int32"))
    number = Value("int32")
    shown = is_progress_bar_enabled()
    disable_progress_bars()  # reading a finished cache shows several bars of no use
    try:
        return Dataset.from_generator(
            _rows,
            features=Features(
                {
                    "input_ids": ids,
                    "targets": List(ids),
                    "task": number,
                    "instance": number,
                    "length": number,
                    "cut_source": number,
                    "cut_targets": number,
                    "unknown_targets": number,
                    "dropped_examples": number,
                }
            ),
            gen_kwargs={"tasks": tasks, "tokenizer": tokenizer, "options": options},
            cache_dir=str(cache_dir) if cache_dir is not None else None,
            fingerprint=fingerprint(tasks, tokenizer, options),
        )
    except DatasetGenerationError as error:
        # What happened while a row was made, in the library's wrapping.
        if isinstance(error.__cause__, ConfigurationError):
            raise error.__cause__ from None
        raise
    finally:
        if shown:
            enable_progress_bars()


def summary(rows: "Dataset", tasks: Sequence[Task]) -> str:
    """How much there is in what :func:`tokenize` returned for some of the tasks, and what was cut or dropped."""
    counts = ("cut_source", "cut_targets", "unknown_targets", "dropped_examples")
    column = {name: rows[name][:] for name in ("task", "instance", *counts)}
    empty = sum(
        not all(output.strip() for output in tasks[task].instances[instance].outputs)
        for task, instance in zip(column["task"], column["instance"], strict=True)
    )
    losses = {
        "sources cut at the length limit": sum(column["cut_source"]),
        "targets cut": sum(column["cut_targets"]),
        "targets of nothing but what the tokenizer does not know": sum(column["unknown_targets"]),
        "examples dropped from prompts because they did not fit": sum(column["dropped_examples"]),
        "instances with an empty reference": empty,
    }
    said = "".join(f"; {number:,} {what}" for what, number in losses.items() if number)
    return f"{len(rows):,} instances of {len(set(column['task'])):,} tasks{said}"


def fingerprint(
    tasks: Sequence[tuple[int, Task, Sequence[int]]], tokenizer: PreTrainedTokenizerBase, options: SourceTarget
) -> str:
    """Digest everything that the rows depend on: the files' contents, the chosen instances, tokenizer and options."""
    parts: list[Any] = [
        FORMAT_VERSION,
        [(index, task.name, task.digest, list(instances)) for index, task, instances in tasks],
        tokenizer_fingerprint(tokenizer),
        asdict(options),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest a tokenizer's vocabulary, rules and special tokens, wherever it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()),
        {role: str(token) for role, token in tokenizer.special_tokens_map.items()},
        backend.to_str() if backend is not None else "",
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _rows(
    tasks: Sequence[tuple[int, Task, Sequence[int]]], tokenizer: PreTrainedTokenizerBase, options: SourceTarget
) -> Iterator[dict[str, Any]]:
    def fits(text: str) -> bool:
        return not options.source(tokenizer, text)[1]

    for index, task, instances in tasks:
        for position in instances:
            instance = task.instances[position]
            try:
                prompt = render(task, instance.input, options.prompt, fits)
                source, cut_source = options.source(tokenizer, prompt.text)
                targets = [options.target(tokenizer, output) for output in instance.outputs]
            except ConfigurationError as error:
                raise ConfigurationError(f"{task.name}.json, field ['Instances'][{position}]: {error}") from error
            yield {
                "input_ids": source,
                "targets": [target for target, _ in targets],
                "task": index,
                "instance": position,
                "length": len(source),
                "cut_source": int(cut_source),
                "cut_targets": sum(was_cut for _, was_cut in targets),
                "unknown_targets": sum(_is_unknown(tokenizer, target) for target, _ in targets),
                "dropped_examples": prompt.dropped_examples,
            }


def _is_unknown(tokenizer: PreTrainedTokenizerBase, target: list[int]) -> bool:
    """Whether a target has unknown tokens and says nothing besides them: no output can be told from another."""
    return tokenizer.unk_token_id in target and not str(tokenizer.decode(target, skip_special_tokens=True)).strip()
