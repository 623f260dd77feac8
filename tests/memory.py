"""A meter of memory."""

from collections.abc import Callable
from itertools import accumulate

import torch


def peak_memory(function: Callable[[], object]) -> int:
    """Memory of the CPU that tensors take at the peak of a call beside what is there before, in bytes, exactly."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes), default=0)
