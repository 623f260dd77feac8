"""Processes that fetch batches ahead."""

import os
import signal
import threading
from typing import Any

from torch.utils.data import DataLoader

# Those that end a process unless it says otherwise, and that people, terminals and schedulers send for that.
ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)  # some are not on Windows
)


class HoldingSignalsBack(DataLoader[Any]):
    """A data loader whose workers start with :data:`ENDING` held back, until they leave them to the main process."""

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_main_process(worker: int) -> None:
    """Let a worker outlive what ends a run, which reaches it too where it is sent to all processes of a job.

    Otherwise the main process would fail for want of its workers before it has written a checkpoint. It still ends them
    by SIGTERM itself.

    Args:
        worker: The worker's number, which PyTorch gives to such functions.
    """
    for number in ENDING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        # Threads that are started later inherit the mask, so that only the one that waits gets the signal.
        signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGTERM])
        threading.Thread(target=end_if_the_main_process_says_so, args=(os.getppid(),), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, [])


def end_if_the_main_process_says_so(main: int) -> None:
    """Wait for SIGTERM, and end if it comes from a process."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)
