"""The results of an ablation as data, as Markdown and as a web page, from the cached scores of the runs."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from dist_t2i.ablation.plan import Plan
from dist_t2i.ablation.scoring import OWN
from dist_t2i.ablation.statistics import Difference, Measure, difference, verdict, weakness
from dist_t2i.config.resume import differences
from dist_t2i.config.sections import Config
from dist_t2i.reporting import web_page

FORMAT = 1
METHOD = (
    "An *arm* is the base configuration with overrides. All arms have the same number of images and the same seeds. "
    "The networks of two arms differ only in the parts that text.mode changes; the table of arms lists the numbers of "
    "parameters. A seed determines the initial weights, the order of the data and the noise. Differences are paired: "
    "each difference compares two runs of different arms with the same seed.",
    "Every run is scored on the same held-out captions with the same evaluation noise. The scores come from a feature "
    "network that took no part in training. Scores by a model's own D and S_D are reported and labeled, but decide "
    "nothing, because each arm has a different D and S_D.",
    "Intervals are 95% t intervals over training seeds; the held-out captions are fixed. An interval over seeds shows "
    "whether a method gives the same result with other seeds. A bootstrap interval over few seeds would be too "
    "narrow, because resamples of 3 values never leave the range of these values. A nominal 95% interval then covers "
    "the mean only about three times in four. A t interval is valid if the scores of the seeds are normally "
    "distributed, which few seeds cannot show.",
    "The plan names the deciding metrics in advance (`decides`). A verdict states for these metrics whether the "
    "intervals of the paired differences show that the reference is better, worse, or neither. The verdict also "
    "states whether each result holds after a Bonferroni correction for all deciding comparisons.",
)
"""How arms are compared: Markdown, one paragraph per string. The method is this project's own, not from a paper."""
Scores = Mapping[tuple[str, int], Mapping[str, Any]]
"""Maps (arm, seed) to the result of `RunScorer.scores`."""


@dataclass(frozen=True)
class Findings:
    """The results of an ablation. `scores` contains at least one run of every arm."""

    plan: Plan
    configs: Mapping[tuple[str, int], Config]
    scores: Scores
    missing: Sequence[str]
    """Runs without scores, with the reason for each run."""
    facts: Mapping[str, str]
    """Facts about how the results were computed: command, hardware, hours, revision, ..."""

    @cached_property
    def measures(self) -> list[Measure]:
        measures = []
        for split, about in self._any_scores["splits"].items():
            for number, score in enumerate(about["scores"]):
                values: dict[str, dict[int, float]] = {arm: {} for arm in self.plan.arms}
                for (arm, seed), run_scores in self.scores.items():
                    values[arm][seed] = run_scores["splits"][split]["scores"][number]["value"]
                name = re.sub(r" \(\d+ of \d+ pairs\)", "", score["name"])  # the count varies by run
                ends = score["floor"], score["ceiling"]
                measures.append(Measure(score["key"], name, split, score["better"], values, *ends))
        return measures

    @cached_property
    def comparisons(self) -> list[Difference]:
        """The difference between the reference and each other arm, for each measure."""
        plan = self.plan
        deciding = sum(key in plan.decides for key in {m.key for m in self.measures}) * len(plan.others)
        return [difference(m, arm, plan.reference, deciding) for m in self.measures for arm in plan.others]

    @property
    def _any_scores(self) -> Mapping[str, Any]:
        return next(iter(self.scores.values()))

    @property
    def seeds(self) -> int:
        """The number of seeds of the arm with the fewest seeds."""
        return min(len(values) for values in self.measures[0].values.values())

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(measure.split for measure in self.measures))

    def changes(self, arm: str) -> list[str]:
        """`key: value (REFERENCE: value)` for every key in which an arm differs from the reference."""
        configs = {name: config for (name, _), config in reversed(list(self.configs.items()))}
        pair = configs[self.plan.reference], configs[arm]
        changed = {**differences(*pair), **differences(*pair, free=True)}.items()
        return [
            f"{key}: {now} ({self.plan.reference}: {was})" for key, (was, now) in changed if not key.startswith("run.")
        ]

    def parameters(self, arm: str) -> Mapping[str, int]:
        """Maps each network of the arm to its number of weights."""
        return next(scores["parameters"] for (name, _), scores in self.scores.items() if name == arm)

    def decides(self, item: Difference) -> bool:
        """Whether the verdict on the arm of `item` is based on this comparison."""
        return item.measure.split == self.splits[0] and item.measure.key in self.plan.decides

    def verdicts(self) -> list[str]:
        """One paragraph in Markdown for each hypothesis."""
        verdicts = []
        for arm in self.plan.others:
            default = f"{self.plan.label(self.plan.reference)} beats {self.plan.label(arm)}"
            deciding = [item for item in self.comparisons if item.arm == arm and self.decides(item)]
            verdicts.append(verdict(self.plan.arms[arm].claim or default, deciding))
        return verdicts

    def as_json(self) -> dict[str, Any]:
        manifest = self._any_scores["manifest"]
        networks = {name: network for name, network in manifest["judges"].items() if name != "own"}
        protocol = self._any_scores["protocol"]
        return _finite(
            {
                "format": FORMAT,
                "plan": asdict(self.plan),
                "measures": [
                    {**asdict(measure), "arms": {arm: asdict(measure.estimate(arm)) for arm in measure.values}}
                    for measure in self.measures
                ],
                "differences": [
                    {
                        **{"metric": item.measure.key, "split": item.measure.split, "arm": item.arm},
                        **{"reference": item.reference, "says": item.says, "sure": item.sure},
                        **{"gain": asdict(item.gain), "all_counted": asdict(item.counted)},
                    }
                    for item in self.comparisons
                ],
                "verdicts": self.verdicts(),
                "changes": {arm: self.changes(arm) for arm in self.plan.others},
                "parameters": {arm: self.parameters(arm) for arm in self.plan.arms},
                "missing": self.missing,
                "made": self.facts,
                "manifest": {
                    "judges": networks,
                    "data_fingerprint": manifest["data_fingerprint"],
                    "protocol": protocol,
                },
            }
        )


