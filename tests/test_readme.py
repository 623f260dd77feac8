"""What the README says can be done, done."""

import re
import subprocess
import sys
from pathlib import Path

from diopt_lightning.cli import main

ROOT = Path(__file__).resolve().parents[1]


def example() -> str:
    """The first Python example of the README."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_script_has_at_most_25_lines():
    assert len(example().strip().splitlines()) <= 25


def test_the_script_does_what_the_command_does(tmp_path, monkeypatch):
    script, command = tmp_path / "script", tmp_path / "command"
    script.mkdir()
    monkeypatch.chdir(script)
    short = example().replace("max_epochs=3", "max_steps=2, limit_val_batches=1, limit_test_batches=1, logger=False")
    assert short != example()
    exec(compile(short, "README.md", "exec"), {})
    limits = ["max_steps=2", "limit_val_batches=1", "limit_test_batches=1", "logger=false"]
    arguments = [f"--trainer.{limit}" for limit in limits]
    config = str(ROOT / "configs" / "demo.yaml")
    assert (
        main(
            [
                "fit",
                "--config",
                config,
                f"--data.root={command}/data",
                *arguments,
                f"--trainer.default_root_dir={command}",
            ]
        )
        == 0
    )
    for name in ("losses.csv", "instructions.json", "metrics.json", "predictions.jsonl"):
        (left,) = script.rglob(name)
        assert left.read_bytes() == (command / name).read_bytes()


def test_the_engine_imports_pytorch_alone():
    code = (
        "import sys, diopt_lightning.bilevel; "
        "print([m for m in ('lightning', 'transformers', 'datasets', 'jsonargparse') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_instructions_backbones_and_modules_do_without_the_cache_and_the_parser():
    # Refusing `datasets` stands for a machine without it. Lightning imports jsonargparse where that is installed, so
    # it is looked for in our own files.
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "datasets":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import diopt_lightning.instructions, diopt_lightning.backbones, diopt_lightning.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    sources = [
        path for path in (ROOT / "diopt_lightning").rglob("*.py") if path.name not in ("cli.py", "rebuilding.py")
    ]
    assert len(sources) > 30
    assert not [path for path in sources if "jsonargparse" in path.read_text(encoding="utf-8")]
