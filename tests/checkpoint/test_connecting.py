"""A server is reached whatever the environment says, and what is no server gets one sentence."""

import json
import socket
import ssl
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from json_server import start_serving

from checkpoint.endpoint import connect, first_model, is_loopback
from checkpoint.faults import BadInput
from serve.own_server import OwnServer, own_server
from serve.settings import ServeSettings

MODELS = json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]})
KEY = "a-key"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.server.key
        if wanted and self.headers["Authorization"] != f"Bearer {wanted}":
            self.send(401, '{"error": "Unauthorized"}')
        elif self.path == "/health":
            self.send(200, "")
        else:
            self.send(200, self.server.models)

    def send(self, status, text):
        self.send_response(status)
        self.send_header("Content-Type", self.server.content_type)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


class Ipv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture
def serving():
    """A function that starts a server and returns it; its `url` says where it is."""
    started = []

    def start(kind=ThreadingHTTPServer, host="127.0.0.1", tls=None):
        server = kind((host, 0), Handler)
        server.models = MODELS
        server.key = None
        server.content_type = "application/json"
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        shown = f"[{host}]" if ":" in host else host
        server.url = f"{'https' if tls else 'http'}://{shown}:{server.server_port}"
        thread = start_serving(server)
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def certificate(tmp_path):
    """Files of a self-signed certificate for another host, and of its key."""
    files = [tmp_path / "cert.pem", tmp_path / "key.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=elsewhere", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return files


@pytest.fixture(autouse=True)
def dead_proxy(monkeypatch):
    """Every request that goes through a proxy fails."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_this_machine_is_never_asked_through_a_proxy(serving):
    assert first_model(connect(serving().url)) == "tiny"


def test_an_ipv6_address_is_written_in_brackets(serving):
    server = serving(Ipv6Server, "::1")
    assert first_model(connect(server.url)) == "tiny"
    settings = ServeSettings(host="::1", port=server.server_port)
    assert own_server(settings).url == server.url
    assert own_server(settings).served_name() == "tiny"


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_a_key_is_sent(serving, monkeypatch, given):
    server = serving()
    server.key = KEY
    if given == "environment":
        monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert first_model(connect(server.url, KEY if given == "argument" else None)) == "tiny"
    settings = ServeSettings(port=server.server_port)
    if given == "argument":
        settings = settings.model_copy(update={"api_key": KEY})
    assert own_server(settings).is_healthy()
    assert own_server(settings).served_name() == "tiny"


def test_a_wrong_key_is_named(serving):
    server = serving()
    server.key = KEY
    with pytest.raises(BadInput, match=r"refuses the API key \(give --api-key, or set VLLM_API_"):
        first_model(connect(server.url, "another"))
    assert not OwnServer(server.url, "another").is_healthy()


def test_a_key_does_not_appear_in_the_settings_as_text():
    assert KEY not in str(ServeSettings(api_key=KEY))


def test_our_own_server_may_have_any_certificate(serving, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = serving(tls=context)
    settings = ServeSettings(port=server.server_port, ssl_certfile=certificate[0])
    assert own_server(settings).url == server.url
    assert own_server(settings).is_healthy()
    assert first_model(own_server(settings).client(timeout=10)) == "tiny"
    with pytest.raises(BadInput, match="no server answers"):
        first_model(connect(server.url))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_server_on_all_addresses_is_reached_on_this_machine(host):
    url = own_server(ServeSettings(host=host, port=8000)).url
    assert url in ("http://127.0.0.1:8000", "http://[::1]:8000")


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        ("text/html", "<html>Welcome</html>", "does not answer as an OpenAI-compatible server"),
        ("application/json", "<html>Welcome</html>", "OpenAI-compatible server"),
        ("application/json", "[]", "OpenAI-compatible server"),
        ("application/json", "{}", "OpenAI-compatible server"),
        ("application/json", '{"data": null}', "OpenAI-compatible server"),
        ("application/json", '{"data": [{"name": 1}]}', "OpenAI-compatible server"),
        ("application/json", '{"object": "list", "data": []}', "serves no model"),
    ],
)
def test_what_is_no_server_of_ours_gets_a_sentence(serving, content_type, body, message):
    server = serving()
    server.models = body
    server.content_type = content_type
    with pytest.raises(BadInput, match=message):
        first_model(connect(server.url))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "http://",
        "http://host:99999",
        "http://host:port",
        "http://[::1",
        "ftp://host",
        "",
        "http://ho st",
        "http://" + "x" * 300,
    ],
)
def test_what_is_no_url_gets_a_sentence(url):
    with pytest.raises(BadInput) as caught:
        first_model(connect(url))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("user", ["user:secret", "secret", ":secret"])
def test_a_password_in_a_url_is_refused_and_not_repeated(user):
    with pytest.raises(BadInput, match="with a user name or a password") as caught:
        connect(f"http://{user}@localhost:8000")
    assert "secret" not in str(caught.value)


def test_nobody_there_gets_a_sentence():
    with pytest.raises(BadInput, match="no server answers"):
        first_model(connect("http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("model.localhost", True),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback_is_told_from_other_hosts(host, expected):
    assert is_loopback(host) is expected
