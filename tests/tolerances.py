"""How much of its tolerance every numerical assertion uses: ``pytest --tolerances=FILE``.

An assertion that holds with a tolerance used almost up fails on the next processor, which adds in another order. So the
share of its tolerance that an assertion used, the largest of (error / (atol + rtol |expected|)) over all entries, is
appended to FILE with the test and the line, and the shares above a third are printed at the end. Recorded are
``torch.testing.assert_close``, ``torch.allclose`` (and so ``gradcheck``), ``pytest.approx``, and comparisons ``error <
tolerance`` of an :class:`Error`, as ``relative_error`` returns; in forked processes too. Not recorded are assertions
without a tolerance (bitwise equality) and those that something is *not* close.

The kernels that PyTorch has for several processors and numbers of threads add in different orders. All six::

    for threads in 1 2; do
        for capability in default avx2 ""; do
            ATEN_CPU_CAPABILITY=$capability pytest --threads=$threads --tolerances=/tmp/shares.tsv
        done
    done
    python -m tests.tolerances /tmp/shares.tsv       # all settings side by side
    python -m tests.tolerances /tmp/shares.tsv 0.1   # with all above a tenth

An empty capability is the best that the processor has: on one without AVX-512 it is avx2 again.
(A file that exists and is named without the `=` is taken for one of tests, before pytest knows the option.)
"""

import csv
import io
import linecache
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).resolve().parent
# What a third of a tolerance leaves is a factor of three to processors that nobody here has.
MUCH = 1 / 3


class Error(float):
    """An error of which it is recorded how much of a tolerance it uses: ``assert Error(...) < tolerance``."""

    def __lt__(self, tolerance: float) -> bool:
        if Recorder.active is not None:
            Recorder.active.record(float(self / tolerance))
        return float(self) < tolerance


class Recorder:
    """Appends shares of tolerances to a file while it is a plugin of pytest.

    Args:
        path: The file.
        threads: What ``--threads`` says.
    """

    active: "Recorder | None" = None

    def __init__(self, path: str, threads: int) -> None:
        asked, found = os.environ.get("ATEN_CPU_CAPABILITY"), torch.backends.cpu.get_cpu_capability()
        self.setting = f"{asked or f'unset ({found})'} x {threads}"
        self.path = Path(path).absolute()
        # Forked processes write to the same descriptor, line by line; nothing is lost when one of them ends abruptly.
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.start = self.path.stat().st_size

    def record(self, share: float) -> None:
        """Append the share of its tolerance that the assertion used from which this is called."""
        place = asserted_at()
        if place is not None:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
            line = io.StringIO()
            csv.writer(line, delimiter="\t", lineterminator="\n").writerow([self.setting, test, place, f"{share:.3g}"])
            os.write(self.file, line.getvalue().encode())

    def record_tensors(self, actual: Any, expected: Any, rtol: float, atol: float) -> None:
        """The same of two tensors."""
        if rtol == atol == 0 or not actual.is_floating_point():
            return
        with torch.no_grad():
            difference, size = (actual.double() - expected.double()).abs(), expected.double().abs()
            shares = torch.where(difference == 0, 0.0, difference / (atol + rtol * size))
        self.record(shares.nan_to_num(nan=torch.inf).max().item() if shares.numel() else 0.0)

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionstart(self) -> Any:
        """Listen to all comparisons from now on."""
        Recorder.active = self
        tensors, scalar = torch.testing._comparison.TensorLikePair, type(pytest.approx(1.0))
        compare, allclose, equal = tensors._compare_regular_values_close, torch.allclose, scalar.__eq__

        def recorded_compare(pair: Any, actual: Any, expected: Any, *, rtol: Any, atol: Any, **options: Any) -> None:
            self.record_tensors(actual, expected, rtol, atol)
            compare(pair, actual, expected, rtol=rtol, atol=atol, **options)

        def recorded_allclose(input: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-8, **options: Any) -> bool:
            self.record_tensors(input, other, rtol, atol)
            return allclose(input, other, rtol, atol, **options)

        def recorded_equal(approximation: Any, actual: Any) -> bool:
            # Not what is counted in whole numbers on both sides, such as bytes: an estimate of it is not rounded.
            numbers = (approximation.expected, actual)
            if all(isinstance(x, (int, float)) for x in numbers) and any(isinstance(x, float) for x in numbers):
                difference = abs(numbers[0] - numbers[1])
                self.record(difference / approximation.tolerance if difference else 0.0)
            return equal(approximation, actual)

        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(tensors, "_compare_regular_values_close", recorded_compare)
        self.patches.setattr(torch, "allclose", recorded_allclose)
        self.patches.setattr(scalar, "__eq__", recorded_equal)
        return (yield)

    def pytest_sessionfinish(self) -> None:
        """Listen no more."""
        self.patches.undo()
        Recorder.active = None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print what used much of its tolerance."""
        terminalreporter.section("tolerances")
        with self.path.open() as file:
            file.seek(self.start)
            terminalreporter.write(table(file))


def asserted_at() -> str | None:
    """The file and line of the assertion that is being checked; none for what other code asks, or is denied."""
    frame = sys._getframe(1)
    while frame is not None and (
        frame.f_code.co_filename == __file__
        or any(part in ("torch", "_pytest") for part in Path(frame.f_code.co_filename).parts)
    ):
        frame = frame.f_back
    if frame is None or TESTS not in Path(frame.f_code.co_filename).parents:
        return None
    path, line = frame.f_code.co_filename, frame.f_lineno
    if "assert not " in linecache.getline(path, line):
        return None
    return f"{Path(path).relative_to(TESTS.parent)}:{line}"


def table(lines: Iterable[str], much: float = MUCH) -> str:
    """All assertions that used more than a share of their tolerance in a setting, with their largest shares."""
    shares: dict[tuple[str, str], dict[str, float]] = {}
    count = 0
    for setting, test, place, share in csv.reader(lines, delimiter="\t"):
        of_test = shares.setdefault((place, test), {})
        of_test[setting] = max(of_test.get(setting, 0.0), float(share))
        count += 1
    settings = list(dict.fromkeys(setting for of_test in shares.values() for setting in of_test))
    above = sorted(
        ((max(of_test.values()), *key) for key, of_test in shares.items() if max(of_test.values()) > much), reverse=True
    )
    rows = [f"{'  '.join(f'{setting:>16}' for setting in settings)}  assertion"] if above else []
    for _, place, test in above:
        of_test = (shares[place, test].get(setting) for setting in settings)
        cells = "  ".join(f"{'-' if share is None else f'{share:.3g}':>16}" for share in of_test)
        rows.append(f"{cells}  {place} {test.rpartition('::')[2]}")
    rows.append(
        f"{count:,} comparisons by {len(shares):,} assertions in {len({place for place, _ in shares})} lines; "
        f"more than {much:.3g} of the tolerance: {len(above)} in {len({place for _, place, _ in above})} lines."
    )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    with Path(sys.argv[1]).open() as file:
        print(table(file, *map(float, sys.argv[2:])), end="")
