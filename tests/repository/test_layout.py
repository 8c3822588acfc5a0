"""The folders of model repositories: what counts as a model and a version, and that no name leads out of them."""

import contextlib
import os
from pathlib import Path

import pytest

from sluice_server.errors import InvalidArgument
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.layout import Repositories, read_directory, write_override


def make_model(repository: Path, name: str, *versions: str, config: str | None = None) -> Path:
    path = repository / name
    path.mkdir(parents=True)
    if config is not None:
        (path / "config.pbtxt").write_text(config)
    for version in versions:
        (path / version).mkdir()
        (path / version / "model.onnx").write_bytes(b"onnx")
    return path


def test_a_repository_lists_its_model_directories_and_nothing_else(tmp_path: Path) -> None:
    make_model(tmp_path, "b", "1")
    make_model(tmp_path, "a")
    (tmp_path / "README.md").write_text("not a model")
    (tmp_path / ".git").mkdir()
    (tmp_path / "lost+found").mkdir()
    with contextlib.suppress(OSError):  # not every file system takes it
        (tmp_path / os.fsdecode(b"\xff")).mkdir()  # which no message can carry
    assert Repositories([tmp_path]).scan() == {"a": (tmp_path / "a",), "b": (tmp_path / "b",)}


def test_versions_are_positive_decimal_directories_in_rising_order(tmp_path: Path) -> None:
    path = make_model(tmp_path, "m", "10", "2", "0", "01", "-1", "v3", "²", "9" * 30, "1.5", config="")
    (path / "7").write_text("a file")
    found = Repositories([tmp_path]).find("m")
    assert found.versions == (2, 10)
    assert found.config_path == path / "config.pbtxt"
    assert Repositories([tmp_path]).find("m") == found


def test_a_configuration_that_was_chosen_by_name_comes_first_in_the_models_that_have_it(tmp_path: Path) -> None:
    for name in ("both", "plain"):
        make_model(tmp_path, name, "1", config="")
    (tmp_path / "both" / "configs").mkdir()
    chosen = tmp_path / "both" / "configs" / "large.pbtxt"
    chosen.write_text("")
    repositories = Repositories([tmp_path], "large")
    assert repositories.find("both").config_path == chosen
    assert repositories.find("plain").config_path == tmp_path / "plain" / "config.pbtxt"
    assert Repositories([tmp_path], "small").find("both").config_path == tmp_path / "both" / "config.pbtxt"
    assert Repositories([tmp_path]).find("both").config_path == tmp_path / "both" / "config.pbtxt"


def test_the_model_file_may_stand_in_a_folder_of_its_name_with_its_external_data(tmp_path: Path) -> None:
    make_model(tmp_path, "m", "1")
    folder = tmp_path / "m" / "2" / "model.onnx"
    folder.mkdir(parents=True)
    found = Repositories([tmp_path]).find("m")
    assert found.model_file(1, "model.onnx") == tmp_path / "m" / "1" / "model.onnx"
    with pytest.raises(ModelLoadError, match=r"unable to find '2/model.onnx/model.onnx' for model 'm'") as caught:
        found.model_file(2, "model.onnx")
    assert caught.value.reason.startswith("Unavailable: ")
    (folder / "model.onnx").write_bytes(b"onnx")
    assert found.model_file(2, "model.onnx") == folder / "model.onnx"
    with pytest.raises(ModelLoadError, match=r"unable to find '1/net.onnx' for model 'm'"):
        found.model_file(1, "net.onnx")


