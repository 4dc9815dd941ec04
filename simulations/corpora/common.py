"""What both coding tasks share: near-duplicates, the three-way split by concept, files, honest reference points."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")
_STOP_WORDS = """of the and or in with to due unspecified other nos nec specified a an not elsewhere classified by for on except
all services"""
_STOP = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True, slots=True)
class Row:
    """One wording of a concept and the label that it must get."""

    site: str
    label: str
    title: str
    concept: str
    text: str
    split: str


def words(text: str) -> frozenset[str]:
    """The words that carry meaning: lower case, without stop words and 'unspecified'."""
    return frozenset(w for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in _STOP)


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard index, 0 .. 1."""
    return len(a & b) / len(a | b) if a | b else 0.0


def clean(rows: Iterable[Row], *, jaccard: float) -> list[Row]:
    """Drops texts that mean two labels, repeated texts, and test texts too near to any training text."""
    rows = list(rows)
    labels: dict[frozenset[str], set[str]] = defaultdict(set)
    for row in rows:
        labels[words(row.text)].add(row.label)
    rows = [r for r in rows if words(r.text) and len(labels[words(r.text)]) == 1]
    train = [words(r.text) for r in rows if r.split == "train"]
    kept, seen = [], set()
    for row in rows:
        bag = words(row.text)
        if (bag, row.split) in seen or (row.split == "test" and max(overlap(bag, t) for t in train) >= jaccard):
            continue
        seen.add((bag, row.split))
        kept.append(row)
    return kept


def with_validation(rows: Sequence[Row], *, share: float, jaccard: float, seed: int) -> list[Row]:
    """Moves a share of each label's training concepts to validation, never the row that is the label's own title.

    The test split stays as it is. Validation texts too near to what remains in training are dropped.
    """
    rng = random.Random(f"validation/{seed}")
    by_label: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.split == "train" and row.text != row.title and row.concept not in by_label[row.label]:
            by_label[row.label].append(row.concept)
    titles = {r.concept for r in rows if r.text == r.title}
    moved: set[tuple[str, str]] = set()
    for label, concepts in sorted(by_label.items()):
        free = sorted(set(concepts) - titles)
        if len(free) >= 4:
            moved.update((label, c) for c in rng.sample(free, max(1, round(share * len(free)))))
    split = [replace(r, split="validation") if r.split == "train" and (r.label, r.concept) in moved else r for r in rows]
    train = [words(r.text) for r in split if r.split == "train"]
    return [r for r in split if r.split != "validation" or max(overlap(words(r.text), t) for t in train) < jaccard]


def reference_points(rows: Sequence[Row]) -> dict[str, float]:
    """What one must know before being impressed: exact match on test by chance, by the commonest label, and by the label of
    the training text of all sites with the largest word overlap."""
    train, test = [r for r in rows if r.split != "test"], [r for r in rows if r.split == "test"]
    bags = [(words(r.text), r.label) for r in train]
    asked = [(words(r.text), r.label) for r in test]
    commonest = Counter(r.label for r in train).most_common(1)[0][0]
    nearest = sum(max(bags, key=lambda b: overlap(b[0], bag))[1] == label for bag, label in asked)
    return {
        "chance": 1 / len({r.label for r in train}),
        "majority": sum(r.label == commonest for r in test) / len(test),
        "nearest_neighbor": nearest / len(test),
    }


def write(out: Path, rows: Sequence[Row], *, suffix: str, general: Sequence[Mapping[str, str]], facts: Mapping[str, Any]) -> None:
    """Writes SITE.SPLIT.jsonl, general.jsonl and dataset.json, and prints a table."""
    out.mkdir(parents=True, exist_ok=True)
    sums: dict[str, str] = {}

    def save(name: str, lines: Iterable[Mapping[str, str]]) -> None:
        blob = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()
        (out / name).write_bytes(blob)
        sums[name] = hashlib.sha256(blob).hexdigest()

    sites = sorted({r.site for r in rows})
    counts = {s: {p: sum(r.site == s and r.split == p for r in rows) for p in SPLITS} for s in sites}
    for site in sites:
        for split in SPLITS:
            mine = [r for r in rows if (r.site, r.split) == (site, split)]
            save(f"{site}.{split}.jsonl", [_line(r, suffix) for r in mine])
    if general:
        save("general.jsonl", general)
    about = {
        **facts,
        "sites": counts,
        "labels": len({r.label for r in rows}),
        "reference": reference_points(rows),
        "sha256": sums,
    }
    (out / "dataset.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    for site, count in counts.items():
        print(f"{site:24}" + "".join(f"{split} {count[split]:4}   " for split in SPLITS))
    print(f"{len(rows)} rows, {about['labels']} labels -> {out}")
    print("exact match without a model: " + ", ".join(f"{k.replace('_', ' ')} {v:.1%}" for k, v in about["reference"].items()))


def _line(row: Row, suffix: str) -> dict[str, str]:
    return {"prompt": row.text + suffix, "completion": f" {row.label}", "group": row.concept, "label_title": row.title}


def prose(text: str, *, count: int, seed: int) -> list[dict[str, str]]:
    """Fluent paragraphs of at least 45 words: six words given, up to 54 to predict."""
    rows = set()
    for paragraph in re.split(r"\n\s*\n", text):
        flat = re.sub(r"\s+", " ", paragraph).strip()
        parts = flat.split()
        letters = sum(c.isalpha() or c in " ,.'-" for c in flat)
        if len(parts) >= 45 and re.match(r'[A-Z"]', flat) and letters / len(flat) >= 0.95:
            rows.add((" ".join(parts[:6]), " " + " ".join(parts[6:60])))
    found = sorted(rows)
    random.Random(seed).shuffle(found)
    return [{"prompt": a, "completion": b} for a, b in found[:count]]


def python_prose(count: int = 40) -> list[dict[str, str]]:
    """General hold-out that every Python carries: prose of the language reference (PSF-2.0)."""
    from pydoc_data.topics import topics

    return prose("\n\n".join(topics.values()), count=count, seed=3)
