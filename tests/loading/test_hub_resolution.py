"""Where a model name leads: a folder, the hub, the hub's local cache, or an error with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpage.errors import CheckpointError
from kvpage.loading.hub import resolve

hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")


class Response:
    """As much of an HTTP response as an error of the hub carries."""

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code
        self.headers: dict[str, str] = {}
        self.request = None


def http_error(status: int) -> Exception:
    return errors.HfHubHTTPError(f"{status} from the hub", response=Response(status))


def stub(monkeypatch: pytest.MonkeyPatch, online: object, cached: object) -> list[dict[str, Any]]:
    """snapshot_download gives or raises ``online``, and ``cached`` where only local files are asked for."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        result = cached if options["local_files_only"] else online
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return calls


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub(monkeypatch, ConnectionError(), ConnectionError())
    assert resolve(str(tmp_path)) == tmp_path
    assert calls == []


def test_a_repository_is_downloaded_without_what_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stub(monkeypatch, tmp_path, ConnectionError())
    found = resolve("org/some-model_1.0", revision="v2", download_dir="/somewhere", token="secret")
    assert found == tmp_path
    (call,) = calls
    assert call["repo"] == "org/some-model_1.0"
    assert (call["revision"], call["cache_dir"], call["token"]) == ("v2", "/somewhere", "secret")
    assert "*.safetensors" in call["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in call["allow_patterns"])


def test_a_tokenizer_alone_takes_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub(monkeypatch, tmp_path, ConnectionError())
    resolve("org/model", weights=False)
    assert "*.safetensors" not in calls[0]["allow_patterns"]


@pytest.mark.parametrize(
    "trouble",
    [ConnectionError("no route"), errors.LocalEntryNotFoundError("offline"), http_error(503)],
    ids=["no-network", "offline-mode", "hub-down"],
)
def test_without_a_network_the_local_cache_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    stub(monkeypatch, trouble, tmp_path)
    assert resolve("org/model") == tmp_path


def test_without_network_and_cache_the_error_names_the_repository_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub(monkeypatch, ConnectionError("no route to host"), errors.LocalEntryNotFoundError("not cached"))
    with pytest.raises(
        CheckpointError, match=r"'org/model' at revision 'v1' .*no route to host.* give a local folder"
    ):
        resolve("org/model", revision="v1")


def test_a_repository_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(monkeypatch, http_error(404), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"the hub does not give 'org/typo'.* check the name and the token"
    ):
        resolve("org/typo")


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", "a/b/c", "", "org/na me"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stub(monkeypatch, ConnectionError(), ConnectionError())
    with pytest.raises(CheckpointError, match="is no folder on this machine"):
        resolve(model)
    assert calls == []


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("allowed", [False, True])
def test_python_files_are_fetched_only_where_they_may_run(
    allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stub(monkeypatch, tmp_path, ConnectionError())
    resolve("org/model", code=allowed)
    assert ("*.py" in calls[0]["allow_patterns"]) == allowed
