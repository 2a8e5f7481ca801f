"""What an ablation found, as data, as Markdown and as a page. Every number comes from the runs' kept scores."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_t2i import ablation
from dist_t2i.ablation.plan import Plan
from dist_t2i.ablation.scoring import OWN
from dist_t2i.ablation.statistics import Difference, Measure, difference, verdict, weakness
from dist_t2i.config.resume import differences
from dist_t2i.config.sections import Config
from dist_t2i.reporting import web_page

FORMAT = 1
Scores = Mapping[tuple[str, int], Mapping[str, Any]]
"""(arm, seed) -> the scores that `RunScorer.scores` returns."""


@dataclass(frozen=True)
class Findings:
    """What is known once the runs are scored."""

    plan: Plan
    measures: tuple[Measure, ...]
    comparisons: tuple[Difference, ...]
    """Every measure, every arm but the reference."""
    changes: Mapping[str, Sequence[str]]
    """arm -> `key: value (REFERENCE: value)` of what it changes."""
    parameters: Mapping[str, Mapping[str, int]]
    """arm -> network -> how many."""
    missing: Sequence[str]
    """Runs that are not there, and why."""
    made: Mapping[str, str]
    """How it was made: command, hardware, hours, revision, ..."""
    manifest: Mapping[str, Any]
    """The judge, the data and the protocol that all runs share."""

    @property
    def seeds(self) -> int:
        """Of the arm that has the fewest."""
        return min(len(values) for values in self.measures[0].values.values())

    def deciding(self, arm: str) -> list[Difference]:
        """The comparisons that the verdict on an arm rests on."""
        first = self.measures[0].split
        return [
            one
            for one in self.comparisons
            if one.arm == arm and one.measure.split == first and one.measure.key in self.plan.decides
        ]

    def verdicts(self) -> list[str]:
        """A sentence or two for each claim."""
        said = []
        for arm in self.plan.others:
            claim = self.plan.arms[arm].claim or f"{self.plan.label(self.plan.reference)} beats {self.plan.label(arm)}"
            said.append(verdict(claim, self.deciding(arm)))
        return said

    def as_json(self) -> dict[str, Any]:
        return _finite(
            {
                "format": FORMAT,
                "plan": asdict(self.plan),
                "measures": [
                    {**asdict(one), "arms": {arm: asdict(one.estimate(arm)) for arm in one.values}}
                    for one in self.measures
                ],
                "differences": [
                    {
                        **{"metric": one.measure.key, "split": one.measure.split, "arm": one.arm},
                        **{"reference": one.reference, "says": one.says, "sure": one.sure},
                        **{"gain": asdict(one.gain), "all_counted": asdict(one.counted)},
                    }
                    for one in self.comparisons
                ],
                "verdicts": self.verdicts(),
                "changes": dict(self.changes),
                "parameters": dict(self.parameters),
                "missing": list(self.missing),
                "made": dict(self.made),
                "manifest": dict(self.manifest),
            }
        )


def findings(
    plan: Plan,
    configs: Mapping[tuple[str, int], Config],
    scores: Scores,
    *,
    missing: Sequence[str] = (),
    made: Mapping[str, str] | None = None,
) -> Findings:
    """From the scores of the runs that are there; every arm needs at least one."""
    measures = tuple(_measures(plan, scores))
    decide = sum(key in plan.decides for key in {one.key for one in measures}) * len(plan.others)
    first = {arm: config for (arm, _), config in reversed(list(configs.items()))}
    own = {arm: found for (arm, _), found in scores.items()}
    manifest = next(iter(scores.values()))["manifest"]
    return Findings(
        plan=plan,
        measures=measures,
        comparisons=tuple(difference(one, arm, plan.reference, decide) for one in measures for arm in plan.others),
        changes={arm: _changes(first[plan.reference], first[arm], plan.reference) for arm in plan.others},
        parameters={arm: own[arm]["parameters"] for arm in plan.arms},
        missing=missing,
        made=made or {},
        manifest={
            "judges": {name: one for name, one in manifest["judges"].items() if name != "own"},
            "data_fingerprint": manifest["data_fingerprint"],
            "protocol": next(iter(scores.values()))["protocol"],
        },
    )


def _measures(plan: Plan, scores: Scores) -> list[Measure]:
    some = next(iter(scores.values()))
    found = []
    for split, about in some["splits"].items():
        for number, score in enumerate(about["scores"]):
            values: dict[str, dict[int, float]] = {arm: {} for arm in plan.arms}
            for (arm, seed), one in scores.items():
                values[arm][seed] = one["splits"][split]["scores"][number]["value"]
            # The count of pairs that a name may carry is one run's.
            name = re.sub(r" \(\d+ of \d+ pairs\)", "", score["name"])
            ends = score["floor"], score["ceiling"]
            found.append(Measure(score["key"], name, split, score["better"], values, *ends))
    return found


def _changes(reference: Config, other: Config, name: str) -> list[str]:
    changed = differences(reference, other) | differences(reference, other, free=True)
    return [f"{key}: {now} ({name}: {was})" for key, (was, now) in changed.items() if not key.startswith("run.")]


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


# ---- tables ----------------------------------------------------------------------------------------------------------

Table = tuple[str, list[str], list[list[str]]]
"""Caption, heads, rows."""


def score_table(found: Findings, split: str) -> Table:
    heads = ["score", *(found.plan.label(arm) for arm in found.plan.arms), "better", "floor", "ceiling"]
    rows = []
    for one in found.measures:
        if one.split == split:
            cells = [_estimate(one, arm) for arm in found.plan.arms]
            rows.append([one.name, *cells, one.better, _ends(one.floor), _ends(one.ceiling)])
    return f"{split}: mean over seeds (95% t interval over seeds)", heads, rows


def difference_table(found: Findings, split: str) -> Table:
    reference = found.plan.label(found.plan.reference)
    rows = []
    for one in found.comparisons:
        if one.measure.split != split:
            continue
        span = f"{one.gain.low:+.3f} to {one.gain.high:+.3f}" if one.gain.n > 1 else "one seed: none"
        decides = (
            "yes" if one in found.deciding(one.arm) else "no (own judge)" if one.measure.key.endswith(OWN) else "no"
        )
        says = {"better": f"{reference} better", "worse": f"{reference} worse", "nothing": "nothing"}[one.says]
        says += ", also with all counted" if one.sure else ""
        rows.append([found.plan.label(one.arm), one.measure.name, f"{one.gain.mean:+.3f}", span, says, decides])
    heads = ["against", "score", f"{reference} is better by", "95% interval", "which says", "decides"]
    return f"{split}: differences, seed by seed; above 0, {reference} is better", heads, rows


def run_table(found: Findings, split: str) -> Table:
    rows = [
        [one.name, found.plan.label(arm), ", ".join(f"{value:.3f}" for _, value in sorted(values.items()))]
        for one in found.measures
        if one.split == split
        for arm, values in one.values.items()
    ]
    return f"{split}: every run, by seed", ["score", "arm", "values"], rows


def arm_table(found: Findings) -> Table:
    rows = []
    for arm, about in found.plan.arms.items():
        counts = found.parameters[arm]
        numbers = (
            ", ".join(f"{name} {count:,}" for name, count in counts.items()) + f"; {sum(counts.values()):,} in all"
        )
        changes = "; ".join(found.changes.get(arm, ())) or "the base configuration"
        rows.append([found.plan.label(arm), changes, numbers, about.note])
    return "What was compared", ["arm", "changes", "trained parameters", "note"], rows


def _estimate(measure: Measure, arm: str) -> str:
    one = measure.estimate(arm)
    return f"{one.mean:.3f} ({one.low:.3f} to {one.high:.3f})" if one.n > 1 else f"{one.mean:.3f} (one seed)"


def _ends(ends: Mapping[str, float]) -> str:
    return "; ".join(f"{value:.3f} {what}" for what, value in ends.items())


# ---- text ------------------------------------------------------------------------------------------------------------


def method() -> str:
    """How the comparison is made: the second half of the package's docstring, which is where it is written down."""
    _, begin, rest = (ablation.__doc__ or "").partition("* An *arm*")
    return (begin + rest).rstrip()


