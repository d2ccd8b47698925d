"""vLLM's schedulers with a stopwatch inside and outside of whatever was put around them.

The engine is started with `--scheduler-cls` naming one of these. `schedule` and `update_from_output` time
themselves; what others set on the instance in their place is timed from outside. Outer less inner is the cost
of what lies between: our hook, in CPU time of the engine core's thread. Rows (requests in the step, hook ns,
ns of vLLM's own in these methods, ns since the step before) are written as JSON every hundred steps.

`StopwatchAlone` has wraps that do nothing in the hook's place: what the stopwatch itself costs.
"""

import json
import os
import time
from pathlib import Path

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

ENVIRON_ROWS = "KVPILOT_BENCH_ROWS"
_METHODS = ("schedule", "update_from_output")
_cpu_ns = time.thread_time_ns
_WRITE_EVERY = 100


class _Timed:
    def __init__(self, *args, **kwargs):
        object.__setattr__(self, "_inner_ns", 0)
        object.__setattr__(self, "_hook_ns", 0)
        object.__setattr__(self, "_own_ns", 0)
        object.__setattr__(self, "_rows", [])
        object.__setattr__(self, "_ended_ns", time.monotonic_ns())
        super().__init__(*args, **kwargs)

    def __setattr__(self, name, value):
        if name in _METHODS and callable(value):
            value = self._outside(name, value)
        object.__setattr__(self, name, value)

    def _outside(self, name, around):
        def timed(*args, **kwargs):
            began_ns = _cpu_ns()
            result = around(*args, **kwargs)
            self._hook_ns += _cpu_ns() - began_ns - self._inner_ns
            self._own_ns += self._inner_ns
            if name == "update_from_output":
                self._note(len(args[0].num_scheduled_tokens))
            return result

        return timed

    def _note(self, requests):
        now_ns = time.monotonic_ns()
        self._rows.append((requests, self._hook_ns, self._own_ns, now_ns - self._ended_ns))
        self._ended_ns, self._hook_ns, self._own_ns = now_ns, 0, 0
        if len(self._rows) % _WRITE_EVERY == 0:
            Path(os.environ[ENVIRON_ROWS]).write_text(json.dumps(self._rows))

    def schedule(self, *args, **kwargs):
        began_ns = _cpu_ns()
        result = super().schedule(*args, **kwargs)
        self._inner_ns = _cpu_ns() - began_ns
        return result

    def update_from_output(self, *args, **kwargs):
        began_ns = _cpu_ns()
        result = super().update_from_output(*args, **kwargs)
        self._inner_ns = _cpu_ns() - began_ns
        return result


class TimedScheduler(_Timed, Scheduler):
    """For synchronous scheduling."""


class TimedAsyncScheduler(_Timed, AsyncScheduler):
    """For asynchronous scheduling."""


class StopwatchAlone(TimedAsyncScheduler):
    """For a server without a hook."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in _METHODS:
            setattr(self, name, _passing_on(getattr(self, name)))


def _passing_on(method):
    def wrapped(*args, **kwargs):
        return method(*args, **kwargs)

    return wrapped
