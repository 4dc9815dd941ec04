"""`fedlora roster` as coordinators use it: on files, without a server."""

import json
import time

import pytest

from fedlora.cli import main
from fedlora.core.errors import FedLoRAError
from fedlora.formats.keys import Identity, load_public
from fedlora.formats.signed_roster import load_roster
from fedlora.formats.trust import accept

DAY = 86_400


@pytest.mark.parametrize("word", ["new", "add", "revoke", "sign", "show"])
def test_every_command_has_help_with_an_example_in_80_columns(word, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["roster", word, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Example: fedlora roster {word}" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


@pytest.fixture
def study(tmp_path):
    """Keys of a server, four sites, two coordinators and somebody else."""
    for name in ("server", "a", "b", "c", "d", "carol", "dave", "mallory"):
        identity = Identity.generate(name)
        identity.save(tmp_path / f"{name}.key")
        (tmp_path / f"{name}.pub").write_text(identity.public.line() + "\n")
    return tmp_path


@pytest.fixture
def say(study, capsys):
    """Runs one command in the study's directory with --json; returns its facts, or its error."""

    def run(word, *words, status=0):
        paths = [str(study / w) if "." in w and not w.startswith("-") else w for w in words]
        assert main(["roster", word, *paths, "--json"]) == status
        found = json.loads(capsys.readouterr().out)
        return found["data"] if status == 0 else found["error"]

    return run


NEW = ("r.json", "a.pub", "b.pub", "c.pub", "--server", "server.pub", "--coordinator", "carol.pub")


def both_sign(say):
    say("sign", "r.json", "--key", "carol.key")
    return say("sign", "r.json", "--key", "dave.key")


def test_a_roster_is_made_signed_extended_cut_down_and_followed(say, study):
    made = say("new", *NEW, "--coordinator", "dave.pub", "--needed", "2", "--days", "30")
    assert (made["epoch"], made["signatures"], made["needed"], made["state"]) == (1, 0, 2, "in force")
    assert both_sign(say)["signatures"] == 2
    first = load_roster(study / "r.json")
    assert first.roster.not_after - first.roster.not_before == 30 * DAY
    assert say("add", "r.json", "d.pub")["epoch"] == 2
    assert load_roster(study / "r.epoch-1.json") == first
    assert both_sign(say)["signatures"] == 2
    second = load_roster(study / "r.json")
    assert say("revoke", "r.json", "b", "c")["epoch"] == 3
    both_sign(say)
    third = load_roster(study / "r.json")
    assert list(third.roster.active()) == ["a", "d"]
    now, at = int(time.time()), None
    for new in (first, second, third):
        at = accept(new, current=at, pinned=first.roster.digest(), now=now)
    assert at == third
    assert sorted(p.name for p in study.glob("r*.json")) == ["r.epoch-1.json", "r.epoch-2.json", "r.json"]


def test_show_says_who_takes_part_and_who_has_signed(say, study, capsys):
    say("new", *NEW)
    say("sign", "r.json", "--key", "carol.key")
    say("revoke", "r.json", "b")
    shown = say("show", "r.json")
    fingerprint = load_public(study / "b.pub").fingerprint()
    assert shown["sites"][1] == {"name": "b", "status": "revoked", "group": None, "fingerprint": fingerprint}
    assert shown["coordinators"][0]["signature"] == "-"
    assert shown["digest"] == load_roster(study / "r.json").roster.digest()
    assert main(["roster", "show", str(study / "r.json")]) == 0
    text = capsys.readouterr().out
    assert shown["digest"] in text
    assert " ".join(shown["digest"][i : i + 4] for i in range(0, 64, 4)) in text  # to be read aloud
    assert "0 of 1 needed" in text
    assert all(s["fingerprint"] in text for s in shown["sites"])


def test_show_names_a_signature_that_is_not_valid_and_a_roster_that_has_ended(say, study):
    from dataclasses import replace

    say("new", *NEW)
    found = load_roster(study / "r.json")
    old = replace(found.roster, not_before=DAY, not_after=2 * DAY)
    (study / "r.json").write_bytes(replace(found, roster=old, signatures={"carol": bytes(64)}).dump())
    shown = say("show", "r.json")
    assert (shown["state"], shown["signatures"], shown["coordinators"][0]["signature"]) == ("expired", 0, "NOT VALID")
    (study / "r.json").write_bytes(replace(found, roster=replace(old, not_after=1 << 37, not_before=1 << 36)).dump())
    assert say("show", "r.json")["state"] == "not in force yet"


def test_only_a_coordinator_signs_and_the_file_stays_as_it_was(say, study):
    say("new", *NEW)
    before = (study / "r.json").read_bytes()
    for name in ("mallory", "a", "server"):
        error = say("sign", "r.json", "--key", f"{name}.key", status=4)
        assert error["code"] == "roster-invalid"
        assert "carol" in error["hint"]
    namesake = Identity.generate("carol")
    namesake.save(study / "other.key")
    assert say("sign", "r.json", "--key", "other.key", status=4)["code"] == "roster-invalid"
    assert (study / "r.json").read_bytes() == before


def test_a_coordinator_of_the_epoch_before_may_sign_the_change(say, study):
    from dataclasses import replace

    say("new", *NEW)
    say("sign", "r.json", "--key", "carol.key")
    say("add", "r.json", "--days", "9")
    signed = load_roster(study / "r.json")
    moved = replace(signed, roster=replace(signed.roster, coordinators=(load_public(study / "dave.pub"),)))
    (study / "r.json").write_bytes(moved.dump())
    say("sign", "r.json", "--key", "carol.key")
    assert say("sign", "r.json", "--key", "dave.key")["signatures"] == 1
    first, second = (load_roster(study / n) for n in ("r.epoch-1.json", "r.json"))
    pinned, now = first.roster.digest(), int(time.time())
    assert accept(second, current=first, pinned=pinned, now=now) == second
    say("add", "r.json", "d.pub")  # carol's signature, of the epoch before, is no stranger's
    (study / "r.epoch-2.json").unlink()
    assert say("sign", "r.json", "--key", "carol.key", status=4)["code"] == "roster-invalid"


def test_signing_beside_a_damaged_signature_is_refused(say, study):
    from dataclasses import replace

    say("new", *NEW, "--coordinator", "dave.pub")
    found = load_roster(study / "r.json")
    (study / "r.json").write_bytes(replace(found, signatures={"dave": bytes(64)}).dump())
    assert "dave" in say("sign", "r.json", "--key", "carol.key", status=4)["message"]


def test_signing_twice_is_signing_once(say, study):
    say("new", *NEW)
    say("sign", "r.json", "--key", "carol.key")
    before = (study / "r.json").read_bytes()
    say("sign", "r.json", "--key", "carol.key")
    assert (study / "r.json").read_bytes() == before


@pytest.mark.parametrize("words", [("add", "r.json", "d.pub"), ("revoke", "r.json", "a")])
def test_no_epoch_follows_one_that_is_not_signed(words, say, study):
    say("new", *NEW)
    error = say(*words, status=4)
    assert error["code"] == "roster-invalid"
    assert "roster sign" in error["hint"]
    assert [p.name for p in study.glob("r*.json")] == ["r.json"]


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (("add", "r.json"), 3, "config"),
        (("add", "r.json", "a.pub"), 4, "roster-invalid"),
        (("add", "r.json", "none.pub"), 3, "key-file"),
        (("revoke", "r.json", "zoe"), 4, "unknown-site"),
        (("new", *NEW), 3, "store"),
        (("show", "none.json"), 3, "store"),
        (("show", "a.pub"), 4, "roster-invalid"),
        (("sign", "r.json", "--key", "carol.pub"), 3, "key-file"),
    ],
)
def test_what_cannot_be_done_changes_no_file(words, status, code, say, study):
    say("new", *NEW)
    say("sign", "r.json", "--key", "carol.key")
    before = {p: p.read_bytes() for p in study.iterdir()}
    (study / "carol.pub").chmod(0o600)
    assert say(*words, status=status)["code"] == code
    assert {p: p.read_bytes() for p in study.iterdir()} == before


