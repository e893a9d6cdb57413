"""Who may ask a server for what: keys, hosts and directories of media."""

import pytest

from checkpoint.endpoint import KEY_VARIABLE
from checkpoint.faults import BadInput
from serve.command import KEY_GUARD, NO_HOST, REDIRECTS, build_command, build_environment
from serve.environment import CPU
from serve.preflight import RUST_VARIABLE, access_faults
from serve.settings import ServeSettings, override

VERSION = (0, 33, 0)


def faults(**settings):
    return [str(fault) for fault in access_faults(ServeSettings(port=0, **settings))]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.delenv(REDIRECTS, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host):
    assert faults(host=host) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "example.com", "fe80::1"])
def test_every_other_address_needs_a_key(host, monkeypatch):
    (fault,) = faults(host=host)
    assert "can be reached from other machines, and there is no key" in fault
    assert KEY_VARIABLE in fault
    assert faults(host=host, api_key="secret") == []
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert faults(host=host) == []


def test_an_empty_key_is_none(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert len(faults(host="0.0.0.0")) == 1


@pytest.mark.parametrize("key", [" ", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key, monkeypatch):
    with pytest.raises(BadInput, match="api_key: cannot be used") as caught:
        override(ServeSettings(), {"api_key": key})
    assert key.strip() == "" or key not in str(caught.value)
    monkeypatch.setenv(KEY_VARIABLE, key)
    (fault,) = faults(host="0.0.0.0")
    assert f"{KEY_VARIABLE}: cannot be a key" in fault


def test_with_a_key_every_address_asks_for_it(tiny, monkeypatch):
    """Trap: vLLM itself asks below /v1 only (its issue 58144)."""
    assert "--middleware" not in build_command(tiny, ServeSettings(), VERSION, CPU)
    keyed = ServeSettings(api_key="secret")
    assert values(build_command(tiny, keyed, VERSION, CPU), "--middleware") == [KEY_GUARD]
    extra = ["--middleware", "mine.Middleware"]
    command = build_command(tiny, keyed, VERSION, CPU, extra)
    assert values(command, "--middleware") == [KEY_GUARD]
    assert command[-2:] == extra
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert KEY_GUARD in build_command(tiny, ServeSettings(), VERSION, CPU)


def test_a_frontend_that_knows_no_guards_is_refused(monkeypatch):
    for value, count in (("", 0), ("0", 0), ("1", 1)):
        monkeypatch.setenv(RUST_VARIABLE, value)
        assert len(faults()) == count


def test_pages_of_other_origins_are_kept_out_where_vllm_lets_them_in(tiny):
    old = build_command(tiny, ServeSettings(), (0, 26, 0), CPU)
    assert values(old, "--allowed-origins") == ["[]"]
    assert "--allowed-origins" not in build_command(tiny, ServeSettings(), VERSION, CPU)


def test_a_host_in_brackets_is_told_to_lose_them():
    (fault,) = faults(host="[::1]")
    assert "leave the brackets out" in fault


@pytest.mark.parametrize("name", ["allowed_local_media_path", "ssl_certfile", "ssl_keyfile"])
def test_an_empty_path_is_not_the_current_directory(name):
    with pytest.raises(BadInput, match=f"{name}: is '' .*not empty"):
        override(ServeSettings(), {name: ""})


def test_tls_files_are_checked(tmp_path):
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    assert "is not a file" in faults(ssl_certfile=tmp_path / "nothing")[0]
    assert "ssl_certfile" in faults(ssl_keyfile=text)[0]
    assert "cannot be used" in faults(ssl_certfile=text, ssl_keyfile=text)[0]


def test_the_media_directory_is_one(tmp_path):
    assert faults(allowed_local_media_path=tmp_path) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        (fault,) = faults(allowed_local_media_path=path)
        assert "is not a directory" in fault


def values(command, flag):
    """The values after a flag that takes several."""
    start = command.index(flag) + 1
    end = start
    while end < len(command) and not command[end].startswith("--"):
        end += 1
    return command[start:end]


def test_no_host_is_allowed_by_default(tiny):
    """Trap: vLLM fetches from every host when its flag names none."""
    command = build_command(tiny, ServeSettings(), VERSION, CPU)
    assert values(command, "--allowed-media-domains") == [NO_HOST]


def test_named_hosts_are_allowed(tiny):
    settings = override(ServeSettings(), {"allowed_media_domains": "Example.com, bücher.de"})
    command = build_command(tiny, settings, VERSION, CPU)
    assert values(command, "--allowed-media-domains") == ["example.com", "xn--bcher-kva.de"]


def test_vllms_own_flag_for_hosts_wins(tiny):
    extra = ["--allowed-media-domains", "a.org", "b.org"]
    command = build_command(tiny, ServeSettings(), VERSION, CPU, extra)
    assert command.count("--allowed-media-domains") == 1
    assert values(command, "--allowed-media-domains") == ["a.org", "b.org"]


@pytest.mark.parametrize("text", ["https://x.org", "x.org/y", "x.org:80", "", "a,,b", "a b", "*"])
def test_what_is_not_a_host_is_refused(text):
    with pytest.raises(BadInput, match="names of hosts, without scheme, port or path"):
        override(ServeSettings(), {"allowed_media_domains": text})


@pytest.mark.parametrize("text", ["straße.de", "ｅxample.com", "①.org"])
def test_a_name_that_becomes_another_host_is_refused(text):
    """Python's codec makes strasse.de of straße.de, which is another's."""
    with pytest.raises(BadInput, match="if that host is meant"):
        override(ServeSettings(), {"allowed_media_domains": text})


def test_redirects_are_off_unless_the_user_wants_them(full12b, monkeypatch):
    assert build_environment(full12b, ServeSettings(), CPU)[REDIRECTS] == "0"
    monkeypatch.setenv(REDIRECTS, "1")
    assert REDIRECTS not in build_environment(full12b, ServeSettings(), CPU)
