"""The clinical coding task: diagnosis wording -> ICD-10-CM category; sites are specialties with disjoint labels.

Reads the tabular list from the installed package simple-icd-10-cm 1.5.0 (MIT; data: CDC/NCHS ICD-10-CM, April 2026 release:
US government text, based on WHO's ICD-10). Nothing of it is copied into this repository. Not clinical advice.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import Row, clean, python_prose, with_validation, write

SPECIALTIES = {
    "oncology": (2,),
    "cardiology": (9,),
    "gastroenterology": (11,),
    "infectious": (1,),
    "mental-neuro": (5, 6),
    "maternity": (15, 16),
    "orthopaedics": (13,),
    "endocrine-renal": (4, 14),
}
_SIDES = re.compile(
    r"\b(right|left|bilateral"
    r"|unspecified (eye|ear|side|limb|site|hand|foot|ankle|knee|hip|shoulder|elbow|wrist|finger|arm|leg|thigh|trimester)"
    r"|(first|second|third) trimester|fetus [1-9]|other fetus)\b",
    re.IGNORECASE,
)
_VAGUE = re.compile(r"(other|unspecified)\b", re.IGNORECASE)
FACTS = {
    "name": "icd10cm",
    "task": "diagnosis wording -> ICD-10-CM three-character category",
    "source": "PyPI simple-icd-10-cm 1.5.0; CDC/NCHS ICD-10-CM tabular list, April 2026",
    "license": "package MIT; US government text, based on WHO ICD-10; read from the installed package, not vendored",
    "note": "A test of federated learning, not of clinical skill.",
    "general": "prose of the Python language reference (pydoc_data.topics, PSF-2.0)",
}


def tabular() -> Path:
    """The XML inside the installed package, found without running the package."""
    spec = importlib.util.find_spec("simple_icd_10_cm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("simple-icd-10-cm is not installed: pip install 'fedlora[demo]'")
    return Path(next(iter(spec.submodule_search_locations))) / "data" / "icd10c-tabular-April-1-2026.xml"


def codes(xml: Path) -> list[tuple[int, str, str, str, list[str], int]]:
    """(chapter, category, category's title, code, wordings, depth) of every code, in the book's order."""
    found = []

    def walk(node: ET.Element, chapter: int, category: tuple[str, str] | None, depth: int) -> None:
        code, title = (node.findtext("name") or "").strip(), (node.findtext("desc") or "").strip()
        category = category or (code, title)
        notes = [n.text for n in node.findall("inclusionTerm/note") if n.text]
        found.append((chapter, *category, code, [title, *notes], depth))
        for child in node.findall("diag"):
            walk(child, chapter, category, depth + 1)

    for chapter in ET.parse(xml).getroot().findall("chapter"):
        for node in chapter.findall("section/diag"):
            walk(node, int(chapter.findtext("name") or 0), None, 0)
    return found


def rows(xml: Path, sites: list[str], *, categories: int, seed: int) -> list[Row]:
    """Train and test rows: a quarter of each category's concepts is test; the category's title is always trained."""
    rng = random.Random(seed)
    book, out = codes(xml), []
    for site in sites:
        by: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        titles = {}
        for chapter, category, title, code, wordings, depth in book:
            short = code.replace(".", "")
            if chapter not in SPECIALTIES[site]:
                continue
            titles[category] = title
            if depth == 0 or len(short) > 5:
                continue
            for wording in wordings:
                text = re.sub(r"\s+", " ", wording).strip(" :;")
                if 6 <= len(text) <= 90 and not _SIDES.search(text) and not _VAGUE.match(text):
                    by[category][short[:4]].add(text)
        rich = [c for c in by if len(by[c]) >= 4]
        rich.sort(key=lambda c: (-sum(min(len(v), 6) for v in by[c].values()), c))
        for category in rich[:categories]:
            concepts = sorted(by[category])
            rng.shuffle(concepts)
            tests = max(1, round(0.25 * len(concepts)))
            out.append(Row(site, category, titles[category], category, titles[category], "train"))
            for i, concept in enumerate(concepts):
                texts = sorted(by[category][concept])
                rng.shuffle(texts)
                split = "test" if i < tests else "train"
                out += [Row(site, category, titles[category], concept, t, split) for t in texts[:8]]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for SITE.SPLIT.jsonl")
    parser.add_argument("--sites", default="oncology,cardiology,gastroenterology,mental-neuro", help=", ".join(SPECIALTIES))
    parser.add_argument("--ncat", type=int, default=8, help="categories a site (default 8)")
    parser.add_argument("--jaccard", type=float, default=0.7, help="word overlap from which a test text is a near-copy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = clean(rows(tabular(), args.sites.split(","), categories=args.ncat, seed=args.seed), jaccard=args.jaccard)
    found = with_validation(found, share=0.2, jaccard=args.jaccard, seed=args.seed)
    settings = {"categories": args.ncat, "jaccard": args.jaccard, "seed": args.seed}
    write(args.out, found, suffix="\nICD-10-CM:", general=python_prose(), facts={**FACTS, "settings": settings})


if __name__ == "__main__":
    main()
