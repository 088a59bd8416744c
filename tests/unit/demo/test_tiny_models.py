"""Miniature models."""

from dschat.demo.tiny_models import make_tiny_model


def test_files_have_the_mode_of_the_umask(tmp_path):
    folder = make_tiny_model(tmp_path / "tiny", family="llama")
    (folder / "new").touch()
    files = list(folder.iterdir())
    assert len(files) > 4 and len({path.stat().st_mode for path in files}) == 1
