"""A server signs what it publishes, and whoever gets it can see that nothing in it is another's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from raising import raising
from test_rounds import Federation, interrupted, plan

from fedlora.cli import main
from fedlora.core.errors import BadSignature, EnvelopeError, FedLoRAError, KeyFileError, StoreError
from fedlora.flower.enrol import make_server_home
from fedlora.formats.keys import load_public
from fedlora.formats.published.statement import FILE
from fedlora.library.publish import export_run
from fedlora.library.signed import verify

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A server's directory with one run."""
    root = tmp_path_factory.mktemp("server")
    make_server_home(root / "study", hosts=["127.0.0.1"])
    interrupted(Federation(root / "fed", plan(rounds=2)), after=1)
    shutil.copytree(root / "fed" / "run", root / "study" / "runs" / "toy")
    return root / "study"


@pytest.fixture
def published(home, tmp_path):
    done = export_run(home / "runs" / "toy", tmp_path / "adapter", dtype="bfloat16")
    assert done["signed_by"] == load_public(home / "server.pub").fingerprint()
    return tmp_path / "adapter"


def test_what_a_server_publishes_is_signed_with_its_key_and_says_what_it_is(home, published, capsys):
    found = verify(published, load_public(home / "server.pub"))
    assert set(found.files) == {p.name for p in published.iterdir()} - {FILE}
    assert "SHA256SUMS" in found.files
    assert found.trained == json.loads((published / "fedlora_run.json").read_text())
    assert main(["verify", str(published), "--server", str(home / "server.pub")]) == 0
    assert "5 files as signed by the server with fingerprint" in capsys.readouterr().out


def test_the_same_run_is_signed_with_the_same_bytes(home, published, tmp_path):
    export_run(home / "runs" / "toy", tmp_path / "again", dtype="bfloat16")
    assert (tmp_path / "again" / FILE).read_bytes() == (published / FILE).read_bytes()


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "fedlora_run.json", "README.md", "SHA256SUMS"]
)
@pytest.mark.parametrize("how", ["flipped", "longer", "missing", "elsewhere", "directory"])
def test_a_file_that_is_not_the_one_that_was_signed_is_named(home, published, tmp_path, name, how):
    file = published / name
    blob = bytearray(file.read_bytes())
    file.unlink()
    if how == "flipped":
        blob[len(blob) // 2] ^= 1
        file.write_bytes(blob)
    elif how == "longer":
        file.write_bytes(blob + b"\n")
    elif how == "elsewhere":  # the same bytes now, others once somebody has looked
        (tmp_path / "else").write_bytes(blob)
        file.symlink_to(tmp_path / "else")
    elif how == "directory":
        file.mkdir()
    with raising(EnvelopeError, code="payload-mismatch", match=name):
        verify(published, load_public(home / "server.pub"))


@pytest.mark.parametrize("name", ["adapter_model.bin", ".hidden", "tokenizer.json"])
def test_a_file_that_was_put_there_is_named(home, published, name):
    (published / name).write_bytes(b"")
    with raising(EnvelopeError, code="payload-mismatch", match=name):
        verify(published, load_public(home / "server.pub"))


def test_nobody_else_can_sign_in_the_servers_name(home, published, tmp_path):
    make_server_home(tmp_path / "other", hosts=["127.0.0.1"])
    shutil.copytree(home / "runs" / "toy", tmp_path / "other" / "runs" / "toy")
    export_run(tmp_path / "other" / "runs" / "toy", tmp_path / "theirs", dtype="bfloat16")
    for directory, key in ((tmp_path / "theirs", home), (published, tmp_path / "other")):
        with raising(BadSignature, code="bad-signature", match="not signed by the server"):
            verify(directory, load_public(key / "server.pub"))


def test_where_no_servers_key_is_at_hand_it_says_that_nobody_has_signed(home, tmp_path, capsys):
    shutil.copytree(home / "runs" / "toy", tmp_path / "runs" / "toy")
    assert main(["export", str(tmp_path / "runs" / "toy"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "NOT SIGNED" in said
    assert "training.prompt is 'any'" in said
    assert "--base" in said
    assert not (tmp_path / "out" / FILE).exists()
    with raising(BadSignature, code="bad-signature", match="is not signed") as e:
        verify(tmp_path / "out", load_public(home / "server.pub"))
    assert "`fedlora site pull` and merged models are not signed. At a site the task that brought the adapter was" in e.value.hint
    (tmp_path / "out" / "fedlora_run.json").write_text('{"of": "simulation"}')
    with raising(BadSignature, code="bad-signature", match="is not signed") as e:
        verify(tmp_path / "out", load_public(home / "server.pub"))
    assert "a simulation has no server" in e.value.hint
    with raising(StoreError, code="store", match="no directory"):
        verify(tmp_path / "nowhere", load_public(home / "server.pub"))


def test_only_a_run_in_a_servers_directory_is_signed(home, tmp_path):
    """A copy of a run beside a server's is not one that the server has done."""
    shutil.copytree(home, tmp_path / "study")
    for place in ("copies", "runs-of-others"):
        shutil.copytree(home / "runs" / "toy", tmp_path / "study" / place / "toy")
        done = export_run(tmp_path / "study" / place / "toy", tmp_path / place, dtype="bfloat16")
        assert done["signed_by"] is None


def test_a_damaged_key_is_no_reason_to_publish_unsigned(home, tmp_path):
    shutil.copytree(home, tmp_path / "study")
    (tmp_path / "study" / "server.key").write_text("damaged")
    (tmp_path / "study" / "server.key").chmod(0o600)
    with raising(KeyFileError, code="key-file"):
        export_run(tmp_path / "study" / "runs" / "toy", tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("blob", [b"", b"{}", b"[1]", b"\xff\xfe", b"{" * 100_000])
def test_an_envelope_that_is_none_is_a_named_error(home, published, blob):
    (published / FILE).write_bytes(blob)
    with pytest.raises(FedLoRAError) as error:
        verify(published, load_public(home / "server.pub"))
    assert error.value.code == "wire"


@pytest.mark.slow
def test_verifying_needs_no_torch(home, published):
    """The server, and whoever gets the adapter, may have installed fedlora alone."""
    code = "import sys; sys.modules['torch'] = None; from fedlora.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["verify", str(published), "--server", str(home / "server.pub")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_options_that_do_not_go_together_are_refused(home, tmp_path):
    for words, said in (
        (["--to", "gguf"], "--to gguf needs --base"),
        (["--to", "gguf", "--merge"], "not GGUF"),
        (["--with-base"], "belongs to --to gguf"),
        (["--merge"], "--merge needs --base"),
    ):
        assert main(["export", str(home / "runs" / "toy"), str(tmp_path / "out"), *words]) == 3, said
    assert not Path(tmp_path / "out").exists()
