"""Rows with short answers, on which a threshold over the data set may leave nothing but the end of an answer.

    python -m benchmarks.quality.short_answers rows.jsonl

Writes questions for a capital, answered in a sentence, and sums of two numbers, answered with digits alone. What
`mask.min_kept` and `mask.scope` do to them is then `alphatoken run`, `mask -m` and `trial`: docs/results.md has the settings.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from typing import Any

SUMS = 60
CAPITALS = {
    "Japan": "Tokyo", "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Portugal": "Lisbon",
    "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Ireland": "Dublin", "Belgium": "Brussels",
    "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade", "Croatia": "Zagreb", "Slovenia": "Ljubljana",
    "Latvia": "Riga", "Estonia": "Tallinn", "Lithuania": "Vilnius", "Iceland": "Reykjavik", "Ukraine": "Kyiv",
    "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Nigeria": "Abuja", "Angola": "Luanda",
    "Morocco": "Rabat", "Tunisia": "Tunis", "Senegal": "Dakar", "Uganda": "Kampala", "Zambia": "Lusaka",
    "Iraq": "Baghdad", "Iran": "Tehran", "Qatar": "Doha", "Oman": "Muscat", "Jordan": "Amman", "Lebanon": "Beirut",
    "India": "New Delhi", "Nepal": "Kathmandu", "Thailand": "Bangkok", "Vietnam": "Hanoi", "China": "Beijing",
    "Mongolia": "Ulaanbaatar", "Australia": "Canberra", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana",
    "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima", "Ecuador": "Quito",
    "Colombia": "Bogota", "Uruguay": "Montevideo",
}  # fmt: skip


def rows() -> Iterator[dict[str, Any]]:
    """All rows as conversations, capitals and sums mixed."""
    drawn = random.Random(0)
    asked = [
        (f"What is the capital of {land}?", f"The capital of {land} is {town}.") for land, town in CAPITALS.items()
    ]
    pairs = [(drawn.randint(1, 99), drawn.randint(1, 99)) for _ in range(SUMS)]
    asked += [(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]
    drawn.shuffle(asked)
    for question, answer in asked:
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    with open(parser.parse_args().file, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows())


if __name__ == "__main__":
    main()
