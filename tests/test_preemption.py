"""A cloud's notice is heard, asks a run to save and stop, and SIGTERM after it is the same word."""

import http.client
import http.server
import os
import signal
import threading

import pytest

from dinov2_jax import preemption
from dinov2_jax.metrics import read_metrics
from dinov2_jax.signals import StopSignals
from tests.small_run import after_line, repeatable, run

GOOGLE, AMAZON = "/computeMetadata/v1/instance/", "/latest/"


class _Cloud(http.server.BaseHTTPRequestHandler):
    """Answers from the server's `answers`: path -> text; 404 otherwise. Checks the headers."""

    def _answer(self):
        is_google = self.path.startswith(GOOGLE)
        header = "Metadata-Flavor" if is_google else "X-aws-ec2-metadata-token"
        if self.command == "PUT":
            header += "-ttl-seconds"
        text = self.server.answers.get((self.command, self.path))
        code = 403 if header not in self.headers else 200 if text is not None else 404
        self.send_response(code)
        self.end_headers()
        self.wfile.write((text or "").encode())

    do_GET = do_PUT = _answer

    def log_message(self, *_):
        pass


@pytest.fixture
def answers(monkeypatch):
    """What the clouds say, to be changed."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Cloud)
    server.answers = {
        ("GET", f"{GOOGLE}preempted"): "FALSE",
        ("PUT", f"{AMAZON}api/token"): "secret",
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{host}/")
    monkeypatch.setattr(preemption, "EVERY_SECS", 0.01)
    yield server.answers
    server.shutdown()
    server.server_close()


@pytest.fixture
def vendor(tmp_path, monkeypatch):
    """Writes what the firmware says whose machine it is."""
    path = tmp_path / "sys_vendor"
    monkeypatch.setattr(preemption, "_VENDOR", path)
    return path.write_text


def test_google(answers):
    assert preemption.google() is None
    answers["GET", f"{GOOGLE}preempted"] = "TRUE"
    assert preemption.google() == "Google preempts this machine"


def test_amazon(answers):
    assert preemption.amazon() is None
    action = '{"action": "terminate",\n "time": "2017-09-18T08:22:00Z"}'
    answers["GET", f"{AMAZON}meta-data/spot/instance-action"] = action
    assert '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}' in preemption.amazon()


def test_whose_machine_it_is(vendor, monkeypatch):
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    assert preemption.asker() is None
    for text, asker in (
        ("Google\n", preemption.google),
        ("Amazon EC2\n", preemption.amazon),
        ("QEMU\n", None),
    ):
        vendor(text)
        assert preemption.asker() is asker
    vendor("Amazon EC2")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert preemption.asker() is None


def _watch(monkeypatch, answers: list) -> tuple[list, list]:
    """What was asked, and what was told, when the watch has come to its end."""
    said, asked, told = iter(answers), [], []

    def ask():
        asked.append(next(said))
        if isinstance(asked[-1], Exception):
            raise asked[-1]
        return asked[-1]

    monkeypatch.setattr(preemption, "EVERY_SECS", 0.0)
    preemption._watch(ask, told.append, threading.Event())
    return asked, told


def test_a_watch_tells_once(monkeypatch):
    fault = OSError()
    answers = [fault, fault, None, *[fault] * 5, http.client.BadStatusLine("?"), "the end", "more"]
    asked, told = _watch(monkeypatch, answers)
    assert told == ["the end"] and asked == answers[:-1]


def test_a_watch_gives_up_where_nobody_ever_answers(monkeypatch):
    asked, told = _watch(monkeypatch, [OSError(), ValueError(), OSError(), "not asked"])
    assert len(asked) == 3 and told == []


def test_leaving_does_not_wait_for_an_answer_nor_tell_it(monkeypatch):
    asked, go_on, told = threading.Event(), threading.Event(), []

    def ask():
        asked.set()
        go_on.wait(timeout=60)
        return "too late"

    monkeypatch.setattr(preemption, "asker", lambda: ask)
    with preemption.watch_notices(told.append):
        assert asked.wait(timeout=60)
        (thread,) = [t for t in threading.enumerate() if t.name.endswith("(_watch)")]
    assert thread.is_alive()
    go_on.set()
    thread.join(timeout=60)
    assert not thread.is_alive() and told == []


def test_sigterm_after_a_notice_is_the_same_word():
    with StopSignals() as stop:
        stop.notice("Google preempts this machine")
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # a second would end this process
        assert stop.received == signal.SIGTERM


def test_a_run_saves_stops_and_goes_on(cache, finished, answers, vendor, tmp_path, monkeypatch):
    vendor("Google\n")
    heard = threading.Event()
    notice = StopSignals.notice

    def noticed(self, text):
        notice(self, text)
        heard.set()

    def preempt():
        answers["GET", f"{GOOGLE}preempted"] = "TRUE"
        assert heard.wait(timeout=60)

    monkeypatch.setattr(StopSignals, "notice", noticed)
    after_line(monkeypatch, 6, preempt)
    assert run(tmp_path / "run") == 143
    answers["GET", f"{GOOGLE}preempted"] = "FALSE"
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps[-1] in (6, 7)  # at step 8 it would have been saved anyway
    assert run(tmp_path / "run") == 0
    assert repeatable(tmp_path / "run") == repeatable(finished)
