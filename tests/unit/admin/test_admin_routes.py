"""The admin routes: strict input, refusals in one form, pages, preconditions, streamed uploads."""

import base64
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifacts.bundle import load_bundle, write_bundle
from artifacts.manifest import Manifest
from server.admin_schema import PROFILE_NAME, ProfileSpec
from server.registry.errors import RegistryError, RegistryErrorCode
from server.routes.admin.page import page_of
from server.sources.root import MAX_LISTED

OCTETS = {"content-type": "application/octet-stream"}
JSON = {"content-type": "application/json"}
NO_DIGEST = f"sha256:{'0' * 64}"


class TestUpload:
    def test_created_then_there(self, admin: Any, bundle: Path) -> None:
        data = bundle.read_bytes()
        first = admin.call("POST", "/bundles", content=data, headers=OCTETS)
        second = admin.call("POST", "/bundles", content=data, headers=OCTETS)
        assert (first.status_code, second.status_code) == (201, 200)
        body = first.json()
        assert body["created"] and not second.json()["created"] and body["is_resident"]
        assert body["name"] == "medical" and body["layers"] == [2, 5] and body["kinds"] == ["add"]
        assert body["num_bytes"] == len(data) and body["added_by"] == "admin" and body["source"] == "upload"
        assert [check["check"] for check in body["checks"]][-1] == "digest"
        assert len(admin.registry.snapshot().bundles) == 1

    def test_dry_run_keeps_nothing(self, admin: Any, bundle: Path) -> None:
        answer = admin.call("POST", "/bundles?dry_run=true", content=bundle.read_bytes(), headers=OCTETS)
        assert answer.status_code == 200 and answer.json()["dry_run"] and answer.json()["created"]
        assert not admin.registry.snapshot().bundles

    def test_body_is_streamed(self, admin: Any) -> None:
        def endless() -> Any:
            for _ in range(64):
                yield b"x" * (1 << 18)

        code = admin.refused(admin.call("POST", "/bundles", content=endless(), headers=OCTETS), 400)
        assert code == "steering_bundle_invalid"
        assert sum(admin.bundles.chunks) == 64 << 18
        # A body that is read whole would come in one piece.
        assert max(admin.bundles.chunks) < 4 << 20

    def test_headers_reach_the_operation(self, admin: Any, bundle: Path) -> None:
        signature = base64.b64encode(b"signed").decode()
        headers = OCTETS | {"x-steering-digest": NO_DIGEST, "x-steering-signature": signature}
        answer = admin.call("POST", "/bundles", content=bundle.read_bytes(), headers=headers)
        assert admin.refused(answer, 409) == "steering_digest_mismatch"
        name, fields = admin.calls[-1]
        assert name == "upload" and fields["signature"] == b"signed" and fields["expected_digest"] == NO_DIGEST
        assert fields["actor"] == "admin" and not admin.registry.snapshot().bundles

    @pytest.mark.parametrize(
        ("headers", "status", "param"),
        [
            ({"x-steering-digest": "sha256:ABC"}, 400, "x-steering-digest"),
            ({"x-steering-signature": "not base64!"}, 400, "x-steering-signature"),
            ({"x-steering-signature": base64.b64encode(b"x" * 65537).decode()}, 400, "x-steering-signature"),
            ({"content-type": "multipart/form-data; boundary=x"}, 415, "content-type"),
            ({"content-type": ""}, 415, "content-type"),
            ({"content-encoding": "gzip"}, 415, "content-encoding"),
        ],
    )
    def test_bad_headers(self, admin: Any, headers: dict[str, str], status: int, param: str) -> None:
        answer = admin.call("POST", "/bundles", content=b"bytes", headers=OCTETS | headers)
        admin.refused(answer, status, param)
        assert not admin.calls

    def test_client_that_goes_away_leaves_nothing(self, admin: Any) -> None:
        head = (
            f"POST /v1/steering/bundles HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {admin.write_key}\r\n"
            "content-type: application/octet-stream\r\ncontent-length: 1000000\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", admin.port)) as connection:
            connection.sendall(head.encode() + b"x" * 1000)
            deadline = time.monotonic() + 10
            while not admin.bundles.chunks and time.monotonic() < deadline:
                time.sleep(0.01)
            assert admin.bundles.chunks
        incoming = admin.registry.store.incoming().parent
        while any(incoming.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(incoming.iterdir())
        assert admin.call("GET", "/bundles").json() == {"bundles": [], "next": None}


class TestOtherSources:
    def test_path(self, admin: Any) -> None:
        headers = {"x-steering-signature": base64.b64encode(b"signed").decode()}
        answer = admin.call("POST", "/bundles?dry_run=true", json={"path": "a/b.safetensors"}, headers=headers)
        assert admin.refused(answer, 403, "path") == "steering_source_refused"
        expected = {"name": "a/b.safetensors", "actor": "admin", "signature": b"signed", "dry_run": True}
        assert admin.calls == [("add_from_root", expected)]

    def test_remote(self, admin: Any) -> None:
        answer = admin.call("POST", "/bundles", json={"uri": "s3://a/b", "digest": NO_DIGEST})
        admin.refused(answer, 403, "uri")
        expected = {"uri": "s3://a/b", "digest": NO_DIGEST, "actor": "admin", "signature": None, "dry_run": False}
        assert admin.calls == [("add_from_remote", expected)]

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"path": ""}, "path"),
            ({"path": 3}, "path"),
            ({"path": "a", "more": 1}, "more"),
            ({"uri": "s3://a/b"}, "digest"),
            ({"uri": "s3://a/b", "digest": "sha256:12"}, "digest"),
            ({"uri": "s3://a/b", "digest": NO_DIGEST, "path": "a"}, "path"),
            ({}, "path"),
            ([], "body"),
            (None, "body"),
            ("text", "body"),
        ],
    )
    def test_bad_bodies(self, admin: Any, body: Any, param: str) -> None:
        admin.refused(admin.call("POST", "/bundles", content=json.dumps(body), headers=JSON), 400, param)
        assert not admin.calls

    def test_header_without_effect_is_refused(self, admin: Any) -> None:
        header, body = "x-steering-digest", {"uri": "s3://a", "digest": NO_DIGEST}
        answer = admin.call("POST", "/bundles", json=body, headers={header: NO_DIGEST})
        admin.refused(answer, 400, header)