def _finite(value: Any) -> Any:
    """A copy of `value` in which None replaces infinity and NaN, because JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---- tables ----------------------------------------------------------------------------------------------------------

Table = tuple[str, list[str], list[list[str]]]
"""(caption, column heads, rows)"""


def tables(results: Findings) -> tuple[list[Table], list[Table]]:
    """The tables above the figures (scores and differences by split) and below them (arms, values of all runs)."""
    above = [table(results, split) for split in results.splits for table in (score_table, difference_table)]
    return above, [arm_table(results), *(run_table(results, split) for split in results.splits)]


def score_table(results: Findings, split: str) -> Table:
    plan = results.plan
    heads = ["score", *(plan.label(arm) for arm in plan.arms), "better", "floor", "ceiling"]
    rows = []
    for measure in results.measures:
        if measure.split == split:
            cells = [_estimate(measure, arm) for arm in plan.arms]
            rows.append([measure.name, *cells, measure.better, _ends(measure.floor), _ends(measure.ceiling)])
    return f"{split}: mean over seeds (95% t interval over seeds)", heads, rows


def difference_table(results: Findings, split: str) -> Table:
    reference = results.plan.label(results.plan.reference)
    rows = []
    for item in results.comparisons:
        if item.measure.split != split:
            continue
        gain = item.gain
        span = f"{gain.low:+.3f} to {gain.high:+.3f}" if gain.n > 1 else "none (one seed)"
        own = " (own networks)" if item.measure.key.endswith(OWN) else ""
        decides = "yes" if results.decides(item) else f"no{own}"
        conclusion = "inconclusive" if item.says == "nothing" else f"{reference} {item.says}"
        conclusion += ", also after correction" if item.sure else ""
        label = results.plan.label(item.arm)
        rows.append([label, item.measure.name, f"{gain.mean:+.3f}", span, conclusion, decides])
    heads = ["against", "score", f"{reference} is better by", "95% interval", "conclusion", "decides"]
    return f"{split}: differences, paired by seed; positive: {reference} is better", heads, rows


def run_table(results: Findings, split: str) -> Table:
    rows = [
        [measure.name, results.plan.label(arm), ", ".join(f"{value:.3f}" for _, value in sorted(values.items()))]
        for measure in results.measures
        if measure.split == split
        for arm, values in measure.values.items()
    ]
    return f"{split}: every run, by seed", ["score", "arm", "values"], rows


def arm_table(results: Findings) -> Table:
    rows = []
    for arm, about in results.plan.arms.items():
        counts = results.parameters(arm)
        numbers = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        changes = "; ".join(results.changes(arm)) or "the base configuration"
        label = results.plan.label(arm)
        rows.append([label, changes, f"{numbers}; {sum(counts.values()):,} in all", about.note])
    return "Arms", ["arm", "changes", "trained parameters", "note"], rows


def _estimate(measure: Measure, arm: str) -> str:
    mean = measure.estimate(arm)
    return f"{mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f})" if mean.n > 1 else f"{mean.mean:.3f} (one seed)"


def _ends(ends: Mapping[str, float]) -> str:
    return "; ".join(f"{value:.3f} {what}" for what, value in ends.items())


# ---- documents -------------------------------------------------------------------------------------------------------


def markdown(results: Findings, pictures: Mapping[str, str]) -> str:
    """The report in Markdown. `pictures` maps headings to the paths of PNGs, relative to the report."""
    above, below = tables(results)
    missing = ["**Some runs are missing**: " + "; ".join(results.missing) + ".", ""] if results.missing else []
    lines = [
        f"# Ablation: {results.plan.name}",
        "",
        "`tools/ablate.py` generates this file from the runs of the ablation; do not edit it.",
        "",
        *("## Conclusions", "", *(f"* {text}" for text in results.verdicts()), ""),
        *(weakness(results.seeds), "", *missing),
        *(line for table in above for line in _markdown_table(table)),
        *(line for heading, path in pictures.items() for line in (f"## {heading}", "", f"![{heading}]({path})", "")),
        *(line for table in below for line in _markdown_table(table)),
        *("## Method", ""),
        *(textwrap.fill(text, 120, initial_indent="* ", subsequent_indent="  ") for text in METHOD),
        *("", "## Provenance", "", *(f"* {name}: {value}" for name, value in results.facts.items())),
    ]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    caption, heads, rows = table
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (heads, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [f"## {caption[0].upper()}{caption[1:]}", "", lines[0], "|" + "---|" * len(heads), *lines[1:], ""]


def write_page(results: Findings, path: Path, pictures: Mapping[str, Path], credit: str) -> Path:
    """Writes the report as an HTML page that contains its pictures; returns the page's path."""
    above, below = tables(results)
    missing = f"<p><b>Some runs are missing:</b> {escape('; '.join(results.missing))}.</p>" if results.missing else ""
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in results.facts.items())
    body = [
        f"<h1>Ablation: {escape(results.plan.name)}</h1><h2>Conclusions</h2>{_list(results.verdicts())}",
        f"<p class=note>{escape(weakness(results.seeds))}</p>{missing}",
        *(web_page.table(heads, rows, caption) for caption, heads, rows in above),
        *(f"<h2>{escape(heading)}</h2>{web_page.file(file, heading)}" for heading, file in pictures.items()),
        *(web_page.table(heads, rows, caption) for caption, heads, rows in below),
        f"<h2>Method</h2>{_list(METHOD)}<h2>Provenance</h2><dl>{facts}</dl>",
        f"<p class=note>{escape(credit)}</p>" if credit else "",
    ]
    return web_page.write(path, f"Ablation: {results.plan.name}", body)


def _list(paragraphs: Sequence[str]) -> str:
    """An HTML list of the paragraphs, which may contain **bold** and *italic*."""
    items = (re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(paragraph)) for paragraph in paragraphs)
    items = (re.sub(r"\*(.+?)\*", r"<i>\1</i>", item) for item in items)
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
