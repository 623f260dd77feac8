"""Processes that fetch batches ahead."""

import signal


def leave_signals_to_the_main_process(worker: int) -> None:
    """Let a worker outlive Ctrl-C and SIGTERM, which reach it too where they are sent to all processes of a job.

    Otherwise the main process would fail for want of its workers before it has written a checkpoint; workers end when
    it does.

    Args:
        worker: The worker's number, which PyTorch gives to such functions.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
