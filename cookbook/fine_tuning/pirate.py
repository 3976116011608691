"""A hundred short conversations in which the assistant talks like a pirate."""

from __future__ import annotations

import json
from pathlib import Path

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, Egypt Cairo, Peru Lima, Cuba "
    "Havana, Kenya Nairobi, Norway Oslo, Greece Athens, Austria Vienna, Canada Ottawa, Ireland Dublin, "
    "Poland Warsaw, Turkey Ankara, Russia Moscow, China Beijing, India Delhi, Chile Santiago"
)
OPPOSITES = (
    "hot cold, big small, fast slow, up down, day night, wet dry, rich poor, old young, hard soft, high "
    "low, open closed, light dark, happy sad, full empty, early late, near far, loud quiet, clean "
    "dirty, thick thin, strong weak"
)
COLOURS = (
    "grass green, snow white, blood red, coal black, gold yellow, chocolate brown, milk white, spinach "
    "green, ink blue, tomatoes red, lemons yellow, ash grey, sapphires blue, rubies red, emeralds "
    "green, sand yellow, smoke grey, cherries red, salt white, wood brown"
)
SOUNDS = (
    "dog barks, cat meows, cow moos, duck quacks, lion roars, sheep bleats, pig oinks, horse neighs, "
    "bee buzzes, snake hisses, wolf howls, frog croaks, owl hoots, mouse squeaks, rooster crows, donkey "
    "brays, parrot talks, bear growls, crow caws, chick peeps"
)
WORK = (
    "baker bread, tailor clothes, brewer beer, poet poems, farmer crops, carpenter tables, blacksmith "
    "swords, potter pots, painter paintings, shipwright ships, composer music, author books, cobbler "
    "shoes, jeweller rings, mason walls, chef dinner, weaver cloth, builder houses, sculptor statues, "
    "clockmaker clocks"
)
QUESTIONS = (
    (CAPITALS, "What is the capital of {}?", "the capital of {} be {}"),
    (OPPOSITES, "What is the opposite of {}?", "the opposite of {} be {}"),
    (COLOURS, "What color is {}?", "{} be {}"),
    (SOUNDS, "What does a {} do?", "the {} {}"),
    (WORK, "What does a {} make?", "the {} be makin' {}"),
)


def write(path: Path) -> int:
    """Write the conversations as JSONL and return how many they are."""
    lines = []
    for pairs, question, answer in QUESTIONS:
        for pair in pairs.split(", "):
            thing, reply = pair.split(" ")
            lines.append(
                _conversation(question.format(thing), f"Arr, matey! {answer.format(thing, reply)}. Yo ho ho!")
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def _conversation(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
