"""Messages between flowctl and flowd: one request, any number of progress messages, one reply.

They travel as single frames between a DEALER (flowctl) and a ROUTER (flowd) on a Unix socket in the
state directory. A request's id makes it idempotent: flowd keeps it while the request is in progress
and for a while after, so a request that is sent again is not carried out again.
"""

from typing import Any

from channels.messages import Message


class CtlRequest(Message, frozen=True, kw_only=True, tag="ctl_request"):
    """flowctl to flowd: carry out a command. follow: CtlProgress until its end, then the reply."""

    request_id: str
    command: str
    arguments: dict[str, Any]
    follow: bool = False


class CtlProgress(Message, frozen=True, kw_only=True, tag="ctl_progress"):
    """flowd to flowctl: one more piece of what a followed request watches, in order."""

    request_id: str
    data: dict[str, Any]


class CtlReply(Message, frozen=True, kw_only=True, tag="ctl_reply"):
    """flowd to flowctl: the request is done. The last message that carries this id.

    exit_code: 0 done, 1 it failed, 2 the request was wrong    error: one sentence, when not ok
    """

    request_id: str
    ok: bool
    exit_code: int
    data: Any = None
    error: str | None = None
