"""Which media a server fetches, with vLLM's own connector under the plug-in: no host and no file
that is not allowed, no redirect, and a 400 with the reason for everything that cannot be had.
"""

import http.server
import json
import os
import time
from pathlib import Path

import pytest
from json_server import start_serving
from PIL import Image

from serve.command import FETCHES, NO_HOST, REDIRECTS

SCRIPT = Path(__file__).with_name("fetch_media.py")
PLUGIN = Path(__file__).parents[2] / "plugin"


class Handler(http.server.BaseHTTPRequestHandler):
    """A host of pictures, some of which are elsewhere."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/picture.png?redirected")
            self.end_headers()
        elif self.path.startswith("/picture.png"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.picture)
        elif self.path.startswith("/silent"):
            time.sleep(3)
        elif self.path.startswith("/broken"):
            self.send_error(503)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def host(picture):
    """A real HTTP server; `.asked` are the paths that were asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.picture = picture.read_bytes()
        server.url = f"http://127.0.0.1:{server.server_port}"
        start_serving(server)
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture in the middle of a directory that may be read."""
    root = tmp_path_factory.mktemp("allowed") / "media"
    root.mkdir()
    path = root / "picture.png"
    Image.new("RGB", (8, 8)).save(path)
    return path


def ways_out(root: Path, secret: Path) -> dict[str, str]:
    """URLs that try to leave `root` for the picture `secret`, by name."""
    above = f"../{secret.parent.name}/{secret.name}"
    (root / "link.png").symlink_to(secret)
    (root / "folder").symlink_to(secret.parent)
    (root / "chain.png").symlink_to(root / "link.png")
    return {
        "absolute": f"file://{secret}",
        "dots": f"file://{root}/{above}",
        "encoded dots": f"file://{root}/%2e%2e/{secret.parent.name}/{secret.name}",
        "encoded slash": f"file://{root}/..%2f{secret.parent.name}%2f{secret.name}",
        "encoded twice": f"file://{root}/%252e%252e/{secret.parent.name}/{secret.name}",
        "backslashes": f"file://{root}/..\\{secret.parent.name}\\{secret.name}",
        "link": f"file://{root}/link.png",
        "link to a folder": f"file://{root}/folder/{secret.name}",
        "chain of links": f"file://{root}/chain.png",
        "neighbour with the same beginning": f"file://{root}-other/{secret.name}",
        "through /proc": f"file:///proc/self/root{secret}",
        "host": f"file://localhost{secret}",
        "capitals": f"FILE://{secret}",
        "two slashes": f"file:////{secret}",
        "null byte": f"file://{root}/picture.png%00/../{above}",
        "the directory itself": f"file://{root}",
        "the directory above": f"file://{root}/..",
    }


def bad_files(root: Path) -> dict[str, str]:
    """URLs of what is inside the directory and cannot be read, by name."""
    (root / "text.png").write_text("no picture")
    (root / "empty.png").touch()
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "some folder").mkdir()
    os.mkfifo(root / "pipe.png")
    with (root / "large.png").open("wb") as file:
        file.truncate(257 * 2**20)
    return {
        "missing": f"file://{root}/nothing.png",
        "long name": f"file://{root}/{'x' * 300}.png",
        "not a picture": f"file://{root}/text.png",
        "empty": f"file://{root}/empty.png",
        "loop": f"file://{root}/loop.png",
        "folder": f"file://{root}/some%20folder",
        "pipe": f"file://{root}/pipe.png",
        "large": f"file://{root}/large.png",
        "below a file": f"file://{root}/text.png/x",
    }


BAD_URLS = {
    "not base64": "data:image/png,abc",
    "other encoding": "data:image/png;charset=utf-8,abc",
    "no comma": "data:image/png;base64",
    "bad base64": "data:image/png;base64,a$b!",
    "nothing in base64": "data:image/png;base64,",
    "other scheme": "ftp://example.com/x.png",
    "no scheme": "picture.png",
    "empty": "",
    "bad port": "http://127.0.0.1:99999/x.png",
    "no host": "http:///x.png",
    "bad brackets": "http://[::1/x.png",
    "spaces": "http://exa mple/x.png",
}


@pytest.fixture(scope="module")
def answers(vllm_process, picture, host, tmp_path_factory):
    """vLLM's answers to all URLs of this file, by group and name."""
    root = picture.parent
    secret = tmp_path_factory.mktemp("secret") / "secret.png"
    secret.write_bytes(picture.read_bytes())
    neighbour = Path(f"{root}-other")
    neighbour.mkdir()
    (neighbour / secret.name).write_bytes(picture.read_bytes())
    cases: dict[str, dict] = {}

    def add(group, urls, directory=None, hosts=(NO_HOST,)):
        for name, url in urls.items():
            case = {"url": url, "directory": directory, "hosts": list(hosts)}
            cases[f"{group}/{name}"] = case

    add("way out", ways_out(root, secret), str(root))
    add("bad file", bad_files(root), str(root))
    add("bad URL", BAD_URLS)
    add("inside", {"picture": f"file://{picture}"}, str(root))
    add("no directory", {"picture": f"file://{picture}"})
    add("no host", {"picture": f"{host.url}/picture.png?forbidden"})
    allowed = {
        "picture": f"{host.url}/picture.png",
        "redirect": f"{host.url}/moved",
        "missing": f"{host.url}/nothing.png",
        "broken": f"{host.url}/broken",
        "silent": f"{host.url}/silent",
        "nobody listens": "http://127.0.0.1:9/x.png",
    }
    add("allowed host", allowed, hosts=["127.0.0.1"])
    unknown = {"unknown": "http://nothing.invalid/x.png"}
    add("unknown host", unknown, hosts=["nothing.invalid"])
    file = tmp_path_factory.mktemp("cases") / "cases.json"
    file.write_text(json.dumps(cases))
    variables = {"PYTHONPATH": str(PLUGIN), REDIRECTS: "0", "VLLM_NO_USAGE_STATS": "1"}
    variables |= {FETCHES: "1", "VLLM_IMAGE_FETCH_TIMEOUT": "1"}
    result = vllm_process.run(SCRIPT, file, environment=os.environ | variables)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def group_of(answers, group):
    found = {name: answer for name, answer in answers.items() if name.startswith(f"{group}/")}
    assert found
    return found


