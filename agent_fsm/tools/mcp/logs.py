"""What the libraries below log: without the secrets that servers were given, and to nobody who has not asked for it."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from agent_fsm.redaction import redact

__all__ = ["kept_out_of_logs"]

_NAMES = (
    *("mcp.client.streamable_http", "mcp.client.sse", "mcp.client.client", "client"),
    *("mcp.shared.jsonrpc_dispatcher", "mcp.shared.dispatcher", "httpx2"),
    *("httpcore2.connection", "httpcore2.http11", "httpcore2.http2", "httpcore2.proxy", "httpcore2.socks"),
)
"""Loggers by their own names: a filter does not reach those below it."""


@contextmanager
def kept_out_of_logs(secrets: Sequence[str]) -> Iterator[None]:
    """Keep *secrets* out of what the libraries log as long as the block lasts."""
    _install()
    _secrets.update(secrets)
    try:
        yield
    finally:
        _secrets.subtract(secrets)


_secrets: Counter[str] = Counter()


class _Redaction(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        secrets = [secret for secret, uses in _secrets.items() if uses > 0]
        if secrets:
            record.msg, record.args = redact(record.getMessage(), secrets), None
            if record.exc_info:
                record.exc_text = redact(logging.Formatter().formatException(record.exc_info), secrets)
                record.exc_info = None
        return True


_redaction = _Redaction()


def _install() -> None:
    for name in _NAMES:
        logger = logging.getLogger(name)
        if _redaction not in logger.filters:
            logger.addFilter(_redaction)
            logger.addHandler(logging.NullHandler())  # else what is logged where nobody listens goes to stderr