@pytest.mark.parametrize(
    "more",
    [
        ("--needed", "2"),
        ("--needed", "0"),
        ("--days", "0"),
        ("--days", "99999999"),
        ("--max-colluding", "2"),
        ("--min-version", "new"),
        ("--coordinator", "a.pub"),
    ],
)
def test_terms_that_do_not_fit_make_no_file(more, say, study):
    assert say("new", *NEW, *more, status=4)["code"] == "roster-invalid"
    assert not (study / "r.json").exists()


def test_an_epoch_that_was_kept_is_not_overwritten_by_another(say, study):
    say("new", *NEW)
    (study / "r.epoch-1.json").write_bytes((study / "r.json").read_bytes())
    (study / "r.json").unlink()
    say("new", *NEW, "--days", "9")
    say("sign", "r.json", "--key", "carol.key")
    assert say("add", "r.json", "d.pub", status=3)["code"] == "store"


def test_a_site_revoked_stays_out(say, study):
    say("new", *NEW)
    say("sign", "r.json", "--key", "carol.key")
    say("revoke", "r.json", "b")
    say("sign", "r.json", "--key", "carol.key")
    assert say("add", "r.json", "b.pub", status=4)["code"] == "roster-invalid"
    assert say("revoke", "r.json", "b", status=4)["code"] == "revoked-site"
    with pytest.raises(FedLoRAError):
        load_roster(study / "r.json").roster.site("b")
