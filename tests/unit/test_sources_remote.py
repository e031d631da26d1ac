"""Remote bundles from a real HTTP server on this machine, honest and hostile."""

import asyncio
import datetime
import hashlib
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from server.sources import hub, object_store
from server.sources.errors import SourceError, SourceErrorCode
from server.sources.incoming_file import Received
from server.sources.remote import RemoteSources

CONTENT = b"bundle " * 50_000
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_PATH = f"/team/medical/resolve/{COMMIT}/v1/a%20b.safetensors"
HUB_URI = f"hf://team/medical@{COMMIT}/v1/a b.safetensors"
S3_PATH, S3_URI = "/bundles-eu/v1/a%20b.safetensors", "s3://bundles-eu/v1/a b.safetensors"
TOKEN, SECRET = "hf_tokenthatmustnotleak", "awssecretthatmustnotleak"
MAX_BYTES = 1 << 20
# Of a body that must arrive on a machine that is busy with something else, and of what may stall.
IDLE_TIMEOUT_S, STALL_TIMEOUT_S, TOTAL_TIMEOUT_S = 30.0, 4.0, 60.0

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the test has set it, and notes what it was asked."""

    server: "WebServer"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.server.answers.get(self.path, status(404))(self)

    def begin(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in {"ETag": '"1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class WebServer(ThreadingHTTPServer):
    """One thread per connection, so that a stalled answer holds nothing up."""

    daemon_threads = True
    # Stalled answers are still asleep when the test is over.
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what these tests are about."""

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


def content(body: bytes = CONTENT, announced: int | None = None) -> Answer:
    def answer(handler: Handler) -> None:
        handler.begin(200, Content_Length=len(body) if announced is None else announced)
        handler.wfile.write(body)

    return answer


def status(code: int) -> Answer:
    # The answer repeats what it was sent, as a hostile or careless server does.
    def answer(handler: Handler) -> None:
        body = f"<Error><Code>X</Code><Message>{handler.headers}</Message></Error>".encode()
        handler.begin(code, Content_Length=len(body))
        handler.wfile.write(body)

    return answer


def redirect(location: str, code: int = 302) -> Answer:
    return lambda handler: handler.begin(code, Location=location, Content_Length=0)


def endless(handler: Handler) -> None:
    handler.begin(200)
    while not handler.server.over.is_set():
        handler.wfile.write(bytes(65536))


def stalled_body(handler: Handler) -> None:
    handler.begin(200, Content_Length=len(CONTENT))
    handler.wfile.write(CONTENT[:100])
    handler.server.over.wait(30)


def stalled_head(handler: Handler) -> None:
    handler.server.over.wait(30)


def dribble(handler: Handler) -> None:
    handler.begin(200, Content_Length=len(CONTENT))
    for byte in CONTENT:
        if handler.server.over.wait(0.05):
            return
        handler.wfile.write(bytes([byte]))


def garbage(handler: Handler) -> None:
    handler.wfile.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    handler.close_connection = True


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.close()


@pytest.fixture
def other_web() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.close()