def test_a_model_in_two_repositories_is_an_error_of_that_model_which_names_both(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    make_model(one, "same", "1")
    make_model(two, "same", "1")
    make_model(two, "other", "1")
    repositories = Repositories([one, two])
    with pytest.raises(ConfigError) as caught:
        repositories.find("same")
    assert f"'{one / 'same'}' and '{two / 'same'}'" in str(caught.value)
    assert repositories.find("other").path == two / "other"
    assert list(repositories.scan()) == ["other", "same"]


def test_a_repository_that_is_missing_no_directory_or_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere' cannot be read: No such file or directory"):
        Repositories([tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file' cannot be read: Not a directory"):
        Repositories([tmp_path / "file"])
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigError, match="is given twice"):
        Repositories([tmp_path, tmp_path / "sub" / ".."])


def test_a_model_that_no_repository_has_is_named_with_the_places_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model 'nope' is in no model repository") as caught:
        Repositories([tmp_path]).find("nope")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["..", ".", "../m", "a/b", "/etc", "a\\b", "m\0", "m/../../x"])
def test_a_model_name_never_leaves_the_repository(tmp_path: Path, name: str) -> None:
    for attempt in (lambda: Repositories([tmp_path]).find(name), lambda: write_override(name, {}, tmp_path)):
        with pytest.raises(InvalidArgument, match="model name must not contain path traversal characters"):
            attempt()


def test_an_empty_or_absurdly_long_model_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="Model name cannot be empty"):
        Repositories([tmp_path]).find("")
    with pytest.raises(ConfigError, match="is in no model repository"):
        Repositories([tmp_path]).find("m" * 5000)


def test_the_fingerprint_changes_with_every_change_below_the_directory_and_only_then(tmp_path: Path) -> None:
    path = make_model(tmp_path, "m", "1", config="")
    directory = Repositories([tmp_path]).find("m")
    seen = [directory.fingerprint()]
    assert directory.fingerprint() == seen[0]
    file = path / "1" / "model.onnx"

    def record() -> None:
        seen.append(directory.fingerprint())

    file.write_bytes(b"longer than before")
    record()
    os.utime(file, ns=(1, 1))  # same size, another time
    record()
    (path / "2").mkdir()
    record()
    (path / "1" / "model.onnx.data").write_bytes(b"weights")
    record()
    (path / "config.pbtxt").unlink()
    record()
    assert len(set(seen)) == len(seen) == 6
    assert [name for name, _, _ in seen[-1]] == ["1", "1/model.onnx", "1/model.onnx.data", "2"]


def test_the_fingerprint_follows_links_but_not_round_in_circles(tmp_path: Path) -> None:
    path = make_model(tmp_path, "m", "1")
    (path / "1" / "loop").symlink_to(path)
    (path / "dangling").symlink_to(tmp_path / "nowhere")
    names = [name for name, _, _ in read_directory("m", path).fingerprint()]
    assert names == ["1", "1/loop", "1/model.onnx"]
    assert read_directory("m", tmp_path / "m" / "1" / "loop").fingerprint()


def test_uploaded_files_become_a_model_directory(tmp_path: Path) -> None:
    files = {"1/model.onnx": b"onnx", "1/model.onnx.data": b"weights", "3/model.onnx": b"", "labels.txt": b"a\nb"}
    directory = write_override("m", files, tmp_path)
    assert (directory.name, directory.path, directory.config_path) == ("m", tmp_path, None)
    assert directory.versions == (1, 3)
    assert {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.*")} == files


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("../model.onnx", "stays inside"),
        ("1/../../model.onnx", "stays inside"),
        ("/etc/passwd", "stays inside"),
        ("", "stays inside"),
        ("1//model.onnx", "stays inside"),
        ("1/", "stays inside"),
        ("./model.onnx", "stays inside"),
        ("1\\model.onnx", "stays inside"),
        ("1/model\0.onnx", "stays inside"),
        ("1/" + "a" * 300, "longer than 255 bytes"),
        ("1/" + "ä" * 128, "longer than 255 bytes"),
        ("/".join("1" * 9), "more than 8 parts"),
        ("1/\ud800", "cannot be written: is no name for this file system"),
        ("1/model.onnx/below", "cannot be written: File exists"),
    ],
)
def test_an_uploaded_file_never_leaves_the_directory_and_a_bad_name_is_a_config_error(
    tmp_path: Path, name: str, what: str
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(ConfigError) as caught:
        write_override("m", {"1/model.onnx": b"onnx", name: b"bad"}, inside)
    assert what in str(caught.value)
    assert len(str(caught.value)) < 250
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
