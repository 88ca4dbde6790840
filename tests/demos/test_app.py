"""The server: what it serves to whom, and what it refuses whoever asks."""

import dataclasses
import http.client
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

pytest.importorskip("gradio", reason="needs dit-accel[demo]")
from gradio_client.exceptions import AppError

from dit_accel.demos import app
from dit_accel.demos.settings import Caps

ROOT = Path(__file__).parents[2]
REFUSED = (403, 404, 405, 413)


def status(demo, path, data=None, headers=None):
    """Of a request as it is written, with nothing in its path made plain."""
    parts = urlsplit(demo.address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=300)
    connection.putrequest("GET" if data is None else "POST", path, skip_host=False)
    for name, value in {"Content-Length": str(len(data or b"")), **(headers or {})}.items():
        connection.putheader(name, value)
    connection.endheaders(data)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


@pytest.fixture(scope="module")
def picture(client, small):
    """The path of a picture that the client's own session holds."""
    single = client.predict(*small, api_name="/generate")[0]
    return Path(single["path"] if isinstance(single, dict) else single)


def test_events_have_names(client):
    named = client.view_api(return_format="dict", print_info=False)
    assert {"/generate", "/compare", "/mask", "/perturb", "/results"} <= set(named["named_endpoints"])
    assert not named["unnamed_endpoints"]


def test_a_file_of_a_session_is_served(demo, picture):
    assert status(demo, f"/gradio_api/file={quote(str(picture))}") == 200


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/../../../../etc/passwd",
        "{root}/../../etc/passwd",
        "{result}/../../../../../etc/passwd",
        "{result}/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "{root}",
        "{session}",
        "{result}",
        "{repository}/pyproject.toml",
        "pyproject.toml",
        "file:///etc/passwd",
        "https://example.org/",
        "http://169.254.169.254/latest/meta-data",
        "{result}/picture.png%00.txt",
    ],
)
def test_no_other_file_is_served(demo, picture, path):
    places = {
        "root": picture.parents[2],
        "session": picture.parents[1],
        "result": picture.parent,
        "repository": ROOT,
    }
    path = path.format(**places)
    for form in ("/gradio_api/file={}", "/gradio_api/file/{}", "/file={}"):
        assert status(demo, form.format(path)) in REFUSED


def test_a_link_out_of_the_folder_is_not_followed(demo, picture):
    link = picture.with_name("link.png")
    link.symlink_to("/etc/passwd")
    try:
        assert status(demo, f"/gradio_api/file={quote(str(link))}") == 403
    finally:
        link.unlink()


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/proxy=https://example.org/", "/gradio_api/component_server"]
)
def test_nothing_is_uploaded_or_fetched(demo, path):
    assert status(demo, path, data=b"x", headers={"Content-Type": "multipart/form-data; boundary=x"}) == 403


def test_a_body_beyond_the_cap_is_refused(demo, settings):
    body = json.dumps({"data": ["x" * settings.caps.body], "fn_index": 0, "session_hash": "a"}).encode()
    headers = {"Content-Type": "application/json"}
    assert status(demo, "/gradio_api/queue/join", data=body, headers=headers) == 413


def test_one_cannot_find_anothers_files(demo, picture, small, client_of):
    """Every visitor's folder has a name of its own that was drawn; nothing lists it."""
    other = client_of(demo.address)
    single = other.predict(*small, api_name="/generate")[0]
    theirs = Path(single["path"] if isinstance(single, dict) else single)
    assert theirs.parents[1] != picture.parents[1]
    assert theirs.parents[2] == picture.parents[2]
    guess = picture.parents[2] / secrets.token_urlsafe(24) / picture.parent.name / picture.name
    assert status(demo, f"/gradio_api/file={quote(str(guess))}") == 403
    before = picture.read_bytes()
    other.predict(api_name="/cancel")  # of their own runs
    assert picture.read_bytes() == before


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, "../../etc", "Model must be one of|choices"),
        (0, "tiny-sd3", "Model must be one of|choices"),
        (1, "x" * 3000, "2000"),
        (2, "attention: Dense\nguidance: /etc/passwd", "opens no files"),
        (3, 10**12, "Width|maximum"),
        (6, 10**9, "Steps"),
        (8, -5, "Seed|minimum"),
    ],
    ids=["path", "unlisted", "prompt", "file", "size", "steps", "seed"],
)
def test_what_a_client_sends_is_checked_on_the_server(client, small, place, value, words):
    given = list(small)
    given[place] = value
    with pytest.raises(AppError, match=words):
        client.predict(*given, api_name="/compare")


