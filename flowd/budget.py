"""How often a process may be restarted. A decision over times passed in; it starts nothing."""

from collections import deque


class RestartBudget:
    """At most `max_restarts` restarts within any `window_s` seconds.

    >>> budget = RestartBudget(max_restarts=1, window_s=60.0)
    >>> budget.allows(0.0), budget.allows(59.0), budget.allows(60.0)
    (True, False, True)
    """

    def __init__(self, max_restarts: int, window_s: float) -> None:
        if max_restarts < 0:
            raise ValueError(f"max_restarts = {max_restarts} is negative; 0 forbids restarts")
        if window_s <= 0:
            raise ValueError(f"window_s = {window_s} is not a time span; give seconds above 0")
        self.max_restarts = max_restarts
        self.window_s = window_s
        self._granted: deque[float] = deque()  # times of restarts within the window, oldest first

    def allows(self, now: float) -> bool:
        """Whether one more restart is within the budget at `now` (seconds, monotonic); counts it if
        so.

        A refused restart is not counted: the budget refills when the oldest one leaves the window.
        """
        while self._granted and now - self._granted[0] >= self.window_s:
            self._granted.popleft()
        if len(self._granted) >= self.max_restarts:
            return False
        self._granted.append(now)
        return True
