"""Ablations: the same run with one thing changed at a time, several seeds each, and what that allows to say.

tools/ablate.py is the command. Here: `plan` (the file), `runs` (training them), `judging` (scores of each),
`comparing` (intervals over seeds, differences, the verdict) and `report` (the table, the pictures, the document).

Method, all of it our choice:

* An *arm* is the base configuration with overrides. Every arm has the same networks (but for what text.mode itself
  changes: parameters are counted and printed), the same number of images, and the same seeds; a seed fixes weights,
  order of the data and noise, so that a seed of one arm is compared with the same seed of another (differences are paired).
* Every run is scored on the same held-out captions, from the same evaluation noise, by a judge that had no part in
  training. The model's own opinion (its D and S_D) is reported too, called so, and never decides anything: every arm is
  its own judge there.
* Intervals are 95% t intervals over training seeds, held-out captions being fixed: they answer "would it be the same with
  other seeds?", which is what a claim about a method needs. A bootstrap over so few seeds was not taken because it is
  too narrow: of 3 values, its resamples never leave their range, and it covers about three times in four what it promises
  to cover nineteen times in twenty. The t interval is right if seeds scatter normally, which few seeds cannot show.
* A verdict is about the metrics that the plan names beforehand (`decides`). It says what the interval of the paired
  difference allows: better, worse, or nothing; and whether it would hold if all comparisons of the table are counted
  (Bonferroni).
"""