class TestJson:
    @pytest.mark.parametrize("path", ["/bundles", "/profiles/medical"])
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b'{"bundle": "a", "bundle": "b"}',
            b'{"strength": NaN}',
            b'{"strength": 1e999}',
            b'{"strength": ' + b"9" * 5000 + b"}",
            b'{"description": "\\ud800"}',
            b'{"bundle": "\xff"}',
            b"[" * 30000,
            b"\x1f\x8b\x08\x00",
        ],
    )
    def test_what_is_no_strict_json(self, admin: Any, path: str, body: bytes) -> None:
        answer = admin.call("POST" if path == "/bundles" else "PUT", path, content=body, headers=JSON)
        assert admin.refused(answer, 400) == "steering_request_invalid"
        assert not admin.calls

    @pytest.mark.parametrize("path", ["/bundles", "/profiles/medical"])
    def test_too_long(self, admin: Any, path: str) -> None:
        body = json.dumps({"path": "x" * 70000})
        answer = admin.call("POST" if path == "/bundles" else "PUT", path, content=body, headers=JSON)
        assert admin.refused(answer, 413) == "steering_too_large"

    def test_other_content_type(self, admin: Any) -> None:
        answer = admin.call("PUT", "/profiles/medical", content=b"{}", headers={"content-type": "text/plain"})
        admin.refused(answer, 415, "content-type")


