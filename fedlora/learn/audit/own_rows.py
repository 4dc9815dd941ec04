"""How well this site's own rows can be told from rows that were not trained on, and how many come out word by word.

For the eyes of this site alone: nothing of it is sent or logged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora.core.adapter import Adapter
from fedlora.core.errors import DataError, StoreError
from fedlora.core.events import Report
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.tables.audit import Score
from fedlora.formats.files import load_adapter
from fedlora.learn.audit.extraction import Extracted, extract_both, halves
from fedlora.learn.audit.scores import scores
from fedlora.learn.local import load_lora_of
from fedlora.learn.rows import load_tokens
from fedlora.privacy.audit import Membership, membership
from fedlora.site.auditing import own_adapter
from fedlora.site.site_file import load_site_file


@dataclass(frozen=True, slots=True)
class OwnRows:
    """What attacks found on one site's rows.

    Attributes:
        run: id of the run whose adapter was attacked.
        score: by what rows were told apart, ``loss`` or ``ratio``.
        membership: trained rows against held-out rows.
        with_adapter, with_base: what came out word by word, of trained rows.
    """

    run: str
    score: Score
    membership: Membership
    with_adapter: Extracted
    with_base: Extracted

    def lines(self) -> list[str]:
        """For the people of this site."""
        m, a, b = self.membership, self.with_adapter, self.with_base
        how = "the base's loss minus the adapter's" if self.score == "ratio" else "the loss under the adapter"
        return [
            f"run {self.run[:12]}, on the rows of this site; shown here only",
            f"membership: {m.members} rows that were trained on against {m.others} held-out rows, by {how}:",
            f"  AUC {m.auc:.3f} (0.5: this attack failed, which does not mean that nothing leaks)",
            f"  found at 1 % false alarms: {m.tpr_1:.1%}; at 0.1 %: {m.tpr_01:.1%}{_few(m.others)}",
            f"extraction: first half of {a.rows} trained rows given, greedy answer:",
            f"  rows that came out word by word: {a.found} with the adapter, {b.found} with the base alone",
            f"  longest run of equal tokens: {a.longest} with the adapter, {b.longest} with the base alone",
            "Other attacks may find more. A low number is no evidence of safety.",
        ]


def _few(others: int) -> str:
    """What too few held-out rows cannot show."""
    if others >= 1000:
        return ""
    return f" ({others} held-out rows: {'neither rate is' if others < 100 else '0.1 % is not'} resolved)"


def audit_own_rows(
    site_file: Path, *, run: str, score: Score = "ratio", most_rows: int = 2000, extracted: int = 200, report: Report
) -> OwnRows:
    """Attacks the adapter of a run that this site took part in with this site's own rows.

    Args:
        run: first digits of the run's id; empty: the last run that was done.
        most_rows: of each kind, the first ones.
        extracted: trained rows whose second half is asked for.

    Raises:
        StoreError: no such run has come to its end here.
        DataError: no rows are held out, so that there is nothing to compare with; or the rows cannot be read.
        ModelError, ConfigError: the base cannot be used.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    own = own_adapter(root / file.state / "journal", run)
    adapter, plan, name = _kept(own)
    lora = load_lora_of(file, root, plan, report=report)
    train, held_out = load_tokens(file.data, root, tokenizer=lora.tokenizer, plan=plan, report=report)
    if not held_out:
        raise DataError(
            "no rows are held out at this site: there is nothing to compare with",
            hint="name data.held_out_path in the site file, with rows that no run has trained on",
        )
    length, rows = plan.training.max_length, plan.training.per_device_train_batch_size
    found = [scores(lora, adapter, some[:most_rows], score=score, max_length=length, rows=rows) for some in (train, held_out)]
    with_adapter, with_base = extract_both(lora, adapter, halves(train, most=extracted))
    return OwnRows(name, score, membership(*found), with_adapter, with_base)


def _kept(file: Path) -> tuple[Adapter, Plan, str]:
    adapter, stored = load_adapter(file)
    if not isinstance(stored.get("plan"), str) or stored.get("run") != file.stem:
        raise StoreError(f"{file} is not what a site keeps of run {file.stem[:12]}", hint="`fedlora site repair SITE.TOML`")
    return adapter, parse_plan(stored["plan"].encode()), file.stem
