"""What stands before Gradio's server: only sessions' files go out, no uploads, bounded bodies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_FILE = ("/file=", "/file/")
_CLOSED = re.compile(
    "(/gradio_api)?/(upload|proxy=|component_server|deep_link|stream|custom_component|process_recording"
    "|vibe-|undo-vibe|run-history|runs|monitoring|dev/)"
)


class Gate:
    """ASGI middleware.

    Gradio itself would serve any file of its cache to whoever knows the path, fetch public URLs for anybody
    (`/file=https://...`) and take uploads; this demo needs none of these.

    Args:
        app: what answers where nothing is wrong.
        root: folder of the sessions' folders.
        body: bytes of the largest request.
    """

    def __init__(self, app: Any, root: Path, body: int):
        self.app, self.root, self.body = app, root.resolve(), body

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = self._refusal(scope)
        if status:
            await _answer(send, status)
            return
        left, answered = self.body, False

        async def bounded() -> dict[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _TooLarge
            return message

        async def noted(message: dict[str, Any]) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, bounded, noted)
        except _TooLarge:
            if not answered:
                await _answer(send, 413)

    def _refusal(self, scope: dict[str, Any]) -> int | None:
        """The status of what is refused, None for the rest."""
        path = scope["path"]
        for mark in _FILE:
            if mark in path:
                return None if self._is_of_a_session(path.split(mark, 1)[1]) else 403
        if _CLOSED.match(path):
            return 403
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        return 413 if not length.isdigit() or int(length) > self.body else None

    def _is_of_a_session(self, text: str) -> bool:
        """Whether it is the path of a file two folders below the sessions' root: SESSION/RESULT/FILE."""
        if "\0" in text or "://" in unquote(text):
            return False
        path = Path(text if text.startswith("/") else f"/{text}")
        try:
            inside = path.resolve().relative_to(self.root)
        except (ValueError, OSError):
            return False
        return ".." not in path.parts and len(inside.parts) == 3 and path.is_file()


class _TooLarge(Exception):
    """A body grew beyond the bound."""


async def _answer(send: Any, status: int) -> None:
    text = {403: b"refused", 413: b"too large"}[status]
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
