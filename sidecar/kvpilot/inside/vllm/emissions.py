"""When tokens come out: the time between two of a request, and to its first, as histograms by class.

Most steps bring out tokens of the same requests as the step before. Then all gaps are one number, and only
how many tokens each request got has to be looked at; times are written to each request only when the set
changes. O(set) a step, with a small constant; without drafts O(classes).
"""

from collections.abc import Sequence
from typing import Any

from kvpilot.inside.hook import StepHook
from kvpilot.inside.vllm.lives import Lives


class Emissions:
    """Fed with what each step brought out."""

    def __init__(self, hook: StepHook, lives: Lives) -> None:
        self.tokens_total = 0
        """Output tokens so far."""
        self._itl, self._ttft = hook.itl, hook.ttft
        self._lives = lives
        self._steady: Sequence[str] = ()
        """All running requests, in batch order, where all of them emitted in the last step; else nobody."""
        self._steady_ns = 0
        self._by_level: list[tuple[int, list[int]]] = []
        """Their positions, by class level."""

    def step(
        self,
        ids: Sequence[str],
        counts: list[int] | None,
        outputs: dict[int, Any],
        whole: bool,
        same: bool,
        now_ns: int,
    ) -> bool:
        """A step brought `outputs` out, by client; the model ran `ids` and sampled `counts` tokens for each,
        None for at most one. `whole`: all running requests were in it, and it ended none; `same`: so it was
        in the step before, and nobody came or went.

        True where the same requests emitted as in the step before, every one of the batch.
        """
        if same and self._steady:
            emitted = 0
            for each in outputs.values():
                emitted += len(each.outputs)
            # The same requests; with several classes their order matters, too.
            if emitted == len(ids) and (len(self._by_level) == 1 or ids == self._steady):
                gap_ns = now_ns - self._steady_ns
                self._steady_ns = now_ns
                if counts is not None:
                    self._several_each(counts, gap_ns)
                else:
                    self.tokens_total += emitted
                    for level, positions in self._by_level:
                        self._itl[level].record_many(gap_ns, len(positions))
                return True
        if outputs:
            self._changed(ids, outputs, whole, now_ns)
        return False

    def _several_each(self, counts: list[int], gap_ns: int) -> None:
        itl = self._itl
        self.tokens_total += sum(counts)
        for level, positions in self._by_level:
            mine = counts if len(positions) == len(counts) else [counts[i] for i in positions]
            for count in set(mine):
                # The tokens of one step share the time since the previous emission, or speculation would fill
                # the histogram with zeros.
                itl[level].record_many(gap_ns // count, count * mine.count(count))

    def _changed(self, ids: Sequence[str], outputs: dict[int, Any], whole: bool, now_ns: int) -> None:
        lives = self._lives
        for request_id in self._steady:
            life = lives.get(request_id)
            if life is not None:
                life.last_ns = self._steady_ns
        gaps: dict[tuple[int, int], int] = {}
        emitting = 0
        for each in outputs.values():
            for output in each.outputs:
                count = len(output.new_token_ids)
                self.tokens_total += count
                life = lives.get(output.request_id)
                if not count or life is None:
                    continue
                emitting += 1
                if life.last_ns:
                    key = (life.level, (now_ns - life.last_ns) // count)
                    gaps[key] = gaps.get(key, 0) + count
                elif life.added_ns:
                    self._ttft[life.level].record(now_ns - life.added_ns)
                life.last_ns = now_ns
        for (level, gap_ns), count in gaps.items():
            self._itl[level].record_many(gap_ns, count)
        self._steady = self._grouped(ids) if whole and emitting == len(ids) else ()
        self._steady_ns = now_ns

    def _grouped(self, ids: Sequence[str]) -> Sequence[str]:
        """`ids`, with their positions by class; nobody where one of them is not known."""
        by_level: dict[int, list[int]] = {}
        for position, request_id in enumerate(ids):
            life = self._lives.get(request_id)
            if life is None:
                return ()
            by_level.setdefault(life.level, []).append(position)
        self._by_level = list(by_level.items())
        return list(ids)