def test_what_is_allowed_is_read(answers):
    assert answers["inside/picture"] == [200, ""]
    assert answers["allowed host/picture"] == [200, ""]


def test_no_way_leads_out_of_the_directory(answers):
    for name, (status, reason) in group_of(answers, "way out").items():
        assert status == 400, (name, reason)


def test_a_bad_file_is_the_requests_fault(answers):
    for name, (status, reason) in group_of(answers, "bad file").items():
        assert status == 400, (name, reason)
        assert reason, name


def test_a_bad_url_is_the_requests_fault(answers):
    for name, (status, reason) in group_of(answers, "bad URL").items():
        assert 400 <= status < 500, (name, reason)
        assert reason, name


def test_reasons_say_what_is_wrong(answers):
    expected = {
        "bad file/missing": "No such file",
        "bad file/pipe": "is not a regular file",
        "bad file/folder": "is not a regular file",
        "bad file/large": "large.png has 257 MB, at most VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB=256",
        "bad URL/not base64": "Only base64 data URLs",
        "no directory/picture": "--allowed-local-media-path",
        "no host/picture": NO_HOST,
        "unknown host/unknown": "cannot be read",
        "allowed host/missing": "404",
        "allowed host/broken": "503",
        "allowed host/silent": "does not answer in time",
        "allowed host/redirect": "answers 302: the medium is elsewhere, and redirects are not",
    }
    for name, part in expected.items():
        status, reason = answers[name]
        assert 400 <= status < 500, (name, reason)
        assert part in reason


def test_no_host_is_asked_that_is_not_allowed(answers, host):
    assert "/picture.png?forbidden" not in host.asked
    assert "/picture.png" in host.asked


def test_redirects_are_not_followed(answers, host):
    status, _ = answers["allowed host/redirect"]
    assert status == 400
    assert "/moved" in host.asked
    assert "/picture.png?redirected" not in host.asked
