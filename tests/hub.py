"""A hub on this machine: it answers each request as a test says, and counts them."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

REFUSALS = {  # as the hub answers: (status, X-Error-Code)
    "not there": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "no such file": (404, "EntryNotFound"),
    "down": (503, ""),
    "a mirror's no such file": (404, ""),
}


class Hub:
    def __init__(self):
        self.asked: list[str] = []
        self.answer: str | None = None  # one of REFUSALS; None closes the connection without a word
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                if "agent-harnesses" not in self.path:  # where the library thinks that an agent runs it
                    hub.asked.append(f"{self.command} {self.path}")
                if hub.answer is None:
                    self.close_connection = True
                    return
                status, code = REFUSALS[hub.answer]
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextlib.contextmanager
def running(monkeypatch, cache):
    """The hub that the libraries of this process ask, and an empty cache of what it gave. Nobody waits: who
    tries again after a while fails."""
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