def markdown(found: Findings, pictures: Mapping[str, str]) -> str:
    """The document. `pictures`: heading -> path of a PNG, relative to it."""
    splits = list(dict.fromkeys(one.split for one in found.measures))
    lines = [
        f"# Ablation: {found.plan.name}",
        "",
        "Written by `tools/ablate.py` from its runs; nothing here is written by hand.",
        "",
        "## What can be said",
        "",
        *(f"* {said}" for said in found.verdicts()),
        "",
        weakness(found.seeds),
        "",
    ]
    if found.missing:
        lines += ["**Not all runs are there**: " + "; ".join(found.missing) + ".", ""]
    for split in splits:
        for table in (score_table(found, split), difference_table(found, split)):
            lines += _markdown_table(table)
    for heading, path in pictures.items():
        lines += [f"## {heading}", "", f"![{heading}]({path})", ""]
    lines += _markdown_table(arm_table(found))
    for split in splits:
        lines += _markdown_table(run_table(found, split))
    lines += ["## How it is done", "", method(), "", "## How it was made", ""]
    lines += [f"* {name}: {value}" for name, value in found.made.items()]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    caption, heads, rows = table
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (heads, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [f"## {caption[0].upper()}{caption[1:]}", "", lines[0], "|" + "---|" * len(heads), *lines[1:], ""]


def write_page(found: Findings, path: Path, pictures: Mapping[str, Path], credit: str) -> Path:
    """The same as a page that holds its pictures."""
    splits = list(dict.fromkeys(one.split for one in found.measures))
    verdicts = "".join(f"<li>{_marked(said)}</li>" for said in found.verdicts())
    body = [f"<h1>Ablation: {web_page.text(found.plan.name)}</h1><h2>What can be said</h2><ul>{verdicts}</ul>"]
    body.append(f"<p class=note>{web_page.text(weakness(found.seeds))}</p>")
    if found.missing:
        body.append(f"<p><b>Not all runs are there:</b> {web_page.text('; '.join(found.missing))}.</p>")
    for split in splits:
        for caption, heads, rows in (score_table(found, split), difference_table(found, split)):
            body.append(web_page.table(heads, rows, caption))
    body += [f"<h2>{web_page.text(heading)}</h2>{web_page.file(file, heading)}" for heading, file in pictures.items()]
    caption, heads, rows = arm_table(found)
    body.append(web_page.table(heads, rows, caption))
    for split in splits:
        caption, heads, rows = run_table(found, split)
        body.append(web_page.table(heads, rows, caption))
    listed = "".join(f"<dt>{web_page.text(n)}</dt><dd>{web_page.text(v)}</dd>" for n, v in found.made.items())
    steps = "".join(f"<li>{_marked(' '.join(step.split()))}</li>" for step in re.split(r"(?m)^\* ", method())[1:])
    body.append(f"<h2>How it is done</h2><ul>{steps}</ul><h2>How it was made</h2><dl>{listed}</dl>")
    body.append(f"<p class=note>{web_page.text(credit)}</p>" if credit else "")
    return web_page.write(path, f"Ablation: {found.plan.name}", body)


def _marked(said: str) -> str:
    return re.sub(r"\*(.+?)\*", r"<i>\1</i>", re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", web_page.text(said)))