class TestQuery:
    @pytest.mark.parametrize(
        ("method", "path", "param"),
        [
            ("POST", "/bundles?dryrun=true", "dryrun"),
            ("GET", "/bundles?limit=1&limit=2", "limit"),
            ("GET", "/bundles?limit=0", "limit"),
            ("GET", "/bundles?limit=1001", "limit"),
            ("GET", "/bundles?limit=", "limit"),
            ("GET", "/bundles?cursor=", "cursor"),
            ("GET", "/bundles?cursor=A", "cursor"),
            ("GET", "/bundles?cursor=%ff", "cursor"),
            ("GET", "/bundles?cursor=_w", "cursor"),
            ("GET", "/status?verbose", "verbose"),
            ("DELETE", f"/bundles/{NO_DIGEST}?timeout_s=nan", "timeout_s"),
            ("DELETE", f"/bundles/{NO_DIGEST}?timeout_s=1e99", "timeout_s"),
            ("DELETE", "/profiles/medical?drain=perhaps", "drain"),
            ("PUT", "/profiles/medical?dry-run=true", "dry-run"),
            ("GET", "/profiles/medical?before=-1", "before"),
            ("GET", "/profiles/medical?before=99999999999999999999", "before"),
            ("GET", "/audit?before=x", "before"),
        ],
    )
    def test_refused(self, admin: Any, method: str, path: str, param: str) -> None:
        assert admin.refused(admin.call(method, path), 400, param).startswith("steering_")
        assert not admin.calls


class TestBundles:
    def test_pages_survive_changes(self, admin: Any, make_bundle: Any) -> None:
        digests = sorted(admin.add(make_bundle(f"b{seed}", [seed], seed)) for seed in range(5))
        first = admin.call("GET", "/bundles?limit=2").json()
        assert [each["digest"] for each in first["bundles"]] == digests[:2]
        admin.registry.remove_bundle(digests[1], actor="test")
        second = admin.call("GET", f"/bundles?limit=2&cursor={first['next']}").json()
        assert [each["digest"] for each in second["bundles"]] == digests[2:4]
        third = admin.call("GET", f"/bundles?limit=2&cursor={second['next']}").json()
        assert [each["digest"] for each in third["bundles"]] == digests[4:] and third["next"] is None

    def test_detail(self, admin: Any, bundle: Path, other_bundle: Path) -> None:
        digest, other = admin.add(bundle), admin.add(other_bundle)
        for reference in (digest, digest, other):
            assert admin.call("PUT", "/profiles/medical", json={"bundle": reference}).is_success
        body = admin.call("GET", f"/bundles/{digest[:15]}").json()
        assert body["digest"] == digest and body["description"] == "Careful about doses."
        assert body["residency"] == [{"replica": 0, "rank": rank, "keys": [digest, f"{digest}+2"]} for rank in (0, 1)]
        assert [(use["profile"], use["is_current"]) for use in body["used_by"]] == [("medical", False)]
        uses = admin.call("GET", f"/bundles/{other}").json()["used_by"]
        assert [(use["profile"], use["is_current"]) for use in uses] == [("medical", True)]

    @pytest.mark.parametrize(
        ("reference", "status"), [(NO_DIGEST, 404), ("sha256:00000000", 404), ("sha256:0000", 400), ("a%2fb", 404)]
    )
    def test_unknown(self, admin: Any, reference: str, status: int) -> None:
        for method in ("GET", "DELETE"):
            assert admin.call(method, f"/bundles/{reference}").status_code == status

    def test_manifest(self, admin: Any, bundle: Path) -> None:
        digest = admin.add(bundle)
        body = admin.call("GET", f"/bundles/{digest[:15]}/manifest").json()
        assert Manifest.model_validate_json(json.dumps(body)) == load_bundle(bundle).manifest

    def test_tensors(self, admin: Any, tmp_path: Path, bundle: Path) -> None:
        loaded = load_bundle(bundle)
        evidence = {"aligner.1.encoder.weight": torch.ones(3, 2, dtype=torch.float16)}
        path = tmp_path / "with-evidence.safetensors"
        write_bundle(path, loaded.manifest, {**loaded.rows, **evidence})
        digest = admin.add(path)
        body = admin.call("GET", f"/bundles/{digest[:15]}/tensors").json()
        assert body["digest"] == digest
        assert [(row["name"], row["layer"], row["kind"], row["role"]) for row in body["rows"]] == [
            ("runtime.2.0.write", 2, "add", "write"),
            ("runtime.5.0.write", 5, "add", "write"),
        ]
        for row in body["rows"]:
            assert row["norms"] == pytest.approx([float(loaded.rows[row["name"]].norm())])
        assert body["evidence"] == [
            {"name": "aligner.1.encoder.weight", "shape": [3, 2], "dtype": "F16", "num_bytes": 12}
        ]

    def test_tensors_of_a_damaged_file(self, admin: Any, bundle: Path) -> None:
        digest = admin.add(bundle)
        path = admin.registry.store.path(digest)
        path.chmod(0o600)
        path.write_bytes(b"no bundle")
        answer = admin.call("GET", f"/bundles/{digest}/tensors")
        assert not answer.is_success and "damaged" in answer.json()["error"]["message"]
        # What does not need the file is still there.
        assert admin.call("GET", f"/bundles/{digest}/manifest").is_success

    def test_delete(self, admin: Any, bundle: Path) -> None:
        digest = admin.add(bundle)
        admin.call("PUT", "/profiles/medical", json={"bundle": digest})
        assert admin.refused(admin.call("DELETE", f"/bundles/{digest}"), 409) == "steering_bundle_in_use"
        assert admin.call("DELETE", "/profiles/medical").status_code == 204
        admin.bundles.in_use.add(digest)
        admin.refused(admin.call("DELETE", f"/bundles/{digest}"), 409, "digest")
        answer = admin.call("DELETE", f"/bundles/{digest}?drain=true&timeout_s=2.5")
        assert answer.status_code == 204 and answer.content == b""
        expected = {"digest": digest, "actor": "admin", "drain": True, "timeout_s": 2.5}
        assert admin.calls[-1] == ("delete_bundle", expected)
        admin.refused(admin.call("GET", f"/bundles/{digest}"), 404)


