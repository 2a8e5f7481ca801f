"""Scores of edits on a small set with true targets, for a model that copies and a model that knows the answers."""

import pytest
import torch

import dist_t2i
from dist_t2i.cli.edit import render_examples
from dist_t2i.data.shard_set import open_set
from dist_t2i.errors import UserError
from dist_t2i.eval.scores import table
from dist_t2i.eval.studies import edits
from dist_t2i.eval.studies.edits import EditProtocol, evaluate_edits, verdict
from judges import JUDGE
from models_on_disk import write_run, write_tone_set

QUICK = EditProtocol(resamples=50, splits=("train", "test"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_set(write_tone_set(tmp_path_factory.mktemp("sets") / "set"))


@pytest.fixture(scope="module")
def models(tmp_path_factory, data):
    """An editing model and its base. The editing model is untrained: both generate the same pictures."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / name, f"data.train={data.folder}", *more, words=data.tokenizer)
        for name, more in (("edit", ("edit.width=8",)), ("base", ()))
    ]
    return [dist_t2i.load(run, "cpu") for run in runs]


class Oracle:
    """A model that looks up the true edit or copies the source, for the scores of a perfect or a trivial model."""

    def __init__(self, model, data, how):
        self.library, self.how = edits.Library(data, QUICK, 32), how
        self.image_size, self.files, self.images_seen, self.device = 32, model.files, 0, model.device

    def sample_edits(self, sources, texts, noise_seeds, strength):
        return sources if self.how == "copies" else self.library.pictures(texts)


def evaluated(model, base, data):
    return evaluate_edits(model, base, data, QUICK, say=lambda line: None, network=JUDGE)


def test_a_fresh_model_draws_from_scratch(models, data):
    scores, examples = evaluated(*models, data)
    for what in ("pixels", "features"):
        assert scores[edits.TONES, f"{what}_gain_scratch"].value == pytest.approx(0, abs=1e-9)
        assert scores[edits.TONES, f"{what}_gain_copy"].value < 0
    assert "farther than the source copied" in verdict(
        scores
    ) and "not distinct from generated from scratch" in verdict(scores)
    assert scores.manifest["weights_sha256"] != scores.manifest["base_weights_sha256"] == models[1].files.sha256()
    assert render_examples(examples).width > 500 and "right tone" in table(scores.as_json())
    assert evaluated(*models, data)[0].as_json() == scores.as_json()


def test_a_perfect_editor_is_right_and_one_that_copies_is_wrong(models, data):
    perfect, _ = evaluated(Oracle(models[0], data, "knows"), models[1], data)
    tones = perfect.splits[edits.TONES]
    assert tones.pictures == 48 and perfect[edits.TONES, "right_tone"].value == 1
    assert perfect[edits.TONES, "tone_order"].value == 1 and perfect[edits.TONES, "recall_at_1"].value == 1
    assert perfect[edits.TONES, "pixels"].value == perfect[edits.TONES, "outside"].value == 0
    assert "nearer than the source copied" in verdict(perfect) and "100.0% of 48" in verdict(perfect)
    copied, _ = evaluated(Oracle(models[0], data, "copies"), models[1], data)
    assert copied[edits.TONES, "right_tone"].value == copied[edits.TONES, "tone_order"].value == 0
    assert copied[edits.TONES, "pixels"].value == copied[edits.TONES, "pixels"].floor["the source copied"] == 50
    assert copied[edits.OWN, "pixels"].value == 0


def test_genders_are_exchanged_where_the_other_one_is_drawn():
    class Names:
        held_out = ("woman pilot dark skin tone", "man and woman", "boy", "man cook", "women wrestling")

        def __contains__(self, caption):
            return caption in ("man pilot dark skin tone", "girl", "woman and woman", "men wrestling")

    found = [(case.source, case.text) for case in edits.gender_cases(Names())]
    assert found == [
        ("man pilot dark skin tone", "woman pilot dark skin tone"),
        ("girl", "boy"),
        ("men wrestling", "women wrestling"),
    ]


def test_a_tone_is_that_of_the_nearest_real_picture_at_the_pixels_that_show_it(data):
    library = edits.Library(data, QUICK, 32)
    case = edits.tone_cases(library)[0]
    target, source = library.pictures([case.text, case.source])
    noisy = (target.float() + 60 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    right = edits.right_tone(torch.stack([target, source, noisy.to(torch.uint8)]), [case] * 3, library)
    assert right.tolist() == [1, 0, 1]


def test_sets_and_models_that_do_not_fit(models, data, tmp_path):
    from pictures import make_set

    with pytest.raises(UserError, match="skin tone"):
        evaluated(*models, make_set(tmp_path, 12, holdout=0.5))
