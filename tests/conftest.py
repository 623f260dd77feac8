"""What tests share: a small data set in the official layout, small models, the real data where present."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Before transformers is imported: no test reaches for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from diopt_lightning.data.synthetic import WORDS, BlankExemplars, word_tokenizer
from tests.tolerances import Recorder

SHARED = Path(__file__).resolve().parents[2] / "shared"
# The processes that tests run in share the cores.
THREADS = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
TINY_T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
# A smaller version of the demo's experiment.
SMALL_EXPERIMENT = BlankExemplars(
    exemplars=3, train_tasks=4, validation_tasks=2, dev_tasks=2, test_tasks=2, instances=8, labels=4
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the tests, for checks on how far rounding decides them; see tests/tolerances.py."""
    parser.addoption("--threads", type=int, default=1, help="threads of quick tests (default: 1)")
    parser.addoption("--tolerances", metavar="FILE", help="append to FILE what assertions use of their tolerance")


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says figures that the end of the run prints, from whichever process a test runs in."""
    return lambda said: record_property("figures", said)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests have measured."""
    reports = [report for of_kind in terminalreporter.stats.values() for report in of_kind]
    ended = [report for report in reports if getattr(report, "when", None) == "call"]
    said = [str(value) for report in ended for name, value in report.user_properties if name == "figures"]
    if said:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(said))


def pytest_configure(config: pytest.Config) -> None:
    """Record what assertions use of their tolerances, where asked to."""
    if config.getoption("--tolerances"):
        config.pluginmanager.register(Recorder(config.getoption("--tolerances"), config.getoption("--threads")))


@pytest.fixture(autouse=True)
def _run_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test writes by default lands in the checkout, and nothing random differs between runs."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compute_small_things_on_one_thread(request: pytest.FixtureRequest) -> None:
    """The models of quick tests take longer on two threads than on one; slow tests run as a user's command does."""
    slow = request.node.get_closest_marker("slow")
    torch.set_num_threads(THREADS if slow else request.config.getoption("--threads"))


@pytest.fixture
def blank_exemplars() -> BlankExemplars:
    """A smaller version of the demo's experiment."""
    return SMALL_EXPERIMENT


def task_document(name: str = "task001", **changes: Any) -> dict[str, Any]:
    """A valid task of the official layout, with changes; a change to ``None`` removes the field."""
    document: dict[str, Any] = {
        "Categories": ["Label Recall"],
        "Definition": ["Name the castle"],
        "Positive Examples": [
            {"input": f"apple {index}", "output": f"river {index}", "explanation": "storm"} for index in range(3)
        ],
        "Negative Examples": [{"input": "bear", "output": "boat", "explanation": ""}],
        "Instances": [
            {
                "id": f"{name}-{index}",
                "input": " ".join(WORDS[index : index + 1 + index % 5]),
                "output": ["fire", "fish"],
            }
            for index in range(12)
        ],
    }
    document |= changes
    return {field: value for field, value in document.items() if value is not None}


@pytest.fixture
def layout(tmp_path: Path) -> Callable[..., Path]:
    """Writes tasks and split lists in the official layout and returns the folder."""

    def write(tasks: dict[str, Any] | None = None, **lists: list[str]) -> Path:
        root = tmp_path / "natural_instructions"
        (root / "tasks").mkdir(parents=True, exist_ok=True)
        (root / "splits" / "default").mkdir(parents=True, exist_ok=True)
        lists = {"train": [f"task{i:03d}" for i in range(8)], "test": ["task100", "task101"]} | lists
        for names in lists.values():
            for name in names:
                document = (tasks or {}).get(name, task_document(name))
                path = root / "tasks" / f"{name}.json"
                if isinstance(document, bytes):
                    path.write_bytes(document)
                elif document is not None:
                    path.write_text(json.dumps(document), encoding="utf-8")
        for split, names in lists.items():
            (root / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        word_tokenizer([*WORDS, "definition", "name", "the"]).save_pretrained(root / "tokenizer")
        return root

    return write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real tasks, which are not part of the project."""
    root = SHARED / "data" / "super_natural_instructions"
    if not root.is_dir():
        pytest.skip(f"needs the real Super-NaturalInstructions tasks at {root}")
    return root


@pytest.fixture(scope="session")
def t5_tokenizer() -> Path:
    """The real T5 tokenizer, which is not part of the project."""
    folder = SHARED / "models" / "t5_tokenizer"
    if not folder.is_dir():
        pytest.skip(f"needs the T5 tokenizer at {folder}")
    return folder
