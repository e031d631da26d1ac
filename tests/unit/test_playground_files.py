"""The playground's files: nothing that its policy forbids, nothing from elsewhere, all of them in the package."""

import re
import tomllib
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.routes import playground

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in playground.PLAYGROUND.rglob("*") if path.is_file())
# Names of vocabularies, which nobody fetches.
_NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
_FORBIDDEN = {
    "markup from text": r"(?:inner|outer|Adjacent)HTML|setHTML|document\.write|DOMParser|ContextualFragment|srcdoc",
    "code from text": r"\beval\(|new Function\(|setTimeout\(\s*[\"'`]|javascript:",
    "a memory": r"localStorage|sessionStorage|indexedDB|document\.cookie|\bcaches\b|serviceWorker",
    "a way out": r"sendBeacon|WebSocket|EventSource|window\.open",
    "a style attribute": r"setAttribute\(\s*[\"']style|cssText|\bstyle: [\"'`]",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_from_elsewhere_and_nothing_forbidden(path: Path) -> None:
    text = path.read_text()
    for namespace in _NAMESPACES:
        text = text.replace(namespace, "")
    assert re.findall(r"https?:|[\"'(=]//|@import|\bwss?:", text) == []
    for what, pattern in _FORBIDDEN.items():
        assert re.findall(pattern, text) == [], what


def test_the_page_has_no_inline_code_or_style() -> None:
    text = (playground.PLAYGROUND / "index.html").read_text()
    assert re.findall(r"<style|\sstyle=|\son\w+=", text) == []
    assert all(re.search(r"\ssrc=", tag) for tag in re.findall(r"<script[^>]*>", text))
    for name in re.findall(r"(?:src|href)=\"([^\"#]+)\"", text):
        assert (playground.PLAYGROUND / name).is_file(), name


def test_every_import_exists() -> None:
    for path in FILES:
        if path.suffix == ".js":
            for name in re.findall(r"(?:from |import\()\"([^\"]+)\"", path.read_text()):
                assert name.startswith("."), f"{path.name} imports {name}"
                assert (path.parent / name).is_file(), f"{path.name} imports {name}"


def test_all_files_are_in_the_package() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = configuration["tool"]["setuptools"]["package-data"]["server"]
    # `**` means files of every depth there.
    globs = [f"{pattern}/*" if pattern.endswith("**") else pattern for pattern in patterns]
    packaged = {path for pattern in globs for path in (ROOT / "server").glob(pattern)}
    assert set(FILES) <= packaged


def test_headers_and_the_slash() -> None:
    app = FastAPI()
    playground.attach(app)
    with TestClient(app) as client:
        answer = client.get("/playground/")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
        assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = client.get("/playground/", headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304 and "content-security-policy" in again.headers
        redirect = client.get("/playground", follow_redirects=False)
        assert (redirect.status_code, redirect.headers["location"]) == (307, "playground/")
        for path in FILES:
            served = client.get(f"/playground/{path.relative_to(playground.PLAYGROUND)}")
            assert served.status_code == 200 and served.content == path.read_bytes()
        names = {".js": "app.js", ".css": "style.css", ".svg": "icon.svg"}
        kinds = {end: client.get(f"/playground/{name}").headers["content-type"] for end, name in names.items()}
        assert "javascript" in kinds[".js"] and "css" in kinds[".css"] and "svg" in kinds[".svg"]
        assert client.get("/playground/../app.py").status_code == 404
        assert client.get("/playground/%2e%2e/app.py").status_code == 404