class TestProfiles:
    def test_put(self, admin: Any, bundle: Path) -> None:
        digest = admin.add(bundle)
        spec = {"bundle": digest[:20], "strength": -0.5, "maximum_strength": 2, "scope": "response", "layers": [5]}
        spec |= {"exclude": ["reasoning"], "allowed_keys": ["doctor"], "description": "Two\nlines."}
        answer = admin.call("PUT", "/profiles/medical", json=spec)
        assert answer.status_code == 201, answer.text
        body = answer.json()
        assert answer.headers["etag"] == f'"{body["generation"]}"' and body["generation"] == admin.registry.generation()
        assert body | spec == body | {"bundle": digest[:20]} and body["bundle"] == digest
        assert body["changed"] and body["observed"] and not body["dry_run"] and body["previous"] is None
        assert body["changed_by"] == "admin"
        again = admin.call("PUT", "/profiles/medical", json=spec)
        assert again.status_code == 200 and not again.json()["changed"]
        assert again.headers["etag"] == answer.headers["etag"]

    def test_left_out_means_recommended(self, admin: Any, bundle: Path) -> None:
        digest = admin.add(bundle)
        admin.call("PUT", "/profiles/medical", json={"bundle": digest, "strength": 0.25, "layers": [2]})
        body = admin.call("PUT", "/profiles/medical", json={"bundle": digest, "layers": None}).json()
        assert (body["strength"], body["maximum_strength"], body["scope"], body["layers"]) == (1.0, 4.0, "all", [2, 5])
        assert body["previous"]["settings"]["strength"] == 0.25 and body["previous"]["settings"]["layers"] == [2]
        assert body["description"] == "Careful about doses."

    def test_preconditions(self, admin: Any, bundle: Path) -> None:
        spec = {"bundle": admin.add(bundle)}
        assert (
            admin.refused(admin.call("PUT", "/profiles/medical", json=spec, headers={"if-match": '"1"'}), 412)
            == "steering_precondition_failed"
        )
        new = {"if-none-match": "*"}
        etag = admin.call("PUT", "/profiles/medical", json=spec, headers=new).headers["etag"]
        admin.refused(admin.call("PUT", "/profiles/medical", json=spec | {"strength": 2}, headers=new), 412)
        changed = admin.call("PUT", "/profiles/medical", json=spec | {"strength": 2}, headers={"if-match": etag})
        assert changed.status_code == 200 and changed.headers["etag"] != etag
        for method, path in (("DELETE", "/profiles/medical"), ("POST", "/profiles/medical/rollback")):
            admin.refused(admin.call(method, path, headers={"if-match": etag}), 412)
        assert admin.call("GET", "/profiles/medical").headers["etag"] == changed.headers["etag"]

    def test_dry_run(self, admin: Any, bundle: Path) -> None:
        answer = admin.call("PUT", "/profiles/medical?dry_run=true", json={"bundle": admin.add(bundle)})
        assert answer.status_code == 200 and answer.json()["dry_run"] and "etag" not in answer.headers
        admin.refused(admin.call("GET", "/profiles/medical"), 404, "name")

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"bundle": None}, "bundle"),
            ({"bundle": "sha256:12"}, "bundle"),
            ({"bundle": "latest"}, "bundle"),
            ({"strength": "1"}, "strength"),
            ({"strength": True}, "strength"),
            ({"strength": 10001}, "strength"),
            ({"maximum_strength": 0}, "maximum_strength"),
            ({"scope": "some"}, "scope"),
            ({"layers": []}, "layers"),
            ({"layers": [1, 1]}, "layers"),
            ({"layers": [1.0]}, "layers.0"),
            ({"layers": [-1]}, "layers.0"),
            ({"layers": "12"}, "layers"),
            ({"exclude": ["answers"]}, "exclude.0"),
            ({"allowed_keys": []}, "allowed_keys"),
            ({"allowed_keys": ["a\x00"]}, "allowed_keys.0"),
            ({"description": "\x1b[2J"}, "description"),
            ({"description": "x" * 2001}, "description"),
            ({"strenght": 1}, "strenght"),
            ({"strength": 2, "maximum_strength": 1}, "body"),
        ],
    )
    def test_bad_specs(self, admin: Any, change: dict[str, Any], param: str) -> None:
        spec = {"bundle": NO_DIGEST} | change
        admin.refused(admin.call("PUT", "/profiles/medical", json=spec), 400, param)
        assert not admin.calls

    @pytest.mark.parametrize("name", ["Medical", "-a", "a@b", "a%00", "x" * 65, "%F0%9F%92%8A", "a%0A", "a b"])
    def test_bad_names(self, admin: Any, name: str) -> None:
        answers = [
            admin.call("PUT", f"/profiles/{name}", json={"bundle": NO_DIGEST}),
            admin.call("GET", f"/profiles/{name}"),
            admin.call("DELETE", f"/profiles/{name}"),
            admin.call("POST", f"/profiles/{name}/rollback"),
        ]
        for answer in answers:
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "name"
        assert not admin.calls

    def test_list_shows_inference_keys_what_they_may_use(self, admin: Any, bundle: Path) -> None:
        digest = admin.add(bundle)
        for name, keys in (("medical", None), ("medicine", ["doctor"]), ("media", ["nurse"]), ("legal", None)):
            answer = admin.call("PUT", f"/profiles/{name}", json={"bundle": digest, "allowed_keys": keys})
            assert answer.status_code == 201
        seen = admin.call("GET", "/profiles", key=admin.inference_key).json()["profiles"]
        assert [each["name"] for each in seen] == ["medical", "medicine"]
        assert {each["changed_by"] for each in seen} == {None} and {str(each["allowed_keys"]) for each in seen} == {
            "None"
        }
        every = admin.call("GET", "/profiles", key=admin.read_key).json()["profiles"]
        assert [each["name"] for each in every] == ["legal", "media", "medical", "medicine"]
        assert every[1]["allowed_keys"] == ["nurse"] and every[1]["changed_by"] == "admin"
        page = admin.call("GET", "/profiles?limit=1", key=admin.inference_key).json()
        rest = admin.call("GET", f"/profiles?cursor={page['next']}", key=admin.inference_key).json()
        assert [each["name"] for each in rest["profiles"]] == ["medicine"] and rest["next"] is None

    def test_history_and_rollback(self, admin: Any, bundle: Path, other_bundle: Path) -> None:
        digest, other = admin.add(bundle), admin.add(other_bundle)
        made = [
            admin.call("PUT", "/profiles/medical", json={"bundle": each, "strength": strength}).json()["generation"]
            for each, strength in ((digest, 1), (digest, 2), (other, 1))
        ]
        page = admin.call("GET", "/profiles/medical?limit=2").json()
        assert [version["generation"] for version in page["history"]] == made[:0:-1] and page["next"] == made[1]
        rest = admin.call("GET", f"/profiles/medical?limit=2&before={page['next']}").json()
        assert [version["generation"] for version in rest["history"]] == made[:1] and rest["next"] is None
        back = admin.call("POST", "/profiles/medical/rollback")
        assert back.status_code == 200 and back.json()["bundle"] == digest and back.json()["strength"] == 2
        assert back.headers["etag"] == f'"{admin.registry.generation()}"'
        first = admin.call("POST", "/profiles/medical/rollback", json={"to": made[0]})
        assert first.json()["strength"] == 1
        newest = admin.call("GET", "/profiles/medical?limit=1").json()["history"][0]
        assert (newest["action"], newest["restored_from"]) == ("rollback", made[0])
        for body in ({"to": -1}, {"to": 1.5}, {"to": "1"}, {"two": 1}, 3):
            admin.refused(admin.call("POST", "/profiles/medical/rollback", json=body), 400)
        admin.refused(admin.call("POST", "/profiles/medical/rollback", json={"to": 999}), 404)
        admin.refused(admin.call("POST", "/profiles/none/rollback", json={"to": None}), 404)

    def test_deleted(self, admin: Any, bundle: Path) -> None:
        admin.call("PUT", "/profiles/medical", json={"bundle": admin.add(bundle)})
        answer = admin.call("DELETE", "/profiles/medical?drain=1&timeout_s=3")
        assert answer.status_code == 204 and admin.calls[-1][1]["timeout_s"] == 3
        answer = admin.call("GET", "/profiles/medical")
        assert admin.refused(answer, 404, "name") == "steering_profile_not_found"
        assert f"generation {admin.registry.generation()} deleted it" in answer.json()["error"]["message"]
        back = admin.call("POST", "/profiles/medical/rollback")
        assert back.status_code == 200 and back.json()["previous"] is None

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        name=st.from_regex(PROFILE_NAME.replace("$", r"\Z"), fullmatch=True) | st.text(max_size=10),
        body=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from([*ProfileSpec.model_fields, "x"]), inner, max_size=9)
            ),
            max_leaves=12,
        ),
    )
    def test_no_body_is_a_server_error(self, admin: Any, name: str, body: Any) -> None:
        path = "".join(f"%{byte:02x}" for byte in name.encode()) or "%20"
        answer = admin.call("PUT", f"/profiles/{path}", content=json.dumps(body), headers=JSON)
        assert not answer.is_success and answer.status_code < 500
        # A name of one slash or dot is another route, which Starlette refuses by itself.
        assert "error" in answer.json() or "detail" in answer.json()


