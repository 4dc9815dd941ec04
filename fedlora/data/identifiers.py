"""Patterns in rows that look like identifiers of people: counted, named by line, never shown.

A warning and no promise. Patterns find what has a form, and names only where a word beside them says that they are names or the
first name is a common one. If you need certainty, use a de-identification tool before the rows come here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.data.conversations import Conversation
from fedlora.data.report import numbered

_NAME = r"[A-ZÀ-ÖØ-ÞŁŚŻŽŠČĆŐ][\w'\u2019\-]{1,30}"
_TITLE = (
    r"(?:Mrs?|Ms|Miss|Dr|Prof|Herr|Frau|Hr|Fr|Mme|Mlle|M|Monsieur|Madame|Sra?|Srta|Don|Doña|Sig|Sig\.ra|Dott|Dhr|Mevr|Pan|Pani)"
)
_FIRST = (
    r"Adam|Ahmed|Alexander|Alice|Ali|Amelia|Amira|Ana|Andrea|Andreas|Andrew|Anna|Anne|Anthony|Antonio|Barbara|"
    r"Benjamin|Carlos|Carmen|Charles|Charlotte|Chloe|Christian|Christine|Claudia|Daniel|David|Dorothy|Edward|Elena|"
    r"Elizabeth|Emily|Emma|Eric|Eva|Fatima|Felix|Francesco|Frank|George|Georg|Giulia|Giovanni|Hannah|Hans|Helen|"
    r"Henry|Ibrahim|Irina|Isabella|Ivan|Jack|Jacob|James|Jan|Jane|Jean|Jennifer|Johann|John|Jonas|Jose|José|Joseph|"
    r"Juan|Julia|Karen|Karl|Katharina|Kevin|Klaus|Laura|Laurent|Lena|Leon|Linda|Lisa|Luca|Lucas|Lucia|Luis|Maria|"
    r"María|Marie|Mark|Marta|Martin|Mary|Matthew|Max|Mehmet|Michael|Michelle|Mohamed|Mohammed|Monika|Nancy|Nicolas|"
    r"Nina|Olga|Oliver|Olivia|Omar|Patricia|Patrick|Paul|Pedro|Peter|Petra|Philip|Pierre|Piotr|Rachel|Rebecca|"
    r"Richard|Robert|Ruth|Samuel|Sandra|Sara|Sarah|Sofia|Sophie|Stefan|Stephen|Susan|Sven|Thomas|Tomasz|Ursula|"
    r"Victoria|Walter|William|Wolfgang|Yusuf"
)
_DATE = (
    r"(?:\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[./\-]\d{1,2}[./\-]\d{2,4}|"
    r"\d{1,2}\.?(?: of)? ?(?:Jan|F[eé][bv]|M[aä]r|A[pv]r|Ma[iy]|Jun|Jul|Aug|Sep|O[ck]t|Nov|De[cz])[a-zé]{0,8},? \d{4}|"
    r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]{0,6} \d{1,2},? \d{4})"
)
_BORN = (
    r"(?:\bborn\b|\bbirth\b|\bbirthday\b|\bdate of birth\b|\bd\.?o\.?b\b|\bgeb(?:oren|\.)|\bgeburtsdatum\b|\bn[ée]e?\b|"
    r"\bnaissance\b|\bnacid[oa]\b|\bnacimiento\b|\bnat[oa]\b|\bnascita\b|\bgeboren\b|\bur\.|\*)"
)
_RECORD = (
    r"(?:\bMRN\b|\bmedical record|\brecord (?:no|number)|\bpatient (?:id|no|number)|\bpat\.? ?(?:id|nr)|\bcase (?:id|no|number)|"
    r"\bfall(?:nummer|-?nr)|\bakten(?:zeichen|nummer)|\bversicherten(?:nummer|-?nr)|\bpatienten(?:nummer|-?(?:id|nr))|"
    r"\bNHS\b|\bSSN\b|\bsocial security|\binsurance (?:id|no|number)|\bNIR\b|\bIPP\b|\bNHC\b|\bcodice fiscale|\bBSN\b|\bPESEL\b|"
    r"\baccount (?:no|number)|\bcustomer (?:id|no|number)|\bkunden(?:nummer|-?nr)|\bpolicy (?:no|number)|\bpassport)"
)


def _iban(found: str) -> bool:
    """The check digits of an IBAN are right (ISO 13616: the number, its first four characters put last, is 1 modulo 97)."""
    bare = found.replace(" ", "")
    return 15 <= len(bare) <= 34 and int("".join(str(int(c, 36)) for c in bare[4:] + bare[:4])) % 97 == 1


def _telephone(found: str) -> bool:
    return 7 <= sum(c.isdigit() for c in found) <= 15


@dataclass(frozen=True, slots=True)
class Pattern:
    """What one kind of identifier looks like.

    Attributes:
        name: the kind.
        form: what is searched for; takes time linear in the text.
        holds: what else has to hold of a match.
    """

    name: str
    form: re.Pattern[str]
    holds: Callable[[str], bool] = bool


PATTERNS = (
    Pattern(
        "names of people",
        re.compile(
            rf"\b{_TITLE}\.? (?:{_NAME}\.? ){{0,2}}{_NAME}"
            rf"|\b(?:[Nn]ame|[Pp]atient(?:in|e)?|[Pp]atiënt|[Pp]aciente|[Pp]aziente)s?: ?{_NAME}"
            rf"|\b(?:{_FIRST}) (?:[A-Z]\. )?{_NAME}|\b{_NAME}, (?:{_FIRST})\b"
        ),
    ),
    Pattern("dates of birth", re.compile(rf"{_BORN}[^\n]{{0,20}}?{_DATE}|{_DATE}[^\n]{{0,5}}?{_BORN}", re.IGNORECASE)),
    Pattern("other dates to the day", re.compile(rf"(?<![\d.]){_DATE}(?!\d)")),
    Pattern(
        "telephone numbers",
        re.compile(
            r"(?<![\w.])(?:\+|00)\d{1,3}[ ./\-]?(?:\(\d{1,5}\)[ ./\-]?)?\d(?:[ ./\-]?\d){5,12}(?!\w)"
            r"|(?<![\w.])\(?0?\d{2,5}\)?[ /\-]\d{3,4}[ \-]?\d{2,5}(?![\w.])"
            r"|\b(?:[Tt]el|[Pp]hone|[Tt]elefon|[Mm]obile?|[Hh]andy|[Ff]ax|[Tt]él)\b[^\n\d]{0,12}\d(?:[ ./\-]?\d){5,14}"
        ),
        _telephone,
    ),
    Pattern("e-mail addresses", re.compile(r"(?<![\w.+\-])[\w.+\-]{1,64}@[\w\-]{1,63}(?:\.[\w\-]{1,63}){1,5}")),
    Pattern("IBANs", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    Pattern(
        "record numbers",
        re.compile(
            rf"{_RECORD}[^\n\d]{{0,15}}[A-Z]{{0,3}}-?\d[\d \-/]{{3,20}}|(?<![\w\-])\d{{3}}-\d{{2}}-\d{{4}}(?![\w\-])"
            r"|(?<![\w.,\-/+])\d{7,20}(?![\w.,\-/])",
            re.IGNORECASE,
        ),
    ),
)
"""What is looked for. Kinds overlap: a date of birth is a date to the day as well."""

PROMISE = "patterns only: what has another form is not found, and what is found may be something else"


@dataclass(frozen=True, slots=True)
class Found:
    """How often one kind of identifier was found.

    Attributes:
        name: the kind.
        count: matches in all rows.
        lines: (file, line) of the rows that have one; the file's name is ``""`` if there is a single file.
    """

    name: str
    count: int
    lines: tuple[tuple[str, int], ...]

    def text(self) -> list[str]:
        """In words: a line for each file."""
        by_file: dict[str, list[int]] = {}
        for file, line in self.lines:
            by_file.setdefault(file, []).append(line)
        where = [f"{Path(file).name}: {numbered(lines)}" if file else numbered(lines) for file, lines in by_file.items()]
        more = f" and {len(where) - 20:,} more files" if len(where) > 20 else ""
        return [f"{self.name}: {self.count:,} in {len(self.lines):,} rows, {'; '.join(where[:20])}{more}"]


def identifiers(conversations: Sequence[Conversation]) -> list[Found]:
    """Counts what looks like an identifier of a person in the text of the turns, context included: a model reads all of it.

    Returns:
        One entry a kind that was found, in the order of :data:`PATTERNS`. Counts and line numbers only.
    """
    found = []
    for pattern in PATTERNS:
        count, lines = 0, []
        for c in conversations:
            here = sum(sum(pattern.holds(m.group()) for m in pattern.form.finditer(turn.text)) for turn in c.turns)
            if here:
                count += here
                lines.append((c.file, c.line))
        if count:
            found.append(Found(pattern.name, count, tuple(lines)))
    return found
