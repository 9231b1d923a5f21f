"""Files of a model hub: those on this machine first, then the network, and a fast answer where there is none."""

import http.server
import threading
import time
import urllib.request

import huggingface_hub
import pytest
import transformers

from encoders import build, hub
from utils.errors import UserError


@pytest.fixture
def online(monkeypatch):
    """As for a user, whose huggingface_hub may ask the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_files_that_are_here_ask_no_network(online, monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("the network was asked"))
    assert hub.from_hub(lambda: ("loaded", huggingface_hub.constants.HF_HUB_OFFLINE)) == ("loaded", True)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("answers", [True, False])
def test_files_that_are_not_here_are_fetched_where_a_hub_answers(online, monkeypatch, answers):
    monkeypatch.setattr(hub, "hub_answers", lambda: answers)
    tries = []

    def load():
        tries.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        if tries[-1]:
            raise OSError("not on this machine")
        return "fetched"

    if answers:
        assert hub.from_hub(load) == "fetched" and tries == [True, False]
    else:
        with pytest.raises(OSError, match="not on this machine"):
            hub.from_hub(load)
        assert tries == [True]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


class NotFound(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_any_answer_counts_and_it_is_asked_for_as_downloads_are(online, monkeypatch):
    """Python from python.org on macOS has no certificates for urllib; huggingface_hub brings its own."""
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked through urllib"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert hub.hub_answers()
    server.shutdown()
    server.server_close()
    assert not hub.hub_answers()


def test_without_a_hub_a_name_is_refused_at_once_in_one_line(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    started = time.monotonic()
    for load in (
        lambda: build.timm_encoder("resnet18", "pretrained"),
        lambda: build.load_pretrained(transformers.AutoModel, "somebody/nothing"),
    ):
        with pytest.raises(UserError) as error:
            load()
        assert "\n" not in str(error.value) and "neither on this machine nor" in str(error.value)
    assert time.monotonic() - started < 4 * hub.HUB_TIMEOUT  # not the minutes of five tries a file