class TestReading:
    def test_root(self, admin: Any) -> None:
        expected = {"names": ["team/0.safetensors", "team/1.safetensors"], "is_complete": True}
        assert admin.call("GET", "/root").json() == expected
        admin.bundles.num_root_files = MAX_LISTED
        assert not admin.call("GET", "/root").json()["is_complete"]

    def test_status(self, admin: Any, bundle: Path) -> None:
        digest = admin.add(bundle)
        body = admin.call("GET", "/status", key=admin.read_key).json()
        assert body["added_later"] == {"deep": [1]} and body["members"][0]["host"] == "here"
        assert [worker["rank"] for worker in body["workers"]] == [0, 1]
        assert body["workers"][0]["bundles"][0] == digest and body["generation_desired"] == 1 and body["is_ready"]

    def test_audit_pages(self, admin: Any, bundle: Path) -> None:
        digest = admin.add(bundle)
        for strength in (1, 2, 3):
            admin.call("PUT", "/profiles/medical", json={"bundle": digest, "strength": strength})
        page = admin.call("GET", "/audit?limit=2").json()
        assert len(page["entries"]) == 2 and page["entries"][0]["target"] == "medical"
        rest = admin.call("GET", f"/audit?limit=2&before={page['next']}").json()
        assert len(rest["entries"]) == 1 and rest["next"] is None
        times = [entry["at"] for entry in (*page["entries"], *rest["entries"])]
        assert times == sorted(times, reverse=True)

    def test_registry_that_is_locked(self, admin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def locked(*_: Any) -> Any:
            raise RegistryError(RegistryErrorCode.LOCKED, "The registry is locked; try again.")

        monkeypatch.setattr(admin.registry, "snapshot", locked)
        assert admin.refused(admin.call("GET", "/bundles"), 409) == "steering_conflict"

    def test_reading_needs_a_read_key(self, admin: Any) -> None:
        of_bundle = (f"/bundles/{NO_DIGEST}{part}" for part in ("", "/manifest", "/tensors"))
        for path in ("/bundles", *of_bundle, "/profiles/medical", "/status", "/audit", "/root"):
            assert admin.call("GET", path, key=admin.inference_key).status_code == 403
            assert admin.call("GET", path, key="wrong").status_code == 401
            assert admin.call("GET", path, key=admin.read_key).status_code in (200, 404)


class TestDocumentation:
    def test_every_operation(self, admin: Any) -> None:
        document = admin.app.openapi()
        operations = {
            f"{method.upper()} {path.removeprefix('/v1/steering')}": operation
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
            if path.startswith("/v1/steering")
        }
        assert sorted(operations) == [
            *("DELETE /bundles/{digest}", "DELETE /profiles/{name}", "GET /audit", "GET /bundles"),
            *("GET /bundles/{digest}", "GET /bundles/{digest}/manifest", "GET /bundles/{digest}/tensors"),
            *("GET /profiles", "GET /profiles/{name}", "GET /root", "GET /status", "POST /bundles"),
            *("POST /profiles/{name}/rollback", "PUT /profiles/{name}"),
        ]
        for name, operation in operations.items():
            assert operation["summary"] and operation["description"] and operation["tags"] == ["steering"], name
            answers = operation["responses"]
            assert "422" not in answers and {"4XX", "5XX"} <= set(answers), name
            assert answers["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/Refusal"), name
            assert all(parameter["schema"] for parameter in operation.get("parameters", [])), name
            assert ("204" in answers) == name.startswith("DELETE"), name
        assert {"200", "201"} <= set(operations["POST /bundles"]["responses"])
        assert set(operations["POST /bundles"]["requestBody"]["content"]) == {
            "application/octet-stream",
            "application/json",
        }
        assert "If-Match" in {
            parameter["name"].title() for parameter in operations["PUT /profiles/{name}"]["parameters"]
        }
        body = document["components"]["schemas"]["ProfileSpec"]
        assert body["additionalProperties"] is False and set(body["properties"]) == set(ProfileSpec.model_fields)


def test_a_page_needs_no_entry_of_the_one_before() -> None:
    items = {name: name for name in "dbca"}
    first = page_of(items, 2, None)
    assert first.items == ["a", "b"]
    del items["b"]
    assert page_of(items | {"aa": "aa", "bb": "bb"}, 2, first.next).items == ["bb", "c"]
    last = page_of(items, 4, None)
    assert last.items == ["a", "c", "d"] and last.next is None