@pytest.fixture
def environment(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both clients look at the local server."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The library reads HF_ENDPOINT when it is imported, which another test may have done.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    template = f"{web.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")


async def _fetch(
    uri: str,
    target: Path,
    digest: str = DIGEST,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    total_timeout_s: float = TOTAL_TIMEOUT_S,
) -> Received:
    sources = RemoteSources({"hf", "s3"}, idle_timeout_s=idle_timeout_s, total_timeout_s=total_timeout_s)
    return await sources.fetch(uri, digest, target, MAX_BYTES)


async def _refused(uri: str, folder: Path, digest: str = DIGEST) -> SourceErrorCode:
    with pytest.raises(SourceError) as caught:
        await _fetch(uri, folder / "new", digest, STALL_TIMEOUT_S)
    assert not list(folder.iterdir())
    error: BaseException | None = caught.value
    assert isinstance(error, SourceError)
    assert len(str(error)) < 400
    assert str(error).isprintable()
    for word in (TOKEN, SECRET, "AKIATEST", "127.0.0.1", "Signature", "password"):
        assert word not in str(error)
    return error.code


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("uri", "path"), [(HUB_URI, HUB_PATH), (S3_URI, S3_PATH)])
class TestEitherSource:
    async def test_the_file_arrives(self, web: WebServer, tmp_path: Path, uri: str, path: str) -> None:
        web.answers[path] = content()
        assert await _fetch(uri, tmp_path / "new") == (len(CONTENT), DIGEST)
        assert (tmp_path / "new").read_bytes() == CONTENT
        [(asked, headers)] = web.requests
        assert asked == path
        expected = f"Bearer {TOKEN}" if uri == HUB_URI else "AWS4-HMAC-SHA256 Credential=AKIATEST/"
        assert headers["authorization"].startswith(expected)

    @pytest.mark.parametrize(
        ("answer", "code"),
        [
            (status(404), SourceErrorCode.NOT_FOUND),
            (status(401), SourceErrorCode.REFUSED),
            (status(403), SourceErrorCode.REFUSED),
            (status(503), SourceErrorCode.UNAVAILABLE),
            (status(418), SourceErrorCode.UNAVAILABLE),
            (content(b"another bundle"), SourceErrorCode.DIGEST_MISMATCH),
            (content(b""), SourceErrorCode.EMPTY),
            (content(CONTENT[:1000], announced=MAX_BYTES + 1), SourceErrorCode.TOO_LARGE),
            (stalled_head, SourceErrorCode.TIMEOUT),
            (stalled_body, SourceErrorCode.TIMEOUT),
            (garbage, SourceErrorCode.UNAVAILABLE),
            (redirect("file:///etc/hostname"), None),
            (redirect("ftp://127.0.0.1/x"), None),
            (redirect("http://"), None),
            (redirect("\\\\host\\share"), None),
        ],
    )
    async def test_a_bad_answer_has_its_code_and_leaves_nothing(
        self, web: WebServer, tmp_path: Path, uri: str, path: str, answer: Answer, code: SourceErrorCode | None
    ) -> None:
        web.answers[path] = answer
        found = await _refused(uri, tmp_path)
        # The client of the object store does not say why it does not follow.
        allowed = {SourceErrorCode.BAD_REDIRECT, SourceErrorCode.UNAVAILABLE, SourceErrorCode.NOT_FOUND}
        assert found in ({code} if code else allowed)

    async def test_a_body_that_ends_early_is_not_taken(
        self, web: WebServer, tmp_path: Path, uri: str, path: str
    ) -> None:
        web.answers[path] = content(CONTENT[:1000], announced=len(CONTENT))
        assert await _refused(uri, tmp_path) in {SourceErrorCode.UNAVAILABLE, SourceErrorCode.TIMEOUT}

    async def test_an_endless_body_is_cut_off(self, web: WebServer, tmp_path: Path, uri: str, path: str) -> None:
        web.answers[path] = endless
        # An object without a length is none for the object store's client.
        expected = SourceErrorCode.TOO_LARGE if uri == HUB_URI else SourceErrorCode.UNAVAILABLE
        assert await _refused(uri, tmp_path) == expected

    async def test_redirects_without_end_stop(self, web: WebServer, tmp_path: Path, uri: str, path: str) -> None:
        web.answers[path] = redirect(path)
        expected = SourceErrorCode.BAD_REDIRECT if uri == HUB_URI else SourceErrorCode.UNAVAILABLE
        assert await _refused(uri, tmp_path) == expected
        assert len(web.requests) < 50

    async def test_a_body_drop_by_drop_ends_with_the_total_time(
        self, web: WebServer, tmp_path: Path, uri: str, path: str
    ) -> None:
        web.answers[path] = dribble
        with pytest.raises(SourceError, match="longer than 1 s") as caught:
            await _fetch(uri, tmp_path / "new", total_timeout_s=1.0)
        assert caught.value.code == SourceErrorCode.TIMEOUT
        assert not list(tmp_path.iterdir())

    async def test_cancelled_in_the_middle_leaves_nothing(
        self, web: WebServer, tmp_path: Path, uri: str, path: str
    ) -> None:
        web.answers[path] = stalled_body
        task = asyncio.create_task(_fetch(uri, tmp_path / "new"))
        while not web.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not list(tmp_path.iterdir())

    async def test_a_server_that_is_not_there(self, web: WebServer, tmp_path: Path, uri: str, path: str) -> None:
        web.close()
        assert await _refused(uri, tmp_path) == SourceErrorCode.UNAVAILABLE

    @pytest.mark.parametrize("digest", ["", "sha256:", DIGEST[7:], DIGEST.upper(), DIGEST + "0", "md5:" + "0" * 32])
    async def test_a_digest_is_demanded(self, web: WebServer, tmp_path: Path, uri: str, path: str, digest: str) -> None:
        web.answers[path] = content()
        assert await _refused(uri, tmp_path, digest=digest) == SourceErrorCode.BAD_DIGEST
        assert not web.requests


@pytest.mark.usefixtures("environment")
class TestHub:
    @pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
    async def test_the_token_stays_with_the_hub(
        self, web: WebServer, other_web: WebServer, tmp_path: Path, code: int
    ) -> None:
        web.answers[HUB_PATH] = redirect("/renamed", 307)
        web.answers["/renamed"] = redirect(f"{other_web.url}/storage?Signature=s", code)
        other_web.answers["/storage?Signature=s"] = content()
        assert (await _fetch(HUB_URI, tmp_path / "new")).digest == DIGEST
        assert [headers["authorization"] for _, headers in web.requests] == [f"Bearer {TOKEN}"] * 2
        [(_, headers)] = other_web.requests
        assert "authorization" not in headers

    async def test_an_error_of_the_storage_does_not_show_its_address(
        self, web: WebServer, other_web: WebServer, tmp_path: Path
    ) -> None:
        web.answers[HUB_PATH] = redirect(f"{other_web.url}/storage?Signature=s")
        other_web.answers["/storage?Signature=s"] = garbage
        with pytest.raises(SourceError) as caught:
            await _fetch(HUB_URI, tmp_path / "new")
        assert "Signature" not in str(caught.value)
        # What a log prints with the error.
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__

    async def test_tls_is_not_left(
        self, web: WebServer, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        certificate = _certificate(tmp_path_factory.mktemp("tls"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        secure = WebServer()
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        template = f"https://127.0.0.1:{secure.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        try:
            secure.answers[HUB_PATH] = redirect(f"{web.url}/plain")
            web.answers["/plain"] = content()
            assert await _refused(HUB_URI, tmp_path) == SourceErrorCode.BAD_REDIRECT
            assert not web.requests
            secure.answers[HUB_PATH] = content()
            assert (await _fetch(HUB_URI, tmp_path / "new")).digest == DIGEST
        finally:
            secure.close()

    async def test_a_token_of_the_wrong_form_is_not_shown(
        self, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", f"{TOKEN}ü")
        web.answers[HUB_PATH] = content()
        assert await _refused(HUB_URI, tmp_path) == SourceErrorCode.UNAVAILABLE

    async def test_without_leave_no_token_is_sent(
        self, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        web.answers[HUB_PATH] = content()
        await _fetch(HUB_URI, tmp_path / "new")
        assert "authorization" not in web.requests[0][1]

    async def test_offline_mode_is_kept(self, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert await _refused(HUB_URI, tmp_path) == SourceErrorCode.UNAVAILABLE
        assert not web.requests

    def test_the_endpoint_is_that_of_the_library(self, web: WebServer, tmp_path: Path) -> None:
        web.answers["/mirror" + HUB_PATH] = content()
        code = (
            "import asyncio, json, pathlib, sys\n"
            "from server.sources.remote import RemoteSources\n"
            "uri, digest, target = sys.argv[1:]\n"
            "got = asyncio.run(RemoteSources({'hf'}).fetch(uri, digest, pathlib.Path(target), 1 << 20))\n"
            "print(json.dumps(got))\n"
        )
        variables = {"HF_ENDPOINT": f"{web.url}/mirror/", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        result = subprocess.run(
            [sys.executable, "-c", code, HUB_URI, DIGEST, str(tmp_path / "new")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "TRANSFORMERS_OFFLINE": "0", **variables},
            cwd=Path(__file__).parents[2],
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == [len(CONTENT), DIGEST]
        # Nothing else is asked, and nothing about this machine is told.
        [(_, headers)] = web.requests
        assert headers["authorization"] == f"Bearer {TOKEN}"
        assert headers["user-agent"] == "expertsteer"

    @pytest.mark.parametrize(
        "uri",
        [
            "hf://team/medical/a.safetensors",
            "hf://team/medical@main/a.safetensors",
            f"hf://team/medical@{COMMIT[:-1]}/a.safetensors",
            f"hf://team/medical@{COMMIT.upper()}/a.safetensors",
            f"hf://medical@{COMMIT}/a.safetensors",
            f"hf://datasets/team/medical@{COMMIT}/a.safetensors",
            f"hf://../api@{COMMIT}/a.safetensors",
            f"hf://team/..@{COMMIT}/a.safetensors",
            f"hf://user:password@host/x@{COMMIT}/a.safetensors",
            f"hf://team/medical@{COMMIT}",
            f"hf://team/medical@{COMMIT}/",
        ],
    )
    async def test_an_address_of_another_form_is_refused_unasked(
        self, web: WebServer, tmp_path: Path, uri: str
    ) -> None:
        assert await _refused(uri, tmp_path) == SourceErrorCode.BAD_ADDRESS
        assert not web.requests

    @pytest.mark.parametrize("path", ["../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "x\n.safetensors"])
    async def test_a_path_obeys_the_rule_for_names(self, web: WebServer, tmp_path: Path, path: str) -> None:
        assert await _refused(f"hf://team/medical@{COMMIT}/{path}", tmp_path) == SourceErrorCode.BAD_NAME
        assert not web.requests

    async def test_marks_of_an_address_are_part_of_the_name(self, web: WebServer, tmp_path: Path) -> None:
        web.answers[f"/team/medical/resolve/{COMMIT}/a%3Fb%23c%25d.safetensors"] = content()
        uri = f"hf://team/medical@{COMMIT}/a?b#c%d.safetensors"
        assert (await _fetch(uri, tmp_path / "new")).digest == DIGEST


@pytest.mark.usefixtures("environment")
class TestObjectStore:
    @pytest.mark.parametrize(
        "uri",
        [
            "s3://bundles-eu",
            "s3://bundles-eu/",
            "s3:///a.safetensors",
            "s3://AKIATEST:password@bundles-eu/a.safetensors",
            "s3://UPPER/a.safetensors",
            "s3://../a.safetensors",
            "s3://bundles-eu?x=1/a.safetensors",
        ],
    )
    async def test_an_address_of_another_form_is_refused_unasked(
        self, web: WebServer, tmp_path: Path, uri: str
    ) -> None:
        assert await _refused(uri, tmp_path) == SourceErrorCode.BAD_ADDRESS
        assert not web.requests

    async def test_a_key_obeys_the_rule_for_names(self, web: WebServer, tmp_path: Path) -> None:
        for key in ("../other-bucket/a.safetensors", "a//b.safetensors", "a", "%2e%2e/\0.safetensors"):
            assert await _refused(f"s3://bundles-eu/{key}", tmp_path) == SourceErrorCode.BAD_NAME
        assert not web.requests

    async def test_marks_of_an_address_are_part_of_the_key(self, web: WebServer, tmp_path: Path) -> None:
        web.answers["/bundles-eu/%252e%252e/a%3Fb%23c.safetensors"] = content()
        assert (await _fetch("s3://bundles-eu/%2e%2e/a?b#c.safetensors", tmp_path / "new")).digest == DIGEST

    async def test_an_answer_that_fails_once_is_asked_again(self, web: WebServer, tmp_path: Path) -> None:
        def first_fails(handler: Handler) -> None:
            (status(503) if len(web.requests) == 1 else content())(handler)

        web.answers[S3_PATH] = first_fails
        assert (await _fetch(S3_URI, tmp_path / "new")).digest == DIGEST
        assert len(web.requests) == 2

    async def test_without_leave_nothing_goes_over_plain_http(
        self, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        web.answers[S3_PATH] = content()
        monkeypatch.delenv("AWS_ALLOW_HTTP")
        assert await _refused(S3_URI, tmp_path) == SourceErrorCode.UNAVAILABLE
        assert not web.requests

    async def test_public_buckets_need_no_credentials(
        self, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        web.answers[S3_PATH] = content()
        assert (await _fetch(S3_URI, tmp_path / "new")).digest == DIGEST
        assert "authorization" not in web.requests[0][1]

    def test_without_the_package_the_server_says_so_at_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SourceError, match=r"obstore; install it") as caught:
            RemoteSources({"s3"})
        assert caught.value.code == SourceErrorCode.MISSING_PACKAGE
        RemoteSources({"hf"})


@pytest.mark.parametrize(("enabled", "uri"), [({"s3"}, HUB_URI), ({"hf"}, S3_URI), (set(), HUB_URI), (set(), S3_URI)])
async def test_only_enabled_schemes(tmp_path: Path, enabled: set[str], uri: str) -> None:
    with pytest.raises(SourceError, match="not enabled") as caught:
        await RemoteSources(enabled).fetch(uri, DIGEST, tmp_path / "new", MAX_BYTES)
    assert caught.value.code == SourceErrorCode.SCHEME_DISABLED
    assert not list(tmp_path.iterdir())


def test_an_unknown_scheme_cannot_be_enabled() -> None:
    with pytest.raises(SourceError, match="'gopher'"):
        RemoteSources({"hf", "gopher"})


@pytest.mark.parametrize(
    "uri",
    ["", "hf:", "file:///etc/hostname", "http://127.0.0.1/a", "https://u:password@h/a", "HF://a/b", "s3" + "x" * 5000],
)
async def test_other_addresses_are_refused_and_not_repeated(tmp_path: Path, uri: str) -> None:
    assert await _refused(uri, tmp_path) == SourceErrorCode.BAD_ADDRESS


@given(st.text(max_size=60), st.sampled_from(["hf://", f"hf://team/medical@{COMMIT}/", "s3://", "s3://bundles-eu/"]))
def test_any_address_is_parsed_or_refused(text: str, start: str) -> None:
    parse = hub.parse if start.startswith("hf") else object_store.parse
    try:
        parsed = parse(start + text)
    except SourceError as error:
        assert error.code in {SourceErrorCode.BAD_ADDRESS, SourceErrorCode.BAD_NAME}
    else:
        assert ".." not in parsed[-1].split("/")
        assert parsed[-1].isprintable()


def _certificate(folder: Path) -> Path:
    """Write key and certificate of 127.0.0.1 to one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    path = folder / "tls.pem"
    path.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    return path
