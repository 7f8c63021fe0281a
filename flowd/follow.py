"""Shows a job as it runs: a live table on a terminal, a line per step elsewhere, or JSON lines."""

import contextlib
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from flowd.client import ControlClient
from flowd.console import cell, failure, hint, number, print_json, traceback_of
from flowd.control import ENDED
from flowd.errors import DaemonLost, JobFailed
from flowd.watched import Update, Watched, tokens_per_s

# Events that a line each is worth. Steps have their own line, commits come with every step, and
# "failed" is told by the restart or the end of the job that follows it.
NEWS = ("warmup", "restart", "rollback", "scale")


class View(Protocol):
    """Shows updates, in order. A context manager, because a terminal has to be given back."""

    watched: Watched

    def show(self, update: Update) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def follow_job(client: ControlClient, job: str, *, as_json: bool) -> int:
    """Show a job until it ends; 0 when it is done.

    Raises JobFailed when it ended otherwise. Ctrl-C leaves the job alone and gives 0: what was
    asked, to start or watch it, is done.
    """
    view = make_view(job, as_json=as_json, live=sys.stdout.isatty())
    updates = client.follow("status", {"job": job, "follow": True})
    try:
        with contextlib.closing(updates), view:
            for update in updates:
                if update is not None:
                    view.show(update)
    except KeyboardInterrupt:
        hint(
            f'\ndetached: job "{job}" goes on; `flowctl status {job} --follow` shows it again, '
            f"`flowctl cancel {job}` ends it"
        )
        return 0
    return conclude(view.watched)


def make_view(job: str, *, as_json: bool, live: bool) -> View:
    """The view that suits where the output goes."""
    if as_json:
        return JsonView(job)
    return LiveView(job) if live else LineView(job)


def conclude(watched: Watched) -> int:
    """The last words about a job: 0 when it is done; as `check_done` when it is not."""
    check_done(watched)
    reward = number(watched.metrics.get("reward_mean"))
    why = f" ({watched.reason})" if watched.reason else ""
    hint(f'job "{watched.name}" done: {watched.step} steps, reward {reward}{why}')
    return 0


def check_done(watched: Watched) -> None:
    """Raise JobFailed, with the traceback, for a job that ended otherwise; DaemonLost for one that goes on unseen."""
    if watched.state == "done":
        return
    if watched.state not in ENDED:
        raise DaemonLost(
            f'flowd stopped while job "{watched.name}" was {watched.state} at step {watched.step}; '
            f"start it with `flowd up`, then `flowctl resume {watched.name}`"
        )
    raise JobFailed(failure(watched.status()), traceback_of(watched.status()))


class JsonView:
    """Each update as a line of JSON on stdout, as it came."""

    def __init__(self, job: str) -> None:
        self.watched = Watched(job)

    def show(self, update: Update) -> None:
        self.watched.apply(update)
        print_json(update)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


class LineView(JsonView):
    """A line per trainer step on stdout; what else happens, on stderr."""

    def show(self, update: Update) -> None:
        was = self.watched.state
        self.watched.apply(update)
        if self.watched.state != was and self.watched.state not in ENDED:
            hint(f'job "{self.watched.name}" {self.watched.state}')
        if update["event"] == "step":
            print(step_line(self.watched), flush=True)
        elif update["event"] == "eval":
            print(evaluation_line(update, len(str(self.watched.steps))), flush=True)
        elif update["event"] in NEWS:
            hint(news_line(update))


class LiveView(JsonView):
    """A table on the terminal that is drawn over itself; news scroll by above it."""

    def __init__(self, job: str) -> None:
        from rich.live import Live

        super().__init__(job)
        self._live = Live(get_renderable=self._table, refresh_per_second=4)

    def show(self, update: Update) -> None:
        self.watched.apply(update)
        if update["event"] in NEWS:
            self._live.console.print(news_line(update), markup=False, highlight=False)
        elif update["event"] == "eval":
            line = evaluation_line(update, len(str(self.watched.steps)))
            self._live.console.print(line, markup=False, highlight=False)
        if update["event"] in ("step", "eval", "job", "status"):
            self._live.refresh()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def _table(self) -> Any:
        return live_table(self.watched)


def step_line(watched: Watched) -> str:
    """One trainer step as aligned key=value pairs, then how each stage spent its time."""
    metrics = watched.metrics
    width = len(str(watched.steps))
    pairs = [
        f"step={metrics['step']:>{width}}/{watched.steps}",
        f"reward={number(metrics.get('reward_mean')):>6}",
        f"staleness={metrics.get('staleness_max', '-')}",
        f"tokens_per_s={number(tokens_per_s(metrics), 0):>7}",
        f"seconds={number(metrics.get('seconds'), 2):>6}",
    ]
    if metrics.get("attempt"):
        pairs.append(f"attempt={metrics['attempt']}")
    times = "; ".join(f"{kind}: {text}" for kind, text in watched.recent_times().items())
    return "  ".join(pairs) + (f"  [{times}]" if times else "")


def evaluation_line(update: Mapping[str, Any], width: int) -> str:
    """One evaluation in a line: of the policy after `step` steps, with 95 % intervals."""
    pairs = [f"eval step={update['step']:>{width}}"]
    for name, key, bounds in (
        ("reward", "eval_reward_mean", "eval_reward"),
        ("greedy", "eval_greedy", "eval_greedy"),
    ):
        if key in update:
            interval = ""
            if update.get(f"{bounds}_low") is not None:
                low, high = number(update[f"{bounds}_low"]), number(update[f"{bounds}_high"])
                interval = f" [{low}, {high}]"
            pairs.append(f"{name}={number(update[key])}{interval}")
    rates = [key for key in update if key.startswith("eval_pass_at_")]
    if "eval_reward_mean" in update and rates:
        pairs.append(f"pass@{rates[-1].removeprefix('eval_pass_at_')}={number(update[rates[-1]])}")
    pairs.append(f"problems={update['eval_problems']}")
    pairs.append(f"seconds={number(update.get('eval_seconds'), 2)}")
    return "  ".join(pairs)


def news_line(update: Update) -> str:
    """What happened, in a line; tracebacks are left to the end of the job."""
    shown = {
        key: value
        for key, value in update.items()
        if key not in ("event", "job", "traceback") and value not in (None, "", [])
    }
    return f"{update['event']}: " + "  ".join(f"{key}={cell(v)}" for key, v in shown.items())


def live_table(watched: Watched) -> Any:
    """The job as a small rich table: the newest step, and a line per stage."""
    from rich.table import Table
    from rich.text import Text

    metrics = watched.metrics
    table = Table(title=f"{watched.name}: {watched.state}", title_justify="left", min_width=64)
    evaluated = watched.evaluation
    for header in (
        "step",
        "reward",
        *(["eval"] if evaluated else []),
        "staleness",
        "tokens/s",
        "seconds",
    ):
        table.add_column(header, justify="right")
    table.add_row(
        f"{watched.step}/{watched.steps}",
        number(metrics.get("reward_mean")),
        *(
            [number(evaluated.get("eval_reward_mean", evaluated.get("eval_greedy")))]
            if evaluated
            else []
        ),
        str(metrics.get("staleness_max", "-")),
        number(tokens_per_s(metrics), 0),
        number(metrics.get("seconds"), 2),
    )
    times = watched.recent_times()
    lines = [f"{kind:<10} {text}" for kind, text in times.items()]
    if watched.state not in ENDED:  # then all of them are gone, as they should be
        lines += [f"{name:<10} {state}" for name, state in watched.unusual_actors().items()]
    table.caption = Text("\n".join(lines))
    table.caption_justify = "left"
    return table
