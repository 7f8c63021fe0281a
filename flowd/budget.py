"""How often a replica may be restarted. A decision over times and commits passed in; it starts nothing."""

from collections import deque


class RestartBudget:
    """At most `max_restarts` within `window_s` seconds, and `max_without_commit` between two commits of the job.

    The first stops what dies at once, again and again. The second stops what dies more slowly and never gets
    anywhere: a restart is worth its while only if the job commits a new step afterwards.

    >>> budget = RestartBudget(max_restarts=1, window_s=60.0, max_without_commit=2)
    >>> budget.ask(0.0, -1), budget.ask(59.0, -1), budget.ask(60.0, -1)
    (None, 'it was restarted 1 time within 60 s already, the limit', None)
    >>> budget.ask(3600.0, -1), budget.ask(3600.0, 7)
    ('it was restarted 2 times without a new commit already, the limit', None)
    """

    def __init__(self, *, max_restarts: int, window_s: float, max_without_commit: int) -> None:
        for name, limit in (
            ("max_restarts", max_restarts),
            ("max_without_commit", max_without_commit),
        ):
            if limit < 0:
                raise ValueError(f"{name} = {limit} is negative; 0 forbids restarts")
        if window_s <= 0:
            raise ValueError(f"window_s = {window_s} is not a time span; give seconds above 0")
        self.max_restarts = max_restarts
        self.window_s = window_s
        self.max_without_commit = max_without_commit
        self._granted: deque[float] = deque()  # times of restarts within the window, oldest first
        self._committed = -1
        self._without_commit = 0  # restarts since that step was committed

    def ask(self, now: float, committed_step: int) -> str | None:
        """None when one more restart is within the budget, which counts it; else why it is not.

        now: seconds, monotonic    committed_step: the last one that the job committed, -1 before the first
        A refused restart is not counted.
        """
        while self._granted and now - self._granted[0] >= self.window_s:
            self._granted.popleft()
        if committed_step > self._committed:
            self._committed, self._without_commit = committed_step, 0
        if len(self._granted) >= self.max_restarts:
            return _spent(len(self._granted), f"within {self.window_s:g} s")
        if self._without_commit >= self.max_without_commit:
            return _spent(self._without_commit, "without a new commit")
        self._granted.append(now)
        self._without_commit += 1
        return None


def _spent(restarts: int, how: str) -> str:
    times = "1 time" if restarts == 1 else f"{restarts} times"
    return f"it was restarted {times} {how} already, the limit"
