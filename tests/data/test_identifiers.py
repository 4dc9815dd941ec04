"""What looks like an identifier is counted by line, never shown, in time that grows with the text."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.cli import main
from fedlora.data import Conversation, Turn
from fedlora.data.identifiers import PATTERNS, PROMISE, identifiers

FOUND = {
    "names of people": ["Mr. Smith came", "Dr. Anna-Lena Müller", "Patient: Kowalski", "seen by Maria Lopez", "Miller, John",
                        "Frau Schneider", "Mme Dupont", "Name: O'Brien"],
    "dates of birth": ["born 12.03.1950", "DOB: 1950-03-12", "geb. 3.4.61", "Date of birth 3 March 1950", "née le 12/03/1950",
                       "*12.03.1950", "03/12/1950 (DOB)", "geboren am 5. März 1961"],
    "other dates to the day": ["on 2024-05-06 it", "5. Mai 2024", "March 3, 2024"],
    "telephone numbers": ["+49 30 1234567", "call 030/1234567", "(555) 123-4567", "Tel.: 0171 2345678", "+1-555-123-4567",
                          "+33 6 12 34 56 78", "phone 555 1234 567"],
    "e-mail addresses": ["write jane.roe@example.org now"],
    "IBANs": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819"],
    "record numbers": ["MRN 1234567", "MRN: 00-12-34", "case no. 4711-12", "Fall-Nr. 12345", "123-45-6789", "NHS 943 476 5919",
                       "id 12345678 done", "Versichertennummer A123456789"],
}  # fmt: skip
NOTHING = ["Take 5 mg twice daily, BP 120/80, pulse 72.", "pH 7.35, Na 140, K 4.1 mmol/l", "I10 and E11.9",
           "100 mg/d for 6-8 weeks",
           "The patient denies pain.", "Version 1.2.3", "range 10-20", "in 2019 and 2020", "12,345.67 EUR"]  # fmt: skip


def row(text, line=1, file=""):
    return Conversation((Turn("prompt", text, False), Turn("completion", "fine", True)), False, line, "", file=file)


def kinds(text):
    return {found.name for found in identifiers([row(text)])}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_each_kind_is_found(kind, text):
    assert kind in kinds(text)


@pytest.mark.parametrize("text", NOTHING)
def test_what_clinical_text_is_full_of_is_nothing(text):
    assert kinds(text) == set()


def test_an_iban_whose_check_digits_are_wrong_is_none():
    assert "IBANs" not in kinds("DE00 3704 0044 0532 0130 00")


def test_counts_are_by_line_and_file():
    (found,) = identifiers([row("a@b.de c@d.de", 3), row("x", 4), row("e@f.de", 9)])
    assert (found.count, found.lines) == (3, (("", 3), ("", 9)))
    assert found.text() == ["e-mail addresses: 3 in 2 rows, lines 3, 9"]
    (found,) = identifiers([row("a@b.de", 3, "a.csv"), row("e@f.de", 9, "b.csv")])
    assert found.text() == ["e-mail addresses: 2 in 2 rows, a.csv: line 3; b.csv: line 9"]


@given(st.text(st.sampled_from("Aa1 .-/@+*,é:\n(") | st.characters(codec="utf-8"), max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_searched(text):
    identifiers([row(text)])


PIECES = ["a", "1", "A", "1 ", "Dr. ", "born ", "A-", "+1", "a@", "a.", "MRN ", "AB12 ", "Maria ", "*", "12.12.", "tel ", "né"]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_time_grows_with_the_text_and_not_with_its_square(pattern):
    def seconds(text):
        began = time.process_time()
        for _ in pattern.form.finditer(text):
            pass
        return time.process_time() - began

    for piece in PIECES:
        small = min(seconds(piece * (20_000 // len(piece))) for _ in range(2))
        assert seconds(piece * (200_000 // len(piece))) < 40 * max(small, 0.002), piece


def test_the_command_says_lines_and_no_text(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text('prompt,completion\n"Patient: Maria Lopez, born 12.03.1950",call 030/1234567\nx,y\n')
    (tmp_path / "plan.toml").write_text("")
    (tmp_path / "site.toml").write_text('[data]\npath = "rows.csv"\n')
    words = ["check", str(tmp_path / "plan.toml"), "--site", str(tmp_path / "site.toml"), "--identifiers"]
    assert main(words) == 0
    told = "".join(capsys.readouterr())
    assert "dates of birth: 1 in 1 rows, line 2" in told
    assert PROMISE in told
    assert not any(word in told for word in ("Lopez", "1950-", "12.03", "1234567"))
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["identifiers"]
    assert {"kind": "dates of birth", "count": 1, "rows": 1, "places": [{"file": "", "line": 2}]} in found
    assert main([*words[:2], "--identifiers"]) == 2