def test_what_nobody_foresaw_tells_nothing(client, small, demo, monkeypatch):
    def fail(model):
        raise KeyError("a secret of the server")

    monkeypatch.setattr(demo.studio.worker, "pipeline", fail)
    with pytest.raises(AppError) as caught:
        client.predict(*small, api_name="/generate")
    assert "secret" not in str(caught.value)
    assert "Something went wrong" in str(caught.value)


def test_out_of_memory_is_a_message(client, small, demo, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("dit_accel.generation.execute", fail)
    with pytest.raises(AppError, match="Not enough memory"):
        client.predict(*small, api_name="/generate")
    assert demo.studio.worker.loaded is None
    monkeypatch.undo()
    assert client.predict(*small, api_name="/generate")[2]


def test_a_prompt_with_markup_is_text(open_page, make_small):
    page = open_page()
    make_small(page)
    page.evaluate("window.hurt = 0")
    markup = "<img src=x onerror='window.hurt = 1'><script>window.hurt = 2</script>'; rm -rf \"$HOME\" `id`"
    page.get_by_label("Prompt").first.fill(markup)
    page.locator("#generate").click()
    page.locator("#figures dd").first.wait_for()
    page.get_by_text("Reproduce this").first.click()
    page.wait_for_timeout(500)
    assert page.evaluate("window.hurt") == 0
    command = page.locator(".export .cm-content:visible").first.inner_text()
    words = subprocess.run(
        ["bash", "-c", f"dit-accel() {{ printf '%s\\n' \"$@\"; }}\n{command}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=os.environ.get("TMPDIR", "/tmp"),
    ).stdout
    assert f"--prompt={markup}\n" in words


def test_the_page_fetches_nothing_from_elsewhere(browser, demo):
    page, hosts = browser.new_page(), set()
    page.set_default_timeout(300_000)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(demo.address)
    page.wait_for_selector("#compare")
    page.close()
    assert hosts <= {"127.0.0.1", None, ""}


def test_closing_the_tab_deletes_its_files(open_page, make_small, demo):
    def with_pictures() -> set:  # sessions of other pages may begin and end meanwhile
        folders = [one.folder for one in list(demo.studio.sessions._sessions.values())]
        return {folder for folder in folders if list(folder.rglob("accelerated.png"))}

    before = with_pictures()
    page = open_page()
    make_small(page)
    page.locator("#generate").click()
    page.locator("#figures dd").first.wait_for()
    (folder,) = with_pictures() - before
    page.context.close()
    until = time.monotonic() + 300
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert not folder.exists()


def test_visitors_who_left_are_forgotten(settings, monkeypatch, client_of):
    """Gradio itself remembers the pages of 10,000, for good."""
    pages, make = [], app.page
    monkeypatch.setattr(app, "page", lambda studio: pages.append(make(studio)) or pages[0])
    few = dataclasses.replace(settings, caps=Caps(visitors=2))
    with app.served(few, quiet=True) as (address, _):
        for _ in range(4):
            visitor = client_of(address)
            visitor.predict("Clear", "radius: 3", 1, 8, 8, 0, "64x32", api_name="/mask")
            visitor.close()
        assert len(pages[0].state_holder.session_data) <= 2


def test_the_server_leaves_no_file_and_tells_its_address(tmp_path):
    """As a user starts it: loopback, a page, and nothing left after SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dit_accel", "demo", "--model", "tiny-flux", "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        address = re.search(rf"http://127\.0\.0\.1:{port}/?", line)
        assert address, line
        with urllib.request.urlopen(address[0], timeout=300) as answer:
            assert b"dit-accel" in answer.read()
        assert list(tmp_path.glob("dit-accel-demo-*"))
    finally:
        process.terminate()
    assert process.wait(300) == 143
    assert not list(tmp_path.glob("dit-accel-demo-*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "/etc"], "neither a bundled model"),
        (["--model", "https://example.org/a"], "neither a bundled model"),
        (["--auth", "name"], "NAME:PASSWORD"),
        (["--results", "/no/such/folder"], "must be a folder"),
    ],
)
def test_bad_options_are_refused_before_anything_is_served(options, words):
    from typer.testing import CliRunner

    from dit_accel.cli import app as commands

    result = CliRunner().invoke(commands, ["demo", *options])
    assert result.exit_code == 1
    assert words in result.output


def test_a_space_runs_the_file():
    """`demos/app.py` by itself is the app file; what it needs is in `demos/requirements.txt`."""
    text = (ROOT / "demos" / "requirements.txt").read_text()
    assert "dit-accel[demo]" in text
    source = (ROOT / "demos" / "app.py").read_text()
    assert 'if __name__ == "__main__":' in source
    assert not re.search(r"^from \.", source, re.MULTILINE)  # it is no package there
    for closed in ("allowed_paths", "gr.load", "flagging"):
        assert not any(closed in path.read_text() for path in (ROOT / "demos").glob("*.py"))
